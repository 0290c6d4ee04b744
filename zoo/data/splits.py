"""Where the split of a data set is written: in the names of its files, else it changes nothing."""

from collections.abc import Mapping

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
