"""DeepSpeed through accelerate: as one process trains, in checkpoints of our own; what it cannot do is refused."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from tests import killed_runs, two_processes_zero
from tests.test_two_processes import weights_of
from tests.train_builders import config, losses, recipe
from zoo.benches import processes_work
from zoo.registry import ZooError
from zoo.runs.folder import RunFolder
from zoo.runs.zero import ASKED, reduce_in_order, require_run_by_us, zero_plugin
from zoo.settings.parallel import ParallelConfig
from zoo.storage.atomic import remove
from zoo.training.loop import Run


def cut(place, name, to):
    """Copy a run as if it had been killed ahead of its last checkpoint."""
    folder = RunFolder(shutil.copytree(place / name, place / to))
    remove(folder.list_checkpoints()[-1])


def test_two_processes_train_as_one_and_go_on_anywhere(tmp_path):
    pytest.importorskip("deepspeed")
    common = "batch_size: 8, accumulate: 2, checkpoint_every: 1, lr: 0.001, clip: 0.5"
    stages = {"a": f"steps: 2, {common}, train: [projector]", "b": f"steps: 3, {common}"}
    words = recipe(tmp_path, stages)
    Run(config([*words, f"run.folder={tmp_path / 'one'}"])).train()
    cut(tmp_path, "one", "one_in_zero")
    with killed_runs.served():
        args = (two_processes_zero.main, tmp_path, words, [0, 1, 2], ["one_in_zero"])
        ended = killed_runs.call_in_two(tmp_path, *args)
    assert ended.code == 0, ended.said
    cut(tmp_path, "zero2", "zero_in_one")
    Run(config(["--config-dir", words[1], f"resume={tmp_path / 'zero_in_one'}"])).train()
    for name in ("zero0", "zero1", "zero2", "one_in_zero", "zero_in_one"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6), name
        for key, weight in weights_of(tmp_path / "one").items():
            assert torch.allclose(weights_of(tmp_path / name)[key], weight, atol=1e-5), f"{key} of {name}"
    for name in two_processes_zero.UNLIKE:
        one = processes_work.train(name, 2, ParallelConfig())
        for level in (1, 2):
            two = processes_work.Trained.load(tmp_path / f"{name}.{level}.0.pt")
            loss, weight = processes_work.differences(two, one)
            assert loss < 1e-6 and weight < 1e-5, (name, level)


@pytest.mark.parametrize("divides", [False, True])
def test_gradients_are_reduced_in_one_order_whatever_a_batch_has(divides):
    """As DeepSpeed calls it: a gradient that arises is announced, and the end of a pass is."""
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    reduced = []
    zero = SimpleNamespace(bit16_groups=[[a, b], [c]], partition_gradients=divides, use_grad_accum_attribute=False)
    zero.get_gradient_for_reduction = lambda parameter: parameter.grad
    zero.process_gradients = lambda parameter, number: reduced.append((number, parameter.grad.tolist()))
    zero.reduce_gradients = lambda **_: [
        zero.process_gradients(p, i) for i, g in enumerate(zero.bit16_groups) for p in g
    ]
    zero.overlapping_partition_gradients_reduce_epilogue = lambda: reduced.append("end")
    reduce_in_order(zero)
    for parameter, number in ((c, 1), (a, 0)):  # b has none
        parameter.grad = torch.full((2,), 3.0)
        if divides:
            zero.process_gradients(parameter, number)
    (zero.overlapping_partition_gradients_reduce_epilogue if divides else zero.reduce_gradients)()
    assert reduced == [(0, [3.0, 3.0]), (0, [0.0, 0.0]), (1, [3.0, 3.0]), *["end"] * divides]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3 leaves weights empty .* parallel.shard=fsdp2"),
        ({"bf16": {"enabled": True}}, "'bf16', which is precision and master_weights of the run"),
        ({"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel', which would train something else"),
        ({"gradient_allreduce_op": "sum"}, "'gradient_allreduce_op', which would train something else"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer', which is stages.<stage>.optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: it replaces"),
    ],
)
def test_what_the_loop_does_otherwise_is_refused(asked, message):
    allowed = {"stage": 2, "offload_optimizer": {"device": "none"}}
    plain = {"autotuning": {"enabled": False}, "gradient_allreduce_op": "mean"}
    require_run_by_us({"zero_optimization": allowed, "fp16": {"enabled": False}, **plain})
    with pytest.raises(ZooError, match=message):
        require_run_by_us(asked)


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv(ASKED, "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ZooError, match="pip install deepspeed, or choose DDP or FSDP2"):
        zero_plugin(ParallelConfig())
    assert zero_plugin(ParallelConfig(shard="fsdp2")) is None, "the config decides"


@pytest.mark.parametrize("name", ["tensor", "replicate"])
def test_groups_of_fsdp2_are_refused_where_the_launcher_asks_for_deepspeed(monkeypatch, name):
    monkeypatch.setenv(ASKED, "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ZooError, match=rf"parallel\.{name}=2 is for FSDP2, .* asks for DeepSpeed .*shard=fsdp2"):
        zero_plugin(ParallelConfig(**{name: 2}))
    assert zero_plugin(ParallelConfig(shard="fsdp2", **{name: 2})) is None
