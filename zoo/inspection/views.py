"""One image after several pruners: the content of an X-ray, which its page and its picture show."""

from dataclasses import dataclass, field
from typing import Any

NONE = "none"  # the view without a pruner, with which all others are compared


@dataclass
class View:
    """One image after one pruner."""

    name: str
    grid: tuple[int, int]  # of the encoder
    layers: list[list[int]]  # for each layer of the LLM and each patch: index of its image token, -1 if dropped
    tokens: list[int]  # number of image tokens in each layer
    answer: str
    scores: list[float] | None = None  # of patches, by which a pruner before the LLM ranks
    layer_scores: dict[int, list[float | None]] = field(default_factory=dict)  # the same inside the LLM, by layer
    mixed: bool = False  # the projector mixes tokens, so tokens of a layer have no single patch
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether several patches share a token."""
        return len(set(self.layers[0]) - {-1}) < sum(t >= 0 for t in self.layers[0])

    @property
    def moments(self) -> list[int]:
        """Layers at which tokens change, and the first layer."""
        return [i for i, now in enumerate(self.layers) if i == 0 or now != self.layers[i - 1]]


@dataclass
class Xray:
    """All views of one image, and the image after the encoder's preprocessing."""

    image: Any  # PIL
    question: str
    model: str
    views: list[View]
    refused: dict[str, str] = field(default_factory=dict)  # pruner -> why it does not fit
