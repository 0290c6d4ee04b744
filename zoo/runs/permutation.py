"""A shuffled order that is computed position by position, for data sets whose order would take memory if stored."""

from typing import Any

import numpy as np

ROUNDS = 8  # 4 give a pseudorandom permutation of large halves (Luby and Rackoff, 1988); more for short ones
STORED = 1 << 20  # lengths up to here are numpy's permutation, which takes 8 bytes a sample


class Permutation:
    """A pseudorandom bijection of [0, length), of a few numbers in memory whatever the length.

    A Feistel network on pairs (left, right) of [0, a) x [0, b), a * b the smallest product of nearly equal factors that
    is at least `length`; where it leaves [0, length) it is applied again (Black and Rogaway, 2002: cycle walking),
    which at such a product happens to few positions.

    Args:
        length: at least 1.
        random: the generator that the keys of the rounds are drawn from.
    """

    def __init__(self, length: int, random: np.random.Generator) -> None:
        self.length = length
        self._a = int(np.ceil(np.sqrt(length)))
        self._b = -(-length // self._a)
        self._keys = random.integers(0, 1 << 63, ROUNDS, dtype=np.uint64)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Return the image of each position: (P,) int64 -> (P,) int64."""
        found = self._walk(np.asarray(positions, dtype=np.uint64))
        while (outside := found >= self.length).any():
            found[outside] = self._walk(found[outside])
        return found.astype(np.int64)

    def _walk(self, positions: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left: Any = positions // b  # of [0, a)
        right: Any = positions % b  # of [0, b)
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _mixed(left ^ key) % b) % b
            else:
                left = (left + _mixed(right ^ key) % a) % a
        result: np.ndarray = left * b + right
        return result


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit numbers: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(length: int, random: np.random.Generator) -> "np.ndarray | Permutation":
    """Return a shuffled order of `length` samples, to be indexed by arrays of positions."""
    return Permutation(length, random) if length > STORED else random.permutation(length)
