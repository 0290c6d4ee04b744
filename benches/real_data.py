"""Real data for the claims: folders below $ZOO_DATA, and Fashion-MNIST."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from zoo.data.classes import read_idx

CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def folder_of(name: str) -> Path:
    """Where a data set has to be."""
    return Path(os.environ.get("ZOO_DATA") or "data") / name


def lacking(names: Sequence[str]) -> str:
    """Say which data sets are not there; empty: all are."""
    absent = [name for name in names if not folder_of(name).is_dir()]
    where = folder_of("").as_posix()
    return (
        f"there is no {' and no '.join(absent)} in {where}; set ZOO_DATA to the folder that holds it" if absent else ""
    )


@cache
def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Photos of clothes (n, 28, 28) of mean 0 and deviation 1, and their classes (n,); `split` is train or dev."""
    kinds = ("images-idx3", "labels-idx1")
    photos, classes = (read_idx(folder_of("fashion_mnist") / f"{split}-{kind}-ubyte.gz") for kind in kinds)
    return (torch.tensor(photos).float() / 255 - 0.286) / 0.353, torch.tensor(classes).long()


@cache
def patches_of(split: str, side: int) -> tuple[Tensor, Tensor]:
    """The same photos as patches (n, (28 / side)^2, side^2), row by row, and their classes."""
    photos, classes = fashion_mnist(split)
    patches = photos.unfold(1, side, side).unfold(2, side, side)  # (n, h, w, side, side)
    return patches.flatten(3).flatten(1, 2), classes
