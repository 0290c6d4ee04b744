"""Boxes in text: mean overlap (IoU) with the truth, and the share that overlap by half or more.

This is accuracy at an IoU of 0.5, as the scripts for RefCOCO count it (MDETR, Kamath et al., arXiv:2104.12763).
Read are four numbers in brackets, two pairs as in `(12,30),(45,60)`, four numbers without brackets, and PaliGemma's
`<loc0123>` (top, left, bottom, right in 1024ths). The first box of a prediction counts, as in those scripts. Where we
differ: a prediction without a box is counted as `unparsed`, and so is one whose numbers are too large for a float or in
1024ths of an image whose size is not known; one whose corners are swapped, or that has no area, has an overlap of 0.
With several true boxes the best overlap counts; a truth without area is an error.

Prediction and truth may be in any unit if it is the same; otherwise, `dialog.meta` gives the truth in pixels as `box`
(x1, y1, x2, y2; or several) with `image_size` (width, height), and the option `scale` is the number of units of the
prediction across the whole image.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from zoo.registry import Dialog, Score, Task, ZooError, register, unknown
from zoo.tasks.answers import accepted
from zoo.tasks.estimates import means

ORDERS = ("xyxy", "yxyx", "xywh")
NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
POINT = rf"[\[({{<]\s*({NUMBER})(?:\s*,\s*|\s+)({NUMBER})\s*[\])}}>]"
LOCATION = re.compile(r"<loc(\d{4})>\s*" * 4)
BOX = re.compile(
    rf"{POINT}\s*(?:(?:,|to|and|-)\s*)?{POINT}"
    rf"|[\[({{<]\s*({NUMBER})[\s,]+({NUMBER})[\s,]+({NUMBER})[\s,]+({NUMBER})\s*[\])}}>]"
)
ALONE = re.compile(rf"(?<![\w.+-]){NUMBER}(?!\w)")
LOCATIONS = 1024

Box = tuple[float, float, float, float]


@dataclass
class BoxesConfig:
    max_new_tokens: int = 32  # longest answer
    order: str = "xyxy"  # of the predicted numbers: xyxy | yxyx | xywh
    scale: float = 0.0  # predicted units across the image: 1, 100, 999, 1000; 0: the unit of the truth

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise unknown("order of box numbers", self.order, ORDERS)
        if not 0 <= self.scale < float("inf") or self.max_new_tokens < 1:
            raise ZooError(
                f"scale must be 0 or more and max_new_tokens 1 or more, got {self.scale}, {self.max_new_tokens}."
            )


@register("task", "boxes")
class Boxes(Task):
    """iou, accuracy_50, unparsed; a prediction without four numbers has an overlap of 0."""

    mode = "generate"

    def __init__(self, config: BoxesConfig) -> None:
        self.config = config
        self.max_new_tokens = config.max_new_tokens

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Compare with the box of the dialog, the best one where there are several.

        Raises:
            ZooError: the dialog has no box to compare with, or one without an area.
        """
        truths, unit, size = self._truth(dialog)
        given = self._given(prediction, unit, size)
        best = max(overlap(given, truth) for truth in truths) if given is not None else 0.0
        return {"iou": best, "accuracy_50": float(best >= 0.5), "unparsed": float(given is None)}

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average over the boxes."""
        return means(rows)

    def _truth(self, dialog: Dialog) -> tuple[list[Box], float, tuple[float, float] | None]:
        """Return the true boxes, how many of their units make an image (0: not known), and its size where known."""
        stated = dialog.meta.get("box")
        if stated is None:
            found = [(a, next(boxes_in(a, self.config.order), None)) for a in accepted(dialog)]
            wrong = [answer for answer, box in found if box is None]
            if wrong or not found:
                raise ZooError(f"Task 'boxes' needs answers with four numbers or meta['box'], got {wrong}.")
            truths = [box for answer, _ in found for box in boxes_in(answer, self.config.order)]
            units = {unit for _, unit in truths}
            if len(units) > 1:
                raise ZooError(f"Task 'boxes' needs answers in one unit, got {accepted(dialog)}.")
            return [_with_area(box, box) for box, _ in truths], units.pop(), None
        several = isinstance(stated, (list, tuple)) and len(stated) > 0 and isinstance(stated[0], (list, tuple))
        boxes = [_with_area(_numbers(box, 4), box) for box in (stated if several else [stated])]
        size = dialog.meta.get("image_size")
        if size is None and self.config.scale:
            raise ZooError("Task 'boxes' with a scale needs meta['image_size'] (width, height) beside meta['box'].")
        sides = None if size is None else _numbers(size, 2)
        if sides is not None and (None in sides or min(sides) <= 0):
            raise ZooError(f"meta['image_size'] must be the width and the height in pixels, got {size!r}.")
        return boxes, 0.0, sides

    def _given(self, prediction: str, unit: float, size: tuple[float, float] | None) -> Box | None:
        """The predicted box in the unit of the truth; None where there is none, or it cannot be brought there."""
        found = next(boxes_in(prediction, self.config.order), None)
        if found is None:
            return None
        box, units = found
        if size is not None and (units := units or self.config.scale):
            box = tuple(v / units * side for v, side in zip(box, (*size, *size), strict=True))  # type: ignore[assignment]
        elif units != unit:
            return None
        return box if all(map(isfinite, box)) else None


def boxes_in(text: str, order: str = "xyxy") -> Iterator[tuple[Box, float]]:
    """Yield the boxes in a text as x1, y1, x2, y2, each with how many of its units make an image; 0: not known.

    What is too large for a float is left out, with a box of it.
    """
    text = text.replace("\u2212", "-")  # the minus of typographers
    if LOCATION.search(text):
        for match in LOCATION.finditer(text):
            y1, x1, y2, x2 = map(float, match.groups())
            if max(y1, x1, y2, x2) <= LOCATIONS:
                yield (x1, y1, x2, y2), LOCATIONS
        return
    found = [[n for n in match.groups() if n is not None] for match in BOX.finditer(text)]
    alone = [] if found else ALONE.findall(text)
    for numbers in found or ([alone] if len(alone) == 4 else []):
        a, b, c, d = map(float, numbers)
        box = (b, a, d, c) if order == "yxyx" else (a, b, a + c, b + d) if order == "xywh" else (a, b, c, d)
        if all(map(isfinite, box)):
            yield box, 0.0


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes of finite numbers; 0 for a box whose corners are swapped."""
    largest = max(map(abs, (*first, *second))) or 1.0
    (a1, b1, a2, b2), (c1, d1, c2, d2) = ([v / largest for v in box] for box in (first, second))
    # Sides as shares of those around both, for a product of two tiny or two huge ones would leave what a float holds.
    across, down = max(a2, c2) - min(a1, c1), max(b2, d2) - min(b1, d1)
    width, height = min(a2, c2) - max(a1, c1), min(b2, d2) - max(b1, d1)
    if width <= 0 or height <= 0:
        return 0.0
    both = width / across * (height / down)
    areas = (a2 - a1) / across * ((b2 - b1) / down) + (c2 - c1) / across * ((d2 - d1) / down)
    return min(1.0, both / (areas - both)) if both > 0 else 0.0


def _numbers(values: Any, count: int) -> Any:
    """Check that `values` are `count` finite numbers, and return them as a tuple."""
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    good = [v for v in numbers if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e300]
    if len(good) != count or len(numbers) != count:
        what = "meta['box'] must be x1, y1, x2, y2" if count == 4 else "meta['image_size'] must be width, height"
        raise ZooError(f"{what}, got {values!r}.")
    return tuple(map(float, good))


def _with_area(box: Box, stated: Any) -> Box:
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ZooError(f"The true box {stated!r} has no area: x1 < x2 and y1 < y2 are needed, as {box}.")
    return box
