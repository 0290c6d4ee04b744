"""The loader: what is seen is a function of (seed, position), whoever asks; streams are read in order."""

import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import torch

from tests.conftest import sample
from zoo.registry import Dataset, Sample, StreamingDataset, ZooError
from zoo.runs.batches import Batches, Loader
from zoo.runs.order import Mix, ShardPosition, keyed
from zoo.settings.stage import Stage


class Numbers(Dataset):
    """Sample i is named `<name><epoch>-<i>`, and its question is as long as i."""

    def __init__(self, length: int, name: str = "a") -> None:
        self.length, self.name = length, name

    def __len__(self) -> int:
        return self.length

    def get(self, index: int, epoch: int = 0) -> Sample:
        return sample(("x" * (1 + index), "yes"), name=f"{self.name}{epoch}-{index}", seed=index)


class Stream(StreamingDataset):
    """As Numbers, but of a length that it does not tell."""

    def __init__(self, length: int, name: str = "s") -> None:
        self.inner = Numbers(length, name)

    def stream(self, epoch: int = 0, start: int = 0):
        for i in range(start, self.inner.length):
            yield self.inner.get(i, epoch)


class Names:
    """Stands in for a processor: a batch is the names of its samples."""

    def encode(self, one: Sample) -> Sample:
        return one

    def collate(self, rows: list[Sample], multiple_of: int = 1) -> dict:
        return {"ids": [r.id for r in rows], "draw": torch.rand(1)}


def mix(weights=None, seed=0, **datasets) -> Mix:
    return Mix(datasets, weights or {}, seed)


def seen(some_mix, *, start=0, steps=6, rank=0, world=1, streams=None, **stage) -> list[list[str]]:
    stage = Stage(steps=steps, **{"batch_size": 4, **stage})
    place = ShardPosition(rank, world, start, streams or {})
    return [item["batch"]["ids"] for item in Loader(Batches(some_mix, Names(), stage, steps, place))]


def test_an_epoch_sees_every_sample_once():
    names = [n for ids in seen(mix(a=Numbers(12)), steps=6) for n in ids]
    assert sorted(names[:12]) == sorted(f"a0-{i}" for i in range(12))
    assert sorted(names[12:]) == sorted(f"a1-{i}" for i in range(12))
    assert [n[3:] for n in names[:12]] != [n[3:] for n in names[12:]], "each epoch has its own order"


def test_order_depends_on_the_seed_alone():
    one = seen(mix(a=Numbers(12)))
    assert one == seen(mix(a=Numbers(12)))
    assert one != seen(mix(a=Numbers(12), seed=1))


def test_no_weights_means_every_sample_equally_often():
    names = [n for ids in seen(mix(a=Numbers(30, "a"), b=Numbers(10, "b")), steps=10) for n in ids]
    assert Counter(n[0] for n in names) == {"a": 30, "b": 10}


@pytest.mark.parametrize("steps", [5, 25, 100])
def test_weights_hold_at_every_length(steps):
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    datasets = {n: Numbers(7, n) for n in "abcd"}
    names = [n for ids in seen(Mix(datasets, weights, 0), steps=steps) for n in ids]
    counts = Counter(n[0] for n in names)
    for name, share in weights.items():
        assert abs(counts[name] - share * len(names)) <= 2
    assert "d" not in counts, "a data set that the mix does not name is not seen"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "streams"])
def test_starting_in_the_middle_gives_the_rest(workers, buckets, kind):
    if buckets and kind == "streams":
        pytest.skip("length buckets need lengths")

    def fresh():
        other = Stream(5, "s") if kind == "streams" else Numbers(5, "s")
        return Mix({"a": Numbers(9, "a"), "s": other}, {"a": 2.0, "s": 1.0}, 3)

    options = {"workers": workers, "length_buckets": buckets, "accumulate": 2}
    stage = Stage(steps=40, batch_size=4, **options)
    items = list(Loader(Batches(fresh(), Names(), stage, 40, ShardPosition())))
    whole = [i["batch"]["ids"] for i in items]
    assert len(whole) == 80
    for start in (1, 17, 33):
        streams = items[2 * start - 1]["info"]["streams"]
        assert bool(streams) == (kind == "streams")
        assert seen(fresh(), start=start, steps=40, streams=streams, **options) == whole[2 * start :]


def test_workers_give_what_a_thread_gives():
    for data in (Numbers(9, "a"), Stream(9, "a")):
        assert seen(mix(a=data), workers=0, steps=8) == seen(mix(a=data), workers=2, steps=8)


@pytest.mark.parametrize("data", [Numbers(9, "a"), Stream(9, "a")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_the_samples_of_one(data, accumulate):
    alone = seen(mix(a=data), batch_size=8, steps=3)
    ranks = [seen(mix(a=data), batch_size=8, steps=3, rank=r, world=2, accumulate=accumulate) for r in (0, 1)]
    for step, wanted in enumerate(alone):
        turns = range(step * accumulate, (step + 1) * accumulate)
        assert [n for turn in turns for rank in ranks for n in rank[turn]] == wanted


def test_buckets_put_like_lengths_together():
    def spread(ids):
        lengths = [int(n.partition("-")[2]) for n in ids]
        return max(lengths) - min(lengths)

    plain, bucketed = (seen(mix(a=Numbers(64)), steps=16, length_buckets=b) for b in (False, True))
    assert sorted(n for ids in plain for n in ids) == sorted(n for ids in bucketed for n in ids)
    assert max(map(spread, bucketed)) == 3
    assert sorted(map(spread, plain))[8] > 20
    assert [spread(b) for b in bucketed] == [3] * 16 and bucketed != sorted(bucketed), "batches are in no order"


def test_reading_data_leaves_the_models_randomness_alone():
    def state_after(workers):
        torch.manual_seed(0)
        source = iter(Loader(Batches(mix(a=Numbers(9)), Quiet(), Stage(steps=3, workers=workers), 3, ShardPosition())))
        next(source)
        return torch.rand(3).tolist()

    torch.manual_seed(0)
    untouched = torch.rand(3).tolist()
    assert state_after(0) == untouched
    assert state_after(2) == untouched


class Quiet(Names):
    def collate(self, rows, multiple_of=1):
        return {"ids": [r.id for r in rows]}


def test_dialogs_apart_or_in_one_row(make_model):
    _, processor = make_model()

    class Two(Dataset):
        def __len__(self):
            return 4

        def get(self, index, epoch=0):
            return sample(("a", "yes"), ("bb", "no"), name=str(index), seed=index)

    def batch(**stage):
        stage = Stage(steps=1, batch_size=4, **stage)
        return next(iter(Loader(Batches(mix(a=Two()), processor, stage, 1, ShardPosition()))))["batch"]

    together, apart, packed = batch(), batch(pack="none"), batch(pack_length=200)
    assert together["input_ids"].shape[0] == 4 and apart["input_ids"].shape[0] == 8
    assert packed["input_ids"].shape[0] < 4 and packed["input_ids"].shape[1] <= 200
    count = [int((b["labels"] != -100).sum()) for b in (together, apart, packed)]
    assert count[0] == count[1] == count[2]
    assert [len(b["pixel_values"]) for b in (together, apart, packed)] == [4, 8, 4]


class Broken(Names):
    def encode(self, one):
        if one.id.endswith("-3"):
            raise ZooError("cannot read cat.png")
        return one


@pytest.mark.parametrize("kind", [Numbers, Stream])
def test_workers_outlast_a_sigterm_to_all_processes(kind):
    """As schedulers send it; the run then takes its last step and saves."""
    there = set(multiprocessing.active_children())
    source = iter(Loader(Batches(mix(a=kind(40)), Names(), Stage(steps=30, workers=2), 30, ShardPosition())))
    found = [next(source), next(source)]  # one of each worker
    workers = [p for p in multiprocessing.active_children() if p not in there]
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    found += list(source)
    assert len(workers) == 2 and len(found) == 30 and not any(p.is_alive() for p in workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_stops_the_run_or_is_skipped(workers):
    stage = Stage(steps=3, batch_size=4, workers=workers)
    with pytest.raises(Exception, match=r"cannot read cat.png"):
        list(Loader(Batches(mix(a=Numbers(12)), Broken(), stage, 3, ShardPosition())))
    stage = Stage(steps=3, batch_size=4, workers=workers, skip_broken=True)
    items = list(Loader(Batches(mix(a=Numbers(12)), Broken(), stage, 3, ShardPosition())))
    assert sum(i["info"]["samples"] for i in items) == 11
    assert [line for i in items for line in i["info"]["broken"]] == [
        {"data": "a", "where": "record 3", "id": "a0-3", "kind": "text", "reason": "cannot read cat.png"}
    ]


def test_waiting_is_counted():
    class Slow(Names):
        def collate(self, rows, multiple_of=1):
            time.sleep(0.05)
            return {"ids": []}

    loader = Loader(Batches(mix(a=Numbers(12)), Slow(), Stage(steps=3), 3, ShardPosition()))
    assert len(list(loader)) == 3
    assert 0.1 < loader.waited < 2


def test_leaving_early_stops_the_thread():
    import threading

    source = iter(Loader(Batches(mix(a=Numbers(12)), Names(), Stage(steps=1000), 1000, ShardPosition())))
    next(source)
    source.close()
    assert not [t for t in threading.enumerate() if t.name == "zoo-loader"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ZooError, match=r"'b'. Did you mean 'a'"):
        mix({"b": 1.0}, a=Numbers(3))
    with pytest.raises(ZooError, match="has no samples"):
        mix(a=Numbers(0))
    with pytest.raises(ZooError, match="give the stage steps, not epochs"):
        mix(a=Stream(3)).samples_in(1)
    with pytest.raises(ZooError, match="give the mix weights"):
        mix(a=Stream(3), b=Numbers(3))
    with pytest.raises(ZooError, match="length_buckets needs data of known length"):
        seen(mix(a=Stream(3)), length_buckets=True)
    with pytest.raises(ZooError, match=r"over 3 processes with accumulate=1; allowed are multiples of 3"):
        seen(mix(a=Numbers(3)), world=3)
    with pytest.raises(ZooError, match="without a single sample"):
        seen(mix(a=Stream(0)))


def test_places_agree_wherever_one_starts():
    whole = mix(a=Numbers(5), b=Numbers(8)).places(0, 60)
    for start in (0, 7, 31):
        assert mix(a=Numbers(5), b=Numbers(8)).places(start, 60) == whole[start:]
    again = mix(a=Numbers(5), b=Numbers(8))
    assert again.places(40, 60) == whole[40:] and again.places(10, 20) == whole[10:20]


def test_keyed_generators_differ_by_key_and_repeat():
    assert keyed(1, 2).integers(1 << 30) == keyed(1, 2).integers(1 << 30) != keyed(2, 1).integers(1 << 30)
