"""Tensors in parts: what is written in several files is read as one, and parts that are not one are refused."""

import pytest
import torch

from zoo.registry import ZooError
from zoo.storage.sharded import Part, listing_of_parts, read_own, write_parts


def written(folder, whole, boxes):
    """Write boxes of a tensor, (offsets, shape) each, to a file each; returns the files."""
    files = []
    for number, (at, shape) in enumerate(boxes):
        box = whole[tuple(slice(o, o + n) for o, n in zip(at, shape, strict=True))]
        files.append(folder / f"{number}.safetensors")
        write_parts(files[-1], [Part("w", whole.dtype, shape, at)], iter([box]))
    return files


WHOLE = torch.arange(20.0).view(5, 4)
ROWS = [((0, 0), (2, 4)), ((4, 0), (1, 4)), ((2, 0), (2, 4))]
TILES = [((0, 0), (5, 1)), ((0, 1), (3, 3)), ((3, 1), (2, 3))]


@pytest.mark.parametrize("boxes", [ROWS, TILES, [((0, 0), (5, 4))]])
def test_parts_are_read_as_one(tmp_path, boxes):
    target = torch.full_like(WHOLE, -1)
    read_own(listing_of_parts(written(tmp_path, WHOLE, boxes))["w"], target)
    assert torch.equal(target, WHOLE)


@pytest.mark.parametrize(
    "boxes",
    [
        ROWS[:2],  # rows 2 and 3 are missing
        [*ROWS, ROWS[0]],  # rows are there twice
        [((0, 0), (2, 4)), ((1, 0), (2, 4)), ((4, 0), (1, 4))],  # row 1 twice, row 3 missing: 20 numbers
        [((0, 0), (5, 2)), ((0, 1), (5, 1)), ((0, 3), (5, 1))],  # the same of columns
    ],
)
def test_parts_that_are_not_one_are_refused(tmp_path, boxes):
    with pytest.raises(ZooError, match="do not make up one tensor"):
        listing_of_parts(written(tmp_path, WHOLE, boxes))
