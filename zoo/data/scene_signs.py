"""Signs in `scenes`: a light plate with a word and a dark one with a number, where no object is.

Glyphs are 5 x 7 dots, drawn for this file, so that a picture depends on no font. A dot is a 64th of the picture's side,
and three characters are 17 dots wide: at 128 pixels in patches of 8 a plate covers about 5 x 3 patches, and reading it
takes most of them. The words differ in single letters from each other; the digits of a number are all different.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from zoo.data.scene_draw import Level, Objects

FONT = """
0     1     2     3     4     5     6     7     8     9
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. .#... .###. .##..

a     b     c     e     h     i     n     o     p     r     s     t     u
.###. ####. .#### ##### #...# .###. #...# .###. ####. ####. .#### ##### #...#
#...# #...# #.... #.... #...# ..#.. ##..# #...# #...# #...# #.... ..#.. #...#
#...# #...# #.... #.... #...# ..#.. ##..# #...# #...# #...# #.... ..#.. #...#
##### ####. #.... ####. ##### ..#.. #.#.# #...# ####. ####. .###. ..#.. #...#
#...# #...# #.... #.... #...# ..#.. #..## #...# #.... #.#.. ....# ..#.. #...#
#...# #...# #.... #.... #...# ..#.. #..## #...# #.... #..#. ....# ..#.. #...#
#...# ####. .#### ##### #...# .###. #...# .###. #.... #...# ####. ..#.. .###.
"""
# fmt: off
WORDS = (
    "bat", "bet", "bin", "bit", "bun", "can", "cap", "cat", "cop", "cub", "cup",
    "cut", "hat", "hen", "hit", "hot", "hut", "nap", "net", "nut", "pan", "pen",
    "pet", "pin", "pit", "pot", "rat", "run", "sun", "tan", "ten", "tin",
)
# fmt: on
LENGTH = 3  # characters of a sign
DIGITS = 10
WORD, NUMBER = range(2)  # the two signs
PLATES = ((240, 240, 235), (35, 35, 45))  # of the word and of the number
INKS = ((30, 30, 60), (240, 235, 200))
PITCH, WIDTH, HEIGHT = 6, 5 * LENGTH + LENGTH + 1, 9  # dots from glyph to glyph, and of a plate with its margin
TRIES = 60  # places tried for a sign before it is left out


def _glyphs() -> dict[str, np.ndarray]:
    """Read `FONT`: character -> (7, 5) bool."""
    found = {}
    for block in FONT.strip().split("\n\n"):
        names, *rows = block.split("\n")
        for at, name in enumerate(names.split()):
            found[name] = np.array([[dot == "#" for dot in row.split()[at]] for row in rows])
    return found


GLYPHS = _glyphs()
CHARACTERS = "".join(GLYPHS)  # the digits first


@dataclass
class Signs:
    """Signs of n scenes: the word, then the number."""

    shown: np.ndarray  # (n, 2) bool; where there was room
    word: np.ndarray  # (n,) index into WORDS
    digits: np.ndarray  # (n, LENGTH) all different
    x: np.ndarray  # (n, 2) left edge in pixels, whole numbers
    y: np.ndarray  # (n, 2) upper edge
    dot: int  # pixels a side

    def text(self, scene: int, sign: int) -> str:
        """What a sign reads."""
        return WORDS[self.word[scene]] if sign == WORD else "".join(map(str, self.digits[scene]))


def place(rng: np.random.Generator, objects: Objects, size: int) -> Signs:
    """Draw what signs read, and find places for them that no object covers.

    Args:
        rng: the only source of randomness.
        objects: of n scenes.
        size: side of the picture in pixels.
    """
    n, dot = len(objects.count), max(1, size // 64)
    word = rng.integers(len(WORDS), size=n)
    digits = rng.random((n, DIGITS)).argsort(1)[:, :LENGTH]
    wide, high = WIDTH * dot, HEIGHT * dot
    spots = rng.random((n, 2, TRIES, 2)) * (size - np.array([wide, high]) + 1)  # (n, 2, TRIES, 2)
    left, top = np.moveaxis(spots.astype(np.int64), -1, 0)  # (n, 2, TRIES)
    reach = (objects.radius + dot)[:, None, None]  # (n, 1, 1, k)
    ox, oy = objects.x[:, None, None], objects.y[:, None, None]
    over = (ox + reach > left[..., None]) & (ox - reach < left[..., None] + wide)
    over &= (oy + reach > top[..., None]) & (oy - reach < top[..., None] + high) & objects.exists[:, None, None]
    free = ~over.any(-1)  # (n, 2, TRIES)
    shown, x, y = np.zeros((n, 2), bool), np.zeros((n, 2), np.int64), np.zeros((n, 2), np.int64)
    rows = np.arange(n)
    for sign in (WORD, NUMBER):
        if sign == NUMBER:
            clear = abs(left[:, sign] - x[:, :1]) >= wide + dot
            free[:, sign] &= clear | (abs(top[:, sign] - y[:, :1]) >= high + dot) | ~shown[:, :1]
        at = free[:, sign].argmax(1)
        shown[:, sign] = free[rows, sign, at]
        x[:, sign], y[:, sign] = left[rows, sign, at], top[rows, sign, at]
    return Signs(shown, word, digits, x, y, dot)


def draw(pictures: np.ndarray, signs: Signs) -> None:
    """Put the signs on pictures (n, size, size, 3) uint8, in place."""
    for scene, sign in np.argwhere(signs.shown).tolist():
        plate = _plate(signs.text(scene, sign), sign, signs.dot)  # (h, w, 3)
        x, y = signs.x[scene, sign], signs.y[scene, sign]
        pictures[scene, y : y + plate.shape[0], x : x + plate.shape[1]] = plate


@lru_cache(maxsize=2048)
def _plate(text: str, sign: int, dot: int) -> np.ndarray:
    inked = np.zeros((HEIGHT, WIDTH), bool)
    for at, character in enumerate(text):
        inked[1:8, 1 + PITCH * at : 6 + PITCH * at] = GLYPHS[character]
    inked = inked.repeat(dot, 0).repeat(dot, 1)
    return np.where(inked[..., None], INKS[sign], PLATES[sign]).astype(np.uint8)


def cell_labels(signs: Signs, grid: int, size: int) -> np.ndarray:
    """Label each cell of a grid with the character at its centre: (n, grid * grid) int16, 0: none, else 1 + index."""
    middle = (np.arange(grid) + 0.5) * size / grid
    cx, cy = np.tile(middle, grid), np.repeat(middle, grid)  # (cells,)
    labels = np.zeros((len(signs.word), grid * grid), np.int16)
    for sign in (WORD, NUMBER):
        column = np.floor((cx - signs.x[:, sign, None] - signs.dot) / (PITCH * signs.dot)).astype(np.int64)
        row = (cy - signs.y[:, sign, None]) / signs.dot
        inside = (column >= 0) & (column < LENGTH) & (row >= 0) & (row < HEIGHT) & signs.shown[:, sign, None]
        read = np.array([[CHARACTERS.index(c) for c in signs.text(i, sign)] for i in range(len(signs.word))])  # (n, 3)
        characters = np.take_along_axis(read, column.clip(0, LENGTH - 1), 1)
        labels = np.where(inside, characters + 1, labels).astype(np.int16)
    return labels


def scene_labels(objects: Objects, signs: Signs | None, level: Level) -> np.ndarray:
    """Label whole scenes, for [CLS]: (n, 1, L) int16.

    The labels are whether each pair of colour and shape is there (0, 1); with signs also the word (0: none, else 1 +
    index) and each digit of the number (0: no number, else 1 + digit).
    """
    n, pairs = len(objects.count), level.num_colors * level.num_shapes
    pair = objects.color * level.num_shapes + objects.shape
    labels = [((pair[..., None] == np.arange(pairs)) & objects.exists[..., None]).any(1)]
    if signs is not None:
        labels += [np.where(signs.shown[:, :1], signs.word[:, None] + 1, 0)]
        labels += [np.where(signs.shown[:, 1:], signs.digits + 1, 0)]
    return np.concatenate(labels, 1).reshape(n, 1, -1).astype(np.int16)
