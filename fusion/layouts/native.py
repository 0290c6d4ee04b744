"""Images that keep their shapes: each has as many tokens as its grid, and positions by time, row and column.

Paper: Wang et al., arXiv:2409.12191 (Qwen2-VL), M-RoPE. An image of h x w tokens that begins at position c has its
token (i, j) at (c, c + i, c + j), and what follows goes on at c + max(h, w). A video is a row for each pair of frames,
the k-th at time c + k, or with `tokens_per_second` (Qwen2.5-VL, arXiv:2502.13923) as much later as its seconds. With
`timestamps` (Qwen3-VL, arXiv:2511.21631) each pair is an image of its own, behind its time in words; in front of it in
the GLM-V family (arXiv:2507.01006), which writes it as images are (`clock`).

transformers 5 goes on behind a video as behind an image, also where it lasts longer than it is wide
(`after_video=side`); earlier versions went on at the largest position of any axis and one (`extent`).

Tokens that a pruner leaves keep the places of the whole grid. With dense positions, those of a pruned image are counted
one by one on all axes. An LLM with positions of one axis counts the tokens, or with kept positions the places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.registry import Cut, Layout, Pruner, ZooError, build, register, require_at_least, unknown

AFTER = ("side", "extent")


@dataclass(frozen=True)
class Clock:
    """How a family writes a pair of frames with its time."""

    words: str  # around `shown`, the pair: `mean` of its times, `start` that of its first frame, `second` a whole one
    as_image: bool = False  # with the placeholder of images, not of videos


CLOCKS = {
    "qwen3_vl": Clock("<{mean:.1f} seconds>{shown}"),
    "glm4v": Clock("{shown}{second}", as_image=True),
    "glm46v": Clock("{shown}{start:.1f} seconds", as_image=True),
}


@dataclass
class NativeConfig:
    tokens_per_second: float = 0.0  # positions of a second of video on the first axis; 0: one for each pair of frames
    timestamps: bool = False  # write the time in front of each pair of frames, which is then an image of its own
    clock: str = "qwen3_vl"  # with timestamps: the family whose words they are, qwen3_vl | glm4v | glm46v
    begin: str = "<|vision_start|>"  # with timestamps: in front of a pair
    end: str = "<|vision_end|>"  # with timestamps: behind a pair
    after_video: str = "side"  # where text goes on behind a video: side (its longer one) | extent (of all axes)

    def __post_init__(self) -> None:
        require_at_least(0, tokens_per_second=self.tokens_per_second)
        if self.after_video not in AFTER:
            raise unknown("after_video", self.after_video, AFTER)
        if self.clock not in CLOCKS:
            raise unknown("clock", self.clock, CLOCKS)


@register("layout", "native")
class Native(Layout, nn.Module):
    """Has no parameters. It joins rows of unlike length as they are.

    Args:
        config: how videos are placed and written.
        num_tokens: the most of a row.
        counted: the parts that tokens of a row go through, as plain values: `kind`, `node` and `given` of each.
    """

    native = True
    _parts: Sequence[Any]

    def __init__(self, config: NativeConfig, *, num_tokens: int, counted: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.config, self.most = config, num_tokens
        self.films_as_images = config.timestamps and CLOCKS[config.clock].as_image
        self.given: dict[str, Any] = {"num_tokens": num_tokens, "counted": [dict(c) for c in counted]}
        with torch.device("meta"):
            parts = [build(c["kind"], c["node"], **_tuples(c["given"])) for c in counted]
        object.__setattr__(self, "_parts", parts)  # they have no weights of the model
        self._known: dict[tuple[int, int], int] = {}

    def _left(self, grid: tuple[int, int]) -> int:
        """Count what pruners and projector leave of the tokens of a row with a grid."""
        if grid not in self._known:
            left, now = grid[0] * grid[1], grid  # of what is left, (0, 0) once tokens were dropped
            for part in self._parts:
                if now != (0, 0) and isinstance(part, Pruner) and (pooled := part.grid_of(now)) is not None:
                    left, now = pooled[0] * pooled[1], pooled
                elif (count := part.num_tokens(left)) != left:
                    left, now = count, (0, 0)
            self._known[grid] = left
        return self._known[grid]

    def num_tokens(self, n: int) -> int:
        """Count the most that an image may take."""
        return self.most

    def count(self, cut: Cut) -> int:
        """Count the tokens of an image with this grid that pruners and projector leave."""
        return cut.rows * self._left(_grid(cut))

    def _whole(self, cut: Cut) -> int:
        """Count the tokens that the encoder gives of an image."""
        return cut.rows * _grid(cut)[0] * _grid(cut)[1]

    def advance(self, cut: Cut, axes: int, dense: bool) -> int:
        """Count the positions from the first token of an image to what follows it."""
        if dense and self.count(cut) != self._whole(cut):
            return self.count(cut)
        if axes == 1:
            return self._whole(cut)
        last = int(self._times(cut)[-1]) + 1 if self.config.after_video == "extent" else 0
        return max(*_grid(cut), last)

    def coordinates(self, cut: Cut, places: Tensor, axes: int, dense: bool) -> Tensor:
        """Return the positions of the tokens of an image, from its first: (A, R * K).

        Args:
            cut: of the image.
            places: (R, K) of each token in the grid of its row.
            axes: A of the LLM, 1 or 3.
            dense: positions of pruned images count the tokens left.
        """
        rows, left = places.shape
        h, w = _grid(cut)
        if dense and left != h * w:
            return torch.arange(rows * left, device=places.device).expand(axes, -1)
        if axes == 1:
            return (torch.arange(rows, device=places.device)[:, None] * (h * w) + places).reshape(1, -1)
        time = torch.from_numpy(self._times(cut)).to(places.device)[:, None]
        return torch.stack([time.expand_as(places), places // w, places % w]).flatten(1)

    def _times(self, cut: Cut) -> np.ndarray:
        """Return the position of each row on the first axis, from that of the first row: (R,) int64."""
        rows = np.arange(cut.rows)
        if cut.kind != "frame" or not self.config.tokens_per_second:
            return rows
        # In float32, as transformers computes it: whole numbers are met or missed alike.
        step = np.float32(self.config.tokens_per_second) * np.float32(cut.interval)
        return (rows.astype(np.float32) * step).astype(np.int64)

    def pieces(self, cut: Cut) -> list[Cut]:
        """Divide a video into the pairs that are images of their own in the prompt."""
        if cut.kind != "frame" or not self.config.timestamps:
            return [cut]
        return [Cut(1, "frame", cut.size, patches=cut.patches)] * cut.rows

    def text(self, cut: Cut, token: str) -> str | None:
        """Write a video with timestamps: the time of each pair of its frames, and the pair as an image."""
        if cut.kind != "frame" or not self.config.timestamps:
            return None
        words = CLOCKS[self.config.clock].words
        shown = self.config.begin + token * (self.count(cut) // cut.rows) + self.config.end
        starts = cut.starts or cut.times
        times = zip(cut.times, starts, strict=True)
        return "".join(words.format(mean=m, start=s, second=int(s), shown=shown) for m, s in times)

    def forward(self, tokens: Tensor | Sequence[Tensor], cuts: Sequence[Cut]) -> Tensor:
        """Join the rows of each image (R, K, C) to one sequence (S, C)."""
        return torch.cat([rows.flatten(0, 1) for rows in tokens])


def _grid(cut: Cut) -> tuple[int, int]:
    if cut.patches == (0, 0):
        raise ZooError("layout 'native' takes images that keep their shapes, and this one has no grid of its own.")
    return cut.patches


def _tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
