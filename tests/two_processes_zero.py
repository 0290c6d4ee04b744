"""Run by test_zero in both of two processes: training by DeepSpeed, stage by stage of ZeRO, and going on."""

import gc
import os
from pathlib import Path

import torch.distributed as dist

from tests.train_builders import config
from zoo.benches import processes_work
from zoo.runs.zero import ASKED, Zero
from zoo.settings.parallel import ParallelConfig
from zoo.training.loop import Run

# Trained with a pass of text alone in one process: its gradients arise in another order, and those of a distiller's
# weights do not.
UNLIKE = ("no adapter", "dense")


def main(place: Path, words: list[str], levels: list[int], resumed: list[str]) -> None:
    """Train runs named `zero1`, ... from the start, and those of `resumed` from a checkpoint."""
    os.environ |= {ASKED: "true", "DS_ACCELERATOR": "cpu"}
    levels_run, inner = set(), Zero.backward
    Zero.backward = lambda self, loss: [levels_run.add(self.engine.zero_optimization_stage()), inner(self, loss)]
    chosen = [(level, [*words, f"run.folder={place / f'zero{level}'}"]) for level in levels]
    chosen += [(2, ["--config-dir", words[1], f"resume={place / name}"]) for name in resumed]
    for level, these in chosen:
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(level)
        run = Run(config(these))
        run.train()
        assert levels_run == {level}
        levels_run.clear()
        run.close()
    del run
    for level in (1, 2):
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(level)
        for name in UNLIKE:
            processes_work.train(name, 2, ParallelConfig()).save(place / f"{name}.{level}.{dist.get_rank()}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
