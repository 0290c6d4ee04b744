"""Questions about absent objects by POPE's protocol: which are asked for, and in which order.

Paper: Li et al., Evaluating Object Hallucination in Large Vision-Language Models, arXiv:2305.10355, section 5. Half of
the questions name an object of the picture. The other half name one that it lacks: any (`random`), those that are
most frequent in the training pictures (`popular`), or those that are there most often together with the picture's own
objects (`adversarial`). An object is a pair of colour and shape here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from zoo.data.scene_draw import Level, Objects, pair_table

COUNTED = 1024  # training scenes that are counted


@dataclass
class Frequencies:
    """How often pairs occur in training scenes."""

    alone: np.ndarray  # (pairs,)
    together: np.ndarray  # (pairs, pairs); 0 of a pair with itself

    @staticmethod
    def of(scenes: Iterable[Objects], level: Level) -> Frequencies:
        """Count the pairs of scenes."""
        ids = np.arange(level.num_colors * level.num_shapes)
        there = np.concatenate(
            [
                ((o.color * level.num_shapes + o.shape)[..., None] == ids) & o.exists[..., None]  # (n, k, pairs)
                for o in scenes
            ]
        )
        any_of = np.asarray(there.any(1), dtype=np.int64)  # (scenes, pairs)
        together = any_of.T @ any_of
        np.fill_diagonal(together, 0)
        return Frequencies(any_of.sum(0), together)


def absent(rng: np.random.Generator, how: str, here: np.ndarray, known: Frequencies, level: Level) -> np.ndarray:
    """Order the pairs that scenes lack, those to be asked for first: (n, pairs); those that they have come last.

    Args:
        rng: for `random`, and among equals.
        how: random, popular or adversarial.
        here: (n, pairs) how often each pair is in each scene.
        known: frequencies in training scenes.
        level: of difficulty; pairs that training never shows are not asked for.
    """
    key = rng.random(here.shape)  # below 1, so that it decides among equals only
    if how == "popular":
        key = key - known.alone
    elif how == "adversarial":
        key = key - (here > 0) @ known.together
    _, held = pair_table(level)
    key[here > 0] = np.inf
    key[:, held] = np.inf
    return key.argsort(1)
