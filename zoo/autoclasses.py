"""Register the zoo's models with transformers' Auto classes.

The registration itself is `AutoModel.register` and its like, in the last lines of `zoo.model_config`,
`zoo.composed.model` and `zoo.text.processor`. A script that calls `AutoModelForImageTextToText.from_pretrained(folder)`
needs `import zoo`, before or after the import of transformers, and nothing else.

`import zoo` cannot register at once: that would import torch, transformers and torchvision, 2.9 s of CPU, where
`zoo list`, completion and a config mistake take 0.04 s. So an import hook runs after each of transformers' three Auto
modules and imports the zoo's module that registers itself there; for Auto modules that are imported already, it is
imported now.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto"
_OURS = {
    f"{_AUTO}.configuration_auto": "zoo.model_config",
    f"{_AUTO}.modeling_auto": "zoo.composed.model",
    f"{_AUTO}.processing_auto": "zoo.text.processor",
}


def register_config(config: Any) -> None:
    """Register the config of the composed model with AutoConfig."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(config.model_type, config, exist_ok=True)


def register_model(config: Any, model: type) -> None:
    """Register the composed model with AutoModel and AutoModelForImageTextToText."""
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForImageTextToText

    AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)


def register_processor(config: Any, processor: type) -> None:
    """Register the processor of the composed model with AutoProcessor."""
    from transformers.models.auto.processing_auto import AutoProcessor

    AutoProcessor.register(config, processor, exist_ok=True)


def register_when_loaded() -> None:
    """Register with the Auto modules that are imported already, and with the others when they are imported."""
    if not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())
    for name, ours in _OURS.items():
        if name in sys.modules:
            import_module(ours)


class _AutoFinder(MetaPathFinder):
    """Finds the Auto modules as Python does, and imports the zoo's module after each."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _OURS or (spec := PathFinder.find_spec(name, path, target)) is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            import_module(_OURS[name])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this module's loader alone
        return spec
