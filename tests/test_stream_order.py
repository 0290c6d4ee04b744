"""Streams of real parquet files: rows and order are those of one reader, whatever the workers and processes."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import sample
from zoo import registry
from zoo.data.stream_order import Lanes
from zoo.registry import Dataset, Sample, StreamingDataset, ZooError
from zoo.runs.batches import Batches, Loader
from zoo.runs.order import Mix, ShardPosition
from zoo.settings.stage import Stage

datasets = pytest.importorskip("datasets")
from datasets.packaged_modules.parquet.parquet import Parquet  # noqa: E402

SIZES = {1: [40], 3: [16, 16, 16], 8: [8] * 8, 5: [20, 3, 0, 11, 14]}  # the last ones do not divide


class Ids:
    """Stands in for a processor: a batch is the names of its samples."""

    def encode(self, one: Sample) -> Sample:
        if "broken" in one.dialogs[0].messages[0]["content"][-1]["text"]:
            raise ZooError("not today")
        return one

    def collate(self, rows, multiple_of=1):
        return {"ids": [r.id for r in rows]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    datasets.disable_progress_bars()
    for number, sizes in SIZES.items():
        (root / str(number)).mkdir()
        for shard, size in enumerate(sizes):
            text, rows = datasets.Value("string"), range(size)
            columns = {"id": [f"{shard}-{i}" for i in rows], "question": ["why"] * size, "answer": ["so"] * size}
            table = datasets.Dataset.from_dict(columns, datasets.Features(dict.fromkeys(columns, text)))
            table.to_parquet(root / str(number) / f"{shard}.parquet", batch_size=4)
    return root


def stream(folders, shards, **options):
    return registry.build(
        "dataset", {"name": "hf", "path": f"{folders}/{shards}/*.parquet", "streaming": True, **options}
    )


def batches(data, *, batch=8, steps=16, rank=0, world=1, start=0, streams=None, **stage):
    stage = Stage(steps=steps, batch_size=batch, **stage)
    mix = data if isinstance(data, Mix) else Mix({"s": data}, {"s": 1.0}, 0)
    return Batches(mix, Ids(), stage, steps, ShardPosition(rank, world, start, streams or {}))


def ids(items):
    return [name for item in items for name in item["batch"]["ids"]]


def of_ranks(make, world, accumulate=1, steps=16):
    """What `world` processes see, put together as one process sees it."""
    ranks = [[made[j]["batch"]["ids"] for j in range(steps * accumulate)] for made in map(make, range(world))]
    return [name for turn in range(steps * accumulate) for rank in ranks for name in rank[turn]]


@pytest.mark.parametrize("shards", SIZES)
@pytest.mark.parametrize("shuffle", [0, 6])
def test_every_row_once_in_an_epoch(folders, shards, shuffle):
    data = stream(folders, shards, shuffle_buffer=shuffle)
    stored = [f"{shard}-{i}" for shard, size in enumerate(SIZES[shards]) for i in range(size)]
    made, total = batches(data, batch=4, steps=3 * len(stored) // 4), len(stored)
    seen = ids(made[j] for j in range(len(made)))
    epochs = [seen[n : n + total] for n in range(0, 3 * total, total)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(stored)] * 3
    assert epochs[0] == stored if not shuffle else len({tuple(epoch) for epoch in epochs}) == 3
    assert sorted(s.id for s in data.stream(1)) == sorted(stored)
    assert [s.id for s in data.stream(1, start=7)] == [s.id for s in data.stream(1)][7:]
    if not shuffle:
        assert [s.id for s in data.stream(1)] == stored


@pytest.mark.parametrize("shards", SIZES)
@pytest.mark.parametrize("shuffle", [0, 6])
def test_processes_share_the_rows_of_one(folders, shards, shuffle):
    data = stream(folders, shards, shuffle_buffer=shuffle)
    alone = ids(map(batches(data).__getitem__, range(16)))
    for world, accumulate in ((2, 1), (4, 2), (8, 1)):
        options = {"world": world, "accumulate": accumulate}
        assert of_ranks(lambda rank, options=options: batches(data, rank=rank, **options), world, accumulate) == alone


@pytest.mark.parametrize(("shards", "shuffle", "workers"), [(1, 0, 2), (3, 0, 1), (3, 6, 4), (8, 0, 4), (5, 6, 2)])
def test_workers_see_what_one_reader_sees(folders, shards, shuffle, workers):
    data = stream(folders, shards, shuffle_buffer=shuffle)
    one = list(Loader(batches(data)))
    assert list(Loader(batches(data, workers=workers))) == one
    # Killed in the middle, with the place as a checkpoint keeps it, and gone on with another number of workers; twice.
    streams = json.loads(json.dumps(one[2]["info"]["streams"]))
    rest = list(Loader(batches(data, start=3, streams=streams)))
    assert ids(rest) == ids(one[3:])
    again = json.loads(json.dumps(rest[7]["info"]["streams"]))
    last = batches(data, start=11, streams=again, workers=1 + workers % 2, rank=1, world=2)
    assert ids(Loader(last)) == [name for item in one[11:] for name in item["batch"]["ids"][4:]]


@pytest.mark.parametrize("shuffle", [0, 6])
def test_a_mix_with_other_data_is_the_same_everywhere(folders, shuffle):
    class Named(Dataset):
        def __len__(self):
            return 7

        def get(self, index, epoch=0):
            return sample(("why", "so"), name=f"n-{index}", seed=index)

    data = {"named": Named(), "a": stream(folders, 8, shuffle_buffer=shuffle), "b": stream(folders, 3)}

    def mix():
        return Mix(data, {"named": 1.0, "a": 2.0, "b": 1.0}, 3)

    one = list(Loader(batches(mix())))
    assert of_ranks(lambda rank: batches(mix(), rank=rank, world=4), 4) == ids(one)
    streams = one[4]["info"]["streams"]
    assert set(streams) == {"a", "b"}
    assert ids(Loader(batches(mix(), start=5, streams=streams, workers=2))) == ids(one[5:])


@pytest.fixture
def read(monkeypatch):
    """Count the rows that are read from each file."""
    counts: Counter = Counter()
    generate = Parquet._generate_tables

    def counted(self, files, *args, **kwargs):
        for key, table in generate(self, files, *args, **kwargs):
            first = next(iter(files))
            counts[Path(first if isinstance(first, str) else next(iter(first))).stem] += len(table)
            yield key, table

    monkeypatch.setattr(Parquet, "_generate_tables", counted)
    return counts


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("options", [{"shuffle_buffer": 16}, {"lanes": 8}])
def test_a_row_of_lanes_is_read_by_one_process(folders, read, world, options):
    data = stream(folders, 8, **options)
    of_ranks(lambda rank: batches(data, batch=16, steps=4, rank=rank, world=world), world, steps=4)
    assert len(read) == 8 and set(read.values()) == {8}


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_read_nothing_twice(folders, read, workers):
    for shuffle in (0, 16):
        read.clear()
        list(Loader(batches(stream(folders, 8, shuffle_buffer=shuffle), steps=8, workers=workers)))
        assert set(read.values()) == {8}


def test_a_stored_order_goes_on_without_reading_what_came_before(folders, read):
    made = batches(stream(folders, 8))
    place = [made[j] for j in range(6)][-1]["info"]["streams"]  # 48 rows: six files
    read.clear()
    rest = batches(stream(folders, 8), start=6, steps=8, streams=place)
    assert ids(rest[j] for j in (6, 7)) == [f"{shard}-{i}" for shard in (6, 7) for i in range(8)]
    assert {"6", "7"} <= set(read) <= {"5", "6", "7"}, "the end of the sixth may be looked at again"


def test_first_rows_only_are_those_of_the_stored_order(folders):
    for shuffle in (0, 4):
        data = stream(folders, 3, limit=20, shuffle_buffer=shuffle)
        wanted = [f"0-{i}" for i in range(16)] + [f"1-{i}" for i in range(4)]
        assert sorted(s.id for s in data.stream()) == sorted(wanted)
        assert sorted(ids(Loader(batches(data, batch=4, steps=5, workers=2)))) == sorted(wanted)


def test_a_saved_folder_streams_too(folders, tmp_path):
    from_disk = datasets.Dataset.from_dict({"id": list("abcdefgh"), "question": ["why"] * 8, "answer": ["so"] * 8})
    from_disk.save_to_disk(tmp_path / "saved")
    for shuffle in (0, 4):
        data = registry.build(
            "dataset", {"name": "hf", "path": str(tmp_path / "saved"), "streaming": True, "shuffle_buffer": shuffle}
        )
        one = list(Loader(batches(data, batch=4, steps=5)))
        assert list(Loader(batches(data, batch=4, steps=5, workers=2))) == one
        assert sorted(ids(one[:2])) == list("abcdefgh")
        resumed = batches(data, batch=4, steps=5, start=3, streams=one[2]["info"]["streams"])
        assert ids(Loader(resumed)) == ids(one[3:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_row_is_skipped_and_the_stream_goes_on(tmp_path, workers):
    rows = [
        {"id": str(i), "question": "broken" if i == 2 else "why", "answer": "" if i == 5 else "so"} for i in range(8)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = registry.build("dataset", {"name": "hf", "path": str(path), "streaming": True})
    with pytest.raises(ZooError, match="not today"):
        list(Loader(batches(data, batch=4, steps=2, workers=workers)))
    items = list(Loader(batches(data, batch=4, steps=4, workers=workers, skip_broken=True)))
    assert ids(items) == list("013467" * 2)
    lines = [line for item in items for line in item["info"]["broken"]]
    assert [line["where"].rpartition(":")[2] for line in lines] == ["3", "6"] * 2
    assert lines[0]["reason"] == "not today" and "'answer' is empty" in lines[1]["reason"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_off_is_named_in_its_turn(folders, tmp_path, workers):
    for name in "01":
        (tmp_path / f"{name}.parquet").write_bytes((folders / "8" / f"{name}.parquet").read_bytes())
    data = stream(tmp_path.parent, tmp_path.name)
    (tmp_path / "1.parquet").write_bytes((folders / "8" / "1.parquet").read_bytes()[:-20])
    source = iter(Loader(batches(data, batch=4, steps=4, workers=workers)))
    assert ids([next(source), next(source)]) == [f"0-{i}" for i in range(8)]
    with pytest.raises(ZooError, match=r"parquet' cannot be read on behind 8 rows: "):
        next(source)


def test_samples_that_cannot_travel_are_named():
    class Local(StreamingDataset):
        def stream(self, epoch=0, start=0):
            yield Sample("a", [lambda: b""], [])

    with pytest.raises(ZooError, match=r"data s, a stream, cannot be sent to a loader worker .*: set workers=0"):
        list(Loader(batches(Local(), steps=1, workers=1)))


def test_lanes_say_what_is_wrong(folders):
    def start(epoch, shard, skip):
        yield from range(skip, 3)

    options = {"size": 4, "lanes": 2, "seed": 0}
    with pytest.raises(ZooError, match="'s' is a stream without a single sample"):
        Lanes("s", [0, 0], start, place={}, **options)
    with pytest.raises(ZooError, match="order in which data 's' is read has changed"):
        Lanes("s", [3, 3], start, place={"epoch": 0, "read": 3}, **options)
    short = Lanes("s", [4, 4], start, place={}, **options)
    with pytest.raises(ZooError, match=r"shard . ends before its row 3 of 4"):
        [short.next(n, True) for n in range(8)]
    for wrong, message in (({"lanes": -1}, "0 or more, got -1"), ({"lanes": 2, "limit": 3}, "read whole, limit=0")):
        with pytest.raises(ZooError, match=message):
            stream(folders, 1, **wrong)
    with pytest.raises(ZooError, match=r"lanes=2 needs a stream of several parquet files"):
        list(stream(folders, 1, lanes=2).stream())


def test_lanes_of_a_stored_order_take_turns(folders):
    seen = ids(Loader(batches(stream(folders, 3, lanes=2), batch=4, steps=12, workers=2)))
    assert seen[:8] == ["0-0", "0-1", "1-0", "1-1", "0-2", "0-3", "1-2", "1-3"]
    assert seen[32:] == [f"2-{i}" for i in range(16)]
