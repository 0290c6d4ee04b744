"""Shared by losses of several terms: weights with warm-up, names of divergences, weights of positions."""

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
    """Mixin of distillers with weighted terms: the training loop sets the step and reads the weights."""

    terms: Terms

    def begin_step(self, step: int, steps: int) -> None:
        """Set the weights of the terms for optimiser step `step` of `steps`."""
        self.terms.begin_step(step, steps)

    @property
    def weights(self) -> dict[str, float]:  # type: ignore[override]
        """Weight of each loss in the current step."""
        return self.terms.weights


def beta_of(name: str, beta: float) -> float:
    """Return beta of `zoo.distill.losses.chunked`: 0 for forward, 1 for reverse, the option itself for jsd."""
    if name not in DIVERGENCES:
        raise unknown("divergence", name, DIVERGENCES)
    if name == "jsd" and not 0 < beta < 1:
        raise ZooError(f"beta of jsd must be in (0, 1), got {beta}; its ends are forward and reverse.")
    return {"forward": 0.0, "reverse": 1.0}.get(name, beta)


def check_divergence(divergence: str, beta: float, temperature: float, per: str) -> None:
    """Check the options of a divergence.

    Raises:
        ZooError: one is out of range or unknown.
    """
    beta_of(divergence, beta)
    if not temperature > 0:
        raise ZooError(f"temperature must be more than 0, got {temperature}.")
    if per not in ("token", "answer"):
        raise unknown("per", per, ("token", "answer"))


def why_live(temperature: float) -> str:
    """Return why a stored teacher has no probabilities of a temperature; empty: it has."""
    if temperature == 1.0:
        return ""
    return f"A stored teacher's probabilities are those of temperature 1: set temperature=1, not {temperature}"


def token_weights(matched: Matched, batch: Mapping[str, Any], per: str = "token") -> Tensor:
    """Weight each position (S,) so that a sum over them is a mean.

    Args:
        matched: with the answer of each position.
        batch: `num_labels`, the divisor of a sum over tokens; absent: the number of positions.
        per: token, or answer: all answers have the same weight, whatever their length.
    """
    count = len(matched.rows)
    if per == "token":
        return torch.full((count,), 1.0 / float(batch.get("num_labels") or max(1, count)), device=matched.rows.device)
    assert matched.group is not None, "responses come with the index of their answer"
    _, member, sizes = matched.group.unique(return_inverse=True, return_counts=True)
    return 1.0 / (sizes[member].float() * max(1, len(sizes)))
