"""Run by test_tensor_parallel in all processes: two of them share each layer of the LLM."""

import gc
import json

import torch.distributed as dist

from tests.train_builders import config
from zoo.checking.devices import _Weights
from zoo.checking.plan import Plan
from zoo.runs import sharding
from zoo.settings.scale import Devices
from zoo.training.finish import save_model, score
from zoo.training.loop import Run


def main(words: list[str], fits: bool) -> None:
    """Train, save and score; where the layers do not fit, they are gathered as they run."""
    run = Run(config([*words, "parallel.tensor=2"]))
    run.train()
    for name in ("q_proj", "o_proj"):
        weight = run.model.llm.layers[0].self_attn.get_submodule(name).weight
        assert weight.to_local().numel() * dist.get_world_size() == weight.numel(), "it is not divided"
    plan = Devices(devices=dist.get_world_size(), tensor=2)
    planned = _Weights(run.model, run.stages["a"], Plan(slots={}), plan, run.parallel, "fp32")
    held = sum(getattr(p, "_local_tensor", p).nbytes for p in run.model.parameters())
    stated = sum(planned.shard(n) * planned.stored[n].itemsize for n in planned.first)
    assert held == stated if run.main else held <= stated, "the first process has the larger shares"
    save_model(run)
    sharding._fits = lambda *given: fits
    found = score(run, limit=2, baselines=True)
    if run.main:
        (run.folder.path / "answers.json").write_text(json.dumps([found.predictions, found.summary()]))
    run.close()
    del run, weight
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
