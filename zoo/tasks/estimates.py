"""Numbers with their standard errors: means, ratios of means, shares of groups."""

from collections.abc import Mapping, Sequence

import numpy as np

from zoo.registry import Score

Rows = Sequence[Mapping[str, float]]


def column(rows: Rows, name: str) -> np.ndarray:
    """Return the values of one metric, in the order of the rows."""
    return np.array([row[name] for row in rows], np.float64)


def mean(values: np.ndarray) -> Score:
    """Mean of independent values, with the standard error that the sample's variance gives."""
    n = len(values)
    if n == 0:
        return Score(0.0, 0, 0.0)
    return Score(float(values.mean()), n, float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0)


def ratio(above: np.ndarray, below: np.ndarray) -> Score:
    """Ratio of two sums over the same samples, 0 where the lower one is 0.

    The standard error is the delta method's: with r the ratio, the mean of (above - r * below) / mean(below) has the
    spread of r to first order. `n` counts the samples whose `below` is not 0. For 0/1 columns and `above <= below` this
    is the binomial error of a share.
    """
    n = len(above)
    if n == 0 or below.sum() == 0:
        return Score(0.0, 0, 0.0)
    value = above.sum() / below.sum()
    pull = (above - value * below) / below.mean()
    error = pull.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
    return Score(float(value), int(np.count_nonzero(below)), float(error))


def consistency(right: np.ndarray, groups: np.ndarray) -> Score:
    """Share of the groups in which every sample is right."""
    _, members = np.unique(groups, return_inverse=True)
    return mean((np.bincount(members, weights=1 - right) == 0).astype(np.float64) if len(right) else right)


def means(rows: Rows) -> dict[str, Score]:
    """Mean of every metric; names that begin with an underscore are counts for the task itself and no metrics."""
    names = dict.fromkeys(name for row in rows for name in row if not name.startswith("_"))
    return {name: mean(column([row for row in rows if name in row], name)) for name in names}
