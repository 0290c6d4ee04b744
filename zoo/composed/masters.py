"""Master weights: weights of 16 bits train in float32, or steps smaller than their last bit are lost.

Micikevicius et al., arXiv:1710.03740, section 3.1. At a learning rate of 2e-5 a step is less than half of the last bit
of most weights in bfloat16, and rounding takes it away. Here the parameter itself becomes float32, and autocast makes
the copy of 16 bits that products read. Saved models keep the float32 values where rounding would change them, and load
in the data type that the weights had (`zoo.composed.loader`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError, unknown
from zoo.storage.precision import SHORT, ids_of
from zoo.storage.weights import named_weights

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in SHORT}
_COMPARED = 1 << 24  # numbers that are compared at once


def widen(model: Any, precision: str) -> None:
    """Make weights of 16 bits that train float32, and those beside them that `to_widen` names."""
    widen_names(model, to_widen(model, precision))


def to_widen(model: Any, precision: str) -> dict[str, Tensor]:
    """Return the weights of 16 bits that train in float32, and those that could not be computed with beside them.

    Frozen weights stay as they are, but for these:

    - Without autocast, which gives products operands of one data type: all weights of a part that trains in part.
    - With it, vectors of such a part: normalisation layers on a CPU refuse a float32 input with weights of 16 bits.
    - With it, float16 weights outside of linear layers and convolutions: autocast joins no float16 with bfloat16.

    Args:
        model: composed, with the parameters that train set.
        precision: of products: fp32, or bf16 for autocast.
    """
    named = {n: t for n, t in named_weights(model).items() if isinstance(t, nn.Parameter)}
    parts = {model.part_of(n) for n, p in named.items() if n in model.masters or (p.requires_grad and p.dtype in SHORT)}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    multiplied = ids_of(layer.weight for layer in layers)

    def is_wide(name: str, parameter: nn.Parameter) -> bool:
        if parameter.requires_grad or precision == "fp32":
            return parameter.requires_grad or model.part_of(name) in parts
        experts = name.startswith("llm.") and parameter.ndim > 2
        joined = parameter.dtype == torch.float16 and not experts and id(parameter) not in multiplied
        return joined or (parameter.ndim < 2 and model.part_of(name) in parts)

    return {n: p for n, p in named.items() if p.dtype in SHORT and is_wide(n, p)}


def widen_names(model: Any, names: Iterable[str]) -> None:
    """Make the weights `names` float32, and note the data type that they had; others than of 16 bits stay."""
    named = named_weights(model)
    chosen = {n: named[n] for n in names if n in named and named[n].dtype in SHORT}
    model.masters |= {n: t.dtype for n, t in chosen.items()}
    _cast(model, dict.fromkeys(ids_of(chosen.values()), torch.float32))


def widen_terms(model: Any) -> None:
    """Make an adapter's weights of 16 bits float32 where no weight of the language model has 16.

    LoRA is often saved in 16 bits beside a base of float32. Products of one row are slow in bfloat16 on a CPU, and cast
    their inputs: a layer of SmolLM2-135M with LoRA takes twice as long. Values stay, and are saved as they were.
    """
    inside = {n: t for n, t in named_weights(model).items() if n.startswith("llm.") and t.dtype in SHORT}
    parts = {name: model.part_of(name) for name in inside}
    if "llm" not in parts.values():
        widen_names(model, [name for name, part in parts.items() if part.startswith("adapter.")])


def narrow(model: Any) -> None:
    """Round master weights to the data type that they had when they were loaded."""
    named = named_weights(model)
    _cast(model, {i: dtype for n, dtype in model.masters.items() if n in named for i in ids_of([named[n]])})
    model.masters = {}


def is_mixed(model: Any) -> bool:
    """Whether a part holds master weights beside others of 16 bits, so that only autocast computes with both."""
    parts = {model.part_of(name) for name in model.masters}
    return any(p.dtype in SHORT and model.part_of(n) in parts for n, p in model.named_parameters())


def _cast(model: Any, dtypes: Mapping[int, torch.dtype]) -> None:
    """Cast parameters by their id, in place, through FSDP's `_apply` where the model is sharded."""
    if dtypes:
        model._apply(lambda t: t.to(dtypes[id(t)]) if id(t) in dtypes else t)


# ---- in a saved model ------------------------------------------------------------------------------------------------


def as_saved(
    state: Mapping[str, Tensor], masters: Mapping[str, torch.dtype], part_of: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, list[str]] | None]:
    """Round master weights where that loses nothing; return the weights, and the record of the others for the config.

    Args:
        state: whole tensors by their names.
        masters: name -> data type that the weight was loaded in.
        part_of: name of a weight -> its part.

    Returns:
        The weights; and data type -> names of those that stay float32, or the name of a part for all of its float32
        weights.
    """
    result, wide = dict(state), dict[str, torch.dtype]()
    for name, dtype in masters.items():
        if name not in state or state[name].dtype != torch.float32:
            continue
        if _exact(state[name], dtype):
            result[name] = state[name].to(dtype)
        else:
            wide[name] = dtype
    parts = {name: part_of(name) for name in result}
    float32 = Counter(parts[n] for n, t in result.items() if t.dtype == torch.float32)
    record: dict[str, list[str]] = {}
    for key, dtype in NAMES.items():
        mine = [name for name in wide if wide[name] == dtype]
        complete = {part for part, count in Counter(parts[n] for n in mine).items() if count == float32[part]}
        record[key] = sorted(complete) + [n for n in mine if parts[n] not in complete]
    record = {key: names for key, names in record.items() if names}
    return result, record or None


def masters_in(
    record: Mapping[str, Any] | None, dtypes: Mapping[str, torch.dtype], part_of: Callable[[str], str]
) -> dict[str, torch.dtype]:
    """Return the master weights of a saved model: name -> data type that it is loaded in.

    Args:
        record: of its config, not trusted.
        dtypes: name -> data type, of the weights in its folder.
        part_of: name of a weight -> its part.

    Raises:
        ZooError: the record is none that `as_saved` makes.
    """
    found: dict[str, torch.dtype] = {}
    if not isinstance(record or {}, Mapping):
        raise ZooError(f"The config states masters={str(record)!r:.60}, where names by data type are needed.")
    for key, names in (record or {}).items():
        if key not in NAMES:
            raise unknown("data type of master weights in the config", str(key), NAMES)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ZooError(f"The config states masters.{key}={names!r:.60}, where a list of names is needed.")
        for name, dtype in dtypes.items():
            if dtype == torch.float32 and {name, part_of(name)} & set(names):
                found[name] = NAMES[key]
    return found


def _exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding to `dtype` changes nothing; compares in pieces, up to the first difference."""
    return all(torch.equal(p.to(dtype).float(), p) for p in tensor.detach().reshape(-1).split(_COMPARED))
