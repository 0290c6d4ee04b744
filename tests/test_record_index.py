"""Records of large files stay on the disk: the same records, places and groups as in memory, whatever the file."""

import json
import multiprocessing
import os
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest

from zoo.data import record_file, record_index
from zoo.data.chat_json import ChatJson, ChatJsonConfig
from zoo.data.record_file import RecordFile
from zoo.data.record_groups import Grouping, kept_groups
from zoo.registry import ZooError


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(record_file, "ON_DISK", 0)


def seen(path):
    """Everything that a file of records gives: each record or its error, and its place."""
    found = RecordFile(path)
    result = []
    for index in range(len(found)):
        try:
            result.append((found.where(index), found[index]))
        except ZooError as error:
            result.append((found.where(index), str(error)))
    return result


def content(draw):
    """A file with ends of lines, blanks, marks and broken records of all kinds."""
    ends = draw.choice([["\n"], ["\r\n"], ["\n", "\r\n", "\n\n", "\r", "\n \t\n"]])
    lines = []
    for i in range(draw.randrange(12)):
        line = json.dumps({"id": i, "text": "é" * draw.randrange(30)}, ensure_ascii=draw.random() < 0.5)
        line = draw.choice(["", "", "", " ", "\t", "\ufeff"]) + line + draw.choice(["", "", " "])
        lines.append(draw.choice([line] * 6 + [line[:-2], "[1]", "x"]) + draw.choice(ends))
    text = "".join(lines)
    return (text if draw.random() < 0.5 else text.rstrip("\r\n")).encode()


@pytest.mark.parametrize("chunk", [16, 61, 1 << 20])
def test_a_file_on_the_disk_gives_what_it_gives_in_memory(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(record_index, "CHUNK", chunk)
    draw = random.Random(chunk)
    kinds = set()
    for number in range(150):
        data = content(draw)
        path = tmp_path / f"{number}.{draw.choice(['json', 'jsonl', 'ndjson'])}"
        path.write_bytes(data)
        outcomes = []
        for size in (1 << 40, 0, 0):  # in memory, on the disk, on the disk with an index that is there
            monkeypatch.setattr(record_file, "ON_DISK", size)
            try:
                outcomes.append(seen(path))
            except ZooError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1] == outcomes[2], data
        kinds.add(type(outcomes[0]))
    assert kinds == {list, str} and len(list(tmp_path.glob(".*.zoo-index"))) > 75
    assert not list(tmp_path.glob(f"*{os.getpid()}"))


def test_a_list_and_a_file_that_changes(tmp_path, on_disk):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": i} for i in range(5)], indent=1))
    assert [r["id"] for r in RecordFile(path)] == list(range(5))
    stamp = path.stat().st_mtime_ns
    path.write_text(json.dumps([{"id": 9 - i} for i in range(5)], indent=1))
    os.utime(path, ns=(stamp, stamp))  # the same size and time: the ends of the file differ
    assert [r["id"] for r in RecordFile(path)] == [9, 8, 7, 6, 5]
    path.write_text('{"id": 3}\n')
    assert [r["id"] for r in RecordFile(path)] == [3]


def test_an_index_is_not_read_in_and_is_16_bytes_a_record(tmp_path, on_disk):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": i}) + "\n" for i in range(1000)))
    found = RecordFile(path)
    index = tmp_path / ".rows.jsonl.zoo-index"
    assert index.stat().st_size == 64 + 16 * 1000 and len(pickle.dumps(found)) < 1000
    again = pickle.loads(pickle.dumps(found))
    assert again[999] == {"id": 999} and again[-1] == {"id": 999} and again.where(4) == f"{path}:5"
    with pytest.raises(IndexError):
        found[1000]


def test_an_index_that_is_broken_or_not_ours(tmp_path, on_disk):
    path, index = tmp_path / "rows.jsonl", tmp_path / ".rows.jsonl.zoo-index"
    path.write_text('{"id": 0}\n{"id": 1}\n')
    assert len(RecordFile(path)) == 2
    whole = index.read_bytes()
    for wrong in (b"", whole[:40], whole[:-1], whole + b"x", b"x" * len(whole)):
        index.write_bytes(wrong)
        assert [r["id"] for r in RecordFile(path)] == [0, 1] and index.read_bytes() == whole
    beyond = np.frombuffer(whole, np.uint8).copy()
    beyond[64 + 16 + 8] = 255  # the second record would be longer than the file
    index.write_bytes(beyond.tobytes())
    with pytest.raises(ZooError, match=r"broken at record 2.*delete"):
        RecordFile(path)[1]


def test_a_folder_that_cannot_be_written(tmp_path, on_disk, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 0}\n\n{"id": 1}\n')

    def refused(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(record_index.Path, "replace", refused)  # the tests may run as root, whom no mode keeps out
    found = RecordFile(path)
    assert [r["id"] for r in found] == [0, 1] and found.where(1).endswith(":3")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def _ids(path):
    record_file.ON_DISK = 0
    return [record["id"] for record in RecordFile(path)]


def test_processes_that_begin_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": i}) + "\n" for i in range(200)))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_ids, [path] * 8) == [list(range(200))] * 8
    assert sorted(p.name for p in tmp_path.iterdir()) == [".rows.jsonl.zoo-index", "rows.jsonl"]


@pytest.mark.parametrize("options", [{}, {"group_by_image": True}, {"split_field": "split"}, {"limit": 7}])
def test_samples_are_those_of_a_file_in_memory(options, tmp_path, monkeypatch):
    """Grouped and split by arrays that are kept beside the file; the second time they are read, not made."""
    draw = random.Random(1)
    rows = []
    for i in range(60):
        turns = [{"from": "human", "value": f"<image>\nquestion {i}"}, {"from": "gpt", "value": "answer"}]
        row = {"id": str(i), "conversations": turns, "split": draw.choice(["train", "train", "dev"])}
        rows.append(row | {"image": f"{draw.randrange(9)}.png"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"")
    config = ChatJsonConfig(file=str(path), **options)

    def samples(config):
        data = ChatJson(config)
        return [(s.id, [str(i) for i in s.images], len(s.dialogs)) for s in map(data.get, range(len(data)))]

    monkeypatch.setattr(record_file, "ON_DISK", 1 << 40)
    in_memory = [samples(c) for c in (config, replace(config, limit=20))]
    monkeypatch.setattr(record_file, "ON_DISK", 0)
    assert [samples(c) for c in (config, replace(config, limit=20))] == in_memory
    kept = list(tmp_path.glob(".rows.jsonl.zoo-groups-*"))
    assert len(kept) == (2 if options.keys() & {"group_by_image", "split_field"} else 0)
    grouping = ChatJson._grouping
    monkeypatch.setattr(ChatJson, "_grouping", None)
    assert [samples(c) for c in (config, replace(config, limit=20))] == in_memory
    monkeypatch.setattr(ChatJson, "_grouping", grouping)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    assert len(samples(config)) < len(in_memory[0]) or options == {"limit": 7}
    left = list(tmp_path.glob(".rows.jsonl.zoo-groups-*"))
    assert len(left) == min(1, len(kept)) and not {*left} & {*kept}, "groups of the file as it was are deleted"


def test_groups_are_those_of_a_dict():
    draw = random.Random(0)
    for _ in range(50):
        naive, found = {}, Grouping()
        for record in range(draw.randrange(40)):
            shared = draw.choice([None, "a", "b", "\ud800", str(record % 3)])
            found.add(record, shared)
            naive.setdefault(shared if shared is not None else (record,), []).append(record)
        members, ends = found.arrays()
        groups = [part.tolist() for part in np.split(members, ends[:-1])] if len(ends) else []
        assert groups == sorted(naive.values())


def test_of_very_many_records_some_are_read_when_the_file_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.data.chat_json.CHECKED", 10)
    monkeypatch.setattr("zoo.data.chat_json.SPREAD", 5)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    good, path = json.dumps({"id": "x", "conversations": turns}), tmp_path / "rows.jsonl"
    path.write_text("\n".join([good] * 40))
    read = []
    monkeypatch.setattr(ChatJson, "_head", lambda self, index: read.append(index))
    assert len(ChatJson(ChatJsonConfig(file=str(path)))) == 40 and read == [0, 9, 19, 29, 39]


def test_a_file_that_is_replaced_while_it_is_open_is_refused(tmp_path, on_disk):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    first, second = RecordFile(path), RecordFile(path)
    path.write_text('{"a": 3}\n{"b": 4}\n{"c": 5}\n')
    with pytest.raises(ZooError, match="has changed since it was opened"):
        first[0]  # with the old index
    assert len(RecordFile(path)) == 3
    for _ in range(2):
        with pytest.raises(ZooError, match="has changed since it was opened"):
            second[0]  # with the new one
    with pytest.raises(ZooError, match="has changed since it was opened"):
        second.where(0)


def test_a_line_longer_than_the_system_reads_at_once(tmp_path, on_disk, monkeypatch):
    path, read = tmp_path / "a.jsonl", os.pread
    path.write_text('{"a": 1}\n{"a": "' + 100 * "x" + '"}\n{"a": 2}\n')
    monkeypatch.setattr(record_index, "CHUNK", 16)
    monkeypatch.setattr(record_index.os, "pread", lambda file, length, at: read(file, min(length, 50), at))
    with pytest.raises(ZooError, match=r"a\.jsonl:2 is a line of more than 50 bytes"):
        RecordFile(path)


@pytest.mark.parametrize("left", [b"", b"half", None])
def test_groups_that_a_crash_left_in_part_are_made_anew(left, tmp_path):
    made = Grouping()
    made.add(0, "a")
    file = tmp_path / "groups"
    if left is None:
        with file.open("wb") as out:
            np.save(out, np.empty(0, np.int64))
    else:
        file.write_bytes(left)
    assert [kept_groups(file, lambda: made)[0], kept_groups(file, Grouping)[0]] == [[0], [0]]
