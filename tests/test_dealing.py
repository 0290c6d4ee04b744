"""Samples of a step dealt by cost: the same samples, alike sums, a function of the seed and the step."""

import numpy as np
import pytest

from tests.test_loader import Numbers, Stream, mix, seen
from zoo.registry import ZooError
from zoo.runs.dealing import cost_of, deal

STEPS = {"batch_size": 16, "steps": 3}


@pytest.mark.parametrize("parts, size", [(1, 6), (4, 1), (4, 8), (8, 4), (64, 2)])
def test_parts_have_alike_sums(parts, size):
    random = np.random.default_rng(parts)
    before, after = [], []
    for _ in range(20):
        costs = random.lognormal(5, 0.5, parts * size)
        order = deal(costs, parts)
        assert sorted(order) == list(range(len(costs)))
        sums = [c.reshape(parts, size).sum(1) for c in (costs, costs[order])]
        before.append(sums[0].max() / sums[0].mean())
        after.append(sums[1].max() / sums[1].mean())
        # The largest part has at most the mean and one sample more (Graham, 1969).
        assert sums[1].max() <= sums[1].mean() + costs.max()
    if size >= 4 and parts > 1:
        assert np.mean(after) - 1 < 0.5 * (np.mean(before) - 1)


def everything(**place):
    world = place.get("world", 1)
    return [seen(mix(a=Numbers(60)), rank=rank, **STEPS, **place) for rank in range(world)]


def test_a_step_has_the_same_samples_in_parts_that_do_not_depend_on_who_runs_them():
    plain = seen(mix(a=Numbers(60)), **STEPS)
    parts = []
    for world, accumulate in ((4, 1), (2, 2), (1, 4)):
        found = everything(world=world, accumulate=accumulate, balance=True)
        steps = [[found[r][s * accumulate + t] for t in range(accumulate) for r in range(world)] for s in range(3)]
        assert [sorted(name for part in step for name in part) for step in steps] == [sorted(step) for step in plain]
        parts.append(steps)
    assert parts[0] == parts[1] == parts[2]
    lengths = [[sum(int(name.split("-")[1]) for name in part) for part in step] for step in parts[0]]
    assert all(max(some) - min(some) < 15 for some in lengths)


def test_a_resumed_run_deals_as_before():
    whole = everything(world=2, balance=True, length_buckets=True)
    for workers in (0, 1):
        later = everything(world=2, balance=True, length_buckets=True, start=2, workers=workers)
        assert later == [rank[2:] for rank in whole]


def test_a_stream_cannot_be_dealt():
    with pytest.raises(ZooError, match="balance needs data of known length, and data 's' is a stream"):
        seen(mix(s=Stream(9)), balance=True)


def test_an_image_costs_what_it_is_said_to():
    one = Numbers(3).get(2)
    assert cost_of(one, 100.0) - cost_of(one, 0.0) == 100.0 * len(one.images)
