"""`attention_flow` as two Triton kernels, for CUDA; the caller chooses between this and its blockwise form.

With the log-sum-exp of each row, P_ij = exp(s_ij - lse_i) follows from a score alone. The first kernel computes the
log-sum-exp, one program per block of rows, the second P^T u, one program per block of keys. A walk is one pass of the
first and `steps` of the second; memory is a tile of scores and vectors over tokens. Scores are in units of log 2, and
sums in float32, whatever the inputs are.

Triton is imported here and nowhere else: import this file where a kernel is about to run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.fusion.pruners.inside.sequence import VisibilityMask

_FAR = 2**31 - 1  # a window that binds nowhere


@triton.jit
def _load(base, index, stride, length, DIM: tl.constexpr, WIDE: tl.constexpr,
          EXACT: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Load rows `index` of (L, d), with zeros behind both ends."""
    d = tl.arange(0, WIDE)
    inside = (index < length)[:, None] & (d < DIM)[None, :]
    x = tl.load(base + index[:, None] * stride + d[None, :], mask=inside, other=0.0)
    return x.to(tl.float32) if EXACT else x


@triton.jit
def _scores(query, key, rows, keys, at, column, row_segment, key_segment, length, window, factor, softcap,
            SIGHT: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Score a tile (rows, keys) in units of log 2; -inf where a key is not visible."""
    s = tl.dot(query, tl.trans(key), input_precision="ieee")
    if CAP:  # factor leads to what tanh is taken of; tanh(x) = 2 sigmoid(2 x) - 1
        s = softcap * (2 * tl.sigmoid(2 * factor * s) - 1)
    else:
        s = s * factor
    seen = (keys < length)[None, :] & (rows < length)[:, None] & (keys[None, :] <= rows[:, None])
    if SIGHT:
        r = tl.load(column + at + rows, mask=rows < length, other=0)
        k = tl.load(column + at + keys, mask=keys < length, other=0)
        seen = seen & (k[None, :] <= r[:, None]) & (r[:, None] - k[None, :] < window)
        r = tl.load(row_segment + at + rows, mask=rows < length, other=0)
        k = tl.load(key_segment + at + keys, mask=keys < length, other=-1)
        seen = seen & (k[None, :] == r[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _row_lse(q, k, qb, qh, ql, kb, kh, kl, column, row_segment, key_segment, lse, heads, shared, length, window,
             factor, softcap, SIGHT: tl.constexpr, CAP: tl.constexpr, DIM: tl.constexpr,
             WIDE: tl.constexpr, SIDE: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Compute the log-sum-exp of a block of rows; inf for a row without visible keys, which then contributes 0."""
    first, bh = tl.program_id(0) * SIDE, tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = first + tl.arange(0, SIDE)
    query = _load(q + b * qb + h * qh, rows, ql, length, DIM, WIDE, EXACT)
    most, total = tl.full([SIDE], float("-inf"), tl.float32), tl.zeros([SIDE], tl.float32)
    for start in range(0, tl.minimum(first + SIDE, length), SIDE):  # causal: no key after the block's last row
        keys = start + tl.arange(0, SIDE)
        key = _load(k + b * kb + h // shared * kh, keys, kl, length, DIM, WIDE, EXACT)
        s = _scores(query, key, rows, keys, b * length, column, row_segment, key_segment, length, window, factor,
                    softcap, SIGHT, CAP)  # fmt: skip
        new = tl.maximum(most, tl.max(s, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(most - finite) + tl.sum(tl.exp2(s - finite[:, None]), 1)
        most = new
    found = tl.where(total > 0, most + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse + bh * length + rows, found, mask=rows < length)


@triton.jit
def _step(q, k, qb, qh, ql, kb, kh, kl, column, row_segment, key_segment, lse, u, out, heads, shared, length, window,
          factor, softcap, SIGHT: tl.constexpr, CAP: tl.constexpr, DIM: tl.constexpr,
          WIDE: tl.constexpr, SIDE: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Compute one step, P^T u, for a block of keys over all rows."""
    first, bh = tl.program_id(0) * SIDE, tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    keys = first + tl.arange(0, SIDE)
    key = _load(k + b * kb + h // shared * kh, keys, kl, length, DIM, WIDE, EXACT)
    total = tl.zeros([SIDE], tl.float32)
    for start in range(first, length, SIDE):  # causal: no row before the block's first key; tiles are square
        rows = start + tl.arange(0, SIDE)
        query = _load(q + b * qb + h * qh, rows, ql, length, DIM, WIDE, EXACT)
        s = _scores(query, key, rows, keys, b * length, column, row_segment, key_segment, length, window, factor,
                    softcap, SIGHT, CAP)  # fmt: skip
        norm = tl.load(lse + bh * length + rows, mask=rows < length, other=float("inf"))
        vote = tl.load(u + bh * length + rows, mask=rows < length, other=0.0)
        total += tl.sum(tl.exp2(s - norm[:, None]) * vote[:, None], 0)
    tl.store(out + bh * length + keys, total, mask=keys < length)


@torch.no_grad()
def walk(
    query: Tensor,
    key: Tensor,
    start: Tensor,
    *,
    scaling: float,
    steps: int,
    temperature: float = 1.0,
    damping: float = 0.0,
    sight: VisibilityMask | None = None,
    softcap: float | None = None,
    side: int = 0,
) -> Tensor:
    """Walk as `attention_flow` does, whose arguments these are: (B, H, L) float32.

    Args:
        side: rows and keys of a tile, a power of 2 from 16 on; 0: by the size of a head.
    """
    b, h, length, dim = query.shape
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    wide = max(16, triton.next_power_of_2(dim))
    side = side or (64 if wide * query.element_size() <= 256 else 32)
    lse = torch.empty(b, h, length, device=query.device)
    places = [lse] * 3  # placeholders, which kernels without SIGHT do not read
    if sight is not None:
        tokens = sight.tokens
        places = [tokens.place, tokens.segment, tokens.segment.masked_fill(~tokens.seen, -1)]
        places = [x.to(torch.int32).contiguous() for x in places]
    log2e = 1 / math.log(2)
    where = (query, key, *query.stride()[:3], *key.stride()[:3], *places)
    sizes = (h, h // key.shape[1], length, (sight and sight.window) or _FAR)
    factor = scaling / softcap if softcap else scaling / temperature * log2e
    cap = (softcap or 0.0) / temperature * log2e
    fixed = {"SIGHT": sight is not None, "CAP": bool(softcap), "DIM": dim, "WIDE": wide, "SIDE": side}
    # Products of bf16 are exact in float32 on the device; Triton's interpreter would multiply their bits instead.
    fixed["EXACT"] = triton.knobs.runtime.interpret
    grid = (triton.cdiv(length, side), b * h)
    u = start[:, None].float().expand(b, h, length).contiguous()
    with torch.cuda.device_of(query):  # kernels start on the current device, whatever their tensors are on
        _row_lse[grid](*where, lse, *sizes, factor, cap, **fixed)
        for _ in range(steps):
            out = torch.empty_like(u)
            _step[grid](*where, lse, u, out, *sizes, factor, cap, **fixed)
            u = out if not damping else (1 - damping) * out + damping * start[:, None].float()
    return u
