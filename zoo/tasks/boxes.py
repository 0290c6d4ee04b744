"""Boxes in text: mean overlap (IoU) with the truth, and the share that overlap by half or more.

Read are four numbers in brackets, two pairs as in `(12,30),(45,60)`, four numbers that stand alone, and PaliGemma's
`<loc0123>` (top, left, bottom, right in 1024ths). Overlap does not depend on the unit as long as the truth has the
same; where they differ, `dialog.meta` gives the truth in pixels as `box` (x1, y1, x2, y2) with `image_size` (width,
height), and the option `scale` says how many units of the prediction make the whole image.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.registry import Dialog, Score, ZooError, register, unknown
from zoo.tasks.answers import accepted
from zoo.tasks.estimates import means

ORDERS = ("xyxy", "yxyx", "xywh")
NUMBER = r"-?\d+(?:\.\d+)?"
PAIR = rf"\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)"
LOCATION = re.compile(r"<loc(\d{4})>\s*" * 4)
PATTERNS = [
    re.compile(rf"{PAIR}\s*,?\s*{PAIR}"),
    re.compile(rf"[\[(<{{]\s*({NUMBER})[\s,]+({NUMBER})[\s,]+({NUMBER})[\s,]+({NUMBER})\s*[\])>}}]"),
]
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
        if self.scale < 0 or self.max_new_tokens < 1:
            raise ZooError(
                f"scale must be 0 or more and max_new_tokens 1 or more, got {self.scale}, {self.max_new_tokens}."
            )


@register("task", "boxes")
class Boxes:
    """iou, accuracy_50, unparsed; a prediction without four numbers has an overlap of 0."""

    mode = "generate"

    def __init__(self, config: BoxesConfig) -> None:
        self.config = config
        self.max_new_tokens = config.max_new_tokens

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Compare with the box of the dialog, the best one where there are several.

        Raises:
            ZooError: the dialog has no box to compare with.
        """
        truths, size = self._truth(dialog)
        given = parse_box(prediction, self.config.order)
        if given is not None and size:
            units = LOCATIONS if LOCATION.search(prediction) else self.config.scale
            given = tuple(v / units * side for v, side in zip(given, (*size, *size), strict=True))  # type: ignore[assignment]
        best = max(overlap(given, truth) for truth in truths) if given is not None else 0.0
        return {"iou": best, "accuracy_50": float(best >= 0.5), "unparsed": float(given is None)}

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average over the boxes."""
        return means(rows)

    def _truth(self, dialog: Dialog) -> tuple[list[Box], Sequence[float] | None]:
        """Return the true boxes, and the size of the image where predictions must be scaled to it."""
        box = dialog.meta.get("box")
        if box is not None and self.config.scale:
            size = dialog.meta.get("image_size")
            if size is None or len(size) != 2:
                raise ZooError("Task 'boxes' with a scale needs meta['image_size'] (width, height) beside meta['box'].")
            return [_box(box)], size
        if box is not None:
            return [_box(box)], None
        truths = [found for answer in accepted(dialog) if (found := parse_box(answer, self.config.order)) is not None]
        if not truths:
            raise ZooError(f"Task 'boxes' needs answers with four numbers or meta['box'], got {accepted(dialog)}.")
        return truths, None


def parse_box(text: str, order: str = "xyxy") -> Box | None:
    """Return the first box in a text as x1, y1, x2, y2, or None."""
    if found := LOCATION.search(text):
        y1, x1, y2, x2 = map(float, found.groups())
        return x1, y1, x2, y2
    matches = [m for pattern in PATTERNS if (m := pattern.search(text))]
    if matches:
        numbers = min(matches, key=lambda m: m.start()).groups()
    else:
        numbers = tuple(re.findall(rf"(?<![\w.]){NUMBER}(?![\w])", text))
        if len(numbers) != 4:
            return None
    a, b, c, d = map(float, numbers)
    if order == "yxyx":
        return b, a, d, c
    return (a, b, a + c, b + d) if order == "xywh" else (a, b, c, d)


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes; 0 for a box whose corners are swapped."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (first, second)]
    return width * height / (sum(areas) - width * height)


def _box(values: Sequence[float]) -> Box:
    if len(values) != 4:
        raise ZooError(f"meta['box'] must be x1, y1, x2, y2, got {list(values)}.")
    a, b, c, d = map(float, values)
    return a, b, c, d
