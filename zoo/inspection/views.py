"""One picture as pruners leave it: what the X-ray looks for, and its page and picture show."""

from dataclasses import dataclass, field
from typing import Any

NONE = "none"  # the view without a pruner, which all others are compared with


@dataclass
class View:
    """One picture as one pruner leaves it."""

    name: str
    grid: tuple[int, int]  # of the encoder
    layers: list[list[int]]  # for each layer of the LLM, for each patch: which image token it is in, -1 dropped
    tokens: list[int]  # image tokens that each layer sees
    answer: str
    scores: list[float] | None = None  # by which patches were ranked before the LLM
    layer_scores: dict[int, list[float | None]] = field(default_factory=dict)  # inside it, by layer
    mixed: bool = False  # the projector mixes tokens, so layers say nothing of single patches
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether several patches share a token."""
        return len(set(self.layers[0]) - {-1}) < sum(t >= 0 for t in self.layers[0])

    @property
    def moments(self) -> list[int]:
        """Layers at which something changes, the first among them."""
        return [i for i, now in enumerate(self.layers) if i == 0 or now != self.layers[i - 1]]


@dataclass
class Xray:
    """All views of one picture, and the picture as the encoder sees it."""

    image: Any  # PIL
    question: str
    model: str
    views: list[View]
    refused: dict[str, str] = field(default_factory=dict)  # pruner -> why it does not fit
