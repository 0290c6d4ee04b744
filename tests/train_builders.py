"""A run small enough for a test, in this process or in others, and what it logged."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo.runs.folder import RunFolder, read_metrics
from zoo.runs.saving import Saver

REPO = Path(__file__).resolve().parents[1]
RECIPE = """# @package _global_
defaults:
  - override /model: scenes_tiny
  - override /data: [scenes]
vision: {width: 16, heads: 2, depth: 1, layer: -1, image_size: 32, patch_size: 8}
llm: {hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 32}
tokenizer: {vocab_size: 320}
data: {scenes: {size: 32, scenes: 40, eval_scenes: 4, grid: 4}}
device: cpu
precision: fp32
stages:
"""


def recipe(place: Path, stages: Mapping[str, str], name: str = "tiny") -> list[str]:
    """Write a recipe with these stages (YAML in braces) into a config folder; returns the words that choose it."""
    folder = place / "conf" / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    body = "".join(f"  {stage}: {{{fields}}}\n" for stage, fields in stages.items())
    (folder / f"{name}.yaml").write_text(RECIPE + body, encoding="utf-8")
    return ["--config-dir", str(place / "conf"), f"recipe={name}", f"run.dir={place}"]


def config(words: list[str], *more: str) -> Any:
    """Compose the config of `zoo train <words>`."""
    from zoo.settings.config import compose

    return compose("train", [*words[2:], *more], words[1])


class _Killed(Exception):
    pass


def train_up_to(run: Any, at: int = 0) -> None:
    """Train a run up to the checkpoint behind step `at`, or the first one, and no further, as one that is killed."""
    inner = run._save

    def save(engine: Any) -> None:
        inner(engine)
        if not at or run.progress.global_step == at:
            raise _Killed

    run._save = save
    with pytest.raises(_Killed):
        run.train()


def start(words: list[str], *, processes: int = 1) -> subprocess.Popen:
    """Start `zoo train` with these words, on one process or under torchrun."""
    command = [sys.executable, "-m", "zoo.train"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["-m", "zoo.train"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *words], cwd=REPO, env=env, **pipe)


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss of a run's metrics; every step may be logged once only."""
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return {r["step"]: r["loss"] for r in rows}


def saved(place, named, optimizers=(), progress=None):
    """Save a checkpoint in one process, and return its folder."""
    folder, alone = RunFolder(place), SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    Saver(alone, folder, keep=2).save(1, named, optimizers, progress or {})
    return folder.list_checkpoints()[-1]
