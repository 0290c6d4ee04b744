"""Pictures of NLVR from their structure, pixel by pixel as the official PNGs have them.

A picture is three grey boxes of 100 x 100 with up to eight shapes each. A shape is blended with the share of each pixel
that it covers, in sixteenths, which a table (`sprites.json`) gives for every type and size.
"""

import json
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.absent import absent
from zoo.registry import IGNORE_INDEX, ZooError

SIDE = 100  # of a box, in pixels
BOX_GREY, GAP_GREY = 211, 128
TYPES = ("square", "circle", "triangle")
SIZES = (10, 20, 30)
COLORS = {"Yellow": (255, 255, 0), "Black": (0, 0, 0), "#0099ff": (0, 153, 255)}
ORDERS = tuple(permutations(range(3)))  # PNG number k shows the boxes in the k-th order
BINS = 32  # of a coordinate in dense labels, as in `scenes`


@dataclass(frozen=True)
class Layout:
    """How the three boxes become images."""

    size: tuple[int, int]  # (width, height) of an image
    corners: tuple[tuple[int, int], ...]  # (x, y) of the boxes of one image


LAYOUTS = {
    "canvas": Layout((400, 100), ((0, 0), (150, 0), (300, 0))),  # as the official PNGs
    "boxes": Layout((SIDE, SIDE), ((0, 0),)),  # three images
    "square": Layout((224, 224), ((8, 8), (116, 8), (8, 116))),  # the fourth quarter stays empty
}

Shape = tuple[int, int, int, int, int]  # x, y, then indices into SIZES, TYPES and COLORS


def read_box(objects: list[dict[str, Any]], where: str) -> list[Shape]:
    """Check the objects of a box in `structured_rep`.

    Raises:
        ZooError: a type, size or colour is unknown, or a shape does not lie in the box.
    """
    shapes = []
    for item in objects:
        try:
            x, y, size = int(item["x_loc"]), int(item["y_loc"]), int(item["size"])
            shape = (x, y, SIZES.index(size), TYPES.index(item["type"]), list(COLORS).index(item["color"]))
        except (KeyError, ValueError, TypeError) as error:
            raise ZooError(f"{where} has an object that cannot be drawn, {item}: {error}.") from None
        if not (0 <= x <= SIDE - size and 0 <= y <= SIDE - size):
            raise ZooError(f"{where} has an object outside of its box of {SIDE} x {SIDE} pixels: {item}.")
        shapes.append(shape)
    return shapes


class Sprites:
    """Coverage of every shape, spread to three channels once."""

    def __init__(self, path: Path) -> None:
        try:
            table = json.loads(path.read_text())
            cover = [[np.array(table[f"{t}-{s}"], np.int32) for t in TYPES] for s in SIZES]
        except FileNotFoundError:
            raise absent(path, "It holds the coverage of each shape.") from None
        except (KeyError, ValueError) as error:
            raise ZooError(f"{path} is not a table of coverage: {error}.") from None
        self.paint: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}
        for s, side in enumerate(SIZES):
            for t, name in enumerate(TYPES):
                if cover[s][t].shape != (side, side):
                    raise ZooError(f"{path}: {name}-{side} must have {side} x {side} values, got {cover[s][t].shape}.")
                for c, rgb in enumerate(COLORS.values()):
                    color = np.array(rgb, np.int32) * cover[s][t][..., None]  # (side, side, 3), in sixteenths
                    self.paint[s, t, c] = 16 - cover[s][t][..., None], color

    def draw(self, boxes: list[list[Shape]], layout: Layout) -> np.ndarray:
        """Draw boxes at the corners of a layout: (height, width, 3) uint8."""
        width, height = layout.size
        canvas = np.full((height, width, 3), GAP_GREY, np.int32)
        for (left, top), shapes in zip(layout.corners, boxes, strict=True):
            canvas[top : top + SIDE, left : left + SIDE] = BOX_GREY
            for x, y, s, t, c in shapes:
                rest, color = self.paint[s, t, c]
                side = SIZES[s]
                window = canvas[top + y : top + y + side, left + x : left + x + side]
                window[:] = (window * rest + color + 8) >> 4
        return canvas.astype(np.uint8)


@dataclass(frozen=True)
class Drawing:
    """An image that is drawn when it is called."""

    sprites: Sprites = field(repr=False)
    boxes: list[list[Shape]]
    layout: Layout

    def __call__(self) -> np.ndarray:
        return self.sprites.draw(self.boxes, self.layout)


def drawings(sprites: Sprites, boxes: list[list[Shape]], layout: str) -> list[Drawing]:
    """Return the images of a picture in the layout of that name: one, or one for each box."""
    plan = LAYOUTS[layout]
    per_image = len(plan.corners)
    return [Drawing(sprites, boxes[at : at + per_image], plan) for at in range(0, len(boxes), per_image)]


def cell_labels(images: list[Drawing], grid: int) -> np.ndarray:
    """Label each cell of a grid over each image: (images, grid * grid, 7) int16.

    The columns are those of `scenes`: colour, shape and size (0: ground, else 1 + index), then the box as x1 y1 x2 y2
    in 32 bins (ignored on the ground). A cell belongs to the shape whose square holds its centre, or comes within a
    pixel of it.
    """
    labels = np.zeros((len(images), grid, grid, 7), np.int16)
    labels[..., 3:] = IGNORE_INDEX
    for image, cells in zip(images, labels, strict=True):
        width, height = image.layout.size
        span = np.array([width, height])
        in_boxes = zip(image.layout.corners, image.boxes, strict=True)
        placed = [(left + x, top + y, s, t, c) for (left, top), some in in_boxes for x, y, s, t, c in some]
        for reach in (
            1,
            0,
        ):  # shapes may be one pixel apart: the inside of one has precedence over the margin of another
            for x, y, s, t, c in placed:
                start = np.array([x, y])
                first = np.ceil((start - reach) * grid / span - 0.5).astype(int).clip(0)
                last = np.floor((start + SIZES[s] + reach) * grid / span - 0.5).astype(int)
                bins = (np.concatenate([start / span, (start + SIZES[s]) / span]) * BINS).clip(0, BINS - 1)
                cells[first[1] : last[1] + 1, first[0] : last[0] + 1] = [c + 1, t + 1, s + 1, *bins.astype(int)]
    return labels.reshape(len(images), grid * grid, 7)
