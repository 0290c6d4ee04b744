"""The forward KL of two heads, naive and in chunks: what `zoo bench distill` compares.

To see its memory, it is started anew:

    python -m zoo.benches.divergence naive|chunked <positions> <vocabulary> <width>

prints, in MB, how far the memory of a fresh process rises while the loss and its gradients are computed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.distill.losses.chunked import Live, divergence
from zoo.registry import LinearHead

# Blocks above this come from the system and go back at once, so that the peak is what was needed, not what stayed.
MMAP_THRESHOLD = 1 << 20


def inputs(positions: int, vocab: int, width: int, device: torch.device | None = None) -> SimpleNamespace:
    """Hidden states and heads of student and teacher, with logits of a natural size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device or "cpu")

    weight, other = (normal(vocab, width) * 2 * width**-0.5 for _ in range(2))
    rows, theirs = normal(positions, width), normal(positions, width)
    return SimpleNamespace(
        rows=rows.requires_grad_(), weight=weight.requires_grad_(), theirs=theirs, other=other, vocab=vocab
    )


def naive(x: Any) -> Tensor:
    """Both logits in full, softmax in float32."""
    student = F.log_softmax(F.linear(x.rows, x.weight).float(), -1)  # (S, V)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(x.theirs, x.other).float(), -1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def chunked(x: Any) -> Tensor:
    """Ours."""
    llm = SimpleNamespace(vocab_size=x.vocab, linear_head=lambda: LinearHead(x.weight))
    return divergence(llm, x.rows, Live(x.theirs, lambda h: F.linear(h, x.other))) / len(x.rows)


WAYS: dict[str, Callable[[Any], Tensor]] = {"naive": naive, "chunked": chunked}


def step(way: str, x: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients."""
    x.rows.grad = x.weight.grad = None
    loss = WAYS[way](x)
    loss.backward()
    return loss.detach(), x.rows.grad, x.weight.grad


def peak(way: str, positions: int, vocab: int, width: int) -> float:
    """MB that a fresh process needs above its inputs; on a CUDA device, that its allocator hands out."""
    if torch.cuda.is_available():
        x = inputs(positions, vocab, width, torch.device("cuda"))
        step(way, x)
        x.rows.grad = x.weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(way, x)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, "-m", "zoo.benches.divergence", way, str(positions), str(vocab), str(width)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["peak"])


def _memory(what: str) -> float:
    """MB of this process: VmRSS now, or VmHWM at most. What getrusage tells is the parent's peak as well."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(what))) / 1024


def _main(way: str, positions: int, vocab: int, width: int) -> None:
    x = inputs(positions, vocab, width)
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins again
    before = _memory("VmRSS")
    step(way, x)
    print(json.dumps({"peak": max(0.0, _memory("VmHWM") - before)}))


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:5]))
