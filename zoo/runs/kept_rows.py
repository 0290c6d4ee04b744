"""The features of images that keep their shapes, token by token, as a store of features takes them, and back.

A store has tensors whose rows are alike. Such images are rows of unlike length, so that each token is a row of its own
there, one behind the other, image by image.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from zoo.composed.image_path import checksum_of
from zoo.composed.native import grids_of, row_pixels
from zoo.registry import Cut, ImageFeatures, UnlikeRows, groups_of


def lengths_of(cuts: Sequence[Cut], native: bool) -> list[int]:
    """Count the rows that each image has in a store."""
    return [cut.rows * cut.patches[0] * cut.patches[1] if native else cut.rows for cut in cuts]


def apart(rows: UnlikeRows, pixels: Tensor) -> ImageFeatures:
    """Make each token a row: tokens (S, 1, D), and all else that belongs to them, in the order of the batch.

    Args:
        rows: of an encoder.
        pixels: (P, W) patches of all rows, for their checksums.
    """
    checksums = torch.cat([checksum_of(row[None]) for row in row_pixels(pixels, grids_of(rows.cuts))])
    known = [
        replace(group, checksum=checksums[list(members)].unsqueeze(1).expand(group.tokens.shape[:2]))
        for group, members in zip(rows.groups, rows.members, strict=True)
    ]
    marked, first = replace(rows, groups=tuple(known)), known[0]

    def joined(name: str, at: Any = None) -> Tensor:
        return torch.cat(marked.in_order(lambda g: getattr(g, name) if at is None else getattr(g, name)[at]))[:, None]

    found: dict[str, Any] = {
        f.name: joined(f.name) for f in fields(first) if isinstance(getattr(first, f.name), Tensor)
    }
    found["block_attention"] = {word: joined("block_attention", word) for word in first.block_attention}
    found["deep"] = tuple(joined("deep", i) for i in range(len(first.deep)))
    return ImageFeatures(**found, grid=None)


def together(image: ImageFeatures, cuts: Sequence[Cut]) -> UnlikeRows:
    """Undo `apart`, for the images of a batch.

    Args:
        image: tokens (S, 1, D) of all images.
        cuts: of each of them.
    """
    grids = grids_of(cuts)
    counts = [h * w for h, w in grids]
    groups, members = [], []
    for grid, of in groups_of(grids).items():

        def picked(value: Tensor, of: Sequence[int] = of) -> Tensor:
            rows = value[:, 0].split(counts)
            return torch.stack([rows[i] for i in of])  # (M, N, ...)

        found: dict[str, Any] = {
            f.name: picked(value) for f in fields(image) if isinstance(value := getattr(image, f.name), Tensor)
        }
        found["checksum"] = found["checksum"][:, 0]  # (M,)
        found["block_attention"] = {word: picked(scores) for word, scores in image.block_attention.items()}
        groups.append(ImageFeatures(**found, grid=grid, deep=tuple(picked(x) for x in image.deep)))
        members.append(tuple(of))
    return UnlikeRows(tuple(groups), tuple(members), tuple(cuts))
