"""How the small models of the claims train: AdamW, a clipped gradient, warm-up, then a cosine."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def train(
    parameters: Iterable[nn.Parameter],
    steps: int,
    loss: Callable[[], Tensor],
    *,
    rate: float = 2e-3,
    warmup: int = 0,
    last: float = 0.0,
    decay: float = 0.01,
    at: Callable[[int], None] = lambda step: None,
) -> None:
    """Take `steps` steps on what `loss` returns.

    Args:
        parameters: that learn.
        loss: draws a batch and computes its loss.
        rate: peak learning rate.
        warmup: steps over which it rises.
        last: rate at the end as a share of the peak.
        decay: weight decay.
        at: called with the number of steps done.
    """
    learning = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=decay, fused=True)
    for step in range(steps):
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
        factor = (step + 1) / warmup if step < warmup else last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss().backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        at(step + 1)


class Parts:
    """Scores a model at a quarter, a half and the whole of its steps: `found` has 4, 2 and 1 -> the score.

    Args:
        steps: of the training.
        score: of the model as it is.
    """

    def __init__(self, steps: int, score: Callable[[], Any]) -> None:
        self.steps, self.score = steps, score
        self.found: dict[int, Any] = {}

    def __call__(self, done: int) -> None:
        """To be called with the number of steps done."""
        parts = [part for part in (4, 2, 1) if done == self.steps // part]
        if parts:
            self.found |= dict.fromkeys(parts, self.score())
