"""The features of images as a store keeps them: one tensor for each field, in fewer bits where that is asked for.

Scores, a number for each token, stay as they are, so that pruners choose as on live features. Other numbers are kept in
the dtype of the store, unless the encoder's own has no more bits. int8 has a scale in float16 for each `BLOCK` of
values, the largest of them over 127, as in llama.cpp's Q8_0: 8.5 bits a value, an error of at most 1/254 of the block's
largest value.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from zoo.registry import ImageFeatures, ZooError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
BLOCK = 32  # values of a row that share a scale
SCALE = "/scale"
_BLOCKS = "block_attention/"  # its scores are a dict, by word
_KEYS = "attention/keys"  # `keys` of a shard are those of its images
_DEEP = "deep/"  # maps for further layers of the LLM, by number


def unpackable(image: ImageFeatures, grid: tuple[int, int] | None) -> str | None:
    """Return what an encoder's features have that is not kept; None: all is."""
    if image.grid != grid:
        return f"a grid {image.grid} for one of {grid}"
    for field in fields(image):
        value = getattr(image, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in ("grid", "deep") and not isinstance(value, (Tensor, dict)) and value != default:
            return repr(field.name)
    return None


def pack(image: ImageFeatures, keep: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to keep by name, on the CPU, and the dtypes that they had.

    Args:
        image: of an encoder; a row of each tensor belongs to a row of pixels.
        keep: one of `DTYPES`.

    Raises:
        ZooError: a value, or with int8 its scale, is too large for float16.
    """
    found = {f.name: x for f in fields(image) if isinstance(x := getattr(image, f.name), Tensor)}
    if "keys" in found:
        found[_KEYS] = found.pop("keys")
    found |= {_BLOCKS + word: scores for word, scores in image.block_attention.items()}
    found |= {f"{_DEEP}{i}": features for i, features in enumerate(image.deep)}
    packed: dict[str, Tensor] = {}
    for name, value in found.items():
        value = value.detach()
        is_score = value.dim() == 2 and value.shape == image.tokens.shape[:2]
        if not value.is_floating_point() or is_score:
            packed[name] = value.cpu()
        elif keep == "int8":
            packed[name], packed[name + SCALE] = (part.cpu() for part in _in_blocks(value))
            _require_fit(name, value, packed[name + SCALE], "int8 ends at 127 * 65504")
        elif value.element_size() <= DTYPES[keep].itemsize:
            packed[name] = value.cpu()
        else:
            packed[name] = value.to(DTYPES[keep]).cpu()
            _require_fit(name, value, packed[name], "float16 ends at 65504")
    return packed, {name: str(value.dtype).removeprefix("torch.") for name, value in found.items()}


def _require_fit(name: str, value: Tensor, made: Tensor, end: str) -> None:
    """Refuse values that were finite, and are not as they are kept."""
    if not made.isfinite().all() and value.isfinite().all():
        raise ZooError(f"The encoder's {name} reach {value.abs().max().item():.3g}, and {end}: set features.keep=bf16.")


def unpack(packed: Mapping[str, Tensor], dtypes: Mapping[str, str], grid: tuple[int, int] | None) -> ImageFeatures:
    """Return the features of packed rows, in the dtypes that the encoder gave.

    Args:
        packed: by name, on the device where the features are wanted.
        dtypes: by name, from `pack`.
        grid: of the encoder.
    """
    found: dict[str, Any] = {"block_attention": {}}
    deep: dict[int, Tensor] = {}
    for name, stated in dtypes.items():
        dtype = getattr(torch, stated)
        scale = packed.get(name + SCALE)
        value = packed[name].to(dtype) if scale is None else _from_blocks(packed[name], scale, dtype)
        if name.startswith(_BLOCKS):
            found["block_attention"][name.removeprefix(_BLOCKS)] = value
        elif name.startswith(_DEEP):
            deep[int(name.removeprefix(_DEEP))] = value
        else:
            found["keys" if name == _KEYS else name] = value
    return ImageFeatures(**found, grid=grid, deep=tuple(deep[i] for i in sorted(deep)))


def _in_blocks(value: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise (S, ...) to int8 of the same shape, with scales (S, P / BLOCK rounded up) over its P values."""
    flat = value.float().flatten(1)  # (S, P)
    whole = torch.nn.functional.pad(flat, (0, -flat.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = (whole.abs().amax(-1, keepdim=True) / 127).half()  # (S, P / BLOCK, 1)
    steps = (whole / scale.float().where(scale > 0, torch.inf)).round().clamp(-127, 127)
    return steps.to(torch.int8).flatten(1)[:, : flat.shape[1]].reshape(value.shape), scale[..., 0]


def _from_blocks(steps: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    flat = steps.flatten(1).float()
    whole = torch.nn.functional.pad(flat, (0, -flat.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    return (whole * scale.float().unsqueeze(-1)).flatten(1)[:, : flat.shape[1]].reshape(steps.shape).to(dtype)
