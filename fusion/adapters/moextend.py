"""MoExtend: new experts for a mixture-of-experts language model whose own experts and routers stay as they are.

Paper: Zhong et al., arXiv:2408.03511. An extended layer with m experts gets n new ones (the paper has one), a router
row for each, and a calibration of the routing probabilities:

    p = softmax([W x ; v x]),  S = the k largest of p,  q = p + C_out GELU(C_in p)
    w_j = q_j / sum_{i in S} q_i for j in S,  y = sum_{j in S} w_j FFN_j(x)

The calibration is that of the authors' code. Notes on the paper give another one, s_j (1 + s_c) on the output of expert
j with s_c a function of x; the paper's own text was not at hand. A new expert starts as a copy of an old one, its row
as that one's row, and C_out as zero. Which layers, and which expert to copy: those whose routing the new modality
shifts most (`zoo.fusion.adapters.expert_shift`).

Where we differ. Old router rows are the pretrained ones: the release keeps those of its probe (start this adapter on
the probe's model to have that). A family that does not renormalise its weights (Qwen-MoE with norm_topk_prob off) keeps
q_j; there every new expert takes probability from the old ones. The balance loss scales each layer by its own number of
experts; `official_aux` is the release's. With `guard`, sequences without images run as if nothing had been added, to
the bit; that is ours.

New weights are float32, and stay so where the model is loaded in, or cast to, a shorter format. Products of experts run
in the base's format: casting the adapter by itself (`model.adapter["moextend"].to(torch.bfloat16)`) halves the memory
of new experts and changes no number. Router rows and calibration compute in float32 always.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.fusion.adapters import adapter_file
from zoo.fusion.adapters import moe_dispatch as dispatch
from zoo.fusion.adapters.experts import skipping
from zoo.fusion.adapters.routing_trace import Passes
from zoo.fusion.attach import compute_by
from zoo.fusion.llm.decoder import decoder_of
from zoo.registry import ImageFeatures, ZooError, register, require_at_least

_COUNTS = ("num_local_experts", "num_experts")  # what families call their number of experts


@dataclass
class MoExtendConfig:
    layers: list[int] = field(default_factory=list)  # decoder layers to extend; empty: every other one with experts
    sources: list[int] = field(default_factory=list)  # for each layer the old expert to start from; empty: expert 0
    num_new: int = 1  # new experts of each layer
    calibration_width: int = 16  # hidden units of the calibration; 0: none, so that the model can be merged
    guard: bool = False  # sequences without images run as if nothing had been added
    aux: float = 0.001  # weight of the load-balancing loss over all layers with experts
    official_aux: bool = False  # the released form: every layer scaled by the larger number of experts
    floor: float = 0.0  # least calibrated probability, against divisions by about zero; 0: none, as released

    def __post_init__(self) -> None:
        require_at_least(1, num_new=self.num_new)
        require_at_least(0, calibration_width=self.calibration_width, aux=self.aux, floor=self.floor)
        if len(set(self.layers)) < len(self.layers):
            raise ZooError(f"layers names a layer twice: {list(self.layers)}.")
        if self.sources and len(self.sources) != len(self.layers):
            raise ZooError(f"sources needs an expert for each of the {len(self.layers)} layers, got {self.sources}.")


@dataclass
class Guarded:
    """Which sequences of a pass take part."""

    pictured: Tensor | None = None  # (B,) whether a sequence has images; None: all take part, or none
    none: bool = False  # no sequence takes part


_ALL = Guarded()


class NewRows(dispatch.KeepsFloat32):
    """Router rows of the new experts, and the calibration of all."""

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
    """What one layer gets: rows, experts, and the two functions that stand in for the layer's own."""

    gate: Any  # of the language model
    experts: Any
    skipping: Any  # the same experts, which leave out the rows of index m

    def __init__(self, config: MoExtendConfig, block: Any, source: int, passes: Passes) -> None:
        super().__init__()
        self.config, self.source, self.passes = config, source, passes
        self.__dict__["gate"], self.__dict__["experts"] = block.gate, block.experts
        self.old, width = block.gate.weight.shape  # m, C
        if not 0 <= source < self.old:
            raise ZooError(f"sources must be in 0 ... {self.old - 1}, got {source}.")
        first = block.experts.gate_up_proj
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        where: dict[str, Any] = {"device": first.device, "dtype": wide}
        self.rows = NewRows(width, self.old, config.num_new, config.calibration_width, **where)
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_new, *first.shape[1:], **where))  # (n, 2 * I, C)
        self.down_proj = nn.Parameter(torch.empty(config.num_new, *block.experts.down_proj.shape[1:], **where))
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
        """Stand in for the layer's router and experts; the result undoes it."""
        self.__dict__["skipping"] = skipping(self.experts)
        return [compute_by(self.gate, self.route), compute_by(self.experts, self.run)]

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the family's router gives: logits (S, m + n), weights (S, k) and experts (S, k)."""
        gate, n = self.gate, self.config.num_new
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (S, C)
        if self._base_only:
            logits, weights, chosen = type(gate).forward(gate, x)
            if self.training and torch.is_grad_enabled():
                # Data parallelism waits for the gradient of every parameter, on ranks with text alone too.
                weights = weights + 0 * torch.stack([p.flatten()[0] for p in self.parameters()]).sum()
            return F.pad(logits, (0, n), value=-torch.inf), weights, chosen
        logits = F.linear(x, gate.weight)  # (S, m)
        with torch.autocast(x.device.type, enabled=False):
            new = F.linear(x.to(self.rows.weight.dtype), self.rows.weight)  # (S, n)
            both = torch.cat([logits.to(new.dtype), new], dim=-1)  # (S, m + n)
            probs = both.softmax(-1)
            chosen = probs.topk(gate.top_k, dim=-1).indices  # (S, k), by what the calibration does not touch
            weights = self.rows.calibrated(probs, self.config.floor).gather(1, chosen)
            if getattr(gate, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
        if (open_rows := self._pictured(x)) is not None:
            _, base_weights, base_chosen = type(gate).forward(gate, x)
            weights = torch.where(open_rows, weights, base_weights.to(weights.dtype))
            chosen = torch.where(open_rows, chosen, base_chosen)
            both = torch.cat([both[:, : self.old], both[:, self.old :].masked_fill(~open_rows, -torch.inf)], dim=-1)
        kept = weights.to(logits.dtype) if hasattr(gate, "norm_topk_prob") else weights  # as the family's router does
        return both, kept, chosen

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the family's experts give, (S, C): the old ones by themselves, and the new ones beside them."""
        old = self.experts
        if self._base_only:
            return type(old).forward(old, hidden_states, top_k_index, top_k_weights)
        if _may_read_counts(hidden_states):
            return self._run_together(hidden_states, top_k_index, top_k_weights)
        taken = top_k_index >= self.old  # (S, k)
        index, weights = top_k_index.masked_fill(taken, self.old), top_k_weights.masked_fill(taken, 0)
        out = type(old).forward(self.skipping, hidden_states, index, weights)
        for j in range(self.config.num_new):
            mine = top_k_index == self.old + j  # (S, k)
            groups = dispatch.group(mine.any(-1).long() - 1, 1)  # expert 0 is this one
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
        """All experts in one sort, where counts may be read: nobody's rows are masked out of the old ones' products."""
        old = self.experts
        groups = dispatch.group(chosen, self.old + self.config.num_new)
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
        """Whether no sequence of the pass takes part."""
        return self._condition.none

    def _pictured(self, x: Tensor) -> Tensor | None:
        """Which tokens (S, 1) are of sequences with images; None: all take part."""
        if (pictured := self._condition.pictured) is None:
            return None
        flags = pictured.to(x.device)
        if len(flags) != self.passes.rows or len(x) % len(flags):
            raise ZooError(
                f"The guard of adapter 'moextend' knows {len(flags)} sequences, and the pass has {self.passes.rows}."
            )
        return flags.repeat_interleave(len(x) // len(flags)).unsqueeze(-1)


def _may_read_counts(x: Tensor) -> bool:
    """Whether a count may be read without waiting for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@register("adapter", "moextend")
class MoExtend(nn.Module):
    """Starts with a copy of an expert in each extended layer, which is not quite the base model.

    A token whose likeliest expert is the copied one now chooses it and its copy, and loses its second choice.
    """

    adds_experts = True  # a language model that it was merged into is another one than its checkpoint's
    needs: frozenset[str] = frozenset({"moe"})
    provides: frozenset[str] = frozenset()
    destroys: frozenset[str] = frozenset()
    concurrent = True
    losses: frozenset[str] = frozenset({"moextend_balance"})
    keeps_float32 = True
    starts_as_base = False

    llm: Any
    layers: Any

    def __init__(self, config: MoExtendConfig, *, llm: Any) -> None:
        super().__init__()
        self.config = config
        self.__dict__["llm"] = llm
        blocks = expert_blocks(llm)
        if not blocks:
            raise ZooError(_NO_EXPERTS.format(model_type=llm.lm.config.get_text_config().model_type))
        if getattr(llm, "router_aux_coef", 0):
            raise ZooError(
                "router_aux_coef of the LLM takes all layers to have as many experts, and adapter 'moextend' gives "
                "some of them more: set llm.router_aux_coef=0; adapter.moextend.aux is for all layers."
            )
        chosen = list(config.layers) or list(blocks)[::2]
        if odd := [i for i in chosen if i not in blocks]:
            raise ZooError(f"Layer {odd[0]} has no experts to add to. Layers with experts: {_ranges(blocks)}.")
        sources = dict(zip(chosen, config.sources or [0] * len(chosen), strict=True))
        self.passes = Passes(llm, self._balances, "moextend")
        self.__dict__["blocks"] = blocks
        self.layers = nn.ModuleDict(
            {str(i): ExtendedLayer(config, blocks[i], sources[i], self.passes) for i in sorted(chosen)}
        )
        self._undo: list[Any] = []
        self.merged = False  # for good

    blocks: dict[int, Any]

    def start(self) -> None:
        """Copy the source experts anew, of base weights that were loaded since."""
        for layer in self.layers.values():
            layer.start()

    def attach(self) -> None:
        """Stand in for the routers and experts of the chosen layers; no module is replaced and no key renamed."""
        if self._undo:
            return
        self._undo = self.passes.attach()
        self._undo += [b.gate.register_forward_hook(partial(self._note, i)).remove for i, b in self.blocks.items()]
        for layer in self.layers.values():
            self._undo += layer.attach()

    def detach(self) -> None:
        """Give routers and experts back; the language model is what it was, to the bit."""
        for undo in self._undo:
            undo()
        self._undo = []

    def owns(self, name: str) -> bool:
        """Nothing in the language model: rows and experts are this module's own parameters."""
        return False

    @property
    def reads_image(self) -> bool:
        """Whether it computes something else for a sequence with images."""
        return self.config.guard

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """With `guard`, note which sequences have images."""
        flags = [count > 0 for count in images_per_row for _ in range(expand)] if self.config.guard else []
        some = torch.tensor(flags) if any(flags) and not all(flags) else None
        self.passes.condition = Guarded(some, bool(flags) and not any(flags))

    def aux_losses(self) -> dict[str, Tensor]:
        """Load-balancing loss over all layers with experts, weighted; empty in evaluation or with weight 0."""
        records = self.passes.records
        if not records:
            return {}
        if any(layer.rows.weight.requires_grad for layer in self.layers.values()):
            self.passes.require_gradient("adapter 'moextend'")
        losses = [dispatch.load_balance(raw.float().softmax(-1), chosen, keep) for raw, chosen, keep in records]
        if self.config.official_aux:
            widths = [logits.shape[-1] for logits, _, _ in records]
            losses = [v * max(widths) / width for v, width in zip(losses, widths, strict=True)]
        return {"moextend_balance": self.config.aux * torch.stack(losses).mean()}

    def usage(self) -> dict[int, list[float]]:
        """Say for each layer with experts how many choices per token each got in the last training pass."""
        records = self.passes.records
        shares = (dispatch.expert_share(chosen, raw.shape[-1], keep).tolist() for raw, chosen, keep in records)
        return dict(zip(self.blocks, shares, strict=False))

    def save(self, folder: str | Path) -> None:
        """Write this adapter's weights alone, with its options and what they stand on."""
        facts = {"layers": [int(i) for i in self.layers], "old_experts": [layer.old for layer in self.layers.values()]}
        adapter_file.write(folder, "moextend", self.config, self.state_dict(), facts)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote for the same layers of a model with as many experts."""
        saved = adapter_file.facts(folder, "moextend")
        here = {"layers": [int(i) for i in self.layers], "old_experts": [x.old for x in self.layers.values()]}
        for name, value in here.items():
            if saved.get(name) != value:
                raise ZooError(f"adapter 'moextend' in {str(folder)!r} has {name} {saved.get(name)}, this one {value}.")
        same = ("num_new", "calibration_width", "guard", "floor")
        self.load_state_dict(adapter_file.read(folder, "moextend", self.config, same, self.state_dict()))

    @torch.no_grad()
    def merge(self) -> None:
        """Put the new experts into the language model and detach for good: what is left is a plain one, with more.

        Raises:
            ZooError: some layers have fewer experts than others, or the calibration does something: no plain
                checkpoint says that.
        """
        if not self._undo:
            raise ZooError("adapter 'moextend' is not attached: there is nothing to merge.")
        if left := [i for i in self.blocks if str(i) not in self.layers]:
            raise ZooError(
                f"adapter 'moextend' cannot be merged: a checkpoint has one number of experts for all layers, and "
                f"layer {left[0]} has no new one (no router row could keep a filler from ever being chosen). Extend "
                f"all: adapter.moextend.layers=[{','.join(map(str, self.blocks))}]."
            )
        if any(x.rows.calib_out is not None and bool(x.rows.calib_out.any()) for x in self.layers.values()):
            raise ZooError(
                "adapter 'moextend' cannot be merged: its calibration moves the weights of experts, which a plain "
                "router does not. Train with adapter.moextend.calibration_width=0."
            )
        if self.config.guard:
            raise ZooError("adapter 'moextend' cannot be merged with guard=true: a plain model does not know images.")
        self.detach()
        total = 0
        for layer in self.layers.values():
            total = layer.old + self.config.num_new
            layer.gate.weight = _joined(layer.gate.weight, layer.rows.weight)
            for name in ("gate_up_proj", "down_proj"):
                setattr(layer.experts, name, _joined(getattr(layer.experts, name), getattr(layer, name)))
            layer.gate.num_experts = layer.experts.num_experts = total
        text = self.llm.lm.config.get_text_config()
        for name in _COUNTS:
            if hasattr(text, name):
                setattr(text, name, total)
        self.llm.num_experts = total
        for owner in (self.llm.lm, decoder_of(self.llm.lm)):
            for name in ("num_experts", "num_local_experts"):
                if isinstance(getattr(owner, name, None), int):
                    setattr(owner, name, total)
        self.layers = nn.ModuleDict()
        self.merged = True

    def _note(self, layer: int, gate: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, Tensor, Tensor]) -> None:
        self.passes.note(layer, out[0], out[2])  # no product here: a checkpointed layer must compute the same again

    def _balances(self) -> bool:
        return self.training and self.config.aux > 0 and torch.is_grad_enabled() and bool(self.layers)


_NO_EXPERTS = (
    "adapter 'moextend' adds to experts that the LLM has in the fused form of transformers (Mixtral, Qwen2-MoE, "
    "Qwen3-MoE); {model_type!r} has none. Take such an LLM: llm.model_type=mixtral for one of random weights."
)


def expert_blocks(llm: Any) -> dict[int, Any]:
    """Find the layers that are mixtures of experts, by their number: a router `gate` beside fused `experts`."""
    found = {}
    for i, layer in enumerate(llm.layers):
        block = getattr(layer, "mlp", None)
        experts, gate = getattr(block, "experts", None), getattr(block, "gate", None)
        odd = getattr(experts, "is_transposed", False) or getattr(experts, "has_bias", False)
        if hasattr(experts, "gate_up_proj") and hasattr(experts, "_apply_gate") and hasattr(gate, "top_k") and not odd:
            found[i] = block
    return found


def _joined(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([old, new.to(old)]), requires_grad=old.requires_grad)


def _ranges(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
