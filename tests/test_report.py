"""`zoo report`: runs side by side, finished or not, in a table and a picture."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from zoo.inspection.report import main, report_table, smoothed, summaries
from zoo.registry import ZooError
from zoo.runs.folder import RunFolder
from zoo.storage.atomic import write_json


@pytest.fixture
def place(tmp_path):
    """Two finished runs, of which the first is better, one that is under way, and one that has not begun."""
    for number, name in enumerate(("1-good", "2-poor", "3-under_way", "4-begun")):
        run = RunFolder.create(tmp_path, name)
        run.config.write_text("seed: 0\n")
        run.point_last(tmp_path)
        if number == 3:
            continue
        for step in range(1, 51):
            run.log({"step": step, "loss": 3 / step + number})
        run.log({"step": 50, "scores": {"x": 1.0}})
        if number < 2:
            score = {"value": 0.9 - 0.2 * number, "n": 100, "stderr": 0.03}
            line = {"data": "scenes", "kind": "count", "task": "exact", "metric": "accuracy", "held_out": False}
            write_json(run.scores, [{**line, "score": score, "blind": None, "majority": None}])
            write_json(run.path / "summary.json", {"parameters": 1234567, "seconds": 90.0})
    return tmp_path


def test_a_row_per_figure_and_a_column_per_run(place):
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report_table(summaries([place])))
    text = console.export_text()
    assert "90.0 ± 3.0" in text and "70.0 ± 3.0" in text and "scenes/count/accuracy" in text
    assert "1,234,567" in text and "1.5" in text and "step 50" in text and "no steps" in text
    assert len(summaries([place])) == 4, "`last` is no run of its own"


def test_the_picture_shows_every_run(place, capsys):
    assert main([str(place)]) == 0
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
    chosen = sorted(p.parent for p in place.glob("*/*-1-good/config.yaml"))
    assert main([*map(str, chosen), f"out={tmp_path / 'one.png'}"]) == 0
    assert (tmp_path / "one.png").is_file()


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
    assert "last loss" in capsys.readouterr().out, "the table was shown"


def test_smoothing_keeps_a_straight_line():
    steps, values = smoothed([(i, 2.0) for i in range(1, 301)])
    assert values == pytest.approx(np.full(300, 2.0)) and steps[-1] == 300
