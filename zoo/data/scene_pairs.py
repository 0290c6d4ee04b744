"""Wrong answers about drawn scenes, for pairs of a true answer and a hallucinated one.

The wrong answer of `exist` and `relation` is the opposite one; that of a colour, shape, size or count is another of its
kind, one of the picture if possible; and a caption's has an object that the picture lacks in the place of one that it
has. The subject of `exist` is absent half of the time and mostly close to a present one, as in POPE's adversarial
questions (arXiv:2305.10355).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zoo.data.pairs import in_pairs
from zoo.data.scene_draw import COLORS, SHAPES, SIZES, Level
from zoo.registry import Dialog

OPPOSITE = {"yes": "no", "no": "yes", "left": "right", "right": "left", "above": "below", "below": "above"}
KINDS_WITH_WRONG = ("exist", "color", "shape", "size", "count", "relation", "caption")


def scene_pairs(
    rng: np.random.Generator, dialogs: list[Dialog], objects: list[dict[str, Any]], level: Level
) -> list[Dialog]:
    """Put behind each dialog the same question with a wrong answer: chosen, rejected, chosen, ...

    Args:
        objects: of the scene, as `Scenes.scene` tells them.
        level: of difficulty, for the colours and shapes there are.
    """
    words = {"color": list(COLORS)[: level.num_colors], "shape": list(SHAPES)[: level.num_shapes], "size": list(SIZES)}
    return in_pairs(dialogs, lambda dialog, right: _wrong(rng, dialog.kind, right, objects, words))


def _wrong(
    rng: np.random.Generator, kind: str, right: str, objects: list[dict[str, Any]], words: dict[str, list[str]]
) -> str:
    if right in OPPOSITE:
        return OPPOSITE[right]
    if kind == "count":
        others = [str(n) for n in (int(right) - 1, int(right) + 1) if n >= 0]
    elif kind == "caption":
        return _hallucinated(rng, objects, words)
    else:
        others = [w for w in words[kind] if w != right]
        others = [w for w in others if any(o[kind] == w for o in objects)] or others
    return others[int(rng.integers(len(others)))]


def _hallucinated(rng: np.random.Generator, objects: list[dict[str, Any]], words: dict[str, list[str]]) -> str:
    """A caption with an object that is not there in the place of one that is, of the same colour or shape."""
    told = sorted(objects, key=lambda o: o["x"])
    at = int(rng.integers(len(told)))
    color, shape = told[at]["color"], told[at]["shape"]
    near = [(c, shape) for c in words["color"]] + [(color, s) for s in words["shape"]]
    absent = [pair for pair in near if pair not in {(o["color"], o["shape"]) for o in objects}]
    color, shape = absent[int(rng.integers(len(absent)))]
    said = [*told[:at], {**told[at], "color": color, "shape": shape}, *told[at + 1 :]]
    names = [f"a {o['size']} {o['color']} {o['shape']}" for o in said]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
