"""Splits of a data set: where they are written, in the names of its files, and parts of one that overlap."""

import re
from collections.abc import Mapping
from math import inf

from zoo.registry import MISSING, ZooError


def require_split(eval_split: str, names: Mapping[str, str], other: str = "") -> None:
    """Refuse a split for evaluation that would read the training data.

    Args:
        eval_split: of the config; empty: there is none.
        names: option -> name of files, in which `{split}` is replaced.
        other: another way to tell the splits apart, for the message.

    Raises:
        ZooError: no name has `{split}`.
    """
    given = {option: name for option, name in names.items() if name and name != MISSING}
    if not eval_split or not given or any("{split}" in name for name in given.values()):
        return
    shown = ", ".join(f"{option}={name!r}" for option, name in given.items())
    raise ZooError(
        f"eval_split={eval_split!r} would be the training data: {{split}} has to be in {' or '.join(names)}"
        f"{f', or {other}' if other else ''}, got {shown}."
    )


_PART = re.compile(r"(.+?)(?:\[(\d*)(%?):(\d*)(%?)\])?")  # train, train[:90%], train[100:]


def require_apart(name: str, split: str, eval_split: str) -> None:
    """Refuse a split for evaluation of which a part, and not all, is trained on.

    Args:
        name: of the data.
        split: that is trained on.
        eval_split: of the config; empty: there is none.

    Raises:
        ZooError: they overlap.
    """
    ours, theirs = _PART.fullmatch(split), _PART.fullmatch(eval_split)
    if split == eval_split or ours is None or theirs is None or ours[1] != theirs[1]:
        return
    (first, last, unit), (begin, end, other) = _range(ours), _range(theirs)
    whole = (0, inf) in ((first, last), (begin, end))
    if (whole or unit == other) and max(first, begin) < min(last, end):
        raise ZooError(
            f"data.{name}: eval_split={eval_split!r} would be trained on, as a part of split={split!r}. Set both: "
            f"split='{ours[1]}[:90%]' and eval_split='{ours[1]}[90%:]', say."
        )


def _range(part: re.Match[str]) -> tuple[float, float, str]:
    """Return where a part begins and ends, and the unit."""
    return float(part[2] or 0), float(part[4] or inf), "%" if part[3] or part[5] else ""
