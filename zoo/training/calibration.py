"""Batches of a stage for adapters that begin from data: EVA and CorDA read activations ahead of the first step.

Every process runs the same batches, those that one process alone would get first, so that the result does not depend on
the number of processes, and a run that is killed before its first checkpoint begins again with the same values.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from zoo.composed.outputs import LOSS_ALONE
from zoo.runs.batches import Batches
from zoo.runs.checkpoint import tensors_of
from zoo.runs.order import ShardPosition
from zoo.settings.stage import Stage
from zoo.storage.precision import autocast
from zoo.text.batch import TEACHER_ROWS, to_device
from zoo.training.step import Engine, reseed


def begins_in(name: str, stages: Mapping[str, Stage]) -> int:
    """The first stage in which an adapter acts: one that is detached in the first n stages begins in stage n."""
    return sum(name in stage.detach for stage in stages.values())


def keep_beginning(run: Any, name: str) -> None:
    """Have checkpoints hold an adapter's weights from now on, also where no stage trained them yet.

    They are made from data, or from weights that may train meanwhile: a resumed run would not make the same ones.

    Args:
        run: `zoo.training.loop.Run`.
        name: of the adapter.
    """
    named = {n for n, t in tensors_of(run.model).items() if isinstance(t, torch.nn.Parameter)}
    own = {f"model.{n}" for n in named if run.model.part_of(n) == f"adapter.{name}"}
    run.progress.trained = sorted({*run.progress.trained, *own})


def calibrate_adapters(run: Any, index: int, engine: Engine, options: Mapping[str, Any]) -> None:
    """Let the adapters that begin in this stage read its first batches, where they ask for them.

    Args:
        run: `zoo.training.loop.Run`.
        index: of the stage.
        engine: of the stage, before its first step.
        options: of the stage's `Batches`.
    """
    for name, adapter in run.model.adapter.items():
        count = adapter.passes_first() if begins_in(name, run.stages) == index else 0
        if not count:
            continue
        stage, mix = engine.stage, run.data.mix(engine.stage, run.cfg.seed * 1000 + index)
        batches = Batches(mix, run.processor, stage, engine.steps, ShardPosition(), **{**options, "teacher": None})
        made = (batches[j]["batch"] for j in range(min(count, len(batches))))
        given = [{k: v for k, v in b.items() if k != TEACHER_ROWS} for b in made if b is not None]
        run.display.note(f"adapter {name}: reads activations of {len(given)} batches")
        reseed(run.cfg.seed, index, -5)
        run.model.eval()
        adapter.calibrate([partial(_pass, run.model, batch, engine) for batch in given])
        for tensor in [*adapter.parameters(), *adapter.buffers(), *adapter.adapter_state_dict().values()]:
            _same_everywhere(tensor)
        keep_beginning(run, name)
        engine.resume_training()


@torch.no_grad()
def _pass(model: Any, batch: Mapping[str, Any], engine: Engine) -> None:
    with autocast(engine.precision, engine.device):
        model(**to_device(batch, engine.device), **LOSS_ALONE)


def _same_everywhere(tensor: torch.Tensor) -> None:
    """Send the first process's values to the others: on unlike devices, sums may differ in their last bit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and not hasattr(tensor, "full_tensor"):
        torch.distributed.broadcast(tensor.detach(), 0)
