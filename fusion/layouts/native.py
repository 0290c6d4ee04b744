"""Images that keep their shapes: each has as many tokens as its grid, and positions by time, row and column.

Paper: Wang et al., arXiv:2409.12191 (Qwen2-VL), M-RoPE. An image of h x w tokens that begins at position c has its
token (i, j) at (c, c + i, c + j), and what follows goes on at c + max(h, w). A video is a row for each pair of frames,
the k-th at time c + k. transformers goes on behind it as behind an image, also where it lasts longer than it is wide.

Tokens that a pruner leaves keep the places of the whole grid. With dense positions, those of a pruned image are counted
one by one on all axes. An LLM with positions of one axis counts the tokens, or with kept positions the places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import Cut, Layout, ZooError, build, register


@dataclass
class NativeConfig:
    pass


@register("layout", "native")
class Native(Layout, nn.Module):
    """Has no parameters. It joins rows of unlike length as they are.

    Args:
        config: no options.
        num_tokens: the most of a row.
        counted: the parts that tokens of a row go through, as plain values: `kind`, `node` and `given` of each.
    """

    native = True

    def __init__(self, config: NativeConfig, *, num_tokens: int, counted: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.most = num_tokens
        self.given: dict[str, Any] = {"num_tokens": num_tokens, "counted": [dict(c) for c in counted]}
        with torch.device("meta"):
            parts = [build(c["kind"], c["node"], **_tuples(c["given"])) for c in counted]
        object.__setattr__(self, "_counts", [part.num_tokens for part in parts])  # they have no weights of the model
        self._known: dict[int, int] = {}

    def _left(self, n: int) -> int:
        """Count what pruners and projector leave of the `n` tokens of a row."""
        if n not in self._known:
            left = n
            for count in self._counts:
                left = count(left)
            self._known[n] = left
        return self._known[n]

    def num_tokens(self, n: int) -> int:
        """Count the most that an image may take."""
        return self.most

    def count(self, cut: Cut) -> int:
        """Count the tokens of an image with this grid that pruners and projector leave."""
        return cut.rows * self._left(_grid(cut)[0] * _grid(cut)[1])

    def whole(self, cut: Cut) -> int:
        """Count the tokens that the encoder gives of an image."""
        return cut.rows * _grid(cut)[0] * _grid(cut)[1]

    def advance(self, cut: Cut, axes: int, dense: bool) -> int:
        """Count the positions from the first token of an image to what follows it."""
        if dense and self.count(cut) != self.whole(cut):
            return self.count(cut)
        return max(_grid(cut)) if axes > 1 else self.whole(cut)

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
        time = torch.arange(rows, device=places.device)[:, None]
        if axes == 1:
            return (time * (h * w) + places).reshape(1, -1)
        return torch.stack([time.expand_as(places), places // w, places % w]).flatten(1)

    def forward(self, tokens: Tensor | Sequence[Tensor], cuts: Sequence[Cut]) -> Tensor:
        """Join the rows of each image (R, K, C) to one sequence (S, C)."""
        return torch.cat([rows.flatten(0, 1) for rows in tokens])


def _grid(cut: Cut) -> tuple[int, int]:
    if cut.patches == (0, 0):
        raise ZooError("layout 'native' takes images that keep their shapes, and this one has no grid of its own.")
    return cut.patches


def _tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
