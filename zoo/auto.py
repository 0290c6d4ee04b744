"""Make transformers' Auto classes know our models, without importing transformers for those who only want names.

`import zoo` calls `register_when_loaded`: what is loaded already is told at once, the rest at the moment when
somebody imports it.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"
_OURS = ("zoo.model", "zoo.processor")  # their last lines register what they define


def register_model(config: Any, model: type) -> None:
    """Tell AutoConfig, AutoModel and AutoModelForImageTextToText about the composed model."""
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForImageTextToText

    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)


def register_processor(config: Any, processor: type) -> None:
    """Tell AutoProcessor about the processor of the composed model."""
    from transformers.models.auto.processing_auto import AutoProcessor

    AutoProcessor.register(config, processor, exist_ok=True)


def register_when_loaded() -> None:
    """Register now or, if nobody has imported the Auto classes yet, when somebody does."""
    if _AUTO in sys.modules:
        _import_ours()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _import_ours() -> None:
    """Import our modules, unless one of them is being imported right now and will come to its last line by itself."""
    if not any(_is_busy(sys.modules.get(name)) for name in _OURS):
        for name in _OURS:
            import_module(name)


def _is_busy(module: ModuleType | None) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Watch(MetaPathFinder):
    """Follows the imports of transformers: once the outermost is done and the Auto classes are there, ours follow.

    In between they cannot: the modules of transformers import each other in circles.
    """

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Counted(spec.loader, self)
        return spec

    def done(self) -> None:
        if self.depth == 0 and _AUTO in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _import_ours()


class _Counted(Loader):
    """A loader that tells the watch when it begins and ends."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:  # get_source and the like, for tracebacks and inspect
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.watch.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.watch.depth -= 1
        if module.__spec__ is not None:
            setattr(module.__spec__, "_initializing", False)  # noqa: B010  executed: what is imported next may use it
        self.watch.done()
