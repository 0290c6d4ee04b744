"""Where tests find the public data, and the skip that says so where it is absent."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("ZOO_DATA") or Path(__file__).parents[2] / "shared" / "data")


def shared(name: str) -> Path:
    """Return the folder of a data set, or skip the test."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the data set {name!r} in {SHARED} (set ZOO_DATA)")
    return SHARED / name
