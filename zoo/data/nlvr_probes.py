"""Generated questions about the structure of an NLVR picture, as a first stage for small models.

A true-or-false label per sentence is a weak signal: a small model that cannot read its image tokens yet stays at chance
through three epochs of the corpus. Naming the object at a place, or the top of a tower, is learned in minutes, with the
words of the sentences.

Questions for a number or for true or false are balanced by their words: a pair of question and answer is kept the more
often, the rarer this answer is among reference pictures. Otherwise "there are at most 9 items" is always true, and
guessing from the words gives a lower loss than reading the image.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from zoo.data.nlvr_draw import SIDE, SIZES, Shape

COLOR_WORDS = ("yellow", "black", "blue")
SIZE_WORDS = ("small", "medium", "big")
SHAPE_WORDS = ("square", "circle", "triangle")
TRIES = 48  # draws of a question until a pair of question and answer is kept
REFERENCE = 300  # pictures of scattered shapes, and of towers, that answers are balanced over

Probe = tuple[str, str]  # question, answer
Boxes = list[list[Shape]]
Random = np.random.Generator


@dataclass(frozen=True)
class Question:
    text: str
    answer: Callable[[Boxes], str]


Form = Callable[[Random], Question]


def is_tower(boxes: Boxes) -> bool:
    """Whether boxes hold towers of blocks, not scattered shapes."""
    return all(s == 1 and t == 0 and x == 40 for box in boxes for x, _, s, t, _ in box)


class Probes:
    """Questions about pictures; answers are balanced over the first of `reference`, without which they are not."""

    def __init__(self, reference: Iterable[Boxes] = ()) -> None:
        pictures = list(reference)
        self.reference = {t: list(islice((p for p in pictures if is_tower(p) == t), REFERENCE)) for t in (False, True)}
        self.shares: dict[str, Counter[str]] = {}

    def draw(self, random: Random, boxes: Boxes, number: int, kinds: Sequence[str]) -> list[Probe]:
        """Draw questions of some kinds, all equally often, about the boxes as they are shown, in reading order."""
        tower = is_tower(boxes)
        return [self._one(random, boxes, tower, kinds[int(random.integers(len(kinds)))]) for _ in range(number)]

    def _one(self, random: Random, boxes: Boxes, tower: bool, kind: str) -> Probe:
        if kind in PLACES:
            return PLACES[kind](random, boxes, tower)
        forms = (TOWER_FORMS if tower else SCATTER_FORMS)[kind]
        for _ in range(TRIES):
            question = forms[random.integers(len(forms))](random)
            answer = question.answer(boxes)
            if random.random() < self._chance(question, answer, tower):
                break
        return question.text, answer

    def _chance(self, question: Question, answer: str, tower: bool) -> float:
        """How often a pair is kept: so that the three commonest answers of a question are equally common."""
        if not self.reference[tower]:
            return 1.0
        if question.text not in self.shares:
            self.shares[question.text] = Counter(map(question.answer, self.reference[tower]))
        counts = self.shares[question.text]
        if len(counts) == 1:
            return 0.0
        least = sorted(counts.values(), reverse=True)[min(2, len(counts) - 1)]
        return least / max(counts[answer], least)


# ---- objects at places


def _point(random: Random, boxes: Boxes, tower: bool) -> Probe:
    """Ask for the object at a place, in tenths of the box's side; one place in ten is drawn uniformly."""
    number = int(random.integers(3))
    x, y = (int(v) for v in random.integers(10, size=2))
    if boxes[number] and random.random() < 0.9:
        item = boxes[number][random.integers(len(boxes[number]))]
        x, y = ((item[at] + SIZES[item[2]] // 2) // 10 for at in (0, 1))
    there = [
        i
        for i in boxes[number]
        if all(i[at] <= 10 * v + 9 and 10 * v < i[at] + SIZES[i[2]] for at, v in ((0, x), (1, y)))
    ]
    # More than one shape may reach into the place: the one that covers most of it counts.
    covered = max(there, key=lambda i: _reach(i[0], SIZES[i[2]], x) * _reach(i[1], SIZES[i[2]], y), default=None)
    return f"what is at {x} {y} in box {number + 1}", "nothing" if covered is None else _name(covered)


def _reach(start: int, size: int, tenth: int) -> int:
    return min(start + size, 10 * tenth + 10) - max(start, 10 * tenth)


def _list(random: Random, boxes: Boxes, tower: bool) -> Probe:
    """Ask for all that is in a box, from top to bottom."""
    number = int(random.integers(3))
    items = sorted(boxes[number], key=lambda item: (item[1], item[0]))
    if tower:
        return f"name the blocks of tower {number + 1}", " ".join(COLOR_WORDS[i[4]] for i in items) or "nothing"
    return f"name the items in box {number + 1}", ", ".join(map(_name, items)) or "nothing"


# ---- questions with a number or a word as the answer


def _count_in_box(random: Random) -> Question:
    words, of = _pick(random)
    box = int(random.integers(3))
    return Question(f"how many {words}s are in box {box + 1}", lambda boxes: str(sum(map(of, boxes[box]))))


def _count_boxes(random: Random) -> Question:
    words, of = _pick(random)
    return Question(f"how many boxes have a {words}", lambda boxes: str(_boxes_with(of, boxes)))


def _count_all(random: Random) -> Question:
    words, of = _pick(random)
    return Question(f"how many {words}s are there", lambda boxes: str(_all(of, boxes)))


def _height(random: Random) -> Question:
    box = int(random.integers(3))
    return Question(f"how many blocks are in tower {box + 1}", lambda boxes: str(len(boxes[box])))


def _blocks(random: Random) -> Question:
    box, color = int(random.integers(3)), int(random.integers(3))
    return Question(
        f"how many {COLOR_WORDS[color]} blocks are in tower {box + 1}",
        lambda boxes: str(sum(item[4] == color for item in boxes[box])),
    )


def _level(random: Random) -> Question:
    box = int(random.integers(3))
    name, place = (("top", 0), ("base", -1), ("second block from the base", -2))[random.integers(3)]

    def answer(boxes: Boxes) -> str:
        colors = _colors(boxes[box])
        return COLOR_WORDS[colors[place]] if len(colors) >= (2 if place == -2 else 1) else "nothing"

    return Question(f"what is the {name} of tower {box + 1}", answer)


# ---- statements, true or false


def _stated(text: str, truth: Callable[[Boxes], bool]) -> Question:
    return Question(text, lambda boxes: "true" if truth(boxes) else "false")


def _amount(random: Random, most: int) -> tuple[str, Callable[[int], bool]]:
    """Words for a number up to `most`, and whether they are true of a count."""
    number = int(random.integers(1, most + 1))
    word, truth = COMPARISONS[random.integers(len(COMPARISONS))]
    return f"{word} {number}", lambda count: truth(count, number)


def _has(random: Random) -> Question:
    words, of = _pick(random)
    return _stated(f"there is a {words}", lambda boxes: _all(of, boxes) > 0)


def _has_number(random: Random) -> Question:
    words, of = _pick(random)
    amount, truth = _amount(random, 7)
    return _stated(f"there are {amount} {words}s", lambda boxes: truth(_all(of, boxes)))


def _box_has(random: Random) -> Question:
    words, of = _pick(random)
    number = int(random.integers(1, 5))
    word, truth = COMPARISONS[random.integers(2)]
    return _stated(
        f"there is a box with {word} {number} {words}s",
        lambda boxes: any(truth(sum(map(of, box)), number) for box in boxes),
    )


def _each_has(random: Random) -> Question:
    words, of = _pick(random)
    return _stated(f"each box has a {words}", lambda boxes: _boxes_with(of, boxes) == len(boxes))


def _touches(random: Random) -> Question:
    words, of = _pick(random)

    def number(boxes: Boxes) -> int:
        return _all(lambda item: of(item) and _at_wall(item), boxes)

    if random.random() < 0.5:
        return _stated(f"there is a {words} touching the wall", lambda boxes: number(boxes) > 0)
    amount, truth = _amount(random, 4)
    return _stated(f"there are {amount} {words}s touching the wall", lambda boxes: truth(number(boxes)))


def _towers_of(random: Random) -> Question:
    height = int(random.integers(1, 5))
    amount, truth = _amount(random, 3)
    return _stated(
        f"there are {amount} towers with {height} blocks",
        lambda boxes: truth(sum(len(box) == height for box in boxes)),
    )


def _towers_with(random: Random) -> Question:
    color = int(random.integers(3))
    name, place = (("top", 0), ("base", -1))[random.integers(2)]
    amount, truth = _amount(random, 3)
    return _stated(
        f"there are {amount} towers with a {COLOR_WORDS[color]} block at the {name}",
        lambda boxes: truth(sum(_colors(box)[place] == color for box in boxes if box)),
    )


def _tower_colors(random: Random) -> Question:
    color, number = int(random.integers(3)), int(random.integers(1, 4))
    return _stated(
        f"there is a tower with exactly {number} {COLOR_WORDS[color]} blocks",
        lambda boxes: any(_colors(box).count(color) == number for box in boxes),
    )


def _on_top(random: Random) -> Question:
    upper, lower = (int(c) for c in random.integers(3, size=2))
    return _stated(
        f"there is a {COLOR_WORDS[upper]} block on a {COLOR_WORDS[lower]} block",
        lambda boxes: any((upper, lower) in pairwise(_colors(box)) for box in boxes),
    )


COMPARISONS: tuple[tuple[str, Callable[[int, int], bool]], ...] = (
    ("exactly", lambda count, number: count == number),
    ("at least", lambda count, number: count >= number),
    ("at most", lambda count, number: count <= number),
)
SCATTER_FORMS: dict[str, tuple[Form, ...]] = {
    "count": (_count_in_box, _count_in_box, _count_boxes, _count_all),
    "statement": (_has, _has_number, _box_has, _each_has, _touches),
}
TOWER_FORMS: dict[str, tuple[Form, ...]] = {
    "count": (_height, _blocks, _level, _level),
    "statement": (_towers_of, _towers_with, _tower_colors, _on_top),
}
PLACES: dict[str, Callable[[Random, Boxes, bool], Probe]] = {"point": _point, "list": _list}
KINDS = (*PLACES, *SCATTER_FORMS)


def _all(of: Callable[[Shape], bool], boxes: Boxes) -> int:
    return sum(of(item) for box in boxes for item in box)


def _boxes_with(of: Callable[[Shape], bool], boxes: Boxes) -> int:
    return sum(any(map(of, box)) for box in boxes)


def _colors(tower: list[Shape]) -> list[int]:
    """Colours of the blocks, top first."""
    return [item[4] for item in sorted(tower, key=lambda item: item[1])]


def _name(item: Shape) -> str:
    return f"{SIZE_WORDS[item[2]]} {COLOR_WORDS[item[4]]} {SHAPE_WORDS[item[3]]}"


def _at_wall(item: Shape) -> bool:
    x, y, size = item[0], item[1], SIZES[item[2]]
    return x == 0 or y == 0 or x + size == SIDE or y + size == SIDE


def _pick(random: Random) -> tuple[str, Callable[[Shape], bool]]:
    """Return words for a kind of object, and a predicate for it."""
    color = int(random.integers(-1, 3))  # -1: any
    shape = int(random.integers(-1, 3))
    size = int(random.integers(3)) if random.random() < 0.15 else -1
    words = [
        *([SIZE_WORDS[size]] if size >= 0 else []),
        *([COLOR_WORDS[color]] if color >= 0 else []),
        SHAPE_WORDS[shape] if shape >= 0 else "item",
    ]
    wanted = ((2, size), (3, shape), (4, color))
    return " ".join(words), lambda item: all(want < 0 or item[at] == want for at, want in wanted)
