"""The CUDA kernels of AIM's walk, run by Triton's interpreter on a CPU: against the matrix, and the blockwise form."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.test_attention_walk import inputs, matrix, walked
from zoo.fusion.pruners.inside import attention_flow as module

ROOT = Path(__file__).resolve().parents[1]
# The interpreter is chosen before Triton is imported, so the comparison has a process of its own.
CODE = """
import sys
import zoo.fusion.pruners.inside.aim
assert "triton" not in sys.modules, "Triton is imported before it is needed"
from tests.test_walk_kernel import compare, prune
compare()
prune()
print("compared")
"""


def close(got, wanted):
    torch.testing.assert_close(got.double(), wanted, atol=3e-6, rtol=3e-6)


def compare():
    from zoo.fusion.pruners.inside.attention_flow_triton import walk
    from zoo.fusion.pruners.inside.sequence import TokenSequence, VisibilityMask

    n = 21
    query, key, start = inputs(h=2, kv=1, length=n)  # two rows, two heads on one key, head size 8: tiles of 16 fit none
    start = start / n
    for how in ({}, {"temperature": 0.1}, {"softcap": 2.0, "temperature": 0.5}):
        p = matrix(query, key, 0.35, **how)
        close(walk(query, key, start, scaling=0.35, steps=2, side=16, **how), walked(p, start, 2))
    p = matrix(query, key, 0.35, temperature=0.1)
    got = walk(query, key, start, scaling=0.35, steps=5, temperature=0.1, damping=0.15, side=32)
    close(got, walked(p, start, 5, 0.15))
    apart = query.transpose(1, 2).contiguous().transpose(1, 2)  # heads side by side in memory, as a model has them
    assert torch.equal(walk(apart, key, start, scaling=0.35, steps=1), walk(query, key, start, scaling=0.35, steps=1))
    for short in (query.bfloat16(), key.bfloat16()), (query.half(), key.half()):
        close(walk(*short, start, scaling=0.35, steps=2, side=16), walked(matrix(*short, 0.35), start, 2))
    # Padding on the left of one row, two samples in the other, places that tokens had, a window, a hidden token.
    seen, segment = torch.ones(2, n, dtype=torch.bool), torch.zeros(2, n, dtype=torch.long)
    seen[0, :5], seen[1, 12], segment[1, 9:] = False, False, 1
    column = torch.arange(n).expand(2, -1) * 3
    no = torch.zeros_like(seen)
    tokens = TokenSequence(column, seen, no, segment, no, seen, None, packed=True)
    for window in (None, 20):
        sight = VisibilityMask(tokens, window)
        p = matrix(query, key, 0.35, visible=sight(slice(None), n))
        assert bool((p.sum(-1) == 0).any())  # rows that see nothing give nothing
        close(walk(query, key, start, scaling=0.35, steps=3, sight=sight, side=16), walked(p, start, 3))


def prune():
    """AIM in a model keeps the same tokens by the kernel as by blocks."""
    from tests.dropping_builders import forward, llm_of, padded, row
    from tests.test_aim import inside
    from zoo.fusion.pruners.inside.attention_flow_triton import walk

    llm = llm_of()
    pruner = inside(llm, stop=3)
    ids, mask = padded([row("tit", 8), row("titit", 4, 1)])
    calls = []
    for kernel in (lambda device: None, lambda device: lambda *a, **k: calls.append(1) or walk(*a, **k)):
        module._kernel = kernel
        with torch.no_grad():
            out = forward(llm, pruner, ids, mask)
        calls.append((out.last_hidden_state, pruner.kept(out.passed)))
    (before, kept), *scored, (after, same) = calls
    assert scored == [1, 1, 1] and torch.equal(before, after)
    assert all(torch.equal(a, b) for a, b in zip(kept, same, strict=True))


def test_the_kernels_walk_as_the_blocks_do():
    if find_spec("triton") is None:
        pytest.skip("needs Triton, which is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.endswith("compared\n"), done.stderr


def test_a_cpu_and_a_device_that_cannot_compile_walk_by_blocks(monkeypatch):
    assert module._kernel(torch.device("cpu")) is None
    monkeypatch.setitem(
        sys.modules, "zoo.fusion.pruners.inside.attention_flow_triton", None
    )  # as if Triton were not there
    module._kernel.cache_clear()
    with pytest.warns(UserWarning, match="AIM scores without its CUDA kernel, more slowly: ModuleNotFoundError"):
        assert module._kernel(torch.device("cuda", 7)) is None
    module._kernel.cache_clear()


@pytest.mark.parametrize("name", ["_row_lse", "_step"])
def test_the_kernels_compile_for_cuda_devices(name, recwarn):
    """Ahead of time, as a device of capability 8.0 would ask for: bf16, heads of 128, padding and a cap."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from zoo.fusion.pruners.inside import attention_flow_triton as walk_kernel

    kernel = getattr(walk_kernel, name)
    fixed = {"SIGHT": True, "CAP": True, "DIM": 128, "WIDE": 128, "SIDE": 64, "EXACT": False}
    kinds = dict.fromkeys(fixed, "constexpr") | dict.fromkeys(("q", "k"), "*bf16")
    kinds |= dict.fromkeys(("lse", "u", "out"), "*fp32") | dict.fromkeys(("factor", "softcap"), "fp32")
    kinds |= dict.fromkeys(("column", "row_segment", "key_segment"), "*i32")
    signature = {n: kinds.get(n, "i32") for n in kernel.arg_names}
    constants = {(kernel.arg_names.index(n),): value for n, value in fixed.items()}
    made = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
    assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024  # of the smallest device of that kind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_the_kernels_walk_as_the_blocks_do(dtype):
    query, key, start = (x.to("cuda", dtype) for x in inputs(b=2, h=8, kv=2, length=700, d=128))
    start = (start / start.sum(1, keepdim=True)).float()
    assert module._kernel(query.device) is not None
    got = module.attention_flow(query, key, start, scaling=0.09, steps=5, temperature=0.1)
    wanted = walked(matrix(query.cpu(), key.cpu(), 0.09, temperature=0.1), start.cpu(), 5)
    torch.testing.assert_close(got.cpu().double(), wanted, atol=5e-6, rtol=1e-4)
