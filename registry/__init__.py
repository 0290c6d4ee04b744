"""Names to components. Imports nothing else of ours, and nothing heavy."""

from zoo.registry.contracts import (
    IGNORE_INDEX,
    KINDS,
    MANY,
    Cut,
    Dialog,
    ImageFeatures,
    ImageTransform,
    LinearHead,
    Sample,
    Score,
)
from zoo.registry.core import (
    Entry,
    build,
    config_of,
    declare,
    entries,
    get,
    names,
    refuse_code,
    register,
    source_options,
)
from zoo.registry.errors import ZooError, nearest, unknown, unknown_option, wrong_value
from zoo.registry.source import MISSING, Option, options_of

__all__ = [
    "IGNORE_INDEX",
    "KINDS",
    "MANY",
    "MISSING",
    "Cut",
    "Dialog",
    "Entry",
    "ImageFeatures",
    "ImageTransform",
    "LinearHead",
    "Option",
    "Sample",
    "Score",
    "ZooError",
    "build",
    "config_of",
    "declare",
    "entries",
    "get",
    "names",
    "nearest",
    "options_of",
    "refuse_code",
    "register",
    "source_options",
    "unknown",
    "unknown_option",
    "wrong_value",
]
