"""The divergence between a teacher's and a student's next tokens, without holding the logits of either.

Both vocabulary projections run over a few positions at a time; a chunk's gradient is computed right away, from the
formulas below, and its logits are gone before the next chunk. With z the student's logits, s and t the probabilities of
student and teacher at temperature tau, and g = dD/dz:

    forward   D = KL(t || s) = sum t (log t - log s)              g = (s - t) / tau
    reverse   D = KL(s || t) = sum s (log s - log t)              g = s (log s - log t - D) / tau
    JSD       m = beta t + (1 - beta) s                           g = (1 - beta) s (log s - log m - KL(s || m)) / tau
              D = beta KL(t || m) + (1 - beta) KL(s || m)

JSD: Agarwal et al., arXiv:2306.13649, Eq. 1; as in TRL, beta 0 means forward and beta 1 reverse, although the limits of
D itself are 0. No factor tau^2. A stored teacher holds its K likeliest tokens and the remaining mass; student and
teacher are then compared over K + 1 outcomes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.registry import LinearHead, ZooError

AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 26}  # logits of one model in a chunk: 256 positions of 32 768 tokens on a CPU
_LEAST = 1e-30  # of a remainder of mass whose logarithm is taken


@dataclass
class LiveTeacher:
    """A live teacher: its hidden states at the positions, and its vocabulary projection."""

    rows: Tensor  # (S, C)
    head: Callable[[Tensor], Tensor]  # (S, C) -> (S, V)

    def log_probs(self, chunk: slice, vocab: int, temperature: float) -> Tensor:
        """Give log-probabilities (S, vocab), renormalised over the first `vocab` tokens, written over the logits."""
        logits = self.head(self.rows[chunk])[:, :vocab]  # (S, vocab)
        return _log_softmax(_computed(logits), temperature)


@dataclass
class TopKTeacher:
    """A stored teacher: the K likeliest tokens of each position, at temperature 1."""

    ids: Tensor  # (S, K) int64
    log_probs: Tensor  # (S, K)
    log_rest: Tensor  # (S,) logarithm of the mass of all other tokens


def divergence(
    llm: Any,
    rows: Tensor,
    target: LiveTeacher | TopKTeacher,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    weights: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum the divergences of the student's next tokens from the teacher's over positions.

    Args:
        llm: the student's language model, for its vocabulary projection.
        rows: (S, C) hidden states of the student, before that projection; gradients reach them and the projection.
        target: the teacher at the same positions.
        beta: 0 forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence.
        temperature: both models' logits are divided by it.
        vocab_size: size of the shared vocabulary, the first rows of both tables; None: all of the student's. Rows
            beyond it are padding, and are cut off before the softmax.
        weights: (S,) of each position's divergence, no gradient; None: 1.
        chunk: positions at once; None: by the size of the vocabulary.

    Returns:
        The weighted sum, float32; 0 that still reaches `rows` if there is no position.

    Raises:
        ZooError: a stored teacher and a temperature other than 1.
    """
    if isinstance(target, TopKTeacher) and temperature != 1.0:
        raise ZooError(f"A stored teacher's probabilities are those of temperature 1, got temperature={temperature}.")
    if not len(rows):
        return rows.sum() * 0.0
    vocab = min(vocab_size or llm.vocab_size, llm.vocab_size)
    chunk = chunk or max(1, AT_ONCE.get(rows.device.type, AT_ONCE["cuda"]) // vocab)
    if weights is None:
        weights = torch.ones(len(rows), device=rows.device)
    kind = (float(beta), float(temperature), vocab)
    head = llm.linear_head()
    if head is not None:
        summed: Tensor = _Fused.apply(rows, head.weight, head.bias, (head, target, weights, kind, chunk))  # type: ignore
        return summed
    # The projection is not a single product, for example with a LoRA on it: by autograd, with recomputation.
    total = [
        checkpoint(_with_autograd, llm.head, rows[p], target, weights[p], kind, p, use_reentrant=False)
        for p in _pieces(len(rows), chunk)
    ]
    return torch.stack(total).sum()


class _Fused(torch.autograd.Function):
    """Values and gradients in one pass over chunks; backward only multiplies by the gradient that comes in."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple) -> Tensor:
        head, target, weights, kind, chunk = rest
        beta, temperature, vocab = kind
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        table = weight[:vocab].to(dtype)  # (V, C)
        grad_rows = torch.empty_like(rows) if needs_rows else None
        # Gradients are summed over chunks in float32: bfloat16 would round each sum to 8 bits.
        grad_weight = torch.zeros_like(weight, dtype=_at_least_float(weight)) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_at_least_float(bias)) if needs_bias and bias is not None else None
        total = rows.new_zeros((), dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)
        room = rows.new_empty(min(chunk, len(rows)), vocab, dtype=dtype)  # one buffer for the logits of all chunks
        for piece in _pieces(len(rows), chunk):
            x = rows[piece].to(dtype)  # (S, C)
            with torch.autocast(device, enabled=False):
                logits = torch.mm(x, table.t(), out=room[: len(x)])  # (S, V)
            slope = _apply_head(logits, head, bias, vocab)
            values, gradient = _compare(_computed(logits), target, piece, beta, temperature)
            share = weights[piece].to(gradient.dtype)  # (S,)
            total += (values * share).sum()
            if grad_rows is None and grad_weight is None and grad_bias is None:
                continue
            if slope is not None:
                gradient.mul_(slope)
            if head.scale != 1.0:
                share = share * head.scale
            gradient = gradient.to(dtype)
            with torch.autocast(device, enabled=False):
                if grad_rows is not None:
                    grad_rows[piece] = torch.mm(gradient, table) * share.unsqueeze(-1).to(dtype)
                if grad_weight is not None:
                    scaled = x * share.unsqueeze(-1).to(dtype)
                    if dtype == grad_weight.dtype:
                        grad_weight[:vocab].addmm_(gradient.t(), scaled)
                    else:
                        grad_weight[:vocab] += torch.mm(gradient.t(), scaled)
                if grad_bias is not None:
                    grad_bias[:vocab] += torch.mv(gradient.t(), share.to(dtype))
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, bias = ctx.saved_tensors
        return (
            None if rows is None else rows * grad.to(rows.dtype),
            None if weight is None else (weight * grad).to(ctx.dtypes[0]),
            None if bias is None else (bias * grad).to(ctx.dtypes[1]),
            None,
        )


def _apply_head(logits: Tensor, head: LinearHead, bias: Tensor | None, vocab: int) -> Tensor | None:
    """Add the bias, scale and cap, in place; returns the slope of the cap (S, V), where there is one."""
    if bias is not None:
        logits.add_(bias[:vocab])
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.cap is None:
        return None
    logits.div_(head.cap).tanh_()
    slope = 1 - _computed(logits).square()
    logits.mul_(head.cap)
    return slope


def _compare(
    logits: Tensor, target: LiveTeacher | TopKTeacher, piece: slice, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compare a chunk with its target: divergences (S,) and their gradient with regard to the logits (S, V).

    `logits` is overwritten.
    """
    if isinstance(target, LiveTeacher):
        student = _log_softmax(logits, temperature)
        teacher = target.log_probs(piece, logits.shape[1], temperature).to(logits)
        values, gradient = value_and_gradient(student, teacher, beta)
        return values, gradient if temperature == 1.0 else gradient.div_(temperature)
    ids = target.ids[piece]
    teacher = with_rest(target.log_probs[piece], target.log_rest[piece]).to(logits.dtype)
    student, probs, rest = _outcomes(logits, ids)
    values, few = value_and_gradient(student, teacher, beta)  # (S,), (S, K + 1)
    # The gradient of the remaining mass is distributed over its tokens by their share of it.
    gradient = probs.mul_(few[:, -1:] / rest.unsqueeze(-1))
    return values, gradient.scatter_(1, ids, few[:, :-1])


def _outcomes(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of `ids` and of the rest (S, K + 1), all probabilities (S, V), and the rest's mass (S,).

    The probabilities are written over the logits.
    """
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    logits.div_(logits.sum(-1, keepdim=True))  # (S, V) probabilities
    known = logits.gather(1, ids)  # (S, K)
    rest = logits.scatter(1, ids, 0.0).sum(-1).clamp(min=_LEAST)  # (S,) summed: 1 - known cancels
    return torch.cat([known.clamp(min=_LEAST), rest.unsqueeze(-1)], -1).log(), logits, rest


def with_rest(log_probs: Tensor, log_rest: Tensor) -> Tensor:
    return torch.cat([log_probs, log_rest.unsqueeze(-1)], -1).float()  # (S, K + 1)


def value_and_gradient(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divergences (S,) of log-probabilities (S, V), and their gradient with regard to the student's logits (S, V).

    Both arguments are overwritten: a chunk of logits is the largest thing there is, and another costs as much again.
    """
    if beta == 0.0:
        probs = teacher.exp()
        values = torch.linalg.vecdot(probs, teacher.sub_(student))
        return values, student.exp_().sub_(probs)
    if beta == 1.0:
        probs = student.exp()
        gap = student.sub_(teacher)
        values = torch.linalg.vecdot(probs, gap)
        return values, gap.sub_(values.unsqueeze(-1)).mul_(probs)
    mixture = torch.logaddexp(student + _log(1 - beta), teacher + _log(beta))
    probs = student.exp()
    gap = student.sub_(mixture)
    from_student = torch.linalg.vecdot(probs, gap)
    from_teacher = torch.linalg.vecdot(teacher.exp(), teacher.sub_(mixture))
    values = beta * from_teacher + (1 - beta) * from_student
    return values, gap.sub_(from_student.unsqueeze(-1)).mul_(probs).mul_(1 - beta)


def _with_autograd(
    head: Callable[[Tensor], Tensor],
    rows: Tensor,
    target: LiveTeacher | TopKTeacher,
    weights: Tensor,
    kind: tuple[float, float, int],
    piece: slice,
) -> Tensor:
    """Compute a chunk for any projection: its gradient by autograd, the gradient at the logits by the formula."""
    beta, temperature, vocab = kind
    logits = head(rows)[:, :vocab]
    with torch.no_grad():
        values, gradient = _compare(_computed(logits).clone(), target, piece, beta, temperature)
        gradient.mul_(weights.to(gradient.dtype).unsqueeze(-1))
        total = (values * weights).sum()
    linear = (_computed(logits) * gradient).sum()  # linear in the logits, with this gradient; its value cancels below
    return total + (linear - linear.detach())


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log_softmax of logits / temperature, in place."""
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.log_softmax(logits, -1, out=logits)  # each row is read whole before it is written


def _computed(logits: Tensor) -> Tensor:
    """Return logits in float32; float64 stays."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _at_least_float(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
