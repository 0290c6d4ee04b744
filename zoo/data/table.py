"""Images in a table with columns (names, classes, counts), and questions about them by template.

A row is a record of a JSON file, or an image in a folder or archive whose path names the columns. Nothing but what the
columns hold is asked, and any number of wordings costs no rows: `zoo.data.templates` makes the questions when a sample
is taken. Questions, wordings, and how a training image is moved are a function of (seed, epoch, index).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.image_store import ImageStore, open_store
from zoo.data.record_file import RecordFile
from zoo.data.splits import require_split
from zoo.data.templates import Columns, Question, Template, columns_of, filled, listed, matches, value_of, written
from zoo.registry import MISSING, Dataset, Sample, ZooError, register, require_at_least
from zoo.vision.images.decode import open_image


@dataclass
class TableConfig:
    questions: dict[str, Template] = MISSING  # kind -> its template, see `zoo.data.templates`
    file: str = ""  # .json, .jsonl or the same with .gz; {split} in the name is replaced; empty: the rows are images
    images: str = ""  # folder, archive (.tar, .zip) or pattern of tar archives; empty: the folder of the file
    image: str = "{image}"  # name of a row's image there
    paths: str = ""  # without a file: paths of the images, whose braces become columns: {class}/{number}.jpg
    each: str = ""  # column with a list; a row becomes one for each of its values
    where: dict[str, list[str]] = field(default_factory=dict)  # column -> values of the rows that are taken; empty: all
    split: str = "train"  # replaces {split} in the names of files
    eval_split: str = ""  # split for evaluation if the run has training data only; empty: none
    # Column -> values of the rows of `eval_split`, which then are not in the train split; empty: files have the splits
    eval_where: dict[str, list[str]] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)  # column -> value -> what is written for it
    missing: dict[str, str] = field(default_factory=dict)  # column -> value of rows that lack it; of others: an error
    per_image: int = 0  # questions drawn for a training image; 0: all
    flip: bool = False  # show half of the training images mirrored
    crop: float = 0.0  # largest share cut off each side length of a training image, drawn for each, in [0, 1)
    seed: int = 0  # of the questions and of how images are moved, with the epoch and the index
    limit: int = 0  # number of rows, the first ones; 0: all

    def __post_init__(self) -> None:
        require_at_least(0, per_image=self.per_image, limit=self.limit)
        if not 0 <= self.crop < 1:
            raise ZooError(f"crop must be in [0, 1), got {self.crop}.")
        if bool(self.file) == bool(self.paths):
            raise ZooError("Rows come from a file, or from the paths of images: give one of file and paths.")
        if self.paths and not self.images:
            raise ZooError("paths needs images, the folder or archive that they are in.")
        if not self.eval_where:
            names = {"file": self.file, "images": self.images, "paths": self.paths}
            require_split(self.eval_split, names, "eval_where has to choose rows")
        if self.questions != MISSING and not self.questions:
            raise ZooError("questions is empty, so there is nothing to ask.")
        boxes = (
            [kind for kind, template in self.questions.items() if template.bins] if self.questions != MISSING else []
        )
        if boxes and (self.flip or self.crop):
            raise ZooError(f"questions.{boxes[0]} asks for a box, which flip and crop would not move with the image.")


@register("dataset", "table")
class Table(Dataset):
    """All rows that a question applies to, in their order; a training row is asked other questions in every epoch."""

    def __init__(self, config: TableConfig) -> None:
        self.config = config
        self.training = config.split == "train"
        path = Path(config.file.replace("{split}", config.split))
        self.store: ImageStore = open_store(config.images.replace("{split}", config.split) or str(path.parent))
        self.columns = Columns(written(config.words, "words"), config.missing)
        self.rows: list[Mapping[str, Any]] = []
        self.places: list[str] = []
        self._read(path)
        if config.limit:
            self.rows, self.places = self.rows[: config.limit], self.places[: config.limit]
        self.questions = [
            Question(kind, template, self.rows, self.columns, self.places.__getitem__)
            for kind, template in config.questions.items()
        ]
        self.asked = [i for i in range(len(self.rows)) if any(q.gives[i] for q in self.questions)]
        if not self.asked:
            raise ZooError(f"{config.file or config.images} has no row that a question applies to.")

    def __len__(self) -> int:
        return len(self.asked)

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return one image with its questions; the eval split asks the same in every epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        config, at = self.config, self.asked[index]
        random = np.random.default_rng([config.seed & 0xFFFFFFFF, epoch if self.training else 0, index])
        row, where = self.rows[at], self.places[at]
        questions = [q for q in self.questions if q.gives[at]]
        if self.training and 0 < config.per_image < len(questions):
            drawn = random.choice(len(questions), config.per_image, replace=False)
            questions = [questions[i] for i in sorted(drawn)]
        dialogs = [q.about(row, at, random, self.training, where) for q in questions]
        name = filled(config.image, row, where)[0]
        image: Any = self.store.find(name, where)
        if self.training and (config.flip or config.crop):
            flip = config.flip and random.random() < 0.5
            image = partial(_moved, image, flip, *(config.crop * random.random(2)), *random.random(2))
        return Sample(f"{config.split}-{Path(name).with_suffix('')}", [image], dialogs)

    def place(self, index: int) -> str:
        """Name the file and line of a sample's row, or its image."""
        return self.places[self.asked[index]]

    def train_split(self) -> "Table | None":
        """Return the training rows of the same files, for baselines of constant answers."""
        config = self.config
        if self.training:
            return self
        if not config.eval_where and "{split}" not in config.file:
            return None
        return Table(replace(config, split="train", limit=0))

    def eval_split(self) -> "Table | None":
        """Return the rows for evaluation; None without an `eval_split`."""
        if not self.config.eval_split:
            return None
        return Table(replace(self.config, split=self.config.eval_split, limit=0))

    def _read(self, path: Path) -> None:
        """Read the rows, and keep those that are wanted."""
        config = self.config
        records = _paths(self.store, config) if config.paths else RecordFile(path)
        for number in range(len(records)):
            row, where = records[number], records.where(number)
            for value in listed(value_of(row, config.each, where)) if config.each else [None]:
                one = {**row, config.each: value} if config.each else row
                held = bool(config.eval_where) and matches(one, config.eval_where, where, self.columns)
                wanted = matches(one, config.where, where, self.columns)
                if wanted and (not config.eval_where or held != self.training):
                    self.rows.append(one)
                    self.places.append(where)


class _Paths:
    """The images of a store as rows: the parts of their paths that a pattern names."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, str]:
        return self.rows[number]

    def where(self, number: int) -> str:
        return self.rows[number]["image"]


def _paths(store: ImageStore, config: TableConfig) -> _Paths:
    names = columns_of(config.paths)
    if wrong := next((n for n in names if not n.isidentifier() or n == "image" or names.count(n) > 1), None):
        raise ZooError(f"paths {config.paths!r}: {{{wrong}}} cannot name a column, or is there twice.")
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+?)", re.escape(config.paths))
    found = ((name, re.fullmatch(pattern, name)) for name in store.names())
    rows = [{"image": name, **match.groupdict()} for name, match in found if match]
    if not rows:
        near = ", ".join(map(repr, store.names()[:3])) or "none"
        raise ZooError(f"No image in {config.images} is named as {config.paths!r}; the first are {near}.")
    return _Paths(rows)


def _moved(source: Any, flip: bool, less_wide: float, less_high: float, left: float, top: float) -> Any:
    """Open an image, cut shares of its width and height off, from a place in [0, 1), and mirror it."""
    from PIL import ImageOps

    image = open_image(source)
    width, height = image.size
    w, h = max(1, round(width * (1 - less_wide))), max(1, round(height * (1 - less_high)))
    x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
    image = image.crop((x, y, x + w, y + h))
    return ImageOps.mirror(image) if flip else image
