"""Run by test_zero in both of two processes: training by DeepSpeed, stage by stage of ZeRO, and going on."""

import gc
import os
from pathlib import Path

import torch.distributed as dist

from tests.train_builders import config
from zoo.runs.zero import ASKED, Zero
from zoo.training.loop import Run


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
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
