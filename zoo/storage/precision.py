"""Precision of products, weights that stay float32, and fast float32 products on CPU."""

import re
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError, nearest, unknown

SHORT = (torch.float16, torch.bfloat16)
_NAMES = ("float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # what people call them
LARGEST_ERROR = 2e-6  # relative, of a float32 product; measured 3-4e-7, while bfloat16 operands would give 1e-3


@cache
def fast_products() -> bool:
    """Route float32 products on CPU through oneDNN if that keeps their accuracy; returns whether it does.

    MKL takes a slow path on some CPUs, where oneDNN is 1.5 to 2.2 times as fast. The setting is named bf16, but without
    AMX products stay exact; with AMX they may not, hence the probe.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    exact = a.double() @ b.double()
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    error = ((a @ b).double() - exact).norm() / exact.norm()
    if error > LARGEST_ERROR:
        matmul.fp32_precision = before
        return False
    return True


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Return fp32 or bf16; `auto` is bf16 on devices with native bf16 products."""
    if wanted in ("fp32", "bf16"):
        return wanted
    if wanted not in ("auto", ""):
        raise unknown("precision", wanted, ("auto", "fp32", "bf16"))
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpu = torch.backends.cpu.get_cpu_capability()
    native = cpu.startswith("AVX512") and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if native else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return a context in which products run in `precision`."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=True)


def kept_wide(modules: Iterable[nn.Module], dtype: torch.dtype) -> set[int]:
    """Find tensors that transformers keeps in float32 in a model of `dtype`: their ids, and those of their gradients.

    Model classes name them: `_keep_in_fp32_modules_strict` for both 16-bit dtypes, `_keep_in_fp32_modules` for float16.
    """
    found: set[int] = set()
    for model in (m for module in modules for m in module.modules()):
        patterns: list[str] = []
        for name, formats in (("_keep_in_fp32_modules_strict", SHORT), ("_keep_in_fp32_modules", (torch.float16,))):
            patterns += getattr(model, name, None) or () if dtype in formats else ()
        if patterns:  # matched anywhere in a name, as in transformers
            named = re.compile("|".join(p.replace("*", ".*") for p in patterns))
            tensors = [*model.named_parameters(), *model.named_buffers()]
            found |= ids_of(t for name, t in tensors if named.search(name))
    return found


def dtype_of(dtype: Any) -> torch.dtype | None:
    """Resolve a torch dtype or its name; None for `auto`, the dtype of the files."""
    if dtype in (None, "auto"):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        near = nearest(str(dtype), [*_NAMES, *_SHORT])
        hint = f" Did you mean {_SHORT.get(near[0], near[0])!r}?" if near else ""
        raise ZooError(f"dtype must be a torch dtype or its name: {', '.join(_NAMES)}; got {dtype!r}.{hint}")
    return found


def cast_parameters(model: nn.Module, dtype: torch.dtype, only: Collection[str] | None = None) -> None:
    """Cast the parameters of a composed model, except those that stay float32; buffers are not cast.

    Buffers hold rotary frequencies and running means, which lose too much in 16 bits.

    Args:
        model: composed.
        dtype: of floating point parameters.
        only: state-dict names of the parameters to cast; None: all.
    """
    if all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        return
    named = model.state_dict(keep_vars=True)
    chosen = ids_of(named.values() if only is None else (named[name] for name in only))
    model._apply(
        lambda t: t.to(dtype) if id(t) in chosen and t.is_floating_point() and isinstance(t, nn.Parameter) else t
    )


def ids_of(tensors: Iterable[Tensor]) -> set[int]:
    """Return the ids of tensors and of their gradients."""
    return {id(t) for tensor in tensors for t in (tensor, tensor.grad) if t is not None}
