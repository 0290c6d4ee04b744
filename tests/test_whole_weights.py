"""Whole weights of a sharded model for the process that saves: one at a time, in a file that is gone afterwards."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from zoo.registry import ZooError
from zoo.runs import whole_weights as subject
from zoo.runs.folder import RunFolder

ONE = SimpleNamespace(num_processes=1, is_main_process=True)


@pytest.fixture
def model():
    """Weights on a mesh of one process: two tied names, a small one, no rows, bfloat16 of an odd size; one is plain."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
    values = {"a": torch.randn(600, 512), "b": torch.randn(3, 5).bfloat16(), "c": torch.zeros(0, 4)}
    values |= {"d": torch.tensor(2.5), "e": torch.randn(7)}
    found = {
        n: distribute_tensor(v, mesh, [Replicate(), Shard(0) if v.dim() else Replicate()]) for n, v in values.items()
    }
    found["e"] = values["e"]
    found["tied"] = found["a"]
    yield SimpleNamespace(state_dict=lambda keep_vars: found, adapter={}), values
    torch.distributed.destroy_process_group()


def test_they_are_maps_of_a_file_for_a_while(model, tmp_path):
    made, values = model
    with subject.whole_weights(ONE, made, RunFolder(tmp_path)) as state:
        assert len(list(tmp_path.iterdir())) == 1 and state.keys() == values.keys()
        assert all(torch.equal(state[n], v) and state[n].dtype == v.dtype for n, v in values.items())
        assert state["e"].data_ptr() == values["e"].data_ptr(), "what is whole stays where it is"
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_and_no_process_waiting(model, tmp_path, monkeypatch):
    made, values = model
    gathered, inner = [], subject._gathered
    monkeypatch.setattr(subject, "_gathered", lambda *given: (gathered.append(t) or t for t in inner(*given)))

    def full(file, parts, values):
        file.write_bytes(next(values).numpy().tobytes())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subject, "write_parts", full)
    with pytest.raises(ZooError, match="No space left"), subject.whole_weights(ONE, made, RunFolder(tmp_path)):
        raise AssertionError("there is nothing to save")
    assert len(gathered) == len(values) - 1 and not list(tmp_path.iterdir())
