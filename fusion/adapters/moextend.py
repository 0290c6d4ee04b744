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

from zoo.fusion.adapters import adapter_file
from zoo.fusion.adapters import moe_dispatch as dispatch
from zoo.fusion.adapters.extended_layer import ExtendedLayer, Guarded, chooses_largest
from zoo.fusion.adapters.routing_trace import Passes
from zoo.fusion.attach import refer
from zoo.fusion.llm.decoder import decoder_of
from zoo.registry import Adapter, ImageFeatures, ZooError, register, require_at_least
from zoo.registry.forward_pass import Pass

_COUNTS = ("num_local_experts", "num_experts")  # what families call their number of experts


@dataclass
class MoExtendConfig:
    layers: list[int] = field(default_factory=list)  # decoder layers to extend; empty: every other one with experts
    sources: list[int] = field(default_factory=list)  # for each layer the old expert to start from; empty: expert 0
    num_new: int = 1  # new experts of each layer
    calibration_width: int = 16  # hidden units of the calibration; 0: no calibration, needed for merging
    guard: bool = False  # sequences without images run as if nothing had been added
    aux: float = 0.001  # weight of the load-balancing loss over all layers with experts
    official_aux: bool = False  # released form of the loss: every layer scaled by the largest number of experts
    floor: float = 0.0  # lower bound of calibrated probabilities, which are divided by their sum; 0: none, as released

    def __post_init__(self) -> None:
        require_at_least(1, num_new=self.num_new)
        require_at_least(0, calibration_width=self.calibration_width, aux=self.aux, floor=self.floor)
        if len(set(self.layers)) < len(self.layers):
            raise ZooError(f"layers names a layer twice: {list(self.layers)}.")
        if self.sources and len(self.sources) != len(self.layers):
            raise ZooError(f"sources needs an expert for each of the {len(self.layers)} layers, got {self.sources}.")


@register("adapter", "moextend")
class MoExtend(Adapter, nn.Module):
    """Starts with a copy of an expert in each extended layer, which is not quite the base model.

    A token whose likeliest expert is the copied one now chooses it and its copy, and loses its second choice.
    """

    adds_experts = True  # a language model that it was merged into is another one than its checkpoint's
    needs: frozenset[str] = frozenset({"moe"})
    concurrent = True
    losses: frozenset[str] = frozenset({"moextend_balance"})
    keeps_float32 = True
    starts_as_base = False

    llm: Any
    layers: Any

    def __init__(self, config: MoExtendConfig, *, llm: Any) -> None:
        super().__init__()
        self.config = config
        refer(self, llm=llm)
        blocks = expert_blocks(llm)
        if not blocks:
            raise ZooError(_NO_EXPERTS.format(model_type=llm.lm.config.get_text_config().model_type))
        for i, block in {type(b.gate): (i, b) for i, b in blocks.items()}.values():
            if not chooses_largest(block.gate):
                raise ZooError(_OTHER_ROUTER.format(i=i, kind=type(block.gate).__name__))
        if llm.router_aux_coef:
            raise ZooError(
                "router_aux_coef of the LLM takes all layers to have as many experts, and adapter 'moextend' gives "
                "some of them more: set llm.router_aux_coef=0; adapter.moextend.aux is for all layers."
            )
        chosen = list(config.layers) or list(blocks)[::2]
        if odd := [i for i in chosen if i not in blocks]:
            raise ZooError(f"Layer {odd[0]} has no experts to add to. Layers with experts: {_ranges(blocks)}.")
        sources = dict(zip(chosen, config.sources or [0] * len(chosen), strict=True))
        self.passes = Passes(llm, self._balances, "moextend")
        refer(self, blocks=blocks)
        sizes: dict[str, Any] = {name: getattr(config, name) for name in ("num_new", "calibration_width", "floor")}
        self.layers = nn.ModuleDict(
            {str(i): ExtendedLayer(blocks[i], sources[i], self.passes, **sizes) for i in sorted(chosen)}
        )
        self._undo: list[Any] = []
        self.per_row = config.guard  # of a row, not of its samples, it is known whether there are images
        self.merged = False  # for good

    blocks: dict[int, Any]

    def start(self) -> None:
        """Copy the source experts anew, of base weights that were loaded since."""
        for layer in self.layers.values():
            layer.start()

    def attach(self) -> None:
        """Replace the forward of routers and experts in the chosen layers; modules and state-dict keys stay."""
        if self._undo or self.merged:
            return
        self._undo = self.passes.attach()
        # Layers that are not extended are noted too: the balance loss is over all layers with experts.
        self._undo += [b.gate.register_forward_hook(partial(self._note, i)).remove for i, b in self.blocks.items()]
        for layer in self.layers.values():
            self._undo += layer.attach()

    def detach(self) -> None:
        """Give routers and experts back; the language model is what it was, to the bit."""
        for undo in self._undo:
            undo()
        self._undo = []

    def owns(self, name: str) -> bool:
        """False for every parameter of the language model: rows and experts are this module's own."""
        return False

    @property
    def reads_image(self) -> bool:
        """Whether outputs depend on which sequences have images."""
        return self.config.guard

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """With `guard`, note which sequences have images; without an image and a number of sequences, none has."""
        flags = [count > 0 for count in images_per_row for _ in range(expand)] if self.config.guard else []
        # Only a mixed batch needs a mask; a batch of images alone or text alone is one case for all rows.
        some = torch.tensor(flags) if any(flags) and not all(flags) else None
        none = self.config.guard and not any(flags) and (image is None or bool(flags))
        self.passes.condition = Guarded(some, none)

    def aux_losses(self) -> dict[str, Tensor]:
        """Load-balancing loss over all layers with experts, weighted; empty in evaluation or with weight 0."""
        records = self.passes.records
        if not records:
            return {}
        if any(layer.rows.weight.requires_grad for layer in self.layers.values()):
            self.passes.require_gradient("adapter 'moextend'")
        # Mean over layers, each scaled by its own number of experts; -inf logits are probability 0.
        losses = [dispatch.load_balance(raw.float().softmax(-1), chosen, keep) for raw, chosen, keep in records]
        if self.config.official_aux:
            widths = [logits.shape[-1] for logits, _, _ in records]
            losses = [v * max(widths) / width for v, width in zip(losses, widths, strict=True)]
        return {"moextend_balance": self.config.aux * torch.stack(losses).mean()}

    def usage(self, passed: Pass) -> dict[int, list[float]]:
        """Say for each layer with experts how many choices per token each got in a pass in training."""
        records = self.passes.of(passed)
        shares = (dispatch.expert_share(chosen, raw.shape[-1], keep).tolist() for raw, chosen, keep in records)
        return dict(zip(self.blocks, shares, strict=False))

    def save(self, folder: str | Path) -> None:
        """Write the adapter's weights with its options, its layers and how many experts those had before."""
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
            ZooError: layers would differ in their number of experts, or the calibration is not zero: a plain
                checkpoint can hold neither.
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
            raise ZooError(
                "adapter 'moextend' cannot be merged with guard=true: a plain model cannot tell text from images."
            )
        # Detached first: `compute_by` must not route through experts while their weights are replaced.
        self.detach()
        total = 0
        for layer in self.layers.values():
            total = layer.old + self.config.num_new
            layer.gate.weight = _joined(layer.gate.weight, layer.rows.weight)
            for name in ("gate_up_proj", "down_proj"):
                setattr(layer.experts, name, _joined(getattr(layer.experts, name), getattr(layer, name)))
            layer.gate.num_experts = layer.experts.num_experts = total
        # transformers keeps the count in four kinds of places: config, router, experts, and the model's own attribute
        # for its balance loss.
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


_OTHER_ROUTER = (
    "adapter 'moextend' extends routers that take the largest of softmax(W x), such as those of Mixtral, Qwen-MoE and "
    "OLMoE; the {kind} of layer {i} chooses or weighs experts in another way."
)
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
