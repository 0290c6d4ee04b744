"""Labelled pictures as questions: "What is shown?" and "Is this a <class>?".

Reads the IDX files of the MNIST family (LeCun's format, plain or gzipped). Half of the yes/no questions name the true
class, and the others draw one of the rest evenly: a guesser is right half of the time. With `pairs` each question comes
with a wrong answer too: the other of yes and no, or the name of another class.
"""

import gzip
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from zoo.data.absent import absent
from zoo.data.pairs import in_pairs
from zoo.data.splits import require_split
from zoo.registry import MISSING, Dataset, Dialog, Sample, ZooError, register

OPPOSITE = {"yes": "no", "no": "yes"}


@dataclass
class ClassesConfig:
    images: str = MISSING  # IDX file of images, plain or .gz; {split} in the name is replaced
    labels: str = MISSING  # IDX file of labels, in the same order
    classes: list[str] = MISSING  # name of each label, from 0
    split: str = "train"  # replaces {split} in the names of the files
    eval_split: str = ""  # split for evaluation if the run has training data only; empty: none
    name_question: str = "What is shown?"  # answered by the name of the class; empty: not asked
    yes_no_question: str = "Is this a {class}?"  # answered by yes or no; empty: not asked
    yes_no: int = 1  # number of yes/no questions about each image
    name_wordings: list[str] = field(default_factory=list)  # others of name_question; a training picture draws one
    yes_no_wordings: list[str] = field(default_factory=list)  # others of yes_no_question, as there
    pairs: bool = False  # each question twice, with the right answer and with a wrong one: pairs for preference losses
    flip: bool = False  # show half of the training pictures mirrored
    shift: int = 0  # largest shift of training pictures in pixels, in both directions; the edge repeats
    seed: int = 0  # of the classes asked for and of how pictures are moved, with the epoch and the index
    limit: int = 0  # number of images, the first ones; 0: all

    def __post_init__(self) -> None:
        if len(set(self.classes)) < max(2, len(self.classes)) and self.classes != MISSING:
            raise ZooError(f"classes needs two or more different names, got {self.classes}.")
        for question in [self.yes_no_question, *self.yes_no_wordings]:
            if question and question.replace("{class}", "").count("{") + ("{class}" not in question):
                raise ZooError(f"yes_no_question takes '{{class}}' and no other brace, got {question!r}.")
        for name in ("yes_no", "shift", "limit"):
            if getattr(self, name) < 0:
                raise ZooError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        require_split(self.eval_split, {"images": self.images, "labels": self.labels})
        if not self.name_question and not (self.yes_no_question and self.yes_no):
            raise ZooError("There is nothing to ask: name_question and yes_no_question are both off.")


@register("dataset", "classes")
class Classes(Dataset):
    """All pictures of the files, in their order; each is asked about again, with other classes, in every epoch."""

    def __init__(self, config: ClassesConfig) -> None:
        self.config = config
        images, labels = (Path(p.replace("{split}", config.split)) for p in (config.images, config.labels))
        self.images, self.labels = read_idx(images), read_idx(labels)
        if self.images.ndim not in {3, 4} or self.labels.ndim != 1 or len(self.images) != len(self.labels):
            raise ZooError(f"{images} has shape {self.images.shape}, {labels} {self.labels.shape}: they do not fit.")
        if len(self.labels) and self.labels.max() >= len(config.classes):
            raise ZooError(f"{labels} has label {self.labels.max()}, but classes names {len(config.classes)}.")
        if config.limit:
            self.images, self.labels = self.images[: config.limit], self.labels[: config.limit]

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return one picture with its questions; which classes are asked for depends on (seed, epoch, index)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        label = int(self.labels[index])
        dialogs = []
        random = np.random.default_rng([self.config.seed & 0xFFFFFFFF, epoch, index])
        if self.config.name_question:
            question = self._worded(random, self.config.name_question, self.config.name_wordings)
            dialog = _dialog(question, self.config.classes[label], "name")
            dialog.choices = list(self.config.classes)
            dialogs.append(dialog)
        for _ in range(self.config.yes_no if self.config.yes_no_question else 0):
            asked = label
            if random.random() < 0.5:
                asked = (label + int(random.integers(1, len(self.config.classes)))) % len(self.config.classes)
            question = self._worded(random, self.config.yes_no_question, self.config.yes_no_wordings)
            question = question.replace("{class}", self.config.classes[asked])
            dialogs.append(_dialog(question, "yes" if asked == label else "no", "yes_no", "yes_no"))
        image = _rgb(self.images[index])
        if self.config.split == "train":
            image = _moved(image, random, self.config.flip, self.config.shift)
        if self.config.pairs:
            dialogs = in_pairs(dialogs, lambda _, right: self._wrong(random, right))
        return Sample(f"{self.config.split}-{index}", [image], dialogs)

    def _worded(self, random: np.random.Generator, first: str, others: list[str]) -> str:
        """Draw a wording in training; without others nothing is drawn."""
        if not others or self.config.split != "train":
            return first
        return [first, *others][int(random.integers(len(others) + 1))]

    def _wrong(self, random: np.random.Generator, right: str) -> str:
        if right in OPPOSITE:
            return OPPOSITE[right]
        others = [name for name in self.config.classes if name != right]
        return others[int(random.integers(len(others)))]

    def train_split(self) -> "Classes":
        """Return the training pictures, for baselines of constant answers."""
        config = self.config
        if config.split == "train" or "{split}" not in config.labels:
            return self
        return Classes(replace(config, split="train", limit=0))

    def eval_split(self) -> "Classes | None":
        """Return the pictures for evaluation; None without an `eval_split`."""
        if not self.config.eval_split:
            return None
        return Classes(replace(self.config, split=self.config.eval_split, limit=0))


def _dialog(question: str, answer: str, kind: str, task: str = "") -> Dialog:
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    said = [{"type": "text", "text": answer}]
    return Dialog([{"role": "user", "content": asked}, {"role": "assistant", "content": said}], kind=kind, task=task)


def _rgb(image: np.ndarray) -> np.ndarray:
    grey = image[..., None] if image.ndim == 2 else image  # (h, w, 1 or 3)
    return np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey  # (h, w, 3)


def _moved(image: np.ndarray, random: np.random.Generator, flip: bool, shift: int) -> np.ndarray:
    if flip and random.random() < 0.5:
        image = image[:, ::-1]
    if shift:
        height, width = image.shape[:2]
        down, right = random.integers(-shift, shift + 1, 2)
        rows = (np.arange(height) - down).clip(0, height - 1)
        columns = (np.arange(width) - right).clip(0, width - 1)
        image = image[rows[:, None], columns]
    return image


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, type 8, the number of dimensions, their sizes, the values.

    Raises:
        ZooError: the file is missing, of another format, or shorter than its header states.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except FileNotFoundError:
        raise absent(path) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ZooError(f"{path} cannot be read: {error}") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ZooError(f"{path} is not an IDX file of bytes: it begins with {data[:4].hex()}, not 000008.")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    if len(data) - start != int(np.prod(shape)):
        raise ZooError(f"{path} states {shape}, which is {int(np.prod(shape))} values, and holds {len(data) - start}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
