"""What is said of a data file that is not there: users look for the place where it was looked for."""

import os
from pathlib import Path

from zoo.registry import ZooError


def absent(path: Path | str, more: str = "", what: str = "file") -> ZooError:
    """Return the error for a path that does not exist; `more` says what else is known."""
    root = os.environ.get("ZOO_DATA")
    if Path(path).absolute().is_relative_to(Path(root or "data").absolute()):
        where = "Presets look for data sets below"
    else:
        where = "This path was stated as it is. Data sets named as presets, data=[<name>], are looked for below"
    where += f" {root!r} (ZOO_DATA)." if root else " 'data'; ZOO_DATA names another folder."
    return ZooError(" ".join(said for said in (f"There is no {what} {str(path)!r}.", more, where) if said))
