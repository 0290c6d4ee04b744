"""MoLE: each feed-forward layer of a frozen language model gets several low-rank experts and a router that picks one.

Paper: Chen, Jie, Ma (LLaVA-MoLE), arXiv:2401.16160. Per token with input x of the layer, for each of its linears q:

    p = softmax(W_r x + b_r),  k = argmax p,  L_q(h) = W_q h + alpha / rank * c * B_q[k] A_q[k] dropout(h)

with one k for all linears of the layer. c is the gate: 1 (`none`, the released code), p_k (`prob`), 1 + p_k -
stopgrad(p_k) (`ste`); `dense` runs all experts, weighted by p (the release's inference script). With `none` the answer
loss gives the router no gradient: it learns from the balance loss alone, to share tokens evenly.

Where we differ. The balance loss is that of arXiv:2101.03961 for each layer over all tokens, scaled to 1 where experts
share evenly; `official_balance` is the release's. New weights are float32 (the release casts all to bfloat16) and stay
so where the model is loaded in, or cast to, a shorter format; products run in the base's. Casting the adapter alone
(`model.adapter["mole"].to(torch.bfloat16)`) stores its experts in 16 bits, with equal results; its router computes
in float32 always. Padding is not routed: no expert runs there, and it does not count. Attention has no experts; the
paper's plain LoRA there is `adapter/lora` beside this one (targets q, k, v, o). Where a layer is itself a sparse
mixture, the low-rank experts are added to the output of the whole layer.

It cannot be merged: the term depends on the token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.fusion.adapters import adapter_file
from zoo.fusion.adapters import moe_dispatch as dispatch
from zoo.fusion.adapters.plain_layer import require_plain
from zoo.fusion.adapters.routing_trace import Passes, Records
from zoo.fusion.attach import hooks_on, linears, refer, stands_aside
from zoo.registry import Adapter, ImageFeatures, ZooError, register, require_at_least, unknown
from zoo.registry.forward_pass import Pass

GATES = ("none", "prob", "ste", "dense")
FEW = 16  # tokens up to which (a decoding step) running all experts in two products is faster than a sort


@dataclass
class MoLEConfig:
    num_experts: int = 3  # of each feed-forward layer
    rank: int = 16  # of each expert; the paper has 32, the released checkpoint 16
    alpha: float = 32.0  # a term is scaled by alpha / rank
    dropout: float = 0.05  # of a term's input, in [0, 1)
    gate: str = "none"  # factor on the chosen expert's term: none (1) | prob | ste; dense: all experts, by probability
    balance: float = 0.01  # weight of the load-balancing loss; with gate=none and 0 the router stays as it starts
    official_balance: bool = False  # released form of the loss: per sample, layers pooled, 1 / num_experts when even
    layers: list[int] = field(default_factory=list)  # decoder layers, counted from 0; empty: all

    def __post_init__(self) -> None:
        require_at_least(1, num_experts=self.num_experts, rank=self.rank)
        if not self.alpha > 0:
            raise ZooError(f"alpha must be more than 0, got {self.alpha}: a term is scaled by it.")
        if not 0 <= self.dropout < 1:
            raise ZooError(f"dropout must be in [0, 1), got {self.dropout}.")
        require_at_least(0, balance=self.balance)
        if self.gate not in GATES:
            raise unknown("gate", self.gate, GATES)


class LowRankExperts(nn.Module):
    """The experts of one linear layer, stacked."""

    def __init__(self, num_experts: int, rank: int, width_in: int, width_out: int, **where: Any) -> None:
        super().__init__()
        bound = width_in**-0.5  # kaiming_uniform with a = sqrt(5), for each expert
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, width_in, **where).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, width_out, rank, **where))


@dataclass
class _Routed:
    """Routing of a layer's tokens between the layer's pre-hook and its hook."""

    weights: Tensor | None  # (S, E), where all experts run in two products
    groups: dispatch.Groups | None
    scale: Any  # of a term; (S, 1) sorted where the gate depends on the token
    sorted: bool  # the layer's own linear layers get the tokens sorted by expert
    shape: torch.Size  # (B, T, C) of the tokens


class MoLELayer(nn.Module):
    """Router and experts of one feed-forward layer, and the hooks that put them there."""

    mlp: nn.Module  # of the language model
    passes: Passes

    def __init__(self, config: MoLEConfig, number: int, mlp: nn.Module, width: int, passes: Passes) -> None:
        super().__init__()
        self.number, self.passes = number, passes
        self.key = f"mole.{number}"  # of the routing, in the pass that runs
        self.config = config
        first = next(mlp.parameters())
        where: dict[str, Any] = {
            "device": first.device,
            "dtype": max(first.dtype, torch.float32, key=lambda t: t.itemsize),
        }
        refer(self, mlp=mlp)
        self.names = [] if _whole(mlp) else linears(mlp)  # of the linear layers that get terms
        sizes = {n.replace(".", "-"): _sizes(linear) for n, linear in self.linears.items()} or {"whole": (width, width)}
        self.experts = nn.ModuleDict(
            {n: LowRankExperts(config.num_experts, config.rank, *size, **where) for n, size in sizes.items()}
        )
        # Without a gate and a balance loss the router has no gradient, which data parallelism would wait for.
        learns = config.gate != "none" or (config.balance > 0 and config.num_experts > 1)
        self.router = dispatch.Router(width, config.num_experts, bias=True, trainable=learns, device=first.device)
        if where["dtype"] == torch.float64:
            self.router.double()

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Linear layers by name, as they are now: ones in few bits may have taken the place of others."""
        return {n: self.mlp.get_submodule(n) for n in self.names}

    def places(self) -> list[nn.Module]:
        """Return the modules of the language model whose outputs get a term."""
        return list(self.linears.values()) or [self.mlp]

    def attach(self) -> list[Any]:
        """Hook into the layer; returns the handles."""
        mlp = self.mlp
        handles: list[Any] = [mlp.register_forward_pre_hook(self._enter), mlp.register_forward_hook(self._leave)]
        for name, linear in self.linears.items():
            handles.append(linear.register_forward_hook(partial(self._term, name.replace(".", "-"))))
        return handles

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        now = self.passes.now.notes[self.key] = self._route(args[0])
        if not now.sorted:
            return args
        # The layer is pointwise over tokens: sorted once here, each of its linears finds its experts' rows contiguous.
        x = args[0].flatten(0, -2)  # (S, C)
        assert now.groups is not None
        return now.groups.gather(x.to(dispatch.compute_dtype(x))), *args[1:]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        now = self.passes.now.notes.pop(self.key)
        if "whole" in self.experts:
            return self._add(now, out, args[0], self.experts["whole"])
        return now.groups.scatter(out).view(now.shape) if now.sorted and now.groups else out

    def _term(self, name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        now = self.passes.now.notes.get(self.key)
        return out if now is None else self._add(now, out, args[0], self.experts[name])

    def _route(self, tokens: Tensor) -> _Routed:
        """Choose an expert for each of the tokens (B, T, C)."""
        x = tokens.flatten(0, -2)  # (S, C)
        e, scale, gate = self.config.num_experts, self.config.alpha / self.config.rank, self.config.gate
        probs = self.router(x).softmax(-1)  # (S, E)
        top, chosen = probs.max(-1)  # (S,); the lowest index where equal
        self.passes.note(self.number, probs, chosen)
        keep = self.passes.keep_of(self.number)
        if gate == "dense" or self._few(x):
            weights = probs if gate == "dense" else F.one_hot(chosen, e).to(probs.dtype)
            if gate in ("prob", "ste"):
                weights = weights * _gate(top, gate)
            weights = weights if keep is None else weights * keep.unsqueeze(-1)
            return _Routed(weights, None, scale, False, tokens.shape)
        groups = dispatch.group(chosen, e, keep)
        factor = scale if gate == "none" else groups.gather(_gate(top, gate)) * scale
        return _Routed(None, groups, factor, self._alone(), tokens.shape)

    def _alone(self) -> bool:
        """Whether tokens may be sorted for the layer's own modules: no foreign hook depends on their order."""
        own = {id(linear): 1 for linear in self.linears.values()} | {id(self.mlp): 2}
        return bool(self.names) and all(hooks_on(m) == own.get(id(m), 0) for m in self.mlp.modules())

    def _few(self, x: Tensor) -> bool:
        if len(x) <= FEW or torch.compiler.is_compiling():
            return True
        # Without torch's grouped kernel a sort needs counts on the host: all experts at once then wait for nothing.
        sizes = [size for m in self.experts.values() for p in m.parameters() for size in p.shape[1:]]
        return x.device.type == "cuda" and not dispatch.has_kernel(x.device, dispatch.compute_dtype(x), *sizes)

    def _add(self, now: _Routed, out: Tensor, x: Tensor, experts: Any) -> Tensor:
        """Add each token's term to the output of a linear."""
        down, up = experts.lora_A, experts.lora_B
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        if now.sorted and now.groups is not None:
            return dispatch.add_grouped_low_rank(out, x, down, up, now.groups, now.scale)
        x = x.flatten(0, -2)  # (S, I)
        if now.groups is None:
            assert now.weights is not None
            term = dispatch.masked_low_rank(x, down, up, now.weights, now.scale)
        else:
            term = dispatch.grouped_low_rank(now.groups.gather(x), down, up, now.groups, now.scale)
            term = now.groups.scatter(term)
        return out + term.view_as(out).to(out.dtype)


@register("adapter", "mole")
class MoLE(Adapter, nn.Module):
    """Starts as the base model: the second factors are zero."""

    concurrent = True
    losses: frozenset[str] = frozenset({"mole_balance"})
    keeps_float32 = True
    choices = {"gate": GATES}

    llm: Any

    def __init__(self, config: MoLEConfig, *, llm: Any) -> None:
        super().__init__()
        self.config = config
        refer(self, llm=llm)
        chosen = sorted(set(config.layers)) or list(range(llm.num_layers))
        if odd := [i for i in chosen if not 0 <= i < llm.num_layers]:
            raise ZooError(f"layers must be in 0 ... {llm.num_layers - 1}, got {odd[0]}.")
        mlps = {i: feed_forward(llm.layers[i], "adapter 'mole'") for i in chosen}
        for mlp in {type(mlp): mlp for mlp in mlps.values()}.values():
            require_plain(mlp, llm.hidden_size, "adapter 'mole'")
        self.passes = Passes(llm, self._balances, "mole")
        layer = partial(MoLELayer, config, width=llm.hidden_size, passes=self.passes)
        self.layers = nn.ModuleDict({str(i): layer(i, mlp) for i, mlp in mlps.items()})
        names = {id(m): n for n, m in llm.lm.named_modules()}
        layers: Any = self.layers.values()
        self.exclusive = [names[id(m)] for layer in layers for m in layer.places()]
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Hook into the feed-forward layers; no module is replaced and no key renamed."""
        if self._undo:
            return
        self._undo = self.passes.attach()
        for layer in self.layers.values():
            self._undo += [handle.remove for handle in cast(MoLELayer, layer).attach()]

    def detach(self) -> None:
        """Take the hooks away; the language model is what it was, to the bit."""
        for undo in self._undo:
            undo()
        self._undo = []

    def merge(self) -> None:
        """Refuse."""
        raise ZooError(
            "adapter 'mole' cannot be merged: the expert depends on the token, so a single weight cannot replace it. "
            "Keep the adapter, or train adapter=lora, which merges."
        )

    def owns(self, name: str) -> bool:
        """False for every parameter of the language model: the experts are this module's own."""
        return False

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """Nothing here depends on the image."""

    def aux_losses(self) -> dict[str, Tensor]:
        """Load-balancing loss of the pass in training, weighted; empty in evaluation or with weight 0."""
        records = self.passes.records
        if not records:
            return {}
        if any(p.requires_grad for n, p in self.named_parameters() if ".router." in n):
            self.passes.require_gradient("adapter 'mole'")
        if self.config.official_balance:
            return {"mole_balance": self.config.balance * pooled_balance(records, self.passes.rows)}
        each = [dispatch.load_balance(*record) for record in records]
        return {"mole_balance": self.config.balance * torch.stack(each).mean()}

    def usage(self, passed: Pass) -> dict[int, list[float]]:
        """Say for each layer which share of the tokens of a forward pass in training each expert took."""
        e = self.config.num_experts
        shares = (dispatch.expert_share(chosen, e, keep).tolist() for _, chosen, keep in self.passes.of(passed))
        return dict(zip(map(int, self.layers), shares, strict=False))

    def save(self, folder: str | Path) -> None:
        """Write this adapter's weights alone, with its options."""
        adapter_file.write(folder, "mole", self.config, self.state_dict())

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote; options that shape the weights or their use must be those of this adapter."""
        same = ("num_experts", "rank", "alpha", "gate", "layers")
        self.load_state_dict(adapter_file.read(folder, "mole", self.config, same, self.state_dict()))

    def _balances(self) -> bool:
        on = self.training and self.config.balance > 0 and self.config.num_experts > 1
        return on and torch.is_grad_enabled()


def pooled_balance(records: Records, rows: int) -> Tensor:
    """Balance loss as released: for each sample, means over layers and tokens before the product, and no factor E.

    Args:
        records: (probs (S, E), chosen (S,), which tokens (S,) count or None) of each layer.
        rows: samples, so that S is rows * T; a packed row counts as one.
    """
    mean = share = count = records[0][0].new_zeros(())
    for probs, chosen, keep in records:
        real = torch.ones_like(probs[:, 0]) if keep is None else keep.to(probs.dtype)  # (S,)
        hits = F.one_hot(chosen, probs.shape[-1]).to(probs.dtype)  # (S, E)
        count = count + real.view(rows, -1).sum(1, keepdim=True)  # (B, 1)
        mean, share = (  # (B, E)
            sums + (t * real.unsqueeze(-1)).unflatten(0, (rows, -1)).sum(1)
            for sums, t in ((mean, probs), (share, hits))
        )
    count = count.clamp(min=1)
    return (mean / count * (share / count)).sum(1).mean()


def feed_forward(layer: nn.Module, who: str) -> nn.Module:
    """Return the feed-forward module of a decoder layer.

    Raises:
        ZooError: the layer has none of its own.
    """
    for name in ("mlp", "feed_forward", "block_sparse_moe"):
        if isinstance(found := getattr(layer, name, None), nn.Module):
            return found
    raise ZooError(
        f"{who} needs decoder layers with a feed-forward module of their own; {type(layer).__name__} has "
        f"{', '.join(n for n, _ in layer.named_children())}."
    )


def _whole(mlp: nn.Module) -> bool:
    """Whether the terms are added to the whole layer: it is a sparse mixture, its own or another adapter's."""
    return stands_aside(mlp) or any(p.ndim == 3 for p in mlp.parameters())


def _sizes(linear: Any) -> tuple[int, int]:
    """Input and output width; GPT-2's Conv1D stores its weight transposed."""
    out, into = linear.weight.shape if isinstance(linear, nn.Linear) else reversed(linear.weight.shape)
    return into, out


def _gate(top: Tensor, gate: str) -> Tensor:
    """Give the factor on the chosen expert's term: (S, 1)."""
    return (top if gate == "prob" else 1 + (top - top.detach())).unsqueeze(-1)
