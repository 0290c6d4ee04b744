"""Where converted weights are kept."""

import os
from pathlib import Path

RECORD = "converted.json"  # beside the weights of a converted folder: what they are from


def cache() -> Path:
    """Return the folder of converted weights: below `ZOO_CACHE`, else below the user's folder of caches."""
    if own := os.environ.get("ZOO_CACHE"):
        return Path(own).expanduser() / "converted"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo" / "converted"
