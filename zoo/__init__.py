"""A multimodal model zoo: compose a vision-language model from registered parts, by config."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():  # a checkout, run in place or linked to by an editable install
    __path__[:] = [str(_root / "zoo"), str(_root)]  # the package's other folders are beside this one

from zoo import data, distill, fusion, tasks, vision  # noqa: E402  tables of the components, nothing heavy
from zoo.autoclasses import register_when_loaded  # noqa: E402
from zoo.moved import serve  # noqa: E402
from zoo.registry import (  # noqa: E402
    Dialog,
    ImageFeatures,
    ImageTransform,
    Sample,
    Score,
    ZooError,
    names,
    register,
)

if TYPE_CHECKING:
    from zoo.checking.checker import check
    from zoo.composed.model import ZooModel
    from zoo.composed.pruner_alone import pruner
    from zoo.loading.build import compose, load
    from zoo.model_config import ZooConfig
    from zoo.published.export import export
    from zoo.text.processor import ZooProcessor

__version__ = "0.1.0"

# Names that cost an import of torch or transformers, with their modules; resolved on first use (PEP 562).
_LAZY = {
    "ZooConfig": "zoo.model_config",
    "ZooModel": "zoo.composed.model",
    "ZooProcessor": "zoo.text.processor",
    "check": "zoo.checking.checker",
    "compose": "zoo.loading.build",
    "export": "zoo.published.export",
    "load": "zoo.loading.build",
    "pruner": "zoo.composed.pruner_alone",
}

__all__ = [
    "Dialog",
    "ImageFeatures",
    "ImageTransform",
    "Sample",
    "Score",
    "ZooConfig",
    "ZooError",
    "ZooModel",
    "ZooProcessor",
    "check",
    "compose",
    "export",
    "load",
    "names",
    "pruner",
    "register",
]


register_when_loaded()
serve()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
