"""The error for a missing data file, with the place where data sets are expected."""

import os
from pathlib import Path

from zoo.registry import ZooError


def absent(path: Path | str, more: str = "", what: str = "file") -> ZooError:
    """Return the error for a path that does not exist; `more` is a further sentence."""
    root = os.environ.get("ZOO_DATA")
    if Path(path).absolute().is_relative_to(Path(root or "data").absolute()):
        where = "Presets look for data sets below"
    else:
        where = "This path was given explicitly. Data sets named as presets, data=[<name>], are expected below"
    where += f" {root!r} (ZOO_DATA)." if root else " 'data'; ZOO_DATA names another folder."
    return ZooError(" ".join(said for said in (f"There is no {what} {str(path)!r}.", more, where) if said))
