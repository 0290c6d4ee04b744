"""`zoo bench positions` scores a shipped model both ways, and says so in every form."""

import pytest

from zoo.benches.positions import Options, run
from zoo.registry import ZooError


def test_a_model_is_scored_with_both_ways_of_counting():
    said = []
    report = run(Options(models="scenes_tiny=scenes_basics", pruner="random", keep="0.25", limit=2), said.append)
    assert [row.what for row in report.rows] == [
        "scenes_tiny: all tokens",
        "scenes_tiny, random at 0.25: dense",
        "scenes_tiny, random at 0.25: kept",
    ]
    assert all(
        0 < row.value.median <= 100 and row.value.low <= row.value.median <= row.value.high for row in report.rows
    )
    assert report.rows[0].value.median > report.rows[1].value.median
    (dense, kept) = (f"{row.value.median:.1f}" for row in report.rows[1:])
    assert said == [f"scenes_tiny, random: {dense} -> {kept}"]
    assert f"| `scenes_tiny` | `random` | {dense} -> {kept} |" in report.markdown()


def test_models_without_data_and_unknown_pruners_are_refused():
    with pytest.raises(ZooError, match=r"name=data, got 'scenes_tiny'"):
        Options(models="scenes_tiny")
    with pytest.raises(ZooError, match="Did you mean 'divprune'"):
        Options(pruner="divprun")
