"""Exact match after lower case, spaces and the full stop are made equal.

Dialogs that share `meta["group"]` (the images of one NLVR sentence, say) also give `consistency`: the share of groups
in which every answer is right.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.registry import Dialog, Score, ZooError, register
from zoo.tasks.answers import accepted, plain
from zoo.tasks.estimates import column, consistency, means


@dataclass
class ExactConfig:
    max_new_tokens: int = 32  # longest answer
    strict: bool = False  # compare the texts as they are, but for spaces around them

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ZooError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")


@register("task", "exact")
class Exact:
    """accuracy; consistency where dialogs belong to groups."""

    mode = "generate"

    def __init__(self, config: ExactConfig) -> None:
        self.max_new_tokens = config.max_new_tokens
        self.same = str.strip if config.strict else plain

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Return 1 where the prediction is one of the accepted answers."""
        given = self.same(prediction)
        row = {"accuracy": float(given != "" and given in {self.same(answer) for answer in accepted(dialog)})}
        return row | group_of(dialog)

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average, and count the groups that are right throughout."""
        return means(rows) | consistency_of(rows)


def group_of(dialog: Dialog) -> dict[str, float]:
    """Return a number in [0, 1) that is the same for all dialogs with the same `meta["group"]`, if there is one."""
    group = dialog.meta.get("group")
    return {} if group is None else {"_group": zlib.crc32(str(group).encode()) / 2**32}


def consistency_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
    """Return the share of groups that are right throughout, if the rows have groups."""
    grouped = [row for row in rows if "_group" in row]
    if not grouped:
        return {}
    return {"consistency": consistency(column(grouped, "accuracy"), column(grouped, "_group"))}
