"""Make transformers' Auto classes know our models, without importing transformers for those who only want names.

`import zoo` calls `register_when_loaded`: if transformers' Auto classes are loaded already they are told at once, otherwise at the
moment when somebody imports them.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.processing_auto"  # the last of the Auto modules to be loaded


def register() -> None:
    """Tell AutoConfig, AutoProcessor and AutoModelForImageTextToText about `ZooConfig`, `ZooProcessor` and `ZooModel`."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from zoo.model import ZooConfig, ZooModel
    from zoo.processor import ZooProcessor

    AutoConfig.register("zoo", ZooConfig, exist_ok=True)
    AutoModel.register(ZooConfig, ZooModel, exist_ok=True)
    AutoModelForImageTextToText.register(ZooConfig, ZooModel, exist_ok=True)
    AutoProcessor.register(ZooConfig, ZooProcessor, exist_ok=True)


def register_when_loaded() -> None:
    """Register now or when the Auto classes are first imported."""
    if _MODULE in sys.modules:
        register()
    elif not any(isinstance(f, _Watch) for f in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds one module as the import system would, and adds a step behind its execution."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register()
