"""FastV: from an early layer of the LLM on, keep the image tokens that the last prompt token attends to most.

Paper: Chen et al., arXiv:2403.06764. A baseline: scores are the attention of the last prompt token in the layer before
the cut, averaged over heads.

Where we differ from the public code: the row of attention is computed beside the fused kernel, so no layer needs eager
attention; a batch may hold unlike samples; in training the prompt ends at the first label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.inside.attention_tap import AttentionInputs
from zoo.fusion.pruners.inside.dropper import Dropper, DropsInside
from zoo.registry import Preset, ZooError, register


@dataclass
class FastVConfig:
    keep_ratio: float = 0.5  # share of the image tokens kept, in (0, 1]
    layer: int = 2  # first layer with fewer tokens (K), counted from 0; at least 1
    renumber: bool = True  # follow positions=dense of the model; false: tokens keep their positions, as the public code

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ZooError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}.")
        if self.layer < 1:
            raise ZooError(f"layer must be at least 1, the layer before it is scored, got {self.layer}.")


@register("pruner", "fastv")
class FastV(DropsInside, nn.Module):
    """Training-free; adds no parameters, and changes nothing before the LLM."""

    presets = {
        "k2_r50": Preset({"layer": 2, "keep_ratio": 0.5}, "the release: K=2, R=50 %"),
        "k2_r75": Preset({"layer": 2, "keep_ratio": 0.25}, "the release: K=2, R=75 %"),
        "k2_r25": Preset({"layer": 2, "keep_ratio": 0.75}, "the release: K=2, R=25 %"),
        "k3_r50": Preset({"layer": 3, "keep_ratio": 0.5}, "the release's lmms-eval table: K=3, R=50 %"),
    }

    def __init__(self, config: FastVConfig) -> None:
        super().__init__()
        self.config = config

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens in each layer, of `n` that enter the LLM."""
        left = int(self.budget(0, torch.tensor(n, device="cpu")))
        return [n if layer < self.config.layer else left for layer in range(num_layers)]

    def attach(self, llm: Any) -> None:
        """Register the dropper's hooks on the LLM."""
        after = [] if self.config.keep_ratio == 1 else [self.config.layer - 1]
        how: dict[str, Any] = {"renumbers": self.config.renumber}
        self.drop_by(Dropper(llm, "pruner 'fastv'", after, self.budget, self.importance, **how))

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the FLOPs of scoring one prompt with `tokens` in each layer: one row of attention."""
        return 0 if self.config.keep_ratio == 1 else 2 * tokens[self.config.layer - 1] * heads * (head_dim + 1)

    def budget(self, layer: int, total: Tensor) -> Tensor:
        """Count the image tokens kept of `total`: the rounded share, at least one."""
        return (total * self.config.keep_ratio + 0.5).long().clamp(min=1)

    def importance(self, given: AttentionInputs) -> Tensor:
        """Score the positions of a layer by the attention of the last prompt token, the mean over heads: (B, L)."""
        return given.voted()
