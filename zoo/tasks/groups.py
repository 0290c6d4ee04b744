"""Dialogs that belong together through `meta["group"]`: how often all of a group are right."""

import zlib
from collections.abc import Mapping, Sequence

from zoo.registry import Dialog, Score
from zoo.tasks.estimates import column, consistency


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
