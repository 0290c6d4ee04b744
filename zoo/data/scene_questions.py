"""Questions about `scenes` and their exact answers, as small integers for many scenes at a time, and as English."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np

from zoo.data.scene_draw import COLORS, SHAPES, SIZES, Level, Objects, pair_table
from zoo.data.scene_pope import Frequencies, absent
from zoo.data.scene_signs import LENGTH, NUMBER, WORD, WORDS, Signs

KINDS: tuple[str, ...] = ("exist", "color", "shape", "size", "count", "relation", "box", "point", "caption")
EXIST, COLOR, SHAPE, SIZE, COUNT, RELATION, BOX, POINT, CAPTION = range(len(KINDS))
KINDS += ("word", "number", "digit", "turns", "pope_random", "pope_popular", "pope_adversarial")
READ_WORD, READ_NUMBER, READ_DIGIT, TURNS, POPE_RANDOM, POPE_POPULAR, POPE_ADVERSARIAL = range(CAPTION + 1, len(KINDS))
POPE = {POPE_RANDOM: "random", POPE_POPULAR: "popular", POPE_ADVERSARIAL: "adversarial"}
ON_SIGNS = ("word", "number", "digit")  # kinds that need signs
TASKS = {"box": "boxes", "caption": "caption"} | {KINDS[kind]: "yes_no" for kind in POPE}  # the rest: exact
# What a kind of question is a test of: a score table has a row for each.
ABILITIES = {
    "existence": ("exist",),
    "attribute": ("color", "shape", "size"),
    "count": ("count",),
    "relation": ("relation",),
    "grounding": ("box", "point"),
    "text reading": ON_SIGNS,
    "several turns": ("turns",),
    "hallucination": tuple(KINDS[kind] for kind in POPE),
}
SIDES = ("left of", "right of", "above", "below")
CHOICES = ("left or right of", "above or below")
NEIGHBOURS = ("before", "after")

COUNT_ODDS = (0.25, 0.3, 0.3, 0.15)  # of asking for a colour or shape that occurs 0, 1, 2, 3 times in the scene
CHOICE_ODDS = 1 / 2  # of asking for a relation as `left or right`, not as `is it left`
NEAR_MISS = (0.3, 1.8, 3.8)  # weight of an absent pair of which neither, one, or both halves occur in the scene
LEAST_OFFSET = 4 / 64  # of the image's side: relations that differ by less are not asked


def ask(
    rng: np.random.Generator,
    objects: Objects,
    level: Level,
    wanted: list[int],
    bins: int,
    size: int,
    held_out: bool,
    signs: Signs | None = None,
    known: Frequencies | None = None,
) -> np.ndarray:
    """Ask `wanted` (a kind for each slot) about each scene; a kind that does not apply to a scene is replaced.

    With `held_out`, every question is about the scene's first object, or about an absent pair of those held out, and
    those by POPE's protocol are replaced. `signs` are for the kinds that read them, `known` for those of POPE.

    Returns:
        (n, slots, 8) int16: the kind, three numbers for the subject of the question, and four for the answer.
    """
    n, m = len(objects.count), len(wanted)
    asked = _Scenes(rng, objects, level, bins, size, held_out, signs, known)
    kind = np.broadcast_to(np.array(wanted), (n, m)).copy()
    subject, answer = np.zeros((n, m, 3), np.int16), np.zeros((n, m, 4), np.int16)
    makers: tuple[Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]], ...] = (
        asked.exist,
        asked.color,
        asked.shape,
        asked.size_of,
        asked.count,
        asked.relation,
        asked.box,
        asked.point,
        asked.caption,
        asked.word,
        asked.number,
        asked.digit,
        asked.turns,
        *(partial(asked.pope, how) for how in POPE.values()),
    )
    for this in sorted(set(wanted)):
        slots = np.nonzero(np.array(wanted) == this)[0]
        about, reply, valid = makers[this](len(slots))
        other = SIZE if this in (COLOR, SHAPE) else EXIST
        if not valid.all():
            instead, its_reply, _ = makers[other](len(slots))
            about, reply = np.where(valid[..., None], about, instead), np.where(valid[..., None], reply, its_reply)
        kind[:, slots] = np.where(valid, this, other)
        subject[:, slots], answer[:, slots] = about, reply
    return np.concatenate([kind[..., None], subject, answer], -1).astype(np.int16)


class _Scenes:
    """One method for each kind: (about (n, m, 3), answer (n, m, 4), valid (n, m)) for m slots of each scene."""

    def __init__(
        self,
        rng: np.random.Generator,
        objects: Objects,
        level: Level,
        bins: int,
        size: int,
        held_out: bool,
        signs: Signs | None,
        known: Frequencies | None,
    ) -> None:
        self.signs, self.known = signs, known
        self.rng, self.objects, self.level = rng, objects, level
        self.bins, self.size, self.held_out = bins, size, held_out
        self.n = len(objects.count)
        self.rows = np.arange(self.n)[:, None]
        self.pair = objects.color * level.num_shapes + objects.shape  # (n, k)
        exists = objects.exists
        self.per_color = _tally(objects.color, exists, level.num_colors)  # (n, colours)
        self.per_shape = _tally(objects.shape, exists, level.num_shapes)
        self.per_pair = _tally(self.pair, exists, level.num_colors * level.num_shapes)
        self.boxes = objects.boxes(bins, size)

    def pick(self, m: int) -> np.ndarray:
        """An object for each slot, none twice before each had its turn: (n, m)."""
        if self.held_out:
            return np.zeros((self.n, m), np.int64)
        order = np.where(self.objects.exists, self.rng.random(self.pair.shape), 2).argsort(1)
        return order[self.rows, np.arange(m) % self.objects.count[:, None]]

    def exist(self, m: int):
        ids = np.arange(self.per_pair.shape[1])
        present = self.pair[self.rows, self.pick(m)]
        seen, held = pair_table(self.level)
        color_here = self.per_color[:, ids // self.level.num_shapes] > 0
        shape_here = self.per_shape[:, ids % self.level.num_shapes] > 0
        weight = np.array(NEAR_MISS)[color_here.astype(int) + shape_here]  # (n, pairs)
        weight[self.per_pair > 0] = 1e-9
        weight[:, seen if self.held_out else held] = 1e-9
        absent = (self.rng.exponential(size=(self.n, m, len(ids))) / weight[:, None]).argmin(-1)
        yes = self.rng.random((self.n, m)) < 0.5
        asked = np.where(yes, present, absent)
        return _three(asked), _four(self.per_pair[self.rows, asked] > 0), np.ones_like(yes)

    def color(self, m: int):
        """The colour of the only object of its shape."""
        return self._attribute(m, self.objects.shape, self.per_shape, self.objects.color)

    def shape(self, m: int):
        """The shape of the only object of its colour."""
        return self._attribute(m, self.objects.color, self.per_color, self.objects.shape)

    def _attribute(self, m: int, known: np.ndarray, tally: np.ndarray, asked: np.ndarray):
        alone = (tally[self.rows, known] == 1) & self.objects.exists  # (n, k)
        if self.held_out:
            alone[:, 1:] = False
        key = np.where(alone[:, None], self.rng.random((self.n, m, alone.shape[1])), -1)
        chosen = key.argmax(-1)
        return _three(known[self.rows, chosen]), _four(asked[self.rows, chosen]), key.max(-1) >= 0

    def size_of(self, m: int):
        chosen = self.pick(m)
        valid = np.ones((self.n, m), bool)
        return _three(self.pair[self.rows, chosen]), _four(self.objects.large[self.rows, chosen]), valid

    def count(self, m: int):
        tally = np.concatenate([self.per_color, self.per_shape], 1)  # (n, colours + shapes)
        target = self.rng.choice(len(COUNT_ODDS), (self.n, m), p=COUNT_ODDS)
        key = self.rng.random((self.n, m, tally.shape[1])) + (tally[:, None] == target[..., None])
        if self.held_out:
            colors = np.arange(tally.shape[1])[None] == self.objects.color[:, :1]
            shapes = np.arange(tally.shape[1])[None] == self.objects.shape[:, :1] + self.level.num_colors
            key += 2 * (colors | shapes)[:, None]
        asked = key.argmax(-1)
        return _three(asked), _four(tally[self.rows, asked]), np.ones((self.n, m), bool)

    def relation(self, m: int):
        """Where one object lies from another: half of the time as a choice of two sides, else as yes or no.

        The choice is much easier to learn, and what it needs is most of what the other needs: yes and no alone left
        small models at chance for long.
        """
        first, second, vertical, true_side, valid = self._two(m)
        yes = self.rng.random((self.n, m)) < 0.5
        choice = self.rng.random((self.n, m)) < CHOICE_ODDS
        side = np.where(choice, len(SIDES) + vertical, np.where(yes, true_side, true_side ^ 1))
        about = np.stack([self.pair[self.rows, first], self.pair[self.rows, second], side], -1)
        return about, _four(np.where(choice, 2 + true_side, yes)), valid

    def _two(self, m: int):
        """Two objects, whether they are compared by height, where the first lies, and whether that is clear."""
        first, count = self.pick(m), self.objects.count[:, None]
        step = 1 + (self.rng.random((self.n, m)) * np.maximum(count - 1, 1)).astype(np.int64)
        second = (first + step) % np.maximum(count, 1)
        swap = self.rng.random((self.n, m)) < 0.5
        first, second = np.where(swap, second, first), np.where(swap, first, second)
        dx = (self.objects.x[self.rows, first] - self.objects.x[self.rows, second]) / self.size
        dy = (self.objects.y[self.rows, first] - self.objects.y[self.rows, second]) / self.size
        clear_x, clear_y = abs(dx) > LEAST_OFFSET, abs(dy) > LEAST_OFFSET
        vertical = np.where(clear_x & clear_y, self.rng.random((self.n, m)) < 0.5, clear_y)
        true_side = np.where(vertical, 2 + (dy > 0), dx > 0)
        return first, second, vertical, true_side, (count > 1) & (clear_x | clear_y)

    def box(self, m: int):
        chosen = self.pick(m)
        valid = np.ones((self.n, m), bool)
        return _three(self.pair[self.rows, chosen]), self.boxes[self.rows, chosen], valid

    def point(self, m: int):
        """Ask for the object at a point, the centre of one; not for centres inside a later object's box."""
        chosen = self.pick(m)
        x, y = self.objects.x[self.rows, chosen], self.objects.y[self.rows, chosen]  # (n, m)
        reach = self.objects.radius[:, None]
        inside = (abs(self.objects.x[:, None] - x[..., None]) < reach) & (
            abs(self.objects.y[:, None] - y[..., None]) < reach
        )
        later = np.arange(reach.shape[-1]) > chosen[..., None]
        valid = ~(inside & later & self.objects.exists[:, None]).any(-1)
        at = np.stack([x, y, np.zeros_like(x)], -1) * (self.bins / self.size)
        return at.astype(np.int64), _four(self.pair[self.rows, chosen]), valid

    def caption(self, m: int):
        """Nothing is drawn: a caption names all objects (`describe`)."""
        shape = (self.n, m)
        return np.zeros((*shape, 3), np.int64), np.zeros((*shape, 4), np.int64), np.ones(shape, bool)

    def word(self, m: int):
        signs = self._signs
        read = np.broadcast_to(signs.word[:, None], (self.n, m))
        return _three(np.zeros_like(read)), _four(read), self._readable(WORD, m)

    def number(self, m: int):
        read = np.zeros((self.n, m, 4), np.int64)
        read[..., :LENGTH] = self._signs.digits[:, None]
        return np.zeros((self.n, m, 3), np.int64), read, self._readable(NUMBER, m)

    def digit(self, m: int):
        """The digit before or after another one."""
        at = self.rng.integers(LENGTH - 1, size=(self.n, m))
        after = self.rng.integers(2, size=(self.n, m))
        pair = np.stack([at, at + 1], -1)  # places of the two digits
        digits = np.take_along_axis(self._signs.digits[:, None], pair, -1)  # (n, m, 2)
        named, read = (np.where(after, digits[..., i], digits[..., 1 - i]) for i in (0, 1))
        return np.stack([named, after, np.zeros_like(at)], -1), _four(read), self._readable(NUMBER, m)

    @property
    def _signs(self) -> Signs:
        assert self.signs is not None, "ScenesConfig asks about signs only where there are some"
        return self.signs

    def _readable(self, sign: int, m: int) -> np.ndarray:
        return np.broadcast_to(self._signs.shown[:, sign, None] & (not self.held_out), (self.n, m))

    def turns(self, m: int):
        """An object is named in the first turn; later ones ask for its size, and where it lies from another."""
        first, second, vertical, true_side, valid = self._two(m)
        about = np.stack([self.pair[self.rows, first], self.pair[self.rows, second], len(SIDES) + vertical], -1)
        answer = _four(self.objects.large[self.rows, first])
        answer[..., 1] = 2 + true_side
        return about, answer, valid

    def pope(self, how: str, m: int):
        """In turns a pair of the scene and an absent one."""
        assert self.known is not None, "Scenes counts pairs where POPE's questions are asked"
        absent_first = absent(self.rng, how, self.per_pair, self.known, self.level)
        fewest = absent_first.shape[1] - len(pair_table(self.level)[1]) - self.pair.shape[1]
        turn = np.arange(m)
        yes = np.broadcast_to(turn % 2 == 0, (self.n, m))
        present = self.pair[self.rows, self.pick(-(-m // 2))][:, turn // 2]
        asked = np.where(yes, present, absent_first[:, turn // 2 % fewest])
        return _three(asked), _four(yes), np.full((self.n, m), not self.held_out)


def _tally(values: np.ndarray, exists: np.ndarray, num: int) -> np.ndarray:
    """Count each of `num` values in each scene: (n, num)."""
    return ((values[..., None] == np.arange(num)) & exists[..., None]).sum(1)


def _three(first: np.ndarray) -> np.ndarray:
    return _widened(first, 3)


def _four(first: np.ndarray) -> np.ndarray:
    return _widened(first, 4)


def _widened(first: np.ndarray, width: int) -> np.ndarray:
    """Put zeros behind each number: (..., width) int64. Several times as fast as `np.pad` on arrays of this size."""
    wide = np.zeros((*first.shape, width), np.int64)
    wide[..., 0] = first
    return wide


@lru_cache(maxsize=65536)
def question_text(kind: int, num_colors: int, num_shapes: int, a: int, b: int, c: int) -> str:
    """Write a question in English."""
    if kind == EXIST or kind in POPE:
        return f"is there a {pair_text(a, num_shapes)}?"
    if kind == COLOR:
        return f"what color is the {SHAPES[a]}?"
    if kind == SHAPE:
        return f"what shape is the {list(COLORS)[a]} object?"
    if kind == SIZE:
        return f"what size is the {pair_text(a, num_shapes)}?"
    if kind == COUNT:
        return f"how many {list(COLORS)[a]} objects?" if a < num_colors else f"how many {plural(a - num_colors)}?"
    if kind == RELATION:
        return f"is the {pair_text(a, num_shapes)} {(SIDES + CHOICES)[c]} the {pair_text(b, num_shapes)}?"
    if kind == BOX:
        return f"where is the {pair_text(a, num_shapes)}?"
    if kind == POINT:
        return f"what is at {a} {b}?"
    if kind == READ_WORD:
        return "what does the sign say?"
    if kind == READ_NUMBER:
        return "what is the number?"
    if kind == READ_DIGIT:
        return f"which digit is {NEIGHBOURS[b]} the {a}?"
    return "describe the image."


@lru_cache(maxsize=65536)
def answer_text(kind: int, num_shapes: int, a: int, b: int, c: int, d: int) -> str:
    """Write an answer in English; captions are written by `describe`."""
    if kind in (EXIST, RELATION) or kind in POPE:
        return ("no", "yes", "left", "right", "above", "below")[a]
    if kind == COLOR:
        return list(COLORS)[a]
    if kind == SHAPE:
        return SHAPES[a]
    if kind == SIZE:
        return SIZES[a]
    if kind == COUNT:
        return str(a)
    if kind == BOX:
        return f"{a} {b} {c} {d}"
    if kind == READ_WORD:
        return WORDS[a]
    if kind == READ_NUMBER:
        return f"{a} {b} {c}"
    if kind == READ_DIGIT:
        return str(a)
    return pair_text(a, num_shapes)


def follow_ups(num_shapes: int, about: Sequence[int], answer: Sequence[int]) -> tuple[tuple[str, str], ...]:
    """Write the turns of a dialog of several: questions and answers."""
    first, second, side = about
    where = f"is it {(SIDES + CHOICES)[side]} the {pair_text(second, num_shapes)}?"
    return (
        (f"is there a {pair_text(first, num_shapes)}?", "yes"),
        ("what size is it?", SIZES[answer[0]]),
        (where, answer_text(RELATION, num_shapes, answer[1], 0, 0, 0)),
    )


def describe(objects: Objects, scene: int) -> str:
    """Write a caption: every object of a scene, from left to right."""
    order = sorted(range(objects.count[scene]), key=lambda j: objects.x[scene, j])
    names = [
        f"a {SIZES[objects.large[scene, j]]} {list(COLORS)[objects.color[scene, j]]} {SHAPES[objects.shape[scene, j]]}"
        for j in order
    ]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def pair_text(pair: int, num_shapes: int) -> str:
    return f"{list(COLORS)[pair // num_shapes]} {SHAPES[pair % num_shapes]}"


def plural(shape: int) -> str:
    return SHAPES[shape] + ("es" if SHAPES[shape].endswith("s") else "s")
