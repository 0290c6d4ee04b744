"""`zoo report full=... small=...`: pruners on answers that a smaller image keeps right, and on those that it loses."""

import json

import pytest
from rich.console import Console

from zoo.inspection.filtered import filtered, table_of
from zoo.inspection.report import main
from zoo.registry import ZooError


def evaluated(folder, wrong, metric="accuracy", **changed):
    """An evaluation of ten questions, two of each sample, with the answers `wrong` (by number) wrong."""
    rows = []
    for number in range(10):
        kind = "color" if number < 6 else "count"
        prompt = f"<image> what\u2028 of {number if kind == 'count' else 'all'}?"  # some are asked twice of one picture
        scores = {metric: 0.0 if number in wrong else 1.0, "other": 0.0}
        rows.append({"data": "scenes", "id": f"eval-{number // 2}", "kind": kind, "prompt": prompt, "scores": scores})
        rows[-1] |= changed.get(str(number), {})
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


@pytest.fixture
def places(tmp_path):
    wrong = {"full": {9}, "small": {0, 1, 6, 9}, "good": {1, 9}, "poor": {0, 1, 2, 6, 7, 8}}
    return {name: evaluated(tmp_path / name, numbers) for name, numbers in wrong.items()}


def of(figures, run, kind):
    (found,) = (f for f in figures if (f.run, f.kind) == (run, kind))
    return found


def test_groups_are_made_by_the_two_and_counted(places):
    figures = filtered(places["full"], places["small"], [places["good"], places["poor"]])
    assert [(f.run, f.kind) for f in figures[:4]] == [(run, "color") for run in ("full", "small", "good", "poor")]
    for run, alone, needs, easy in (("good", 8, (2, 3), (6, 6)), ("poor", 4, (0, 3), (3, 6))):
        found = of(figures, run, "all")  # 0, 1 and 6 need the whole image; 2 to 5, 7 and 8 do not
        assert (found.all.value, found.all.n) == (alone / 10, 10)
        assert (found.needs.value, found.needs.n) == (pytest.approx(needs[0] / needs[1]), needs[1])
        assert (found.easy.value, found.easy.n) == (pytest.approx(easy[0] / easy[1]), easy[1])
    assert of(figures, "good", "all").needs.stderr == pytest.approx((2 / 9 / 2) ** 0.5)  # of 1, 0, 1
    assert of(figures, "good", "color").needs.n == 2 and of(figures, "good", "count").needs.n == 1
    for run in ("full", "small"):  # 100 and 0 per cent by construction
        assert of(figures, run, "all").needs is None and of(figures, run, "all").easy is None


def test_the_command_prints_the_table_and_writes_the_figures(places, tmp_path, capsys):
    words = [f"full={places['full']}", f"small={places['small']}", str(places["good"]), f"out={tmp_path / 'f.json'}"]
    assert main(words).status == 0
    assert "right at both" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures[-1]["run"] == "good" and figures[-1]["needs"]["n"] == 3
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table_of(filtered(places["full"], places["small"], [places["good"]])))
    assert "66.7 ± 33.3 (3)" in console.export_text()


def test_an_answer_is_right_by_its_first_score_from_a_half_on(tmp_path):
    full = evaluated(tmp_path / "full", set())
    box = {str(n): {"scores": {"iou": value, "accuracy_50": 1.0}} for n, value in enumerate((0.49, 0.5, 0.9))}
    small = evaluated(tmp_path / "small", set(), **box)
    figures = filtered(full, small, [evaluated(tmp_path / "other", set())])
    assert of(figures, "other", "color").needs.n == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["full={full}"], "small=<folder> is missing"),
        (["small={full}"], "full=<folder> is missing"),
        (["full={full}", "small={none}"], "has no predictions.jsonl"),
        (["full={full}", "small={other}"], "are of other questions: 1 are in one of them"),
        (["full={full}", "small={broken}"], "line 2 is not a scored answer"),
        (["full={full}", "smal={full}"], "Did you mean 'small'"),
    ],
)
def test_mistakes_are_named(places, tmp_path, words, message):
    other = evaluated(tmp_path / "other", set(), **{"7": {"id": "eval-99"}})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "predictions.jsonl").write_text((other / "predictions.jsonl").read_text().split("\n")[0] + "\n{}\n")
    given = {"full": places["full"], "none": tmp_path, "other": other, "broken": broken}
    with pytest.raises(ZooError, match=message):
        main([word.format(**given) for word in words])
