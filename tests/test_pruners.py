"""The random and pooling pruners beyond what every pruner must do."""

from dataclasses import replace

import pytest
import torch

from tests.fusion_builders import features
from zoo import registry
from zoo.registry import ZooError


def build(name, grid=(4, 4), **options):
    return registry.build("pruner", {"name": name, **options}, grid=grid, vision_dim=24).eval()


@pytest.mark.parametrize(("ratio", "n", "k"), [(0.25, 16, 4), (0.25, 10, 3), (0.1, 3, 1), (0.5, 5, 3), (1.0, 7, 7)])
def test_random_keeps_the_rounded_share_and_at_least_one(ratio, n, k):
    pruner = build("random", keep_ratio=ratio)
    assert pruner.num_tokens(n) == k
    assert pruner(features(grid=(1, n))).tokens.shape[1] == k


def test_random_depends_on_seed_and_count_alone():
    torch.manual_seed(0)
    first = build("random")(features(m=2)).keep
    torch.manual_seed(1)
    again = build("random").train()(features(m=5, seed=9)).keep
    assert torch.equal(first[0], again[4])
    assert torch.equal(first[0], first[0].sort().values)
    assert not torch.equal(first[0], build("random", seed=1)(features()).keep[0])
    large = build("random", keep_ratio=0.5)(features()).keep[0]
    assert set(first[0].tolist()) < set(large.tolist())


def test_random_resamples_in_training_only_when_asked():
    pruner = build("random", resample=True)
    image = features(m=4)
    assert torch.equal(pruner(image).keep[0], build("random")(image).keep[0])
    torch.manual_seed(0)
    a, b = pruner.train()(image).keep, pruner(image).keep
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1])
    torch.manual_seed(0)
    assert torch.equal(pruner(image).keep, a)


def test_random_after_another_pruner_points_into_the_encoders_grid():
    image = features()
    once = build("random", keep_ratio=0.5)(image)
    twice = build("random", keep_ratio=0.5, seed=3)(once)
    index = twice.keep.unsqueeze(-1).expand(-1, -1, 24)
    assert torch.equal(twice.tokens, image.tokens.gather(1, index))
    assert torch.equal(twice.cls_attention, image.cls_attention.gather(1, twice.keep))


def test_pool_means_over_windows():
    image = features(m=1, grid=(4, 6))
    out = build("pool", grid=(4, 6))(image)
    assert out.grid == (2, 3) and out.tokens.shape == (1, 6, 24)
    square = image.tokens.view(4, 6, 24)
    assert torch.allclose(out.tokens[0, 4], square[2:4, 2:4].mean((0, 1)), atol=1e-6)
    assert torch.allclose(out.cls_attention[0, 4], image.cls_attention.view(4, 6)[2:4, 2:4].mean(), atol=1e-7)


@pytest.mark.parametrize(
    ("grid", "options", "pooled"),
    [((5, 7), {"stride": 2}, (3, 4)), ((5, 7), {"target": [2, 3]}, (2, 3)), ((4, 4), {"stride": 9}, (1, 1))],
)
def test_pool_of_uneven_grids(grid, options, pooled):
    pruner = build("pool", grid=grid, **options)
    out = pruner(features(grid=grid))
    assert out.grid == pruner.grid == pooled
    assert out.tokens.shape[1] == pruner.num_tokens(grid[0] * grid[1]) == pooled[0] * pooled[1]


def test_pool_by_one_is_no_pruner():
    image = features()
    assert build("pool", stride=1)(image) is image


def test_pool_needs_its_grid():
    with pytest.raises(ZooError, match="needs a grid"):
        build("pool", grid=None)(replace(features(), grid=None))
    with pytest.raises(ZooError, match=r"a grid \[4, 4\], which does not hold 15"):
        build("pool").num_tokens(15)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ("random", {"keep_ratio": 1.5}, "got 1.5"),
        ("random", {"keep_ration": 0.5}, "'keep_ration'. Did you mean 'keep_ratio'"),
        ("random", {"seed": -1}, "seed must not be negative"),
        ("pool", {"stride": 0}, "stride must be at least 1, got 0"),
        ("pool", {"target": [3]}, "two positive numbers"),
        ("pool", {"target": [9, 9]}, r"target \[9, 9\] is larger than the grid \[4, 4\]"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ZooError, match=message):
        build(name, **options)
