"""`zoo report`: a row for each run, finished or not, named by what was changed; tables, picture, page, JSON and CSV."""

import csv
import io
import json
import shlex

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.browser import Browser
from zoo.cli.entry import main as zoo
from zoo.inspection import report
from zoo.inspection.report import main
from zoo.inspection.report_page import page
from zoo.inspection.report_picture import smoothed
from zoo.inspection.run_summary import differences, flat, summaries
from zoo.registry import ZooError
from zoo.runs.folder import RunFolder
from zoo.runs.lock import RunLock
from zoo.storage.atomic import write_json

PRUNERS = (
    {"random": {"keep_ratio": 0.5, "seed": 0, "name": "random"}},
    {"random": {"keep_ratio": 0.25, "seed": 0, "name": "random"}},
    {"pool": {"size": 2, "name": "pool"}},
    {},
)
KINDS = ("exist", "count", "relation", "shape", "size", "box")


def config(pruner, **more):
    """The config of a run as Hydra writes it, in short."""
    parts = {"vision": {"width": 128, "name": "timm"}, "pruner": pruner, "projector": {"depth": 2, "name": "mlp"}}
    data = {"scenes": {"split": "train", "name": "scenes"}}
    stages = {"only": {"steps": 50, "lr": 0.001, "distiller": None}}
    return {
        "seed": 0,
        **parts,
        "model": {"name": "scenes_tiny"},
        "data": data,
        "stages": stages,
        "run": {"folder": "x"},
        **more,
    }


@pytest.fixture
def place(tmp_path):
    """Two finished runs, of which the first is better, one that failed in the middle, and one that has not begun."""
    for number, pruner in enumerate(PRUNERS):
        run = RunFolder.create(tmp_path, f"{number}-run")
        run.config.write_text(yaml.safe_dump(config(pruner)))
        run.point_last(tmp_path)
        if number == 3:
            continue
        for step in range(1, 51 if number < 2 else 21):
            run.log({"step": step, "loss": 3 / step + number, "samples_per_s": 100.0})
            if step % 10 == 0:
                run.log({"step": step, "scores": {"scenes/count/accuracy": step / 100}})
        if number == 2:
            run.note_error(ZooError("The loss 'answer' is nan at step 21"))
        else:
            line = {"data": "scenes", "task": "exact", "metric": "accuracy", "blind": None, "majority": None}
            score = {"value": 0.9 - 0.2 * number, "n": 100, "stderr": 0.03}
            lines = [{**line, "kind": kind, "held_out": False, "score": score} for kind in KINDS]
            lines.append({**line, "kind": "count", "held_out": True, "score": {**score, "value": 0.1}})
            write_json(run.scores, lines)
            write_json(run.summary, {"parameters": 1603008, "image_tokens": 32 // (number + 1), "seconds": 90.0})
    return tmp_path


def test_a_row_for_each_run_named_by_what_was_changed(place, capsys):
    assert main([str(place)]).status == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if str(place) not in line) <= 80
    words = " ".join(out.split())
    assert "equal in all: model scenes_tiny, data scenes, seed 0" in words
    for label in ("pruner=random keep_ratio=0.5", "pruner=random keep_ratio=0.25", "pruner=pool", "pruner=null"):
        assert label in words
    assert words.count("90.0±3.0") == len(KINDS) and words.count("70.0±3.0") == len(KINDS)
    assert "90.0±1.2" in words and "10.0±3.0" in words, "over all kinds, without combinations that were held out"
    assert "failed" in words and "20/50" in words and "waiting" in words and "1.6 M" in words
    assert "3 failed: The loss 'answer' is nan at step 21" in words and "zoo train resume=" in words
    assert len(summaries([place])) == 4, "`last` is no run of its own"


def test_commands_name_folders_as_a_shell_takes_them(place, capsys):
    moved = place.rename(place.with_name(f"{place.name} über uns"))
    main([str(moved)])
    out = capsys.readouterr().out
    (command,) = [line for line in out.splitlines() if "zoo train resume=" in line]
    assert str(moved) in shlex.split(command)[-1]


def test_what_is_equal_is_said_once(place, capsys):
    best = [str(path.parent) for path in sorted(place.glob("*/*/summary.json"))]
    assert main(best).status == 0
    table = capsys.readouterr().out
    assert "50 steps, 1.6 M parameters" in " ".join(table.split())
    assert "params" not in table and "state" not in table and "pruner random" in table
    assert "1  keep_ratio=0.5 " in table


@pytest.mark.parametrize("wide", [50, 80, 200])
def test_tables_are_as_wide_as_the_terminal(place, wide, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(wide))
    main([str(place)])
    out = capsys.readouterr().out.partition("picture  ")[0]
    assert max(len(line.rstrip()) for line in out.splitlines() if "resume=" not in line) <= wide
    assert out.count("90.0±3.0") == len(KINDS)


def test_a_run_that_a_process_trains_in_is_running(place):
    lock = RunLock(next(place.glob("*/*-3-run")))
    assert [run.state for run in summaries([place])] == ["done", "done", "failed", "running"]
    lock.release()
    assert summaries([place])[3].state == "waiting"


def test_json_and_csv_have_every_figure(place, capsys):
    assert zoo(["report", str(place), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second, failed, _ = found["runs"]
    assert first["changed"] == {"pruner": ["random"], "pruner.random.keep_ratio": 0.5}
    assert first["scores"]["scenes/count/accuracy"] == {"value": 0.9, "n": 100, "stderr": 0.03}
    assert first["scores"]["scenes/count_held_out/accuracy"]["value"] == 0.1
    assert first["ms_per_sample"] == 10.0 and second["image_tokens"] == 16 and failed["error"].startswith("The loss")
    assert zoo(["report", "--csv", str(place)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["pruner"] for row in rows] == ["random", "random", "pool", "null"]
    assert rows[1]["scenes/count/accuracy value"] == "0.7" and rows[3]["loss"] == ""
    assert not list(place.rglob("report.*")), "figures alone: nothing is written"


def test_evaluations_are_compared_too(tmp_path, capsys):
    for number, pruner in enumerate(PRUNERS[:2]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "eval.yaml").write_text(yaml.safe_dump(config(pruner)))
        score = {"value": 0.5, "n": 4, "stderr": 0.25}
        write_json(
            folder / "scores.json", [{"data": "d", "kind": "k", "metric": "m", "held_out": False, "score": score}]
        )
    main([str(tmp_path)])
    words = " ".join(capsys.readouterr().out.split())
    assert "keep_ratio=0.25 50.0±25.0" in words and "scored" in words


def test_options_that_differ():
    configs = [flat(config(pruner)) for pruner in PRUNERS]
    assert differences(configs)[1:] == [
        {"pruner": ["random"], "pruner.random.keep_ratio": 0.25},
        {"pruner": ["pool"]},
        {"pruner": None},
    ]
    other = flat(config({}, model={"name": "fashion_tiny"}, vision={"width": 64, "name": "timm"}, seed=1))
    assert differences([configs[3], other])[1] == {"model": "fashion_tiny", "seed": 1}
    stages = {"only": {"steps": 50, "lr": 0.01}, "then": {"steps": 5}}
    changed = differences([configs[3], flat(config({}, stages=stages))])[1]
    assert changed == {"stages": ["only", "then"], "stages.only.lr": 0.01}


def test_the_picture_shows_every_run(place, capsys):
    assert main([str(place)]).status == 0
    assert "report.png" in capsys.readouterr().out
    pixels = np.asarray(Image.open(place / "report.png").convert("RGB"))
    assert pixels.shape[0] > 300 and pixels.shape[1] > 1000
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # of the three runs that have a curve, in order
        near = np.abs(pixels.astype(int) - color).sum(-1) < 12
        assert near[:, : pixels.shape[1] // 2].sum() > 100, "its curve is in the left half"
    bars = [
        np.abs(pixels[:, pixels.shape[1] // 2 :].astype(int) - c).sum(-1) < 12 for c in ((31, 119, 180), (255, 127, 14))
    ]
    assert 1.1 < bars[0].sum() / bars[1].sum() < 1.5, "bars of 90 and 70"


def test_runs_can_be_chosen(place, tmp_path):
    chosen = sorted(p.parent for p in place.glob("*/*-0-run/config.yaml"))
    assert main([*map(str, chosen), f"out={tmp_path / 'one.png'}"]).status == 0
    assert (tmp_path / "one.png").is_file()


def test_jobs_of_a_sweep_are_below_the_folder_of_all_runs(tmp_path, capsys):
    for job in "01":
        folder = tmp_path / "sweeps" / "2026-11-30" / "1" / job
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config(PRUNERS[int(job)])))
    assert len(main([str(tmp_path)]).as_json()["runs"]) == 2


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ZooError, match="There is no folder"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(ZooError, match="There is no run in"):
        main([str(tmp_path)])
    with pytest.raises(ZooError, match=r"'ot'. Did you mean 'out'"):
        main([str(tmp_path), "ot=x.png"])


def test_a_picture_that_cannot_be_written_says_so(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match=r"Cannot write the picture .*out=<file>"):
        main([str(place), f"out={tmp_path / 'file' / 'report.png'}"])
    assert "loss" in capsys.readouterr().out, "the table was shown"


def test_smoothing_keeps_a_straight_line():
    steps, values = smoothed([(i, 2.0) for i in range(1, 301)])
    assert values == pytest.approx(np.full(300, 2.0)) and steps[-1] == 300


def test_the_page_draws_a_curve_for_each_run(place, tmp_path):
    main([str(place), f"out={tmp_path / 'one.html'}"])
    text = (tmp_path / "one.html").read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert (tmp_path / "one.png").is_file() and "90.0±3.0" in text and "is nan at step 21" in text
    held = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert [(c["title"], len(c["lines"])) for c in held["charts"]] == [
        ("loss", 3), ("scenes/count/accuracy, per cent", 3),
    ]  # fmt: skip


def test_markup_in_names_does_not_end_the_page(place):
    found = summaries([place])
    found[0].changed = {"note": "</script><b>x"}
    text = page(found, report.figures(found), "</p><b>")
    assert "</script><b>" not in text and "<b>" not in text


def test_a_browser_draws_the_page(place, tmp_path):
    main([str(place), f"out={tmp_path / 'one.html'}"])
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(tmp_path / "one.html")
        assert browser.value("[...document.querySelectorAll('figure')].map(f => f.dataset.lines)") == ["3", "3"]
        assert browser.value("document.querySelectorAll('svg path').length") == 6
        browser.value("document.querySelector('input[data-run]').click()")
        assert browser.value("document.querySelector('figure').dataset.lines") == "2"
    finally:
        browser.close()


def test_a_score_that_is_no_mean_of_its_kinds_has_no_figure_of_all(tmp_path):
    def line(kind, metric, value):
        about = {"data": "pope", "kind": kind, "task": "yes_no", "metric": metric, "held_out": False}
        return {**about, "score": {"value": value, "n": 10, "stderr": 0.0}}

    run = RunFolder.create(tmp_path, "run")
    run.config.write_text(yaml.safe_dump(config({})))
    scores = {"accuracy": (1.0, 0.1), "f1": (1.0, 2 / 11)}  # of all: 22 / 31, and not the mean
    write_json(run.scores, [line(k, m, v) for m, both in scores.items() for k, v in zip("ab", both, strict=True)])
    columns = {heading: cells[0] for heading, cells, _ in report.figures(summaries([tmp_path])) if "\n" in heading}
    assert columns == {
        "all\naccuracy": "55.0±0.0",
        "a\naccuracy": "100.0±0.0",
        "b\naccuracy": "10.0±0.0",
        "a\nf1": "100.0±0.0",
        "b\nf1": "18.2±0.0",
    }


@pytest.mark.parametrize(("stages", "planned"), [([50, 20], 70), ([50, None], None), ([None], None), ([], None)])
def test_the_planned_steps_are_those_of_all_stages_or_not_known(tmp_path, stages, planned):
    run = RunFolder.create(tmp_path, "run")
    of = {f"s{i}": {"steps": steps, "epochs": None if steps else 1} for i, steps in enumerate(stages)}
    run.config.write_text(yaml.safe_dump(config({}, stages=of)))
    assert summaries([tmp_path])[0].planned == planned
