"""Run by test_masters in both of two processes: a checkpoint of 16 bits that trains in halves, as FSDP2 keeps them."""

import gc
from pathlib import Path

import torch.distributed as dist

from tests.train_builders import config
from tests.two_processes_fsdp import SHARDED, halves
from zoo.storage.atomic import remove
from zoo.training.finish import save_model
from zoo.training.loop import Run


def train(place: Path, words: list[str], *, save: bool = False) -> None:
    run = Run(config(words, SHARDED, f"run.folder={place / 'run'}") if "resume=run" not in words else config(words))
    run.train()
    assert halves(run) > 10, "nothing is sharded"
    if save:
        save_model(run)
    run.close()
    del run
    gc.collect()
    dist.barrier()


def main(place: Path, words: list[str]) -> None:
    train(place, words[:-1])
    folder = place / "run" / "checkpoints"
    if dist.get_rank() == 0:
        remove(sorted(folder.glob("step-*"))[-1])  # as if it had been killed in the last stage
    dist.barrier()
    train(place, ["--config-dir", words[1], "resume=run"], save=True)
    dist.destroy_process_group()
