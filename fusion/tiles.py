"""Tiles of an image behind each other, with tokens of the text between them: SmolVLM's and Idefics3's, or InternVL's.

Nothing is learnt here: the model is told where a tile lies by words of the prompt. `grid` writes the row and column
before each tile and marks the overview, `joined` puts one pair of tokens around all tiles.

Paper: Laurencon et al., arXiv:2408.12637 (Idefics3), section 3.1; Chen et al., arXiv:2404.16821 (InternVL 1.5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.registry import Cut, ZooError, register, unknown

STYLES = ("joined", "grid")


@dataclass
class TilesConfig:
    style: str = "joined"  # joined: `begin`, all tiles, `end`; grid: `begin` and its place before each, `end` at last
    begin: str = ""  # token that stands before
    end: str = ""  # token that stands behind
    overview: str = "<global-img>"  # names the overview in a grid
    most: int = 12  # tiles of an image that the check counts with

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise unknown("style", self.style, STYLES)
        if self.most < 1:
            raise ZooError(f"most must be at least 1, got {self.most}.")


@register("layout", "tiles")
class Tiles(nn.Module):
    """Rows are images of their own to the encoder; here they stand in one run."""

    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset({"image_tokens"})
    destroys: frozenset[str] = frozenset()

    def __init__(self, config: TilesConfig, *, num_tokens: int) -> None:
        super().__init__()
        self.config, self.tokens = config, num_tokens
        self.given: dict[str, Any] = {"num_tokens": num_tokens}

    def num_tokens(self, n: int) -> int:
        """The most that an image may take."""
        return self.config.most * self.tokens

    def count(self, cut: Cut) -> int:
        """Count the tokens of an image that was cut so."""
        return cut.rows * self.tokens

    def text(self, cut: Cut, token: str) -> str:
        """What stands in the prompt for an image, `token` once for each of its tokens."""
        tile, begin, end = token * self.tokens, self.config.begin, self.config.end
        if cut.kind == "frame":
            frames = (f"{begin}{tile}{end}" for _ in range(cut.rows))
            return "\n".join(f"Frame{i}: {frame}" for i, frame in enumerate(frames, 1))
        if self.config.style == "joined":
            return begin + tile * cut.rows + end
        overview = f"{begin}{self.config.overview}{tile}{end}"
        rows, columns = cut.grid
        if cut.rows == 1:
            return overview
        if cut.rows != math.prod(cut.grid) + 1:
            raise ZooError(f"{cut.rows} tiles are no {rows} x {columns} and an overview.")
        lines = ("".join(f"{begin}<row_{r}_col_{c}>{tile}" for c in range(1, columns + 1)) for r in range(1, rows + 1))
        return "".join(f"{line}\n" for line in lines) + "\n" + overview

    def forward(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor:
        """Lay out rows (M, K, C) as (M * K, C)."""
        return tokens.flatten(0, 1)
