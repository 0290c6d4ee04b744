"""Streams of .jsonl and .csv files: each row is read once, by the process and worker that trains on it."""

import csv
import io
import json
import os
import pickle
import random
import tarfile

import pytest
from PIL import Image

from tests.test_stream_order import batches, ids, of_ranks
from zoo import registry
from zoo.data import line_files
from zoo.data.line_files import LineFiles
from zoo.data.record_index import entries_of
from zoo.data.tar_shards import Shards
from zoo.registry import RecordError, ZooError
from zoo.runs.batches import Loader

pytest.importorskip("datasets")
SIZES = [20, 3, 0, 11, 14]
ORDERS = [{}, {"lanes": 2}, {"shuffle_buffer": 6}]


@pytest.fixture(scope="module", params=["jsonl", "json", "csv"])
def pattern(request, tmp_path_factory):
    """Files of 48 rows of 1 kB."""
    root = tmp_path_factory.mktemp("lines")
    for shard, size in enumerate(SIZES):
        rows = [{"id": f"{shard}-{i}", "question": f"why,\n{i} " + "x" * 1000, "answer": "so"} for i in range(size)]
        path = root / f"{shard}.{request.param}"
        if request.param == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["id", "question", "answer"])
                writer.writeheader()
                writer.writerows(rows)
        else:
            lines = map(json.dumps, rows)
            path.write_text("\n".join(lines) if request.param == "jsonl" else "[" + ",\n".join(lines) + "]")
    return f"{root}/*.{request.param}"


def stream(pattern, **options):
    return registry.build("dataset", {"name": "hf", "path": str(pattern), "streaming": True, **options})


@pytest.mark.parametrize("options", ORDERS)
def test_every_row_once_in_an_epoch_in_the_order_of_one(pattern, options):
    data, total = stream(pattern, **options), sum(SIZES)
    stored = [f"{shard}-{i}" for shard, size in enumerate(SIZES) for i in range(size)]
    assert (
        [s.id for s in data.stream(1)] == stored
        if not options
        else sorted(s.id for s in data.stream(1)) == sorted(stored)
    )
    assert [s.id for s in data.stream(1, start=7)] == [s.id for s in data.stream(1)][7:]
    one = batches(data, steps=12)
    seen = ids(one[j] for j in range(12))
    assert [sorted(seen[:total]), sorted(seen[total:])] == [sorted(stored)] * 2
    assert not options.get("shuffle_buffer") or seen[:total] != seen[total:]
    for world, accumulate in ((2, 1), (4, 2), (8, 1)):
        share = {"world": world, "accumulate": accumulate, "steps": 12}
        assert of_ranks(lambda rank, s=share: batches(data, rank=rank, **s), world, accumulate, steps=12) == seen


@pytest.mark.parametrize("options", ORDERS)
def test_eight_processes_of_four_workers_read_each_row_once(pattern, options, monkeypatch):
    sizes, read = [], []

    def counted(file, count, at):
        sizes.append(count)
        return pread(file, count, at)

    pread, record = os.pread, LineFiles._record
    data = stream(pattern, **options)
    monkeypatch.setattr(line_files.os, "pread", counted)
    monkeypatch.setattr(LineFiles, "_record", lambda self, place: [read.append(place), record(self, place)][1])
    for rank in range(8):
        readers = [pickle.loads(pickle.dumps(batches(data, batch=16, steps=3, rank=rank, world=8))) for _ in range(4)]
        for step in range(3):
            readers[step % 4][step]
    assert sorted(read) == [(shard, i) for shard, size in enumerate(SIZES) for i in range(size)]
    assert sum(sizes) <= 1.05 * sum(path.stat().st_size for path in data.rows.paths)


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_at_its_row_whatever_the_workers(pattern, workers):
    data = stream(pattern, shuffle_buffer=6)
    one = list(Loader(batches(data)))
    streams = json.loads(json.dumps(one[2]["info"]["streams"]))
    assert ids(Loader(batches(data, start=3, streams=streams, workers=workers))) == ids(one[3:])


@pytest.mark.parametrize("lane", [[5, 0], [1, 4]])
def test_a_stream_with_less_than_when_a_run_stopped_is_refused(pattern, lane):
    place = {"epoch": 0, "drawn": 1, "lanes": [lane]}  # of a sixth file, and of more rows than the second one has
    with pytest.raises(ZooError, match=r"Data 'rows' has fewer shards or rows than when this run was stopped"):
        stream(pattern).order("rows", 4, place)


def test_the_first_rows_only(pattern):
    for options in ({}, {"shuffle_buffer": 4}):
        data = stream(pattern, limit=22, **options)
        assert sorted(s.id for s in data.stream()) == sorted([f"0-{i}" for i in range(20)] + ["1-0", "1-1"])


LETTERS = ["a", "\u00e9", ",", '"', "\n", "\r\n", "\u2028", "\x85", " ", "7", ";", "NA"]


@pytest.mark.parametrize("seed", range(8))
def test_any_csv_is_what_the_whole_file_is_to_the_csv_module(tmp_path, seed):
    draw = random.Random(seed)
    rows = [["".join(draw.choices(LETTERS, k=draw.randint(0, 6))) for _ in range(3)] for _ in range(200)]
    text = io.StringIO(newline="")
    writer = csv.writer(
        text, quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), lineterminator=draw.choice(["\n", "\r\n"])
    )
    writer.writerows([["a", "b", "c"], *rows])
    blank = writer.dialect.lineterminator * (seed % 3)
    (tmp_path / "x.csv").write_bytes((text.getvalue() + blank).encode("utf-8-sig" if seed % 2 else "utf-8"))
    files = LineFiles([tmp_path / "x.csv"])
    assert files.lengths == [200]
    for number, row in enumerate(rows):
        assert list(files.record((0, number)).values()) == [field or None for field in row]
        assert files.record((0, number)).keys() == {"a", "b", "c"}


CARD = """---
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: question, dtype: string}
  - {name: answer, dtype: string}
configs:
- {config_name: default, data_files: [{split: train, path: rows.jsonl}]}
---
"""


def test_images_that_a_folders_card_has_are_its_files(tmp_path):
    """The library makes images of names; a stream has them as the data without streaming has."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "why", "answer": "so"}))
    (tmp_path / "README.md").write_text(CARD)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (streamed,) = stream(tmp_path).stream()
    assert streamed.images == [tmp_path / "a.png"]
    assert streamed.images == registry.build("dataset", {"name": "hf", "path": str(tmp_path)}).get(0).images


def test_a_column_that_some_rows_lack_is_none_and_one_that_all_lack_is_named(tmp_path):
    rows = [{"question": "why", "answer": "so"}, {"question": "who", "answer": "she", "kind": "person"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(stream(tmp_path / "x.jsonl", kind_field="kind").stream())
    assert [s.dialogs[0].kind for s in found] == ["", "person"]
    (error, _) = stream(tmp_path / "x.jsonl", kind_field="kin").stream()
    assert isinstance(error, RecordError) and "x.jsonl:1" in str(error) and "'kind'" in str(error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"a,a\n1,2\n", r"x.csv:1 names the column 'a' twice"),
        ("x.csv", b'question,answer\nwhy,"so\nwho,she\n', r"x.csv:2 begins a quoted text that does not end"),
        ("x.csv", "question,answer\nwhy,so\n".encode("utf-16"), "has to be UTF-8"),
        ("x.json", b'[{"question": "why"', "may have been cut off|ends before its list is closed"),
    ],
)
def test_a_file_that_cannot_be_split_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ZooError, match=message):
        stream(tmp_path / name)


def test_a_broken_row_is_named_and_a_file_that_changes_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"question,answer\nwhy,so\nwho,she,he\nwh\xff,x\nlast,one\n")
    data = stream(path)
    first, wide, latin, last = data.stream()
    assert "x.csv:3: has 3 fields for 2 columns" in str(wide) and "x.csv:4: is not CSV in UTF-8" in str(latin)
    assert first.id == "0:0" and last.where.endswith("x.csv:5")
    path.write_bytes(path.read_bytes() + b"more,rows\n")
    (changed, *_) = data.stream()
    assert "has changed since it was opened" in str(changed)


def test_a_record_that_its_entry_cannot_hold_is_refused():
    assert entries_of([0], [(1 << 32) - 1], [1])["length"][0] == (1 << 32) - 1
    with pytest.raises(ZooError, match="record at byte 7 has 4,294,967,296 bytes; 4 GiB are allowed"):
        entries_of([0, 7], [7, (1 << 32) + 7], [1, 2])


def test_a_sparse_member_of_a_shard_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for name, kind in (("a.json", tarfile.REGTYPE), ("a.png", tarfile.GNUTYPE_SPARSE), ("a.txt", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.size, member.type = 2, kind
            shard.addfile(member, io.BytesIO(b"{}"))
    assert set(Shards([tmp_path / "x.tar"])[0, 0].members) == {"json", "txt"}
