"""Dialogs that belong together through `meta["group"]`: how often all of a group are right."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from zoo.registry import Dialog, Score
from zoo.tasks.estimates import column, consistency


def group_of(dialog: Dialog) -> dict[str, float]:
    """Return a number in [0, 1) that is the same for all dialogs with the same `meta["group"]`, if there is one."""
    group = dialog.meta.get("group")
    if group is None:
        return {}
    digest = blake2b(str(group).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # 53 bits, all that a float holds: of a million groups two share a number once in 18,000 data sets
    return {"_group": (int.from_bytes(digest) >> 11) / 2**53}


def consistency_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
    """Return the share of groups that are right throughout, if the rows have groups."""
    grouped = [row for row in rows if "_group" in row]
    if not grouped:
        return {}
    return {"consistency": consistency(column(grouped, "accuracy"), column(grouped, "_group"))}
