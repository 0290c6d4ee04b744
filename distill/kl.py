"""Distil the distribution of every answer token: forward or reverse KL, or the generalised Jensen-Shannon divergence.

Paper: Hinton et al., arXiv:1503.02531 (forward); Gu et al., arXiv:2306.08543 (reverse);
Agarwal, arXiv:2306.13649 (JSD).
Only on answers of the data: nothing is sampled from the student. The gradient is that of the divergence, without
Hinton's factor temperature^2. Optionally, hidden states of chosen layers are compared too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.distill.losses.chunked import divergence
from zoo.distill.matching.positions import match_responses, shared_vocab
from zoo.distill.matching.terms import Terms, Weighed, beta_of, check_divergence, token_weights, why_live
from zoo.registry import IGNORE_INDEX, ZooError, register


@dataclass
class KLConfig:
    divergence: str = "forward"  # forward: KL(teacher || student); reverse: KL(student || teacher); jsd
    beta: float = 0.5  # of jsd, in (0, 1): share of the teacher in the mixture
    temperature: float = 1.0  # of both models
    weight: float = 1.0  # of the loss
    warmup: float = 0.0  # share of the stage over which the weight rises from 0, in [0, 1]
    per: str = "token"  # token: the mean over tokens; answer: over answers of the mean over an answer's tokens
    # student's layer -> teacher's, -1 the last; empty: none
    hidden_layers: dict[int, int] = field(default_factory=dict)
    hidden_weight: float = 1.0  # of the loss on hidden states
    hidden_warmup: float = 0.0  # share of the stage over which it rises from 0

    def __post_init__(self) -> None:
        self.terms()
        check_divergence(self.divergence, self.beta, self.temperature, self.per)

    def terms(self) -> Terms:
        return Terms(
            {"kl": (self.weight, self.warmup)}
            | ({"hidden": (self.hidden_weight, self.hidden_warmup)} if self.hidden_layers else {})
        )


@register("distiller", "kl")
class KL(Weighed):
    """The loss is called `kl`; that on hidden states, 1 - cosine averaged over layers and positions, `hidden`."""

    def __init__(self, config: KLConfig) -> None:
        self.config, self.terms = config, config.terms()
        self.beta = beta_of(config.divergence, config.beta)
        self.layers = {int(k): int(v) for k, v in config.hidden_layers.items()}
        hidden = {"student.hidden", "teacher.hidden"} if self.layers else set()
        self.needs = frozenset({"teacher.response", *hidden})
        self.equal_widths = bool(self.layers)  # student and teacher must be equally wide; read by the check
        self.live_only = why_live(config.temperature)
        self.per_label = frozenset({"kl", "hidden"}) if config.per == "token" else frozenset()

    def __call__(self, student: Any, teacher: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compare the predictions of labels.

        Args:
            student: its `last_hidden_state` (B, T, C) and `labels` (B, T).
            teacher: the same of the teacher, or None if the batch holds its stored predictions.
            batch: `num_labels`, the divisor of sums; absent: the number of labels of this batch.
        """
        matched = match_responses(student, teacher, batch)
        weights = token_weights(matched, batch, self.config.per)  # (S,)
        losses: dict[str, Tensor] = {}
        if self.weights["kl"]:
            losses["kl"] = divergence(
                student.llm,
                matched.rows,
                matched.target,
                beta=self.beta,
                temperature=self.config.temperature,
                vocab_size=shared_vocab(student, teacher, batch),
                weights=weights,
            )
        if self.layers and self.weights["hidden"]:
            losses["hidden"] = self._hidden(student, teacher, weights)
        return losses

    def _hidden(self, student: Any, teacher: Any, weights: Tensor) -> Tensor:
        """1 - cosine between hidden states of paired layers, at positions that predict labels."""
        if teacher is None:
            raise ZooError("A stored teacher has no hidden states: leave hidden_layers empty, or use a live teacher.")
        total = weights.new_zeros(())
        for ours, theirs in self.layers.items():
            x, y = _layer(student, ours, "student"), _layer(teacher, theirs, "teacher")  # (S, C)
            y = y.to(x.device)
            total = total + ((1 - F.cosine_similarity(x.float(), y.float(), dim=-1)) * weights).sum()
        return total / len(self.layers)


def _layer(seen: Any, number: int, who: str) -> Tensor:
    states = seen.hidden_states  # of the embedding and of each layer
    if not -len(states) < number < len(states):
        raise ZooError(f"hidden_layers names layer {number} of the {who}, which has {len(states) - 1}.")
    state, where = states[number], seen.labels[:, 1:] != IGNORE_INDEX
    if state.shape[1] != seen.labels.shape[1]:
        raise ZooError(f"Layer {number} of the {who} has other positions: a pruner inside the LLM drops some after it.")
    return torch.as_tensor(state[:, :-1][where])
