"""Two processes train as one does: adapters with idle experts, distillers, rows of text alone; with DDP and FSDP2."""

import pytest
import torch

from tests import two_processes_muon
from tests.killed_runs import SERVER, call_in_two, served
from zoo.benches import processes_work as work
from zoo.settings.parallel import ParallelConfig

STEPS = 3  # `zoo bench processes` takes ten, with all adapters and distillers


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of each way to share the model, with what became of each composition; all of one start."""
    place = tmp_path_factory.mktemp("processes")
    with served():
        for shard in ("none", "fsdp2"):
            children = work.start(2, place / shard, work.QUICK, STEPS, ParallelConfig(shard=shard), SERVER)
            for child in children:
                child.join(120)
            hang = [child.kill() for child in children if child.exitcode is None]
            assert not hang and [c.exitcode for c in children] == [0, 0], shard
    return place


@pytest.mark.parametrize("name", work.QUICK)
def test_two_processes_train_as_one(ended, name):
    one = work.train(name, STEPS, ParallelConfig())
    for shard in ("none", "fsdp2"):
        two = work.Trained.load(ended / shard / f"{work.file_name(name)}.pt")
        loss, weight = work.differences(two, one)
        assert loss < 1e-6 and weight < 1e-5, shard


def test_a_bias_of_keys_has_no_gradient_but_rounding():
    """VLoRA has such biases, and processes differ in them: they change nothing that the model computes."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    out = attention(x, x, x)[0]
    out.square().sum().backward()
    query, key, value = attention.in_proj_bias.grad.abs().view(3, 16).amax(1).tolist()
    assert key < 1e-12 * min(query, value)
    with torch.no_grad():
        attention.in_proj_bias[16:32] += 1.0
    assert torch.allclose(attention(x, x, x)[0], out, atol=1e-12)
    kept = work.with_gradient("a.in_proj_bias", torch.arange(48))
    assert kept.tolist() == [*range(16), *range(32, 48)]


def test_muon_works_on_each_matrix_once(tmp_path):
    with served():
        ended = call_in_two(tmp_path, two_processes_muon.main)
    assert ended.code == 0, ended.said
