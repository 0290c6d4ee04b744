"""Attention flow P^T u, once or several times, in blocks of rows: the attention matrix is never held.

P is the row-wise softmax of a layer's scores, u a number for each query. One step with u = 1 / N gives column means,
several steps a PageRank walk. Memory is one block of rows.

Causal attention lets all steps share one pass over the scores. Row i contributes to columns j <= i only, so from the
last block of rows to the first, the values of a row at every step are complete when its block is reached, and one block
of P serves all steps. (Step by step, P would be computed once for each.)

On CUDA several passes are cheap and a sequential loop over blocks is not: walks of several steps run in Triton kernels
(`attention_flow_triton`) where Triton is installed and can compile. A single step stays here: few rows have votes.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.fusion.pruners.inside.sequence import VisibilityMask
from zoo.registry import first_line

BLOCK = 128  # rows of P at a time

# (rows, number of keys) -> mask (B, rows, keys) bool, True where a row may attend to a key
Visible = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def attention_flow(
    query: Tensor,
    key: Tensor,
    start: Tensor,
    *,
    scaling: float,
    steps: int = 1,
    temperature: float = 1.0,
    damping: float = 0.0,
    visible: Visible | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Walk along attention: `steps` times u <- (1 - damping) P^T u + damping * start, in float32.

    Args:
        query: (B, H, L, d), after rotation.
        key: (B, H_kv, L, d), with H a multiple of H_kv.
        start: (B, L) initial value of each query; zero: no vote in the first step.
        scaling: of the scores.
        temperature: the scores are divided by it before the softmax.
        visible: narrows causality (query i attends to keys j <= i); a query without any key contributes nothing.
        softcap: cap of the scores through tanh (Gemma 2), before the temperature.
        block: rows of P at a time.

    Returns:
        (B, H, L): final value of each key, in each head.
    """
    if steps > 1 and (visible is None or isinstance(visible, VisibilityMask)) and (walk := _kernel(query.device)):
        given = {"scaling": scaling, "steps": steps, "temperature": temperature, "damping": damping}
        found: Tensor = walk(query, key, start, **given, sight=visible, softcap=softcap)
        return found
    b, h, length, _ = query.shape
    u = torch.zeros(b, h, steps + 1, length, device=query.device)
    u[:, :, 0] = start[:, None]
    back = damping * start[:, None].float()  # (B, 1, L)
    index = torch.arange(length, device=query.device)

    how: dict[str, Any] = {"scaling": scaling, "temperature": temperature, "visible": visible, "softcap": softcap}

    with torch.autocast(query.device.type, enabled=False):
        if steps == 1:
            # Rows without a vote contribute nothing, and often most rows are such: P is not computed for them.
            for rows in start.ne(0).any(0).nonzero()[:, 0].split(block):
                u[:, :, 1] += (u[:, :, 0, None, rows] @ attention_rows(query, key, rows, length, **how))[:, :, 0]
            return (1 - damping) * u[:, :, 1] + back
        for first in range((length - 1) // block * block, -1, -block):
            end = min(first + block, length)
            p = attention_rows(query, key, index[first:end], end, first, **how)  # (B, H, rows, end)
            p = (1 - damping) * p if damping else p
            for t in range(steps):
                u[:, :, t + 1, first:end] += (u[:, :, t, None, first:end] @ p[..., first:])[:, :, 0] + back[
                    ..., first:end
                ]
            if first:
                u[:, :, 1:, :first] += u[:, :, :-1, first:end] @ p[..., :first]  # (B, H, steps, first)
    return u[:, :, steps]


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    keys: int,
    first: int | None = None,
    *,
    scaling: float,
    temperature: float = 1.0,
    visible: Visible | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute rows of P, (B, H, rows, keys) float32; other arguments are those of `attention_flow`.

    Args:
        rows: (R,) indices of queries.
        keys: number of keys, from the first on.
        first: index of the first of consecutive rows, so that only the diagonal block needs a causal mask; None: the
            rows are not consecutive.
    """
    b, h, _, dim = query.shape
    kv, index = key.shape[1], torch.arange(keys, device=query.device)
    # The cap applies to scaled scores, the temperature to capped ones; without a cap both are one factor.
    q = query[:, :, rows].float() * (scaling if softcap else scaling / temperature)  # (B, H, R, d)
    scores = q.reshape(b, kv, -1, dim) @ key[:, :, :keys].float().transpose(-1, -2)
    scores = scores.view(b, h, -1, keys)  # (B, H, R, keys)
    if softcap:
        scores = torch.tanh(scores / softcap) * (softcap / temperature)
    if first is None:
        scores.masked_fill_(index > rows[:, None], -torch.inf)
    else:
        scores[..., first:].masked_fill_(index[first:] > rows[:, None], -torch.inf)
    if visible is not None:
        scores.masked_fill_(~visible(rows, keys)[:, None], -torch.inf)
    p = torch.softmax(scores, -1)
    # A row without any visible key is softmax of -inf, NaN: it contributes nothing.
    return p.nan_to_num_(0.0) if visible is not None else p


@cache
def _kernel(device: torch.device) -> Any:
    """Return the Triton implementation if it runs on this device, else None."""
    if device.type != "cuda":
        return None
    try:
        from zoo.fusion.pruners.inside.attention_flow_triton import walk

        some = torch.ones(1, 1, 16, 16, device=device)
        walk(some, some, some[0, :, 0], scaling=1.0, steps=1)  # Triton wants a compiler, which may not be here
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        warnings.warn(f"AIM scores without its CUDA kernel, more slowly: {why}", stacklevel=3)
        return None
    return walk


def walk_flops(length: int, heads: int, head_dim: int, steps: int, block: int = BLOCK) -> int:
    """Count the FLOPs of a walk of several steps as torch's counter does for the blockwise form.

    The Triton kernels, which that counter does not count, take `steps` more passes over the scores.
    """
    total = 0
    for first in range(0, length, block):
        rows = min(block, length - first)
        total += 2 * rows * (first + rows) * head_dim + 2 * steps * rows * (rows + first)
    return total * heads
