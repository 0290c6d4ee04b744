"""What losses of several terms share: weights that warm up, names of divergences, what a mean is over."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.distill.matching.positions import Matched
from zoo.registry import Distiller, ZooError, unknown

DIVERGENCES = ("forward", "reverse", "jsd")


class Terms:
    """Weights of named losses, each rising linearly from 0 over the first share of a stage.

    Args:
        terms: loss -> (weight, share of the steps in [0, 1]).
    """

    def __init__(self, terms: Mapping[str, tuple[float, float]]) -> None:
        for name, (weight, warmup) in terms.items():
            if weight < 0:
                raise ZooError(f"The weight of {name} must be at least 0, got {weight}.")
            if not 0 <= warmup <= 1:
                raise ZooError(f"The warm-up of {name} is a share of the stage, in [0, 1], got {warmup}.")
        self.terms = dict(terms)
        self.weights = {name: weight for name, (weight, _) in terms.items()}

    def begin_step(self, step: int, steps: int) -> None:
        """Set the weights for optimiser step `step`, counted from 0, of `steps`."""
        for name, (weight, warmup) in self.terms.items():
            rising = warmup * steps
            self.weights[name] = weight * (min(1.0, (step + 1) / rising) if rising else 1.0)


class Weighed(Distiller):
    """What distillers of weighed terms share: the loop sets the step, and reads the weights."""

    terms: Terms

    def begin_step(self, step: int, steps: int) -> None:
        """Set the weights of the terms for optimiser step `step` of `steps`."""
        self.terms.begin_step(step, steps)

    @property
    def weights(self) -> dict[str, float]:  # type: ignore[override]
        """Of each loss, now."""
        return self.terms.weights


def beta_of(name: str, beta: float) -> float:
    """Return what `zoo.distill.losses.chunked` calls beta: 0 forward, 1 reverse, the option itself for jsd."""
    if name not in DIVERGENCES:
        raise unknown("divergence", name, DIVERGENCES)
    if name == "jsd" and not 0 < beta < 1:
        raise ZooError(f"beta of jsd must be in (0, 1), got {beta}; its ends are forward and reverse.")
    return {"forward": 0.0, "reverse": 1.0}.get(name, beta)


def check_divergence(divergence: str, beta: float, temperature: float, per: str) -> None:
    """Refuse options that no divergence from a teacher has.

    Raises:
        ZooError: one of them is none.
    """
    beta_of(divergence, beta)
    if not temperature > 0:
        raise ZooError(f"temperature must be more than 0, got {temperature}.")
    if per not in ("token", "answer"):
        raise unknown("per", per, ("token", "answer"))


def token_weights(matched: Matched, batch: Mapping[str, Any], per: str = "token") -> Tensor:
    """Weight each position (S,) so that a sum over them is a mean.

    Args:
        matched: with the answer that each position belongs to.
        batch: `num_labels`, what a sum over tokens is divided by; absent: the number of positions.
        per: token, or answer: an answer of one word counts as much as one of ten.
    """
    count = len(matched.rows)
    if per == "token":
        return torch.full((count,), 1.0 / float(batch.get("num_labels") or max(1, count)), device=matched.rows.device)
    assert matched.group is not None, "responses know their answers"
    _, member, sizes = matched.group.unique(return_inverse=True, return_counts=True)
    return 1.0 / (sizes[member].float() * max(1, len(sizes)))
