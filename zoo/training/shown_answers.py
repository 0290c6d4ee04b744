"""Pictures with questions and answers for trackers: what the model answered, under the image that it is about."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from zoo.registry import Sample, ZooError
from zoo.runs.scored import samples_of
from zoo.text.markup import printable
from zoo.vision.images.decode import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 320  # pixels of the longer side of an image
SEARCHED = 200  # samples of a data set that are searched for those of the answers
LETTERS = 52  # of a line


def shown_answers(datasets: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], count: int) -> list["Image"]:
    """Return pictures of the first answers, with all questions about an image under it.

    Args:
        datasets: name -> data set that was evaluated.
        rows: predictions, in the order of the samples.
        count: of images, at most.
    """
    asked: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        asked.setdefault((row["data"], str(row["id"])), []).append(row)
    made: list[Image] = []
    for name, dataset in datasets.items():
        if dataset.is_stream:  # would be read from its beginning
            continue
        scored = len({id_ for data, id_ in asked if data == name})  # as many are drawn, so the same
        for sample in islice(samples_of(name, dataset, scored, 0, 1), SEARCHED):
            if len(made) == count:
                return made
            found = asked.get((name, str(getattr(sample, "id", ""))))
            if found and isinstance(sample, Sample) and sample.images:
                try:
                    made.append(_picture(open_image(sample.images[0]), found))
                except ZooError:  # a broken image, or a video; it is listed where it was left out
                    continue
    return made


def _picture(image: "Image", rows: Sequence[Mapping[str, Any]]) -> "Image":
    """Return an image with questions, answers and references below it."""
    from PIL import Image, ImageDraw, ImageFont

    factor = SIDE / max(image.size)
    image = image.convert("RGB").resize([max(1, round(factor * n)) for n in image.size])
    lines = [line for row in rows[:6] for line in _lines(row)]
    font: Any = ImageFont.load_default(size=11)
    page = Image.new("RGB", (SIDE, image.height + 15 * len(lines) + 8), "white")
    page.paste(image, ((SIDE - image.width) // 2, 0))
    pen = ImageDraw.Draw(page)
    for number, (text, color) in enumerate(lines):
        pen.text((4, image.height + 4 + 15 * number), text, fill=color, font=font)
    return page


def _lines(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    question = printable(row["prompt"].replace("<image>", "").replace("<video>", "").strip())
    right = next(iter(row["scores"].values()), 0.0) >= 0.5
    wanted = "" if right else f"   ({' or '.join(map(str, row['answers'][:2]))})"
    answer = printable(f"{'+' if right else '-'} {row['prediction']}{wanted}")
    color = "#080" if right else "#b00"
    cut = [(line, "black") for line in textwrap.wrap(question, LETTERS)[:3]]
    return [*cut, *((line, color) for line in textwrap.wrap(answer, LETTERS)[:2])]
