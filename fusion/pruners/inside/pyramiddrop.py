"""PyramidDrop: drop image tokens in stages, by how much the question would attend to them in the layer behind each cut.

Paper: Xing et al., arXiv:2410.17247 (CVPR 2025). The LLM is cut into stages. Before the first layer of each, all tokens
that are left are ranked by the attention that the token in front of the answer would pay them in that layer: with its
input norm, queries and keys at its input before anything is dropped, over all keys, the mean over heads. A fixed share
of the tokens that ENTERED the LLM goes on. Training-free; also used in training, where in a dialog of several turns the
tokens in front of each answer vote together. Ranking takes no gradient.

Where we differ from the public code: grouped keys, padding on either side and any attention kernel work, where it ranks
with a mask L x L; several images of a sample, crops and frames are one set with one budget, where it takes the count of
another image; at least one token stays, and shares are rounded as those of other pruners (`as_released`: rounded down,
possibly to none); of equal scores the first is kept; a sample without an answer is ranked by its last token, where
training keeps all of it. It numbers positions anew from each cut on, which is `positions=dense` of a model. In a dialog
of several turns an earlier answer is read on tokens that later questions voted for; `votes=last` is free of that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.inside.attention_tap import AttentionInputs
from zoo.fusion.pruners.inside.dropper import Dropper, DropsInside
from zoo.registry import Preset, ZooError, register, unknown

RELEASED = (8, 16, 24)  # layers that begin a stage, of 32


@dataclass
class PyramidDropConfig:
    keep_ratio: float = 0.5  # share of the image tokens of a stage that go on to the next, in (0, 1]
    layers: list[int] = field(default_factory=list)  # that begin a stage, from 1 on; empty: 8, 16, 24 of 32, scaled
    ratios: list[float] = field(default_factory=list)  # of tokens that entered, by stage; empty: powers of keep_ratio
    votes: str = "turns"  # turns (in front of each answer, in training) | last (prompt token) | text | alive
    reads: str = "behind"  # attention of the layer behind the cut | before it (as FastV)
    as_released: bool = False  # counts rounded down, possibly to 0

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ZooError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}.")
        for name, allowed in (("votes", ("turns", "last", "text", "alive")), ("reads", ("behind", "before"))):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if any(a >= b for a, b in pairwise([0, *self.layers])):
            raise ZooError(f"layers must ascend from 1 on, got {list(self.layers)}.")
        if any(not 0 <= b <= a for a, b in pairwise([1.0, *self.ratios])):
            raise ZooError(f"ratios must be in [0, 1] and must not grow, got {list(self.ratios)}.")
        if self.ratios and len(self.ratios) != (len(self.layers) or len(RELEASED)):
            raise ZooError(f"ratios must be one for each stage, got {list(self.ratios)}.")


@register("pruner", "pyramiddrop")
class PyramidDrop(DropsInside, nn.Module):
    """Adds no parameters, and changes nothing before the LLM."""

    presets = {
        "llava15": Preset(
            {"layers": [8, 16, 24], "keep_ratio": 0.5, "as_released": True},
            "the release's scripts for LLaVA-1.5 and NeXT, 32 layers: 270 of 576 tokens in the mean of the layers",
        ),
        "llava15_64": Preset(
            {"layers": [2, 8, 16], "keep_ratio": 0.19, "as_released": True},
            "the author's answer in issue 29 of the release: 63 of 576 tokens in the mean of 32 layers",
        ),
    }

    def __init__(self, config: PyramidDropConfig) -> None:
        super().__init__()
        self.config = config

    def stages(self, num_layers: int) -> dict[int, float]:
        """Return the share of the tokens that entered by the first layer of each stage that is shorter."""
        c = self.config
        layers = c.layers or [max(1, round(num_layers * layer / 32)) for layer in RELEASED]
        ratios = c.ratios or [c.keep_ratio ** (i + 1) for i in range(len(layers))]
        if c.layers and layers[-1] >= num_layers:
            raise ZooError(f"layers must be below the depth of the LLM, {num_layers}, got {list(layers)}.")
        # In an LLM of few layers stages may coincide or lie behind it: the last of them holds.
        found = {layer: ratio for layer, ratio in zip(layers, ratios, strict=True) if layer < num_layers}
        before = dict(zip(found, [1.0, *found.values()], strict=False))
        return {layer: ratio for layer, ratio in found.items() if ratio < before[layer]}

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens in each layer, of `n` that enter the LLM."""
        stages, counts = self.stages(num_layers), [n]
        for layer in range(1, num_layers):
            counts.append(int(self._count(torch.tensor(n), stages[layer])) if layer in stages else counts[-1])
        return counts

    def attach(self, llm: Any) -> None:
        """Register the dropper's hooks on the LLM."""
        stages = self.stages(llm.num_layers)
        how: dict[str, Any] = {"reads": self.config.reads, "votes": self.config.votes}
        after = [layer - 1 for layer in stages]
        self.drop_by(Dropper(llm, "pruner 'pyramiddrop'", after, partial(self._budget, stages), self._rank, **how))

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the FLOPs of ranking one prompt with `tokens` in each layer: keys, a query and its row, at each cut."""
        rows = sum(2 * tokens[layer - 1] * heads * (head_dim + 1) for layer in self.stages(len(tokens)))
        read = self.dropper is not None and self.config.reads == "behind"
        return rows + (self.dropper.reading_flops(tokens) if read and self.dropper is not None else 0)

    def _budget(self, stages: Mapping[int, float], layer: int, total: Tensor) -> Tensor:
        return self._count(total, stages[layer + 1])

    def _count(self, total: Tensor, ratio: float) -> Tensor:
        kept = total.double() * ratio
        return kept.long() if self.config.as_released else (kept + 0.5).long().clamp(min=1)

    def _rank(self, given: AttentionInputs) -> Tensor:
        """Score the positions of a layer by the attention of the voters, the mean over heads: (B, L)."""
        return given.voted()
