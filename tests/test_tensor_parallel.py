"""Layers that processes share train, answer and are saved as whole ones; what reads whole layers is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import zoo
from tests import killed_runs, two_processes_tensor
from tests.test_two_processes import cut, weights_of
from tests.train_builders import config, losses, recipe
from zoo.cli import check_command
from zoo.evaluation.evaluate import evaluate
from zoo.registry import ZooError
from zoo.runs.processes import start_accelerator
from zoo.runs.tensor_parallel import clip_gradients, reader_of
from zoo.settings.config import compose
from zoo.settings.parallel import ParallelConfig
from zoo.training.loop import Run

# The rate is high, so that a gradient that is half of what it should be is seen; qwen3 has norms of heads.
STAGES = {"a": "steps: 3, batch_size: 8, checkpoint_every: 1, lr: 0.01, clip: 0.5, gradient_checkpointing: true"}
QWEN = ["llm.model_type=qwen3", "llm.num_kv_heads=2"]
FEW = "data.scenes.questions={exist: 1, color: 1, shape: 0, size: 0, count: 0, relation: 0, box: 1}"


def test_layers_in_halves_train_answer_and_are_saved_as_whole_ones(tmp_path):
    """On two processes; a checkpoint of them goes on on four, where FSDP2 divides further."""
    words = [*recipe(tmp_path, STAGES), *QWEN, FEW]
    alone = Run(config([*words, f"run.folder={tmp_path / 'one'}"]))
    alone.train()
    with killed_runs.served():
        for name, processes in (("two", 2), ("two_cut", 4)):
            begun = [*words, f"run.folder={tmp_path / name}"]
            run = begun if name == "two" else [*words[:2], f"resume={tmp_path / name}"]
            main = two_processes_tensor.main
            ended = killed_runs.call_in_two(tmp_path, main, run, name == "two", processes=processes)
            assert ended.code == 0, ended.said
            if name == "two":
                cut(tmp_path, "two")
    whole = weights_of(tmp_path / "one")
    for name in ("two", "two_cut"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6), name
        for key, weight in weights_of(tmp_path / name).items():
            assert torch.allclose(weight, whole[key], atol=1e-5), f"{key} of {name}"
        saved, processor = zoo.load(f"dir:{tmp_path / name}", device="cpu")
        again = evaluate(saved, processor, alone.data.evaluation, limit=2)
        assert json.loads((tmp_path / name / "answers.json").read_text()) == [again.predictions, again.summary()]


REFUSED = {
    "an adapter": (["adapter=[lora]"], r"parallel\.tensor=2 divides .* adapter 'lora' takes whole"),
    "a pruner inside": (["pruner=[fastv]", "llm.num_layers=3"], r"pruner 'fastv' scores image tokens by all"),
    "Muon": (["stages.a.optimizer=muon_adamw"], r"Stage 'a': Muon needs whole matrices"),
    "compilation": (["stages.a.compile=true"], r"Stage 'a': compile=true"),
    "a family": (["llm.model_type=gpt2"], r"no plan of tensor parallelism for GPT2LMHeadModel"),
    "experts": (["llm.model_type=mixtral", "llm.num_experts=2", "llm.top_k=1"], r"plan for Mixtral.* divides by "),
    "heads": (["llm.num_heads=1", "llm.num_kv_heads=1"], r"does not divide the 1 attention_heads"),
    "no shards": (["parallel.shard=none"], r"parallel\.tensor=2 is for parallel\.shard=fsdp2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_check_refuses_what_reads_whole_layers(tmp_path, what):
    words, message = REFUSED[what]
    with pytest.raises(ZooError, match=message):
        made = recipe(tmp_path, {"a": "steps: 1, batch_size: 4"})
        check_command.main(compose("check", [*made[2:], "parallel.tensor=2", *words], made[1]))


def test_processes_that_form_no_groups_are_refused():
    with pytest.raises(ZooError, match=r"parallel\.tensor=2 does not divide 1 process into"):
        start_accelerator("cpu", ParallelConfig(tensor=2))


def test_processes_that_share_layers_read_the_same():
    class Mesh:
        mesh_dim_names = ("replicate", "shard", "tensor")

        def __getitem__(self, name):
            assert name == "tensor"
            return SimpleNamespace(size=lambda: 2)

    of = [SimpleNamespace(torch_device_mesh=Mesh(), process_index=i, num_processes=4) for i in range(4)]
    assert [reader_of(a) for a in of] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert reader_of(SimpleNamespace(torch_device_mesh=None, process_index=3, num_processes=4)) == (3, 4)


def test_norms_of_gradients_on_unlike_meshes_are_those_of_whole_ones():
    """Of one process: each number counts once, whatever is divided, and plain tensors beside."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("shard", "tensor"))
        values = [torch.randn(5, 3), torch.randn(4), torch.randn(2, 2)]
        places = ([Shard(0), Shard(1)], [Shard(0), Replicate()])
        made = [torch.nn.Parameter(distribute_tensor(v, mesh, p)) for v, p in zip(values, places, strict=False)]
        made.append(torch.nn.Parameter(values[2].clone()))
        plain = [torch.nn.Parameter(v.clone()) for v in values]
        for p, q in zip(made, plain, strict=True):
            (p.sum() * 3).backward()
            (q.sum() * 3).backward()
        clip_gradients(made, 0.5)
        torch.nn.utils.clip_grad_norm_(plain, 0.5)
        for p, q in zip(made, plain, strict=True):
            assert torch.allclose(getattr(p.grad, "_local_tensor", p.grad), q.grad)
    finally:
        torch.distributed.destroy_process_group()
