"""Weights of others: files that are no safetensors, or lie about what they hold, are errors that name the file."""

import json
import os
from pathlib import Path

import pytest
import torch

from zoo import ZooError
from zoo.runs.checkpoint import DamagedError, load_optimizers, load_weights, verify
from zoo.storage.safetensors_file import listing
from zoo.storage.weights import weight_files
from zoo.teaching.teacher_store import TeacherStore, read_about


def header(content: object, body: bytes = bytes(64)) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(start: int, end: int, shape: object = (4,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FILES = {
    "empty": b"",
    "short": b"\1\2\3",
    "a header of exabytes": (1 << 62).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "no JSON": header(b"{" * 50),
    "brackets without end": header(b'{"a":' + b"[" * 200_000),
    "a list": header([]),
    "no UTF-8": header(b'{"\xff":1}'),
    "an entry that is none": header({"a": 1}),
    "an entry that lacks": header({"a": {"dtype": "F32"}}),
    "an unknown type": header({"a": tensor(0, 16, dtype="PICKLE")}),
    "a type that is a list": header({"a": tensor(0, 16, dtype=["F32"])}),
    "behind the end": header({"a": tensor(0, 1 << 40, [1 << 38])}),
    "before the beginning": header({"a": tensor(-16, 0)}),
    "backwards": header({"a": tensor(16, 0)}),
    "another size": header({"a": tensor(0, 16, [5])}),
    "a negative side": header({"a": tensor(0, 16, [-2, -2])}),
    "sides without end": header({"a": tensor(0, 16, [2] * 100_000)}),
    "a side of many digits": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "infinite": header(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,16]}}'),
    "the same bytes": header({"a": tensor(0, 16), "b": tensor(0, 16)}),
    "overlapping bytes": header({"a": tensor(0, 16), "b": tensor(12, 28)}),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_weights(kind, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(FILES[kind])
    with pytest.raises(ZooError, match=r"model\.safetensors"):
        listing([file])


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing"])
def test_no_file_of_weights(kind, tmp_path):
    file = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(ZooError, match=r"model\.safetensors"):
        listing([file])


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "", None, 3, ["a.safetensors"]]
)
def test_an_index_that_names_other_files(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ZooError, match="index"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "{" * 99, '{"weight_map":' + "[" * 99_999])
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ZooError, match="index"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("places", "shape"),
    [
        ('{"w": {"saved_offsets": [4000000000]}}', [1]),  # a tensor of 16 GB in a file of 100 bytes
        ('{"w": {"saved_offsets": [-1]}}', [1]),
        ('{"w": {"saved_offsets": [0, 0]}}', [1]),
        ('{"w": {"saved_offsets": ["0"]}}', [1]),
        ('{"w": {"saved_offsets": 0}}', [1]),
        ('{"w": 0}', [1]),
        ("[]x", [1]),
        ("[]", []),
        ("[" * 100_000, [1]),
    ],
)
def test_places_of_parts(places, shape, tmp_path):
    """Parts make up one tensor of as many numbers as the files hold, or are refused."""
    entries = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    (tmp_path / "weights.safetensors").write_bytes(
        header({"__metadata__": {"DCP_SHARDING_INFO": places}, **entries}) + bytes(4)
    )
    with pytest.raises(ZooError, match=r"(weights\.safetensors.*place|parts of 'w')"):
        load_weights(tmp_path, {"w": torch.zeros(shape)})


@pytest.mark.parametrize("files", [3, [], {"weights": -1}, {"weights": 10**9}, {"weights": True}, {"weights": "a"}])
def test_counts_of_files(files, tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"files": files}))
    with pytest.raises(ZooError, match="files of weights"):
        load_weights(tmp_path, {})


def test_pickled_optimizers_are_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save([Evil()], tmp_path / "optimizers.pt")
    with pytest.raises(ZooError, match=r"optimizers\.pt.*is not read"):
        load_optimizers(tmp_path, [], {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../../secret", "/dev/zero", "pipe", "a/b", "..", ""])
def test_hashes_of_other_files(name, tmp_path):
    """SHA256SUMS names files of the checkpoint, which are read to compare them."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "state.json").write_text('{"format": 2}')
    (tmp_path / "weights.safetensors").write_bytes(header({}))
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(DamagedError):
        verify(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{" * 50, '{"format": "${oc.env:HOME}"}', '{"step": {"_target_": "os.system"}}']
)
def test_the_state_of_a_checkpoint(text, tmp_path):
    (tmp_path / "state.json").write_text(text)
    (tmp_path / "SHA256SUMS").write_text("")
    with pytest.raises(DamagedError):
        verify(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{" * 50, '{"format": "${oc.env:HOME}"}', '{"teacher": {"_target_": "os.system"}}', '{"format": 99}'],
)
def test_the_settings_of_a_stored_teacher(text, tmp_path):
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(ZooError):
        read_about(tmp_path)


@pytest.mark.parametrize("kind", ["noise", "no keys", "a plugin"])
def test_a_stored_teacher(kind, tmp_path):
    from zoo.teaching.teacher_store import FORMAT

    about = {"format": FORMAT, "vocab_size": 9, "positions": [], "plugins": [str(tmp_path / "evil.py")]}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "store.json").write_text(json.dumps(about))
    shard = tmp_path / "shard-00000.safetensors"
    if kind == "a plugin":  # it is asked for by nothing
        TeacherStore(tmp_path)
    else:
        shard.write_bytes(os.urandom(100) if kind == "noise" else header({"a": tensor(0, 16)}, bytes(16)))
        with pytest.raises(ZooError, match="shard-00000"):
            TeacherStore(tmp_path)
    assert not Path(tmp_path / "ran").exists()
