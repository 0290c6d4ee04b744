"""Leave decoder layers of a checkpoint out: the start of a student that is as wide as its teacher, and less deep.

Keeping every n-th layer is how DistilBERT starts (arXiv:1910.01108, section 3). What is left computes nonsense until it
is trained, but it knows words.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from zoo.fusion.llm.decoder import decoder_of
from zoo.registry import ZooError


def keep_layers(lm: Any, kept: Sequence[int], name: str) -> None:
    """Leave only some decoder layers in a model of transformers, and in its config, numbered anew.

    Args:
        lm: with weights, or on the meta device.
        kept: layers that stay, counted from 0, ascending.
        name: of the checkpoint, for messages.

    Raises:
        ZooError: there are not as many layers, or the family numbers its layers in a way that is not known here.
    """
    text = lm.config.get_text_config()
    depth = text.num_hidden_layers
    if not 0 <= kept[0] <= kept[-1] < depth or any(a >= b for a, b in pairwise(kept)):
        raise ZooError(
            f"keep_layers of llm {name!r} must ascend, without doubles, within 0 to {depth - 1}, got {list(kept)}."
        )
    if shared := [field for field in _SHARED if getattr(text, field, 0)]:
        raise ZooError(f"keep_layers: layers of {text.model_type!r} use what others compute ({shared[0]}); keep all.")
    for parent in decoder_of(lm).modules():
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                setattr(parent, child, nn.ModuleList([module[i] for i in kept]))
                _number(getattr(parent, child))
    for field, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:  # such as layer_types
            setattr(text, field, [value[i] for i in kept])
        elif field in _NUMBERS and isinstance(value, list):
            setattr(text, field, [new for new, old in enumerate(kept) if old in value])
    text.num_hidden_layers = len(kept)


_SHARED = ("num_kv_shared_layers",)  # Gemma 3n: the last layers read keys of earlier ones
_NUMBERS = ("mlp_only_layers",)  # fields that hold numbers of layers


def _number(layers: nn.ModuleList) -> None:
    """Give each layer's modules its place, which is that of its keys in a cache."""
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", place)  # noqa: B010 - a plain number, which a module's type excludes
