"""A loaded model with other pruners, on the same weights.

Training-free pruners add none, so models that differ in pruners alone can share all tensors: each is a whole model
with modules of its own, and memory holds the weights once.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from zoo import registry
from zoo.composed.assembly import assemble
from zoo.composed.model import ZooModel
from zoo.loading.build import config_for, load, processor_from
from zoo.registry import ZooError, unknown
from zoo.settings.source import source_named
from zoo.text.processor import ZooProcessor
from zoo.text.stops import set_stops

NONE = "none"  # instead of a pruner's name: without one
RATIO = "keep_ratio"


class Pruned:
    """A loaded model, and the same with other pruners, made when they are asked for; threads may share it.

    Args:
        name: as for `zoo.load`.
        overrides: of the model.
        options: further ones of `zoo.load`.
        most: models with other pruners that are kept, those used last; their weights are shared.
    """

    def __init__(self, name: str, overrides: Sequence[str] = (), *, most: int = 8, **options: Any) -> None:
        self.name, self.overrides, self.most = name, list(overrides), most
        self.model, self.processor = load(name, *overrides, **options)
        self._made: OrderedDict[tuple[str | None, float | None], tuple[ZooModel, ZooProcessor]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, pruner: str | None = None, keep_ratio: float | None = None) -> tuple[ZooModel, ZooProcessor]:
        """Return the model with a pruner, and its processor.

        Args:
            pruner: a name, a chain `a+b`, or `none`; None: those that the model was loaded with, with this keep ratio.
            keep_ratio: of the pruners; None: their defaults.

        Raises:
            ZooError: see `with_pruners`.
        """
        if pruner is None and keep_ratio is None:
            return self.model, self.processor
        with self._lock:
            key = pruner, keep_ratio
            if key not in self._made:
                self._made[key] = with_pruners(
                    self.model, self.processor, self.name, self.overrides, pruner, keep_ratio
                )
            self._made.move_to_end(key)
            found = self._made[key]
            while len(self._made) > self.most:
                self._made.popitem(last=False)
            return found


def words_for(pruner: str, keep_ratio: float | None = None) -> list[str]:
    """Return the options of a model for a pruner, or a chain of several: `random+aim`.

    Args:
        pruner: names in the registry, or `none`.
        keep_ratio: of the pruners that have this option; None: their defaults.

    Raises:
        ZooError: there is no such pruner, or no pruner of the chain has a keep ratio.
    """
    if pruner == NONE:
        if keep_ratio is not None:
            raise ZooError("keep_ratio is an option of a pruner, and there is none.")
        return ["pruner=null"]
    names = str(pruner).split("+")
    known = registry.names("pruner")
    for name in names:
        if name not in known:
            raise unknown("pruner", name, [*known, NONE])
    return [f"pruner=[{','.join(names)}]", *_ratios(names, keep_ratio)]


def _ratios(names: Sequence[str], keep_ratio: float | None) -> list[str]:
    """Return the options that set the keep ratio of those pruners that have one."""
    if keep_ratio is None:
        return []
    having = [name for name in names if has_ratio(name)]
    if not having:
        raise ZooError(f"pruner {'+'.join(names)!r} has no option {RATIO}.")
    return [f"pruner.{name}.{RATIO}={keep_ratio!r}" for name in having]


def has_ratio(pruner: str) -> bool:
    """Whether a pruner has the option `keep_ratio`."""
    return any(option.name == RATIO for option in registry.get("pruner", pruner).options)


@torch.no_grad()
def with_pruners(
    model: ZooModel,
    processor: ZooProcessor,
    name: str,
    overrides: Sequence[str],
    pruner: str | None,
    keep_ratio: Any = None,
) -> tuple[ZooModel, ZooProcessor]:
    """Return a model with other pruners that shares its weights with `model`, and its processor.

    Args:
        model: loaded by `zoo.load(name, *overrides)`.
        processor: of the model.
        name: as for `zoo.load`.
        overrides: with which `model` was loaded; those of its pruners are left out where there are others.
        pruner: a name, a chain `a+b`, or `none`; None: those of `model`, with all of their options.
        keep_ratio: of the pruners; None: their defaults.

    Raises:
        ZooError: they do not fit the model, have weights of their own, or the model is quantized or on several devices.
    """
    if pruner is None and model.pruner:
        words = [*overrides, *_ratios(list(model.pruner), keep_ratio)]
    else:
        kept = [word for word in overrides if not word.startswith(("pruner=", "pruner."))]
        words = [*kept, *words_for(pruner or NONE, keep_ratio)]
    source = source_named(name, *words)
    source.attention = model.config.attention
    several = len({weight.device for weight in model.parameters()}) > 1
    if several or any(getattr(model.llm.lm, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        raise ZooError("A model that is quantized, or on several devices, keeps the pruners that it was loaded with.")
    tokenizer = processor.tokenizer
    config = config_for(source, tokenizer)
    with torch.device("meta"):  # `zoo check` does the same, and looks for fixes, which takes seconds
        other = ZooModel(config, parts=assemble(source.slots, vocab_size=len(tokenizer)))
    _share(model, other)
    made, generation = processor_from(source, other, tokenizer)
    other.__dict__["processor"] = made
    set_stops(other, made.template, generation)
    return other.eval(), made


def _share(model: ZooModel, other: ZooModel) -> None:
    """Put the tensors of a model in the places of those of another, by name."""
    ours = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for path, module in other.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                name = f"{path}.{key}" if path else key
                found = ours.get(name)
                if found is None or found.shape != tensor.shape:
                    raise ZooError(
                        f"The pruner changes weights of the model ({name}): load it with this pruner instead."
                    )
                tensors[key] = found
