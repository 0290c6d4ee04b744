"""Leave decoder layers of a checkpoint out: the start of a student that is as wide as its teacher, and less deep.

Keeping every n-th layer is how DistilBERT starts (arXiv:1910.01108, section 3). What is left computes nonsense until it
is trained, but it knows words.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from zoo.fusion.llm.decoder import decoder_of
from zoo.registry import ZooError, one_line


def keep_layers(lm: Any, kept: Sequence[int], name: str) -> None:
    """Leave only some decoder layers in a model of transformers, and in its config, numbered anew.

    Args:
        lm: with weights, or on the meta device.
        kept: layers that stay, counted from 0, ascending.
        name: of the checkpoint, for messages.

    Raises:
        ZooError: there are not as many layers, or the family has layers of several kinds, by rules that put another
            kind in the place of one that stays: nothing could load the model that is left.
    """
    text = lm.config.get_text_config()
    depth = text.num_hidden_layers
    if not 0 <= kept[0] <= kept[-1] < depth or any(a >= b for a, b in pairwise(kept)):
        raise ZooError(
            f"keep_layers of llm {name!r} must ascend, without doubles, within 0 to {depth - 1}, got {list(kept)}."
        )
    if shared := [field for field in _SHARED if getattr(text, field, 0)]:
        raise ZooError(f"keep_layers: layers of {text.model_type!r} use what others compute ({shared[0]}); keep all.")
    # Layers of few bits are compared by what they were made of.
    plain = decoder_of(lm) if getattr(lm, "hf_quantizer", None) is None else _described(lm)
    before: dict[str, list[Kind]] = {}  # path of a list of layers -> what each of them was
    for path, parent in list(decoder_of(lm).named_modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                at = f"{path}.{child}" if path else child
                before[at] = [_kind(layer) for layer in plain.get_submodule(at)]
                setattr(parent, child, nn.ModuleList([module[i] for i in kept]))
                _number(getattr(parent, child))
    for field, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:  # such as layer_types
            setattr(text, field, [value[i] for i in kept])
        elif field in _NUMBERS and isinstance(value, list):
            setattr(text, field, [new for new, old in enumerate(kept) if old in value])
    text.num_hidden_layers = len(kept)
    where = f"keep_layers={list(kept)} of llm {name!r}"
    try:
        again = _described(lm)
    except Exception as error:  # of any family's own checks
        raise ZooError(f"{where}: {text.model_type!r} has no such model: {one_line(error)}") from error
    for path, kinds in before.items():
        for new, (old, layer) in enumerate(zip(kept, again.get_submodule(path), strict=True)):
            if (wanted := _kind(layer)) != kinds[old]:
                raise ZooError(f"{where}: {_unlike(new, old, wanted, kinds, text.model_type)}")


Kind = dict[str, tuple[str, dict[str, Any], dict[str, Any]]]  # module -> class, plain attributes, shapes of weights
_SHARED = ("num_kv_shared_layers",)  # Gemma 3n: the last layers read keys of earlier ones
_NUMBERS = ("mlp_only_layers",)  # fields that hold numbers of layers


def _described(lm: Any) -> Any:
    """The decoder that the config of a model describes, without weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return decoder_of(type(lm)(copy.deepcopy(lm.config)))


def _kind(layer: nn.Module) -> Kind:
    """What a layer is, but for its number and the values of its weights."""
    found: Kind = {}
    for name, module in layer.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("training", "layer_idx")}
        plain = {k: v for k, v in own.items() if v is None or isinstance(v, (bool, int, float, str))}
        shapes = {k: p if p is None else tuple(p.shape) for k, p in module._parameters.items()}
        found[name] = type(module).__name__, plain, shapes
    return found


def _unlike(new: int, old: int, wanted: Kind, kinds: Sequence[Kind], family: str) -> str:
    """Describe where a layer is not what its family's config puts in its new place, and which layers are."""
    name = next(n for n in [*wanted, *kinds[old]] if wanted.get(n) != kinds[old].get(n))
    there, own = (kind.get(name, ("nothing", {}, {})) for kind in (wanted, kinds[old]))
    what = f"{own[0]} for {there[0]}"
    if own[0] == there[0]:
        option = next((o for o in there[1] if own[1].get(o, there) != there[1][o]), "")
        what = f"{option}={own[1].get(option)} for {there[1][option]}" if option else "weights of other shapes"
    fit = [i for i, kind in enumerate(kinds) if kind == wanted]
    hint = f" Of that kind: {', '.join(map(str, fit))}." if fit else ""
    return (
        f"layer {old} would be layer {new}, for which the config of {family!r} has another kind "
        f"({name or 'all of it'}: {what}), and the model could not be loaded again.{hint}"
    )


def _number(layers: nn.ModuleList) -> None:
    """Give each layer's modules its place, which is that of its keys in a cache."""
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", place)  # noqa: B010 - a plain number, which a module's type excludes
