"""Tiles of an image one after the other, with text tokens around them: SmolVLM's and Idefics3's, or InternVL's.

There are no parameters: text tokens give the position of a tile. `grid` writes row and column before each tile and
marks the overview, `joined` puts one pair of tokens around all tiles. Of a video, `joined` numbers the frames; `grid`
writes their number and times in words, and each frame is an image that is not cut.

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
    # joined: `begin`, all tiles, `end`; grid: `begin` and row/column before each tile, then `end`
    style: str = "joined"
    begin: str = ""  # token before the tiles
    end: str = ""  # token after the tiles
    overview: str = "<global-img>"  # token that marks the overview in a grid
    most: int = 12  # largest number of tiles of an image, for the check's token counts

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise unknown("style", self.style, STYLES)
        require_at_least(1, most=self.most)


@register("layout", "tiles")
class Tiles(Layout, nn.Module):
    """Concatenates the tiles of an image; their positions are in the text of the prompt."""

    overview = -1

    def __init__(self, config: TilesConfig, *, num_tokens: int) -> None:
        super().__init__()
        self.config, self.tokens = config, num_tokens
        self.row_tokens = num_tokens
        self.given: dict[str, Any] = {"num_tokens": num_tokens}
        self.spells = config.style == "grid"

    def num_tokens(self, n: int) -> int:
        """Return the count of an image with `most` tiles."""
        return self.config.most * self.tokens

    def count(self, cut: Cut) -> int:
        """Count the tokens of an image with this cut."""
        return cut.rows * self.tokens

    def text(self, cut: Cut, token: str) -> str:
        """Write the prompt's text for an image, with `token` once for each image token."""
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
            raise ZooError(f"{cut.rows} tiles are not a grid of {rows} x {columns} and an overview.")
        lines = ("".join(f"{begin}<row_{r}_col_{c}>{tile}" for c in range(1, columns + 1)) for r in range(1, rows + 1))
        return "".join(f"{line}\n" for line in lines) + "\n" + overview

    def spell(self, cut: Cut, token: str) -> str:
        """Write the prompt's text for a video, with `token` once per frame, in the words SmolVLM was trained on."""
        many, length = in_words(cut.rows), str(timedelta(seconds=int(cut.duration)))
        text = f"You are provided the following series of {many} frames from a {length} [H:MM:SS] video.\n"
        for time in cut.times:
            text += f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{token}"
        return text + "\n\n"

    def forward(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor:
        """Join rows (M, K, C) to one sequence (M * K, C)."""
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
