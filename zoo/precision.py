"""Which number format products run in, and the fast route for float32 products on CPU."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from zoo.registry import unknown

LARGEST_ERROR = 2e-6  # of a float32 product, relative; measured 3-4e-7, where operands cut to bfloat16 would give 1e-3


@cache
def fast_products() -> bool:
    """Route float32 products on CPU through oneDNN where that keeps their accuracy; returns whether it is on.

    MKL takes a slow path on some CPUs; oneDNN's is 1.5 to 2.2 times as fast. The name of the setting says bf16, but
    without AMX the sums stay exact; with AMX they may not, hence the probe.
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
    """Return fp32 or bf16; `auto` is bf16 where the device multiplies it natively."""
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
    """Context in which a forward pass computes its products in `precision`."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=True)
