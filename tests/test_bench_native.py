"""The bench of images that keep their shapes runs, and compares what computes the same."""

import pytest

from zoo.benches import native_page, native_windows
from zoo.benches.native import Options, run
from zoo.registry import ZooError


def test_windows_and_a_page_are_measured(monkeypatch):
    monkeypatch.setattr(native_windows, "PATCHES", 64)
    monkeypatch.setattr(native_page, "SIDES", (32, 96))
    report = run(Options(width=80, depth=2, rounds=1, images=4, batch=2), lambda line: None)
    rows = {row.what: row for row in report.rows}
    windows = rows["qwen2_5_vl, 16 windows: time over transformers'"]
    assert windows.bound == 1 and windows.at_most and windows.note == "tokens are equal to the bit"
    assert rows["page, batches of like length against padded to the largest of the page"].value.median > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 100}, "width must be a multiple of 80, got 100"),
        ({"images": 10}, "images must be a multiple of batch=8, got 10"),
        ({"images": 16}, "rounds=9 need as many batches, and images=16 are 2"),
        ({"families": "qwen4_vl"}, "Did you mean 'qwen"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ZooError, match=message):
        Options(**given)
