"""A run small enough for a test, in this process or in others, and what it logged."""

import os
import subprocess
import sys
from pathlib import Path

from zoo.run_folder import read_metrics

REPO = Path(__file__).resolve().parents[1]
TINY = [
    "vision=timm",
    "vision.width=16",
    "vision.heads=2",
    "vision.depth=1",
    "vision.layer=-1",
    "vision.image_size=32",
    "vision.patch_size=8",
    "projector=mlp",
    "llm=hf",
    "llm.hidden_size=16",
    "llm.num_layers=1",
    "llm.num_heads=2",
    "llm.intermediate_size=32",
    "tokenizer.vocab_size=320",
    "data=[scenes]",
    "data.scenes.size=32",
    "data.scenes.scenes=40",
    "data.scenes.eval_scenes=4",
    "device=cpu",
    "precision=fp32",
]


def arguments(folder: Path, *more: str, recipe: str) -> list[str]:
    """Overrides of a tiny run in `folder`."""
    return [f"recipe={recipe}", *TINY, f"run.folder={folder}", f"run.dir={folder.parent}", *more]


def start(args: list[str], *, processes: int = 1, cwd: Path | None = None) -> subprocess.Popen:
    """Start `zoo train` with real arguments, on one process or under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*launcher, "-m", "zoo.train", *args], cwd=cwd or REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of a run's metrics."""
    return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
