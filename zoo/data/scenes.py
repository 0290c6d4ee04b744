"""Coloured shapes on a textured ground, drawn by the program, with questions whose answers are exactly known.

Each sample is one scene and about seventeen dialogs: existence, colour, shape, size, count, spatial relation, bounding
box, and the object at a point. With `signs` a picture has a word and a number to be read; other kinds are dialogs of
several turns and POPE's questions about absent objects. `scene_questions.ABILITIES` groups the kinds.

Pictures and questions are a function of (seed, split, index), questions also of the epoch. Four pairs of colour and
shape never occur in training; in the eval split a quarter of the scenes hold one, and all questions there are about it
and marked `held_out`, to be scored separately.

Boxes are four words, x1 y1 x2 y2, each from 0 to 31: the image's side is divided into 32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from zoo.data import scene_draw, scene_questions, scene_signs
from zoo.data.scene_draw import COLORS, LEVELS, SHAPES, SIZES, Level, Objects
from zoo.data.scene_pairs import KINDS_WITH_WRONG, scene_pairs
from zoo.data.scene_pope import COUNTED, Frequencies
from zoo.data.scene_questions import CAPTION, KINDS, ON_SIGNS, POPE, TASKS, TURNS
from zoo.data.scene_signs import Signs
from zoo.registry import IGNORE_INDEX, Dataset, Dialog, Sample, ZooError, register, require_at_least, unknown

SPLITS = ("train", "eval")
BINS = 32  # words for a coordinate
CHUNK = 16  # scenes in a chunk, drawn together; small, so that the first batches are ready soon

QUESTIONS = {
    "exist": 4,
    "color": 2,
    "shape": 1,
    "size": 1,
    "count": 2,
    "relation": 5,
    "box": 2,
    "point": 0,
    "caption": 0,
    "word": 0,
    "number": 0,
    "digit": 0,
    "turns": 0,
    "pope_random": 0,
    "pope_popular": 0,
    "pope_adversarial": 0,
}

# Streams of random numbers: what is drawn by one never moves when another changes.
PLACE, DRAW, ASK, MISTAKE, SIGN = range(5)


@dataclass
class ScenesConfig:
    split: str = "train"  # train | eval
    scenes: int = 20000  # pictures of the train split
    eval_scenes: int = 400  # pictures of the eval split; a quarter hold a pair never seen in training; 0: no such split
    size: int = 64  # side of a picture in pixels
    difficulty: int = 1  # 0: 2-3 objects apart, plain; 1: 2-5, overlapping, textured; 2: 4-8, more shapes and colours
    grid: int = 8  # cells per side of the dense labels; 0: none
    signs: bool = False  # a word and a number in each picture, where there is room: see `zoo.data.scene_signs`
    skew: float = 0.0  # some pairs of colour and shape are more frequent: the i-th by (1 + i) ** -skew
    scene_labels: bool = False  # labels of whole pictures, for an encoder's [CLS]: what there is, what signs read
    seed: int = 0  # of the pictures and the questions
    # How many of each kind are asked about a picture, in this order; those given replace the numbers here.
    questions: dict[str, int] = field(default_factory=lambda: dict(QUESTIONS))
    pairs: bool = False  # each question twice, with the right answer and with a wrong one: pairs for preference losses

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise unknown("split of scenes", self.split, SPLITS)
        if not 0 <= self.difficulty < len(LEVELS):
            raise ZooError(f"difficulty must be from 0 to {len(LEVELS) - 1}, got {self.difficulty}.")
        if self.size < 32:
            raise ZooError(f"size must be at least 32 pixels, got {self.size}.")
        least = 1 if self.split == "eval" else 0
        if self.scenes < 1 or self.eval_scenes < least:
            raise ZooError(
                f"scenes must be at least 1 and eval_scenes {least}, got {self.scenes} and {self.eval_scenes}."
            )
        require_at_least(0, grid=self.grid)
        if not 0 <= self.skew < float("inf"):
            raise ZooError(f"skew must be 0 or more, got {self.skew}.")
        for kind, number in self.questions.items():
            if kind not in KINDS:
                raise unknown("kind of question", kind, KINDS)
            if number < 0:
                raise ZooError(f"The number of {kind!r} questions must not be negative, got {number}.")
        if not any((QUESTIONS | dict(self.questions)).values()):
            raise ZooError("questions must ask for at least one question per picture.")
        asked = [kind for kind, number in (QUESTIONS | dict(self.questions)).items() if number]
        if not self.signs and (unread := [kind for kind in asked if kind in ON_SIGNS]):
            raise ZooError(f"questions.{unread[0]} asks about signs, and there are none: set signs=true.")
        if self.pairs and (odd := [kind for kind in asked if kind not in KINDS_WITH_WRONG]):
            known = ", ".join(KINDS_WITH_WRONG)
            raise ZooError(f"pairs has wrong answers to {known} only: set questions.{odd[0]} to 0.")


class Chunk(NamedTuple):
    """Scenes that are drawn, and asked about, together."""

    held_out: bool  # each scene's first object is a pair never seen in training
    number: int


@register("dataset", "scenes")
class Scenes(Dataset):
    """Cheap: about 0.1 ms of one core for a new picture, less than 0.1 ms for a sample of one already drawn."""

    def __init__(self, config: ScenesConfig) -> None:
        self.config = config
        self.level: Level = LEVELS[config.difficulty]
        self.training = config.split == "train"
        numbers = QUESTIONS | dict(config.questions)
        self.wanted = [KINDS.index(kind) for kind, number in numbers.items() for _ in range(number)]
        self._placed: dict[Chunk, Objects] = {}
        self._drawn: dict[Chunk, np.ndarray] = {}  # pictures; all are kept
        self._cells: dict[Chunk, np.ndarray] = {}  # dense labels
        self._whole: dict[Chunk, np.ndarray] = {}  # labels of whole pictures
        self._written: dict[Chunk, Signs] = {}
        self._asked: OrderedDict[tuple[Chunk, int], np.ndarray] = OrderedDict()  # by epoch; the last epoch's are kept

    def __len__(self) -> int:
        return self.config.scenes if self.training else self.config.eval_scenes

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return picture `index` with the questions of `epoch`; the eval split asks the same in every epoch."""
        chunk, at = self._locate(index)
        dialogs = [self._dialog(chunk, at, *row) for row in self._questions(chunk, epoch)[at].tolist()]
        if self.config.pairs:
            rng = np.random.default_rng([*self._key(MISTAKE, chunk, epoch if self.training else 0), at])
            dialogs = scene_pairs(rng, dialogs, self.scene(index), self.level)
        targets = {"patch_labels": self._labels(chunk)[at : at + 1]} if self.config.grid else {}
        if self.config.scene_labels:
            targets["scene_labels"] = self._scene_labels(chunk)[at : at + 1]
        return Sample(f"{self.config.split}-{index}", [partial(self._image, chunk, at)], dialogs, targets)

    def eval_split(self) -> Scenes | None:
        """The eval split of the same world, if it has one."""
        return Scenes(replace(self.config, split="eval")) if self.config.eval_scenes else None

    def train_split(self) -> Scenes:
        """Return the training split of the same scenes, for baselines of constant answers."""
        return self if self.training else Scenes(replace(self.config, split="train"))

    def scene(self, index: int) -> list[dict[str, Any]]:
        """Return the objects of picture `index`: what every answer is made from. Later ones lie on top."""
        chunk, at = self._locate(index)
        objects = self._objects(chunk)
        boxes = objects.boxes(BINS, self.config.size)
        return [
            {
                "color": list(COLORS)[objects.color[at, j]],
                "shape": SHAPES[objects.shape[at, j]],
                "size": SIZES[objects.large[at, j]],
                "x": float(objects.x[at, j]),  # centre, in pixels
                "y": float(objects.y[at, j]),
                "radius": float(objects.radius[at, j]),  # half the side of the bounding box
                "box": boxes[at, j].tolist(),  # x1 y1 x2 y2 in words from 0 to 31
            }
            for j in range(objects.count[at])
        ]

    def signs(self, index: int) -> dict[str, Any]:
        """Return the signs of picture `index`, as far as there was room: word, number -> text and box in pixels."""
        chunk, at = self._locate(index)
        signs = self._signs(chunk)
        found: dict[str, Any] = {}
        for sign, name in enumerate(("word", "number")):
            if signs is not None and signs.shown[at, sign]:
                x, y = int(signs.x[at, sign]), int(signs.y[at, sign])
                sides = scene_signs.WIDTH * signs.dot, scene_signs.HEIGHT * signs.dot
                found[name] = {"text": signs.text(at, sign), "box": [x, y, x + sides[0], y + sides[1]]}
        return found

    def _locate(self, index: int) -> tuple[Chunk, int]:
        """Where picture `index` is: its chunk and the place in it. Each fourth of eval is one with a new pair."""
        if not 0 <= index < len(self):
            raise IndexError(f"scenes has {len(self)} pictures, got index {index}.")
        if self.training:
            return Chunk(False, index // CHUNK), index % CHUNK
        held_out = index % 4 == 3
        number = index // 4 if held_out else index // 4 * 3 + index % 4
        return Chunk(held_out, number // CHUNK), number % CHUNK

    def _key(self, stream: int, chunk: Chunk, epoch: int = 0) -> list[int]:
        seed, split = self.config.seed & 0xFFFFFFFF, SPLITS.index(self.config.split)
        return [seed, split, self.config.difficulty, stream, int(chunk.held_out), chunk.number, epoch]

    def _rng(self, stream: int, chunk: Chunk, epoch: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self._key(stream, chunk, epoch))))

    def _objects(self, chunk: Chunk) -> Objects:
        if chunk not in self._placed:
            size, skew = self.config.size, self.config.skew
            self._placed[chunk] = self._once(
                (size, chunk, "objects"),
                lambda: scene_draw.place(self._rng(PLACE, chunk), CHUNK, self.level, size, chunk.held_out, skew),
            )
        return self._placed[chunk]

    def _signs(self, chunk: Chunk) -> Signs | None:
        if not self.config.signs:
            return None
        if chunk not in self._written:
            self._written[chunk] = self._once(
                (self.config.size, chunk, "signs"),
                lambda: scene_signs.place(self._rng(SIGN, chunk), self._objects(chunk), self.config.size),
            )
        return self._written[chunk]

    @cached_property
    def _frequencies(self) -> Frequencies:
        train = self.train_split()
        chunks = -(-min(COUNTED, len(train)) // CHUNK)
        return Frequencies.of((train._objects(Chunk(False, number)) for number in range(chunks)), self.level)

    def _image(self, chunk: Chunk, at: int) -> np.ndarray:
        """Draw a picture, (size, size, 3) uint8, and the others of its chunk; once."""
        if chunk not in self._drawn:
            self._drawn[chunk] = self._once((self.config.size, chunk, "pictures"), lambda: self._draw(chunk))
        return self._drawn[chunk][at]

    def _draw(self, chunk: Chunk) -> np.ndarray:
        pictures = scene_draw.draw(self._rng(DRAW, chunk), self._objects(chunk), self.level, self.config.size)
        if (signs := self._signs(chunk)) is not None:
            scene_signs.draw(pictures, signs)
        return pictures

    def _labels(self, chunk: Chunk) -> np.ndarray:
        """The dense labels of a chunk's pictures: (CHUNK, grid * grid, 7) int16, with signs 8: the character."""
        if chunk not in self._cells:
            grid, size = self.config.grid, self.config.size
            self._cells[chunk] = self._once(
                (size, chunk, "cells", grid),
                lambda: self._cell_labels(chunk, grid, size),
            )
        return self._cells[chunk]

    def _cell_labels(self, chunk: Chunk, grid: int, size: int) -> np.ndarray:
        labels = scene_draw.cell_labels(self._objects(chunk), grid, BINS, size, IGNORE_INDEX)
        if (signs := self._signs(chunk)) is None:
            return labels
        return np.concatenate([labels, scene_signs.cell_labels(signs, grid, size)[..., None]], -1)

    def _scene_labels(self, chunk: Chunk) -> np.ndarray:
        """The labels of a chunk's pictures as wholes: (CHUNK, 1, L) int16, see `scene_signs.scene_labels`."""
        if chunk not in self._whole:
            self._whole[chunk] = scene_signs.scene_labels(self._objects(chunk), self._signs(chunk), self.level)
        return self._whole[chunk]

    def _once(self, what: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gives, or what another data set of the same world has made already."""
        world = (self.config.seed, self.config.split, self.config.difficulty, self.config.signs, self.config.skew)
        key = (*world, *what)
        made = _WORLDS.get(key)
        if made is None:
            _WORLDS[key] = made = make()
        return made

    def _questions(self, chunk: Chunk, epoch: int) -> np.ndarray:
        """Return the questions about the scenes of a chunk: (CHUNK, slots, 8), see `_dialog`."""
        epoch = epoch if self.training else 0
        if (chunk, epoch) not in self._asked:
            self._asked[chunk, epoch] = scene_questions.ask(
                self._rng(ASK, chunk, epoch),
                self._objects(chunk),
                self.level,
                self.wanted,
                bins=BINS,
                size=self.config.size,
                held_out=chunk.held_out,
                signs=self._signs(chunk),
                known=self._frequencies if POPE.keys() & set(self.wanted) else None,
            )
            while len(self._asked) > len(self) // CHUNK + 2:
                self._asked.popitem(last=False)
        return self._asked[chunk, epoch]

    def _dialog(self, chunk: Chunk, at: int, kind: int, a: int, b: int, c: int, *answer: int) -> Dialog:
        """Put one row of numbers into words: the kind, what is asked about (a, b, c), the answer (four numbers)."""
        name, level = KINDS[kind], self.level
        said: tuple[tuple[str, str], ...]
        if kind == CAPTION:
            said = (("describe the image.", scene_questions.describe(self._objects(chunk), at)),)
        elif kind == TURNS:
            said = scene_questions.follow_ups(level.num_shapes, (a, b, c), answer)
        else:
            question = scene_questions.question_text(kind, level.num_colors, level.num_shapes, a, b, c)
            said = ((question, scene_questions.answer_text(kind, level.num_shapes, *answer)),)
        return Dialog(
            _turns(said),
            kind=name,
            task=TASKS.get(name, "exact"),
            meta={"held_out": chunk.held_out},
        )


# What some data set of this process holds: stages that ask other questions about the same pictures share them.
_WORLDS: WeakValueDictionary[tuple, Any] = WeakValueDictionary()


@lru_cache(maxsize=16384)
def _turns(said: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    """Return the chat turns of questions and answers. The list is cached and shared, so callers must not modify it."""
    turns: list[dict[str, Any]] = []
    for question, answer in said:
        shown = [] if turns else [{"type": "image"}]
        turns.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns
