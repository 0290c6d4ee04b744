"""One layer of MoExtend: router rows and experts beside the frozen ones, and how both are computed.

The equations are in `zoo.fusion.adapters.moextend`.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.fusion.adapters import moe_dispatch as dispatch
from zoo.fusion.adapters.experts import skipping
from zoo.fusion.adapters.routing_trace import Passes
from zoo.fusion.attach import compute_by, refer
from zoo.registry import ZooError


@dataclass
class Guarded:
    """Which sequences of a pass use the new experts."""

    pictured: Tensor | None = None  # (B,) whether a sequence has images; None: all sequences are treated alike
    none: bool = False  # text only: the pass runs as the base model


_ALL = Guarded()


class NewRows(dispatch.KeepsFloat32):
    """Router rows of the new experts, and the calibration of all probabilities."""

    def __init__(self, width: int, old: int, new: int, hidden: int, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(new, width, **where))
        self.calib_in = nn.Parameter(torch.empty(hidden, old + new, **where).normal_(std=0.02)) if hidden else None
        self.calib_out = nn.Parameter(torch.zeros(old + new, hidden, **where)) if hidden else None

    def calibrated(self, probs: Tensor, floor: float) -> Tensor:
        """Add the calibration to the probabilities (S, E)."""
        if self.calib_in is None or self.calib_out is None:
            return probs
        probs = probs + F.linear(F.gelu(F.linear(probs, self.calib_in)), self.calib_out)
        return probs.clamp(min=floor) if floor else probs


class ExtendedLayer(nn.Module):
    """Router rows and experts added to one layer; `route` and `run` replace the forward of its router and experts."""

    gate: Any  # of the language model
    experts: Any
    skipping: Any  # a view of the same experts that leaves out rows routed to index m

    def __init__(
        self,
        block: Any,
        source: int,
        passes: Passes,
        *,
        num_new: int,
        calibration_width: int,
        floor: float,
    ) -> None:
        super().__init__()
        self.num_new, self.floor = num_new, floor
        self.source, self.passes = source, passes
        refer(self, gate=block.gate, experts=block.experts)
        self.old, width = block.gate.weight.shape  # m, C
        if not 0 <= source < self.old:
            raise ZooError(f"sources must be in 0 ... {self.old - 1}, got {source}.")
        first = block.experts.gate_up_proj
        # Trained weights in float32: a step of 1e-5 relative is lost in bfloat16.
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        where: dict[str, Any] = {"device": first.device, "dtype": wide}
        self.rows = NewRows(width, self.old, num_new, calibration_width, **where)
        self.gate_up_proj = nn.Parameter(torch.empty(num_new, *first.shape[1:], **where))  # (n, 2 * I, C)
        self.down_proj = nn.Parameter(torch.empty(num_new, *block.experts.down_proj.shape[1:], **where))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Copy the source expert and its router row as they are now."""
        self.rows.weight.copy_(self.gate.weight[self.source].expand_as(self.rows.weight))
        self.gate_up_proj.copy_(self.experts.gate_up_proj[self.source].expand_as(self.gate_up_proj))
        self.down_proj.copy_(self.experts.down_proj[self.source].expand_as(self.down_proj))
        if self.rows.calib_out is not None:
            self.rows.calib_out.zero_()

    def attach(self) -> list[Any]:
        """Replace the forward of the layer's router and experts; returns the functions that undo it."""
        refer(self, skipping=skipping(self.experts))
        return [compute_by(self.gate, self.route), compute_by(self.experts, self.run)]

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route as the family's router does: logits (S, m + n), weights (S, k) and experts (S, k)."""
        gate, n = self.gate, self.num_new
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (S, C)
        if self._base_only:
            logits, weights, chosen = type(gate).forward(gate, x)
            if self.training and torch.is_grad_enabled():
                # Data parallelism waits for the gradient of every parameter, on ranks with text alone too.
                weights = weights + 0 * torch.stack([p.flatten()[0] for p in self.parameters()]).sum()
            # The balance loss reads m + n columns: probability 0 for experts that did not run.
            return F.pad(logits, (0, n), value=-torch.inf), weights, chosen
        logits = F.linear(x, gate.weight)  # (S, m)
        # float32 also under autocast: near ties between experts would flip with the shape of a batch.
        with torch.autocast(x.device.type, enabled=False):
            new = F.linear(x.to(self.rows.weight.dtype), self.rows.weight)  # (S, n)
            both = torch.cat([logits.to(new.dtype), new], dim=-1)  # (S, m + n)
            probs = both.softmax(-1)
            # Selection uses the uncalibrated probabilities; the calibration changes the weights only.
            chosen = probs.topk(gate.top_k, dim=-1).indices  # (S, k)
            weights = self.rows.calibrated(probs, self.floor).gather(1, chosen)
            if getattr(gate, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
        if (open_rows := self._pictured(x)) is not None:
            # The base router runs on all rows, whose choice is taken for text: `where` keeps shapes free of data.
            _, base_weights, base_chosen = type(gate).forward(gate, x)
            weights = torch.where(open_rows, weights, base_weights.to(weights.dtype))
            chosen = torch.where(open_rows, chosen, base_chosen)
            both = torch.cat([both[:, : self.old], both[:, self.old :].masked_fill(~open_rows, -torch.inf)], dim=-1)
        # Qwen's routers cast the weights back, Mixtral's gives float32.
        kept = weights.to(logits.dtype) if hasattr(gate, "norm_topk_prob") else weights
        return both, kept, chosen

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the outputs of old and new experts, (S, C)."""
        old = self.experts
        if self._base_only:
            return type(old).forward(old, hidden_states, top_k_index, top_k_weights)
        if _may_read_counts(hidden_states):
            return self._run_together(hidden_states, top_k_index, top_k_weights)
        # Expert parallelism treats index m as "expert on another rank" and skips the row; that is used here to route
        # around the old experts, so that the family's own kernel (grouped, fused) still computes them.
        taken = top_k_index >= self.old  # (S, k)
        index, weights = top_k_index.masked_fill(taken, self.old), top_k_weights.masked_fill(taken, 0)
        # PEFT gives the experts another class for the time of a pass, where it has a term on their tensors.
        view = self.skipping if type(self.skipping) is type(old) else skipping(old)
        out = type(old).forward(view, hidden_states, index, weights)
        for j in range(self.num_new):
            mine = top_k_index == self.old + j  # (S, k)
            # 0 where this expert was chosen, -1 (no expert) elsewhere: a group of one expert, without reading counts.
            groups = dispatch.group(mine.any(-1).long() - 1, 1)
            order = groups.order
            rows = dispatch.grouped_ffn(
                hidden_states.index_select(0, order),
                self.gate_up_proj[j : j + 1],
                self.down_proj[j : j + 1],
                groups,
                old.act_fn,
            )
            rows = rows * (top_k_weights * mine).sum(-1).index_select(0, order).unsqueeze(-1)
            out = out.index_add(0, order, rows.to(out.dtype))
        return out

    def _run_together(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """CPU path: one sort over old and new experts.

        Reading the counts does not synchronise here, so no row is computed and then masked.
        """
        old = self.experts
        groups = dispatch.group(chosen, self.old + self.num_new)
        dtype = old.gate_up_proj.dtype
        both = [(getattr(old, name), getattr(self, name).to(dtype)) for name in ("gate_up_proj", "down_proj")]
        rows = dispatch.grouped_linear_over(groups.gather(x.to(dtype)), both[0], groups)  # (S * k, 2 * I)
        rows = dispatch.grouped_linear_over(old._apply_gate(rows), both[1], groups)  # (S * k, C)
        return groups.scatter(rows, weights).to(x.dtype)

    @property
    def _condition(self) -> "Guarded":
        return self.passes.condition or _ALL

    @property
    def _base_only(self) -> bool:
        """Whether the pass runs as the base model."""
        return self._condition.none

    def _pictured(self, x: Tensor) -> Tensor | None:
        """Mask of the tokens of sequences with images, (S, 1); None: all tokens use the new experts."""
        if (pictured := self._condition.pictured) is None:
            return None
        flags = pictured.to(x.device)
        if len(flags) != self.passes.rows or len(x) % len(flags):
            raise ZooError(
                f"The guard of adapter 'moextend' was set for {len(flags)} sequences, and the pass has "
                f"{self.passes.rows}."
            )
        return flags.repeat_interleave(len(x) // len(flags)).unsqueeze(-1)


@torch.no_grad()
def chooses_largest(gate: Any) -> bool:
    """Whether a family's router is the one that `route` replaces: the k largest of softmax(W x), and no more.

    Families have sigmoids, biases, groups and factors under the same names, so it is tried, with random numbers: a
    router on the meta device has none.
    """
    with torch.device("cpu"):
        g = torch.Generator().manual_seed(0)
        try:
            like = copy.deepcopy(gate).to_empty(device="cpu").float()
            for tensor in [*like.parameters(), *like.buffers()]:
                tensor.copy_(torch.randn(tensor.shape, generator=g))
            x = torch.randn(64, like.weight.shape[1], generator=g) / like.weight.shape[1] ** 0.5  # (S, C)
            logits, weights, chosen = type(like).forward(like, x)
        except Exception:  # of any family: it wants more than hidden states, or has no such weight
            return False
        probs = F.linear(x, like.weight).softmax(-1)  # (S, m)
        best, largest = probs.topk(like.top_k, dim=-1)
        if getattr(gate, "norm_topk_prob", True):
            best = best / best.sum(-1, keepdim=True)
        theirs, ours = (torch.zeros_like(probs).scatter(1, *one) for one in ((chosen, weights), (largest, best)))
        return torch.allclose(logits.softmax(-1), probs, atol=1e-5) and torch.allclose(theirs, ours, atol=1e-5)


def _may_read_counts(x: Tensor) -> bool:
    """Whether counts can be read without a synchronisation: on a CPU, outside of a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
