"""Dispatch of tokens to experts, for all routed adapters: router, one sort, grouped products, load-balancing loss.

A token's choices are S = T * k rows. `group` sorts the rows by expert once; `Groups.gather` copies each row once,
`Groups.scatter` brings it back, and in between experts work on contiguous slices. Shapes depend on no data and nothing
waits for the device: on CUDA the slices are known by their ends alone (`torch.nn.functional.grouped_mm`), on a CPU a
loop over slices is as fast. Rows without an expert are sorted last and come out as zero; an expert without rows gets a
zero gradient instead of None, which data parallelism waits for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeepsFloat32(nn.Module):
    """A module whose tensors stay float32 when the model around it is cast to 16 bits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsFloat32":
        def kept(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype not in (torch.bfloat16, torch.float16) else t.to(new.device, torch.float32)

        return super()._apply(kept, recurse)


class Router(KeepsFloat32):
    """Logits over experts, in float32 always: near ties would flip with the shape of a batch in bfloat16."""

    def __init__(
        self, width: int, num_experts: int, *, bias: bool = False, trainable: bool = True, **where: Any
    ) -> None:
        super().__init__()
        start = nn.Linear(width, num_experts, bias=bias, dtype=torch.float32, **where)  # for its initialisation
        self.bias: Tensor | None
        if trainable:
            self.weight, self.bias = start.weight, start.bias
        else:  # a buffer is saved and never trained
            self.register_buffer("weight", start.weight.detach())
            self.register_buffer("bias", start.bias.detach() if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Give float32 logits (..., E) of x (..., C)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class Groups:
    """Rows in the order of their experts."""

    order: Tensor  # (S,) row at each sorted position; rows without an expert come last
    inverse: Tensor  # (S,) sorted position of each row
    ends: Tensor  # (E,) int32: where the slice of each expert ends
    top_k: int  # rows of a token; row t * top_k + j is choice j of token t

    def gather(self, x: Tensor) -> Tensor:
        """Copy tokens (T, C) into rows sorted by expert (S, C)."""
        return _Gather.apply(x, self.order, self.inverse, self.top_k)

    def scatter(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Undo the sort of rows (S, C) and sum those of each token, weighted by (T, k): (T, C)."""
        rows = _Permute.apply(rows, self.inverse, self.order)  # (S, C)
        if self.top_k == 1 and weights is None:
            return rows
        rows = rows.unflatten(0, (-1, self.top_k))  # (T, k, C)
        if weights is None:
            return rows.sum(1)
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), rows).squeeze(1)


def group(chosen: Tensor, num_experts: int, keep: Tensor | None = None) -> Groups:
    """Sort rows by expert; rows of one expert keep their order.

    Args:
        chosen: (T,) or (T, k) expert of each choice; a number outside of 0 ... E - 1 means no expert.
        num_experts: E.
        keep: (T,) valid tokens; the others (padding) get no expert.
    """
    top_k = 1 if chosen.ndim == 1 else chosen.shape[1]
    unrouted = (chosen < 0) | (chosen >= num_experts)
    if keep is not None:
        unrouted = unrouted | ~keep.view(-1, *[1] * (chosen.ndim - 1))
    # Rows without an expert sort behind all others, so that experts' slices begin at 0. Stable: runs are reproducible.
    keys, order = torch.sort(chosen.masked_fill(unrouted, num_experts).flatten(), stable=True)  # (S,)
    # The inverse permutation by a scatter, O(S), where a second argsort would be O(S log S).
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    # searchsorted, not bincount: on CUDA bincount waits for the device. int32, as grouped_mm takes its offsets.
    experts = torch.arange(num_experts, device=keys.device)
    ends = torch.searchsorted(keys, experts, right=True, out_int32=True)  # (E,)
    return Groups(order, inverse, ends, top_k)


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Multiply each expert's rows by its own matrix: x (S, I), weight (E, O, I) -> (S, O).

    Rows without an expert come out as zero. A frozen weight costs no memory for its gradient. Under autocast the
    product runs in the autocast dtype, as a linear layer's would.
    """
    dtype = compute_dtype(x)
    return _GroupedLinear.apply(x.to(dtype), weight.to(dtype), groups.ends)


def grouped_linear_over(x: Tensor, stacks: Sequence[Tensor], groups: Groups) -> Tensor:
    """Multiply each expert's rows by its own matrix, with experts in several stacks (CPU).

    The stacks are not concatenated, and only rows of stacks that train are kept for backward.

    Args:
        x: (S, I), sorted.
        stacks: (E_i, O, I); experts are numbered through, the E_i add up to the E of `groups`.
    """
    return _GroupedLinearOver.apply(x, groups.ends, *stacks)


def add_grouped_low_rank(out: Tensor, x: Tensor, down: Tensor, up: Tensor, groups: Groups, scale: Any = 1.0) -> Tensor:
    """Add to each row the low-rank term of its expert: out + scale * up[e] @ down[e] @ x.

    Args:
        out: (S, O), overwritten in place; no operation may have saved it for backward.
        x: (S, I).
        down, up: (E, R, I) and (E, O, R).
        groups: of the rows.
        scale: a number, or (S, 1) for each row.
    """
    inner = _scaled(grouped_linear(x, down, groups), scale).to(out.dtype)  # (S, R)
    up = up.to(out.dtype)
    # In place saves a tensor of the output's size; compiled graphs fuse the sum, and CUDA's kernel cannot accumulate.
    if torch.compiler.is_compiling() or out.device.type != "cpu":
        return out + _GroupedLinear.apply(inner, up, groups.ends)
    return _AddGroupedLinear.apply(out, inner, up, groups.ends)


def grouped_low_rank(x: Tensor, down: Tensor, up: Tensor, groups: Groups, scale: Any = 1.0) -> Tensor:
    """Compute the low-rank term that `add_grouped_low_rank` adds: (S, O)."""
    return grouped_linear(_scaled(grouped_linear(x, down, groups), scale), up, groups)


def _scaled(inner: Tensor, scale: Any) -> Tensor:
    """Scale rows (S, R) in float32, the dtype of a gate (S, 1), and return them in their own dtype."""
    return (inner * scale).to(inner.dtype)


def masked_low_rank(x: Tensor, down: Tensor, up: Tensor, weights: Tensor, scale: float = 1.0) -> Tensor:
    """Low-rank terms of all experts in two plain products: sum_e weights[e] * scale * up[e] @ down[e] @ x.

    With one nonzero weight per token this equals what `add_grouped_low_rank` adds, for E times its FLOPs: faster for
    few tokens, a single graph under `torch.compile`, and the only way where all experts of a token run.

    Args:
        x: (S, I).
        down, up: (E, R, I) and (E, O, R).
        weights: (S, E).
    """
    dtype = compute_dtype(x)
    e, r, width = down.shape
    inner = F.linear(x.to(dtype), down.to(dtype).reshape(e * r, width))  # (S, E * R)
    inner = inner.unflatten(1, (e, r)) * (weights * scale).to(inner.dtype).unsqueeze(-1)  # (S, E, R)
    wide = up.to(dtype).transpose(0, 1).reshape(-1, e * r)  # (O, E * R)
    return F.linear(inner.flatten(1), wide)  # (S, O)


def grouped_ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, groups: Groups, act: Callable[[Tensor], Tensor] = F.silu
) -> Tensor:
    """Run each expert's gated feed-forward layer on its rows: down[e] @ (act(gate[e] @ x) * (up[e] @ x)).

    Args:
        x: (S, C), sorted.
        gate_up: (E, 2 * I, C), the rows of the gate first: the fused layout of transformers.
        down: (E, C, I).
    """
    gate, up = grouped_linear(x, gate_up, groups).chunk(2, dim=-1)  # (S, I)
    return grouped_linear(act(gate) * up, down, groups)


def load_balance(probs: Tensor, chosen: Tensor, keep: Tensor | None = None) -> Tensor:
    """Load-balancing loss of top-k routing: E * sum_k sum_e f_ke * P_e, which is k where all share evenly.

    Paper: Fedus et al., arXiv:2101.03961, Eqs. 4-6, without the factor alpha (the caller's); f_ke is the share
    of tokens whose k-th choice is e, and has no gradient. Not a lower bound: f and P of different tokens may differ.

    Args:
        probs: (T, E).
        chosen: (T,) or (T, k).
        keep: (T,) tokens that count; None: all.
    """
    # Gradients flow through the mean probabilities only; the counts are not differentiable.
    share = expert_share(chosen, probs.shape[-1], keep)  # (E,)
    if keep is None:
        mean = probs.mean(0)
    else:
        mean = (probs * keep.unsqueeze(-1)).sum(0) / keep.sum().clamp(min=1)
    return probs.shape[-1] * (share.to(mean.dtype) * mean).sum()


def expert_share(chosen: Tensor, num_experts: int, keep: Tensor | None = None) -> Tensor:
    """Average number of choices of each expert per valid token: (E,) float32, whose sum is k."""
    hits = F.one_hot(chosen.reshape(chosen.shape[0], -1), num_experts).sum(1).float()  # (T, E)
    if keep is None:
        return hits.mean(0)
    return (hits * keep.unsqueeze(-1)).sum(0) / keep.sum().clamp(min=1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that products of `x` run in: autocast's where it is enabled (float64 is never cast down)."""
    device = x.device.type
    on = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if on else x.dtype


def has_kernel(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether torch's grouped product supports rows and matrices of these sizes; without it CUDA synchronises.

    It needs CUDA, 16 bits, and rows aligned to 16 bytes (8 numbers).
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or any(size % 8 for size in sizes):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# ---- autograd ----------------------------------------------------------------------------------------------------


class _Permute(torch.autograd.Function):
    """rows[order]. Backward is a gather by the inverse; autograd's index_add is slower and nondeterministic on CUDA."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """x[order // top_k]: each token's row once per choice. Backward sums the k rows of a token without index_add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order if top_k == 1 else order // top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows = grad.index_select(0, ctx.saved_tensors[0])  # (S, C)
        return (rows if ctx.top_k == 1 else rows.unflatten(0, (-1, ctx.top_k)).sum(1)), None, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        # The rows are needed for the gradient of the weight alone: a frozen expert keeps none.
        ctx.save_for_backward(x if weight.requires_grad else None, weight, ends)
        return _product(x, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        back = _product(grad, weight, ends) if ctx.needs_input_grad[0] else None
        return back, _outer(grad, x, ends) if ctx.needs_input_grad[1] else None, None


class _GroupedLinearOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *stacks: Tensor) -> Tensor:
        cuts = [0, *ends.tolist()]  # on a CPU: reading them synchronises nothing
        y = x.new_empty(len(x), stacks[0].shape[1])
        for at, weight in enumerate(w for stack in stacks for w in stack):
            torch.mm(x[cuts[at] : cuts[at + 1]], weight.t(), out=y[cuts[at] : cuts[at + 1]])
        y[cuts[-1] :].zero_()
        firsts = [0]
        for stack in stacks:
            firsts.append(firsts[-1] + len(stack))
        spans = [(cuts[a], cuts[b]) for a, b in pairwise(firsts)]  # rows of each stack
        # Cloned: a view would keep all rows alive, those of frozen stacks too.
        rows = [x[a:b].clone() if w.requires_grad else None for (a, b), w in zip(spans, stacks, strict=True)]
        ctx.save_for_backward(*rows, *stacks)
        ctx.cuts, ctx.spans, ctx.firsts = cuts, spans, firsts
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        rows, stacks = saved[: len(ctx.spans)], saved[len(ctx.spans) :]
        grad, cuts = grad.contiguous(), ctx.cuts
        back = None
        if ctx.needs_input_grad[0]:
            back = grad.new_empty(len(grad), stacks[0].shape[2])
            for at, weight in enumerate(w for stack in stacks for w in stack):
                torch.mm(grad[cuts[at] : cuts[at + 1]], weight, out=back[cuts[at] : cuts[at + 1]])
            back[cuts[-1] :].zero_()
        # Each stack gets its gradient in one tensor, from its own rows, whose ends are counted from their start.
        weights = []
        for i, (a, b) in enumerate(ctx.spans):
            ends = torch.tensor(cuts[ctx.firsts[i] + 1 : ctx.firsts[i + 1] + 1]) - a
            weights.append(_outer(grad[a:b], rows[i], ends) if ctx.needs_input_grad[2 + i] else None)
        return back, None, *weights


class _AddGroupedLinear(torch.autograd.Function):
    """out += the grouped product, in one pass over `out` (CPU)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.mark_dirty(out)
        return _product(x, weight.transpose(1, 2), ends, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        back = _product(grad, weight, ends) if ctx.needs_input_grad[1] else None
        return grad, back, _outer(grad, x, ends) if ctx.needs_input_grad[2] else None, None


# ---- products over slices ----------------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, ends: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply rows (S, I) by (E, I, O) to (S, O), zero behind the last end; `out` (CPU) is added to in place."""
    if torch.compiler.is_compiling():  # a custom op: the loop below reads `ends`, which would break the graph
        return torch.ops.zoo.grouped_product(x, weight, ends)
    if _has_kernel(x, weight):
        y = F.grouped_mm(x, weight, offs=ends)
        behind = torch.arange(len(x), device=x.device) >= ends[-1]
        return y.masked_fill_(behind.unsqueeze(-1), 0)  # the kernel leaves those rows uninitialised
    # Each row is written exactly once, so the result need not be zeroed first.
    y = x.new_empty(len(x), weight.shape[-1]) if out is None else out
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start and out is None:
            torch.mm(x[start:end], weight[e], out=y[start:end])
        elif end > start:
            y[start:end].addmm_(x[start:end], weight[e])
        start = end
    if out is None:
        y[start:].zero_()
    return y


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Sum the outer products of each expert's rows: left (S, O), right (S, I) -> (E, O, I)."""
    if torch.compiler.is_compiling():
        return torch.ops.zoo.grouped_outer(left, right, ends)
    if _has_kernel(left, right):
        return F.grouped_mm(left.t(), right, offs=ends)
    result = left.new_empty(len(ends), left.shape[1], right.shape[1])
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(left[start:end].t(), right[start:end], out=result[e])
        else:  # an expert without rows: zero, since None would make data parallelism wait
            result[e].zero_()
        start = end
    return result


def _has_kernel(x: Tensor, y: Tensor) -> bool:
    return has_kernel(x.device, x.dtype, *x.shape[1:], *y.shape[1:])


@torch.library.custom_op("zoo::grouped_product", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _product(x, weight, ends)


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("zoo::grouped_outer", mutates_args=())
def _opaque_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return _outer(left, right, ends)


@_opaque_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])
