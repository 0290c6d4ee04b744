"""Questions about the structure of an NLVR picture, made up by the program: what a small model has to see first.

One true-or-false label for a sentence is a weak teacher: a small model that cannot read its image tokens yet stays at
chance through three passes over the corpus. Counting what stands in a box, or naming the top of a tower, is learnt in
minutes, and the words are those of the sentences. Half of the true-or-false probes are true.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from zoo.data.nlvr_draw import SIDE, SIZES, Shape

COLOR_WORDS = ("yellow", "black", "blue")
SIZE_WORDS = ("small", "medium", "big")
SHAPE_WORDS = ("square", "circle", "triangle")
TRIES = 8  # draws of a statement until its truth is the one wanted

Probe = tuple[str, str]  # question, answer
Boxes = list[list[Shape]]
Random = np.random.Generator


def probes(random: Random, boxes: Boxes, number: int, kinds: Sequence[str]) -> list[Probe]:
    """Draw questions of some kinds, all equally often, about the boxes as they are shown, in reading order."""
    tower = all(s == 1 and t == 0 and x == 40 for box in boxes for x, _, s, t, _ in box)
    return [KINDS[kinds[int(random.integers(len(kinds)))]](random, boxes, tower) for _ in range(number)]


def _point(random: Random, boxes: Boxes, tower: bool) -> Probe:
    """Ask what stands at a place, in tenths of the box's side; one place in ten is drawn anywhere."""
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


def _question(random: Random, boxes: Boxes, tower: bool) -> Probe:
    questions = TOWER_QUESTIONS if tower else SCATTER_QUESTIONS
    return questions[random.integers(len(questions))](random, boxes)


# ---- questions with a number or a word as the answer


def _count_in_box(random: Random, boxes: Boxes) -> Probe:
    words, of = _pick(random)
    box = int(random.integers(3))
    return f"how many {words}s are in box {box + 1}", str(sum(map(of, boxes[box])))


def _count_boxes(random: Random, boxes: Boxes) -> Probe:
    words, of = _pick(random)
    return f"how many boxes have a {words}", str(sum(any(map(of, box)) for box in boxes))


def _count_all(random: Random, boxes: Boxes) -> Probe:
    words, of = _pick(random)
    return f"how many {words}s are there", str(sum(of(item) for box in boxes for item in box))


def _height(random: Random, boxes: Boxes) -> Probe:
    box = int(random.integers(3))
    return f"how many blocks are in tower {box + 1}", str(len(boxes[box]))


def _blocks(random: Random, boxes: Boxes) -> Probe:
    box, color = int(random.integers(3)), int(random.integers(3))
    count = sum(item[4] == color for item in boxes[box])
    return f"how many {COLOR_WORDS[color]} blocks are in tower {box + 1}", str(count)


def _level(random: Random, boxes: Boxes) -> Probe:
    box = int(random.integers(3))
    name, place = (("top", 0), ("base", -1), ("second block from the base", -2))[random.integers(3)]
    blocks = sorted(boxes[box], key=lambda item: item[1])  # top first
    there = len(blocks) >= (2 if place == -2 else 1)
    return f"what is the {name} of tower {box + 1}", COLOR_WORDS[blocks[place][4]] if there else "nothing"


SCATTER_QUESTIONS = (_count_in_box, _count_in_box, _count_boxes, _count_all)
TOWER_QUESTIONS = (_height, _blocks, _level, _level)


# ---- statements, true or false


def _statement(random: Random, boxes: Boxes, tower: bool) -> Probe:
    wanted = bool(random.random() < 0.5)
    for _ in range(TRIES):
        forms = TOWER_STATEMENTS if tower else SCATTER_STATEMENTS
        text, truth = forms[random.integers(len(forms))](random, boxes)
        if truth == wanted:
            break
    return text, "true" if truth else "false"


def _amount(random: Random, count: int, most: int) -> tuple[str, bool]:
    """Words for a number near `count`, and whether they are true of it."""
    number = max(1, min(most, count + int(random.integers(-1, 2))))
    word = ("exactly", "at least", "at most")[random.integers(3)]
    return f"{word} {number}", {"exactly": count == number, "at least": count >= number, "at most": count <= number}[
        word
    ]


def _has(random: Random, boxes: Boxes) -> tuple[str, bool]:
    words, of = _pick(random)
    return f"there is a {words}", any(of(item) for box in boxes for item in box)


def _has_number(random: Random, boxes: Boxes) -> tuple[str, bool]:
    words, of = _pick(random)
    amount, truth = _amount(random, sum(of(item) for box in boxes for item in box), 9)
    return f"there are {amount} {words}s", truth


def _box_has(random: Random, boxes: Boxes) -> tuple[str, bool]:
    words, of = _pick(random)
    number = int(random.integers(1, 4))
    counts = [sum(map(of, box)) for box in boxes]
    if random.random() < 0.5:
        return f"there is a box with exactly {number} {words}s", number in counts
    return f"there is a box with at least {number} {words}s", max(counts) >= number


def _each_has(random: Random, boxes: Boxes) -> tuple[str, bool]:
    words, of = _pick(random)
    return f"each box has a {words}", all(any(map(of, box)) for box in boxes)


def _touches(random: Random, boxes: Boxes) -> tuple[str, bool]:
    words, of = _pick(random)
    number = sum(of(item) and _at_wall(item) for box in boxes for item in box)
    if random.random() < 0.5:
        return f"there is a {words} touching the wall", number > 0
    amount, truth = _amount(random, number, 6)
    return f"there are {amount} {words}s touching the wall", truth


def _towers_of(random: Random, boxes: Boxes) -> tuple[str, bool]:
    height = int(random.integers(1, 5))
    amount, truth = _amount(random, sum(len(box) == height for box in boxes), 3)
    return f"there are {amount} towers with {height} blocks", truth


def _towers_with(random: Random, boxes: Boxes) -> tuple[str, bool]:
    color, place = int(random.integers(3)), int(random.integers(2))
    ends = [sorted(box, key=lambda item: item[1])[-place] for box in boxes if box]  # 0: top, -1: base
    count = sum(item[4] == color for item in ends)
    amount, truth = _amount(random, count, 3)
    return f"there are {amount} towers with a {COLOR_WORDS[color]} block at the {('top', 'base')[place]}", truth


def _tower_colors(random: Random, boxes: Boxes) -> tuple[str, bool]:
    color, number = int(random.integers(3)), int(random.integers(1, 4))
    counts = [sum(item[4] == color for item in box) for box in boxes]
    return f"there is a tower with exactly {number} {COLOR_WORDS[color]} blocks", number in counts


def _on_top(random: Random, boxes: Boxes) -> tuple[str, bool]:
    upper, lower = (int(c) for c in random.integers(3, size=2))
    towers = [[item[4] for item in sorted(box, key=lambda item: item[1])] for box in boxes]
    truth = any((upper, lower) in pairwise(tower) for tower in towers)
    return f"there is a {COLOR_WORDS[upper]} block on a {COLOR_WORDS[lower]} block", truth


SCATTER_STATEMENTS = (_has, _has_number, _box_has, _each_has, _touches)
TOWER_STATEMENTS = (_towers_of, _towers_with, _tower_colors, _on_top)


KINDS = {"point": _point, "list": _list, "count": _question, "statement": _statement}


def _name(item: Shape) -> str:
    return f"{SIZE_WORDS[item[2]]} {COLOR_WORDS[item[4]]} {SHAPE_WORDS[item[3]]}"


def _at_wall(item: Shape) -> bool:
    x, y, size = item[0], item[1], SIZES[item[2]]
    return x == 0 or y == 0 or x + size == SIDE or y + size == SIDE


def _pick(random: Random) -> tuple[str, Callable[[Shape], bool]]:
    """Words for some kind of object, and what tells it."""
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
