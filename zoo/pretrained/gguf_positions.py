"""Positions that are scaled for longer texts, as GGUF files state them; transformers' reader leaves that out.

llama.cpp's convert_hf_to_gguf.py writes fields `<architecture>.rope.scaling.*` for linear scaling and YaRN, and for
Llama 3 a tensor of divisors, one for each frequency.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.registry import ZooError

DIVISORS = "rope_freqs.weight"  # name of the tensor
_YARN = {"type", "factor", "original_context_length", "finetuned"}  # fields that are read
# Of Llama 3.1 and 3.2 alike; their factor, 8 or 32, is the largest divisor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def scale_positions(config: Any, fields: Mapping[str, Any], divisors: Tensor | None, what: str) -> None:
    """Put the scaling of positions into a config that was read from a GGUF file.

    Args:
        config: of transformers, changed in place.
        fields: of the file, those of one value.
        divisors: (d / 2,) of the frequencies; None: the file has none.
        what: the file, for messages.

    Raises:
        ZooError: they are scaled in another way.
    """
    rope: Any = getattr(config, "rope_parameters", None) or {}
    layers = "full_attention" if isinstance(rope.get("full_attention"), Mapping) else ""  # Gemma 3: of these alone
    own = dict(rope[layers] if layers else rope)
    if own.get("rope_type", "default") != "default":  # the reader knows it
        return
    found = _stated(fields, what)
    if divisors is not None and bool((divisors != 1).any()):
        if found:
            raise ZooError(f"{what} scales positions twice, by {found['rope_type']!r} and by {DIVISORS}. {_INSTEAD}")
        found = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    if not found:
        return
    if not own or any(isinstance(value, Mapping) for value in own.values()):
        raise ZooError(f"{what} scales positions of a {config.model_type!r}, which is not read. {_INSTEAD}")
    config.rope_parameters = {**rope, layers: {**own, **found}} if layers else {**own, **found}
    if divisors is not None and found["rope_type"] == "llama3":
        _require_divisors(config, own, divisors, what)


_INSTEAD = "The model's folder of safetensors has what is needed: llm.checkpoint=<folder or hub name>."


def _stated(fields: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return what the fields state, as transformers' `rope_parameters`; empty: nothing."""
    prefix = f"{fields.get('general.architecture')}.rope."
    stated = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    scaling = {k.removeprefix("scaling."): v for k, v in stated.items() if k.startswith("scaling.")}
    factor = float(scaling.get("factor") or stated.get("scale_linear") or 1.0)
    kind = str(scaling.get("type") or "linear")  # llama.cpp's default
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    length = int(scaling.get("original_context_length") or 0)
    if kind != "yarn" or not length or (more := sorted(scaling.keys() - _YARN)):
        how = f" with {', '.join(more)}" if kind == "yarn" and length else ""
        raise ZooError(f"{what} scales positions by {kind!r}{how}, which is not read. {_INSTEAD}")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}


def _require_divisors(config: Any, plain: Mapping[str, Any], divisors: Tensor, what: str) -> None:
    """Refuse divisors that are not those of Llama 3."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    got, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))  # (d / 2,)
    steps = torch.arange(len(got), dtype=torch.float64) / len(got)
    wanted = float(plain["rope_theta"]) ** -steps
    if len(divisors) != len(got) or not torch.allclose(wanted / divisors.double(), got.double(), rtol=1e-4, atol=0):
        raise ZooError(f"{what} scales positions by {DIVISORS}, and not as Llama 3 does. {_INSTEAD}")
