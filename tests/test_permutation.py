"""The computed order is a bijection at every length, differs by key, and looks like a random one."""

import numpy as np
import pytest

from zoo.runs import permutation
from zoo.runs.order import Mix, keyed
from zoo.runs.permutation import STORED, Permutation, shuffled


@pytest.mark.parametrize("length", [*range(1, 40), 97, 1000, 4096, 65537])
def test_each_position_once(length):
    for seed in range(3):
        found = Permutation(length, keyed(seed))[np.arange(length)]
        assert sorted(found.tolist()) == list(range(length))


def test_a_hundred_million_positions_take_no_memory_and_any_part_is_the_same():
    import tracemalloc

    tracemalloc.start()
    try:
        order = shuffled(100_000_000, keyed(0))
        some = order[np.arange(99_999_000, 100_000_000)]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 1e6
    assert len(set(some.tolist())) == 1000 and some.min() >= 0 and some.max() < 100_000_000
    assert (order[np.array([99_999_017])] == some[17]).all()
    assert (shuffled(100_000_000, keyed(1))[np.arange(1000)] != shuffled(100_000_000, keyed(0))[np.arange(1000)]).any()


def test_short_lengths_keep_the_order_that_runs_have_had():
    assert (shuffled(1000, keyed(3)) == keyed(3).permutation(1000)).all()
    assert isinstance(shuffled(STORED, keyed(0)), np.ndarray)


def test_it_looks_random():
    """Means over 400 keys of a short order, against the bounds of 5 standard errors of a uniform permutation."""
    n, keys = 101, 400
    orders = np.stack([Permutation(n, keyed(seed))[np.arange(n)] for seed in range(keys)])  # (keys, n)
    first = np.bincount(orders[:, 0], minlength=n)  # uniform: 400 / 101 each
    chi = ((first - keys / n) ** 2 / (keys / n)).sum()
    assert chi < n - 1 + 5 * np.sqrt(2 * (n - 1))
    spread = np.sqrt((n * n - 1) / 12)
    for shift in (1, 2, 10, 11):  # 10 and 11 are the factors of the network's domain
        products = (orders - (n - 1) / 2) * (np.roll(orders, shift, 1) - (n - 1) / 2) / spread**2
        assert abs(products.mean() + 1 / (n - 1)) < 5 / np.sqrt(keys * n)
    fixed = (orders == np.arange(n)).sum(1)  # Poisson of mean 1
    assert abs(fixed.mean() - 1) < 5 / np.sqrt(keys)
    rising = (orders[:, 1:] > orders[:, :-1]).sum(1)  # mean (n - 1) / 2, variance (n + 1) / 12
    assert abs(rising.mean() - (n - 1) / 2) < 5 * np.sqrt((n + 1) / 12 / keys)


def test_a_mix_of_computed_orders_has_each_sample_once_an_epoch(monkeypatch):
    monkeypatch.setattr(permutation, "STORED", 0)
    sizes = {"a": 7, "b": 30}
    made = {name: type("Set", (), {"is_stream": False, "__len__": lambda self, n=n: n})() for name, n in sizes.items()}
    joined = Mix(made, {}, 5)
    for epoch in range(3):
        found = joined.places(37 * epoch, 37 * (epoch + 1))
        assert sorted(found) == sorted((k, epoch, i) for k, n in enumerate(sizes.values()) for i in range(n))
    weighted = Mix(made, {"a": 1, "b": 2}, 5)
    whole = weighted.places(0, 300)
    assert whole[130:140] == Mix(made, {"a": 1, "b": 2}, 5).places(130, 140)
    of_b = [(epoch, i) for member, epoch, i in whole if member == 1]
    assert sorted(of_b[:30]) == [(0, i) for i in range(30)]


def test_a_small_share_of_an_epoch_is_a_sample():
    """It was none: a stage without a step, which ended the run."""
    mix = Mix({"a": type("Set", (), {"is_stream": False, "__len__": lambda _: 16})()}, {}, 0)
    assert [mix.samples_in(epochs) for epochs in (0.001, 0.5, 2.25)] == [1, 8, 36]
