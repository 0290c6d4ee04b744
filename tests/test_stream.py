"""Safetensors into place: what is read is what was written, and a file that lies is refused before memory is taken."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zoo.registry import ZooError
from zoo.storage.safetensors_file import fill, listing, read


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(5, 3, generator=generator),
        "a.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "ids": torch.arange(7),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


def test_every_tensor_comes_back_in_any_type(file):
    path, tensors = file
    stored = listing([path])
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        for dtype in {value.dtype, torch.float32}:
            target = torch.full(value.shape, 9, dtype=dtype)
            read(stored[name], target)
            assert torch.equal(target, value.to(dtype)), name
        if value.dim() == 2:
            turned = torch.empty(*reversed(value.shape), dtype=value.dtype).T  # not contiguous
            read(stored[name], turned)
            assert torch.equal(turned, value)


def test_modules_on_the_meta_device_are_filled_and_ties_kept(file):
    path, tensors = file
    with torch.device("meta"):
        layer, other = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5, bias=False)
        other.weight = layer.weight
        module = torch.nn.ModuleDict({"a": layer, "b": other})
    cpu = torch.device("cpu")
    done = fill({"": module}, listing([path]), place=lambda n: cpu, dtype=None)
    assert module["b"].weight is module["a"].weight and not done.missing
    assert torch.equal(module["a"].weight, tensors["a.weight"]) and module["a"].bias.dtype == torch.bfloat16
    assert done.used == {"a.weight", "a.bias"}
    half = fill({"": module}, listing([path]), place=lambda n: cpu, dtype=torch.float16)
    assert module["a"].weight.dtype == torch.float16 and not half.other_shape


def test_large_tensors_are_pages_of_their_file_and_changes_stay_here(tmp_path):
    path, cpu = tmp_path / "model.safetensors", torch.device("cpu")
    values = {"a.weight": torch.randn(600, 512), "a.bias": torch.randn(600)}
    save_file(values, path)
    before = path.read_bytes()
    with torch.device("meta"):
        layer = torch.nn.Linear(512, 600)
    fill({"a": layer}, listing([path]), place=lambda n: cpu, dtype=None)
    assert torch.equal(layer.weight, values["a.weight"]) and layer.weight.untyped_storage().nbytes() == 600 * 512 * 4
    maps = Path("/proc/self/maps")
    assert not maps.exists() or sum(str(path) in line for line in maps.read_text().splitlines()) == 1
    with torch.no_grad():
        layer.weight += 1.0
    assert torch.equal(layer.weight, values["a.weight"] + 1.0) and path.read_bytes() == before
    path.unlink()
    assert layer(torch.ones(1, 512)).isfinite().all()


def test_a_model_is_saved_over_the_files_that_it_came_from(tmp_path):
    from zoo.storage.weights import weight_files, write_weights

    path, cpu = tmp_path / "model.safetensors", torch.device("cpu")
    values = {"a.weight": torch.randn(600, 512), "b.weight": torch.randn(600, 512)}
    write_weights(values, tmp_path, max_shard_size="2MB")
    assert len(weight_files(tmp_path)) == 2
    with torch.device("meta"):
        layers = torch.nn.ModuleDict({n: torch.nn.Linear(512, 600, bias=False) for n in "ab"})
    fill({"": layers}, listing(weight_files(tmp_path)), place=lambda n: cpu, dtype=None)
    for _ in range(2):  # the second time from pages that no name leads to any more
        write_weights(layers.state_dict(), tmp_path)
        assert weight_files(tmp_path) == [path] and sorted(f.name for f in tmp_path.iterdir()) == [path.name]
        for name, stored in listing([path]).items():
            target = torch.empty(stored.shape)
            read(stored, target)
            assert torch.equal(target, values[name]), name


def rewritten(path, to, **changes):
    """A copy whose header says something else."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["a.weight"].update(changes)
    text = json.dumps(header).encode()
    to.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return to


LIES = {
    "longer than the file": {"data_offsets": [0, 10**12], "shape": [10**12 // 4]},
    "before the file": {"data_offsets": [-60, 0]},
    "another size": {"shape": [5, 4]},
    "negative": {"shape": [-5, -3]},
    "no such type": {"dtype": "PICKLE"},
    "no numbers": {"data_offsets": "all"},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(file, tmp_path, lie):
    broken = rewritten(file[0], tmp_path / "broken.safetensors", **LIES[lie])
    with pytest.raises(ZooError, match=r"broken\.safetensors"):
        stored = listing([broken])["a.weight"]
        read(stored, torch.empty(stored.shape))


@pytest.mark.parametrize("content", [b"", b"\x10", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ZooError, match=r"broken\.safetensors"):
        listing([path])


def test_a_file_that_was_cut_off_is_refused(file, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(file[0].read_bytes()[:-8])
    with pytest.raises(ZooError, match="truncated or wrong"):
        listing([path])
    with pytest.raises(ZooError, match="is missing"):
        listing([tmp_path / "nowhere.safetensors"])
