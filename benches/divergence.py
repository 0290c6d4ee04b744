"""The forward KL of two heads, naive and in chunks: what `zoo bench distill` compares."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benches.peak import forget_peak, in_process, memory
from zoo.distill.losses.chunked import LiveTeacher, divergence
from zoo.registry import LinearHead

# Blocks above this come from the system and go back at once, so that the peak is what was needed, not what stayed.
MMAP_THRESHOLD = 1 << 20


def inputs(positions: int, vocab: int, width: int, device: torch.device | None = None) -> SimpleNamespace:
    """Hidden states and heads of student and teacher, with logits of a natural size."""
    generator = torch.Generator(device or "cpu").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

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
    return divergence(llm, x.rows, LiveTeacher(x.theirs, lambda h: F.linear(h, x.other))) / len(x.rows)


WAYS: dict[str, Callable[[Any], Tensor]] = {"naive": naive, "chunked": chunked}


def step(way: str, x: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients."""
    x.rows.grad = x.weight.grad = None
    loss = WAYS[way](x)
    loss.backward()
    return loss.detach(), x.rows.grad, x.weight.grad


def peaks(positions: int, vocab: int, width: int) -> dict[str, float]:
    """MB that each way needs above its inputs: of a fresh process; on a CUDA device, that its allocator hands out."""
    sizes = (positions, vocab, width)
    if not torch.cuda.is_available():
        env = {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        return in_process("divergence", *sizes, **env)
    found = {}
    for way in WAYS:
        x = inputs(*sizes, torch.device("cuda"))
        step(way, x)
        x.rows.grad = x.weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(way, x)
        found[way] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def measure(positions: int, vocab: int, width: int) -> None:
    """Print in MB how far the memory of this process rises while the loss and its gradients are computed."""
    x, found = inputs(positions, vocab, width), {}
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))
    for way in reversed(WAYS):  # the smaller first
        x.rows.grad = x.weight.grad = None
        before = forget_peak()
        step(way, x)
        found[way] = max(0, memory("VmHWM") - before) / 2**20
    print(json.dumps(found))
