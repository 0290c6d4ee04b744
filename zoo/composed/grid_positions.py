"""Positions of images that keep their shapes: their layout has the place of each token, the model adds the rest.

A position is a column plus a shift, on each axis, as for images of one size (`zoo.composed.positions`): at an image
token its place in the image less its column there; behind an image how far it goes on less its number of tokens. So one
number an image serves packed rows, prefix caches and decoding alike.
"""

import torch
from torch import Tensor

from zoo.composed.gaps import Gaps
from zoo.registry import Cut, ImageFeatures, Layout, UnlikeRows, ZooError


class GridPositions:
    """The positions of a model whose images keep their shapes.

    Args:
        layout: of the model.
        axes: of its LLM's positions.
        dense: positions of pruned images count the tokens left.
        grid: (h, w) of the largest image.
    """

    def __init__(self, layout: Layout, axes: int, dense: bool, grid: tuple[int, int]) -> None:
        self.layout, self.axes, self.dense = layout, axes, dense
        self.longest = layout.advance(Cut(patches=grid), axes, dense)

    def placed(self, kept: ImageFeatures) -> ImageFeatures:
        """Sort the tokens of a group by their places in the grid."""
        return kept if self.dense else kept.placed(kept.num_patches or kept.tokens.shape[1])

    def gaps(self, kept: UnlikeRows) -> Gaps:
        """Return the shifts at each token that was made of the features, on each axis."""
        rows, at = kept.in_order(self._places), 0
        ahead, behind = [], []
        for cut in (piece for whole in kept.cuts for piece in self.layout.pieces(whole)):
            places = torch.stack(rows[at : at + cut.rows])  # (R, K)
            where = self.layout.coordinates(cut, places, self.axes, self.dense)  # (A, R * K)
            count = where.shape[1]
            ahead.append(where - torch.arange(count, device=where.device))
            last = torch.zeros(count, dtype=torch.long, device=where.device)
            last[-1:] = self.layout.advance(cut, self.axes, self.dense) - count
            behind.append(last)
            at += cut.rows
        found = torch.cat(ahead, 1)
        return Gaps(found if self.axes > 1 else found[0], torch.cat(behind))

    def _places(self, group: ImageFeatures) -> Tensor:
        if group.places is not None:
            return group.places
        if not self.dense:
            raise ZooError("The encoded images have no positions of their tokens: encode them with this model.")
        rows, count = group.tokens.shape[:2]
        return torch.arange(count, device=group.tokens.device).expand(rows, -1)
