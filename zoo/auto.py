"""Make transformers' Auto classes know our models, without importing transformers for those who only want names.

`import zoo` calls `register_when_loaded`: what is loaded already is told at once, the rest at the moment when somebody imports it.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
# Once a module of transformers is loaded, ours is imported, and its last line registers what it defines.
_OURS = {
    f"{_AUTO}configuration_auto": "zoo.model",
    f"{_AUTO}modeling_auto": "zoo.model",
    f"{_AUTO}processing_auto": "zoo.processor",
}


def register_model(config: type, model: type) -> None:
    """Tell AutoConfig, AutoModel and AutoModelForImageTextToText about the composed model."""
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForImageTextToText

    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)


def register_processor(config: type, processor: type) -> None:
    """Tell AutoProcessor about the processor of the composed model."""
    from transformers.models.auto.processing_auto import AutoProcessor

    AutoProcessor.register(config, processor, exist_ok=True)


def register_when_loaded() -> None:
    """Register now or when the Auto classes are first imported."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
    for theirs in _OURS:
        if theirs in sys.modules:
            _import_ours(theirs)


def _import_ours(theirs: str) -> None:
    """Import our module, unless it or one of transformers is being imported: the outermost of those comes here as well."""
    ours = _OURS[theirs]
    busy = [n for n, m in list(sys.modules.items()) if (n == ours or n.startswith("transformers.")) and _is_busy(m)]
    if not busy:
        import_module(ours)


def _is_busy(module: ModuleType | None) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Watch(MetaPathFinder):
    """Finds the Auto modules as the import system would, and adds a step behind their execution."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _OURS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # get_source and the like, for tracebacks and inspect
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__._initializing = False  # executed: what is imported now may use it
        _import_ours(module.__name__)
