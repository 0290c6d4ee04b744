"""Tiles of an image behind each other, with tokens of the text between them: SmolVLM's and Idefics3's, or InternVL's.

Nothing is learnt here: the model is told where a tile lies by words of the prompt. `grid` writes the row and column
before each tile and marks the overview, `joined` puts one pair of tokens around all tiles. Of a video, `joined` numbers
the frames; `grid` says in words how many there are and when each was seen, every frame an image that is not cut.

Paper: Laurencon et al., arXiv:2408.12637 (Idefics3), section 3.1; Marafioti et al., arXiv:2504.05299 (SmolVLM), for
videos in words; Chen et al., arXiv:2404.16821 (InternVL 1.5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import Tensor, nn

from zoo.registry import Cut, Layout, ZooError, register, require_at_least, unknown

STYLES = ("joined", "grid")
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


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
        require_at_least(1, most=self.most)


@register("layout", "tiles")
class Tiles(Layout, nn.Module):
    """Rows are images of their own to the encoder; here they stand in one run."""

    def __init__(self, config: TilesConfig, *, num_tokens: int) -> None:
        super().__init__()
        self.config, self.tokens = config, num_tokens
        self.row_tokens = num_tokens
        self.given: dict[str, Any] = {"num_tokens": num_tokens}
        self.spells = config.style == "grid"

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

    def spell(self, cut: Cut, token: str) -> str:
        """What stands in the text for a video, `token` once for each frame; SmolVLM learnt from these very words."""
        many, length = in_words(cut.rows), str(timedelta(seconds=int(cut.duration)))
        text = f"You are provided the following series of {many} frames from a {length} [H:MM:SS] video.\n"
        for time in cut.times:
            text += f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{token}"
        return text + "\n\n"

    def forward(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor:
        """Lay out rows (M, K, C) as (M * K, C)."""
        return tokens.flatten(0, 1)


def in_words(n: int) -> str:
    """A number in English words; of 1000 and more in digits."""
    if n < 20:
        return _SMALL[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"-{_SMALL[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{_SMALL[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")
    return str(n)
