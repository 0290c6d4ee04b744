"""Two evaluations on the same samples: paired differences, flips, from folders and from models."""

import json

import numpy as np
import pytest

from zoo.cli import compare_command
from zoo.cli.entry import main
from zoo.evaluation.compared import answers_of, by_question, compared, difference_table
from zoo.evaluation.result import EvalResult
from zoo.registry import ZooError
from zoo.settings.overrides import typed_values


def rows(values, kinds=("count", "color"), **more):
    """An answer for each value; its score is the value."""
    about = {"data": "scenes", "task": "exact", "answers": ["two", "2"], "meta": {}}
    made = []
    for i, value in enumerate(values):
        asked = {"id": f"s{i // 2}", "kind": kinds[i % len(kinds)], "prompt": f"how many {i // 4}?"}
        made.append(
            {**about, **asked, "prediction": f"said {value}", "scores": {"accuracy": float(value), "_n": 1.0}, **more}
        )
    return made


def saved(folder, found):
    EvalResult([], found).save(folder)
    return folder


def test_differences_are_paired():
    random = np.random.default_rng(0)
    hard = random.random(400)
    first, second = (random.random((2, 400)) * 0.1 + hard < 0.6).astype(float)  # what is hard is hard for both
    found = compared(("a", "b"), by_question(rows(first)), by_question(rows(second)))
    whole, *kinds = found.differences
    assert (whole.kind, [line.kind for line in kinds], whole.metric) == ("all", ["count", "color"], "accuracy")
    d = second - first
    assert whole.difference.value == pytest.approx(whole.second.value - whole.first.value)
    assert whole.difference.value == pytest.approx(d.mean()) and whole.difference.n == 400
    assert whole.difference.stderr == pytest.approx(d.std(ddof=1) / 20)
    assert whole.difference.stderr < 0.6 * np.hypot(whole.first.stderr, whole.second.stderr)
    assert sum(line.difference.n for line in kinds) == 400
    assert len(found.flips) == (first != second).sum()
    assert sum(flip.better == "first" for flip in found.flips) == ((first == 1) & (second == 0)).sum()


def test_the_order_of_the_answers_does_not_matter():
    # of a question that is asked twice, the first answer is compared with the first
    first, second = rows([1, 0, 1, 1, 0, 0]), rows([0, 0, 1, 1, 1, 0])
    one = compared(("a", "b"), by_question(first), by_question(second))
    moved = compared(("a", "b"), by_question(first), by_question(sorted(second, key=lambda row: row["kind"])))
    assert sorted(map(str, one.flips)) == sorted(map(str, moved.flips)) and one.differences == moved.differences


def test_held_out_combinations_are_lines_of_their_own():
    both = [
        by_question(rows([1, 0], kinds=("count",)) + rows([v], kinds=("count",), meta={"held_out": True}))
        for v in (0, 1)
    ]
    lines = compared(("a", "b"), *both).differences
    assert {(line.kind, line.difference.value) for line in lines} == {("count", 0.0), ("count_held_out", 1.0)}


def test_folders_are_compared_without_a_model(tmp_path, capsys):
    a, b = saved(tmp_path / "a", rows([1, 1, 0, 1] * 6)), saved(tmp_path / "b", rows([1, 0, 1, 0] * 6))
    assert main(["eval", str(a), str(b), "--flips", "2"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert "18 of 24 answers flip: 12 are right of the first alone, 6 of the second alone." in words
    assert "scenes/color s0: how many 0? first 'said 1', second 'said 0', reference 'two' or '2'" in words
    assert "-25.0 ± 17.3" in words and "and 10 more: --flips 12" in words
    assert main(["eval", "--json", str(a), str(b)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["flips"]) == 18 and found["questions"] == 24
    flip = found["flips"][0]
    assert (flip["data"], flip["id"], flip["kind"], flip["question"]) == ("scenes", "s0", "color", "how many 0?")
    assert (flip["first"], flip["second"], flip["references"], flip["better"]) == (
        "said 1",
        "said 0",
        ["two", "2"],
        "first",
    )


def test_models_are_scored_on_the_same_words_and_compared(tmp_path, monkeypatch, capsys):
    asked = []

    def run(words):
        asked.append(words)
        return EvalResult([], rows([len(asked) == 2] * 4))

    own, words = ["limit=4", "~data.scenes.questions"], ["model=[scenes_tiny,hub:a/y]", f"run.dir={tmp_path}", "--json"]
    assert compare_command.names_two([*own, *words]) and not compare_command.names_two(["model=scenes_tiny", *own])
    found = compare_command.main([*own, *words], run)
    assert [words[:3] for words in asked] == [["model=scenes_tiny", *own], ["model=hub:a/y", *own]]
    assert all(any(word.startswith("run.folder=") for word in words) for words in asked)
    assert found.names == ("scenes_tiny", "hub:a/y") and len(found.flips) == 4 and found.flips[0].better == "second"
    assert "100.0" in capsys.readouterr().out
    asked.clear()  # a folder whose name has to be quoted
    compare_command.main(["model=[scenes_tiny,hub:a/y]", "run.folder='my, runs'"], run)
    assert [typed_values(words[-1:]) for words in asked] == [{"run.folder": f"my, runs/{number}"} for number in (1, 2)]


def test_mistakes(tmp_path, capsys):
    a, b = saved(tmp_path / "a", rows([1, 1])), saved(tmp_path / "b", rows([1, 1, 0]))
    for words, message in (
        ([str(a), str(b)], "are of other questions: 1 are in one of them, the first is 'how many 0?' of scenes/s1"),
        ([str(a)], "compares two folders of evaluations, got"),
        ([str(a), str(tmp_path)], "has no predictions.jsonl"),
        (["model=[x]"], "compares two models, model=[a,b]; got 'model=[x]'"),
        (["model=[x,y,z]"], "got 'model=[x,y,z]'"),
        (["model=[scenes_tiny,scenes_tny]"], "No model named 'scenes_tny'. Did you mean 'scenes_tiny'?"),
        (["model=[scenes_tiny,dir:nowhere]"], "model 'dir:nowhere': no such folder"),
        (["model=[x,y]", "--flip", "3"], "has no flag '--flip'. Did you mean '--flips'?"),
    ):
        assert main(["eval", *words]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "a" / "predictions.jsonl").write_text('{"data": 1}\n')
    with pytest.raises(ZooError, match="line 1 is not a scored answer: KeyError"):
        answers_of(tmp_path / "a")


def test_answers_are_read_line_by_line(tmp_path):
    file = saved(tmp_path, rows([1, 0])) / "predictions.jsonl"
    file.write_bytes(file.read_bytes() + b"\n")
    assert len(answers_of(tmp_path)) == 2
    file.write_bytes(file.read_bytes() + b'{"data": "\xff"}')
    with pytest.raises(ZooError, match="line 4 is not a scored answer: UnicodeDecodeError"):
        answers_of(tmp_path)


def test_one_question_has_no_error_that_a_difference_could_be_beyond():
    pairs = (([0], [1]), ([0, 0, 0], [1, 1, 1]))
    table = [difference_table(compared(("a", "b"), by_question(rows(a)), by_question(rows(b)))) for a, b in pairs]
    assert ["[bold]" in "".join(map(repr, t.columns[5].cells)) for t in table] == [False, True]
