"""Sparse upcycling: feed-forward layers of a dense language model become mixtures of copies of themselves.

Paper: Komatsuzaki et al., arXiv:2212.05055; settings of LLaVA-MoD, Shu et al., arXiv:2408.15881 (four experts, two of
them run, every second layer, balance weight 0.01). With p = softmax(W x) and the k likeliest experts of each token,

    y = sum_e w_e FFN_e(x),   w_e = p_e / (sum of p over the chosen)
    balance = E * sum_e mean(p_e) * mean(first choice is e)                 1 where all share evenly, E at collapse

All experts start as the dense layer and the weights sum to 1, so at the start the model computes what it did before.

Where we differ from the released code: no token is dropped (`capacity: 1.5` and `eval_capacity: 2.0` bring its limits
back, in training and in evaluation; they drop tokens at the end of a sequence, where the answer is, depending on the
rest of the batch); the second expert is the second likeliest, in training too, instead of a sample with Gumbel noise
even in evaluation; padding does not count in the balance; the balance enters the loss once.

The experts are this adapter's own parameters, stacked. The dense layer stays in the language model, where checkpoints
expect it, and is bypassed while the adapter is attached. Experts have the dtype of the dense layer and follow the model
where it is cast; routers are float32 always.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.adapters.moe_dispatch import Groups, Router, expert_share, group, grouped_linear, load_balance
from zoo.fusion.adapters.routing_trace import Passes, always
from zoo.fusion.attach import compute_by, refer
from zoo.registry import Adapter, ImageFeatures, ZooError, register, require_at_least
from zoo.registry.forward_pass import Pass

_NAMES = ("mlp", "feed_forward", "ffn")  # what families call the feed-forward part of a decoder layer


@dataclass
class UpcycleConfig:
    every: int = 2  # stride of the layers that become sparse, from layer 0 on; 1: all
    layers: list[int] = field(default_factory=list)  # layers that become sparse, counted from 0; empty: by `every`
    num_experts: int = 4  # copies of a feed-forward layer
    top_k: int = 2  # experts that run per token; 1 leaves the router to the balance loss alone if `normalize`
    normalize: bool = True  # weights of the chosen experts sum to 1; without, a fresh one is not the dense model
    balance: float = 0.01  # weight of the load-balancing loss, summed over layers; 0: none
    capacity: float = 0.0  # most tokens of an expert, as a multiple of the even share; 0: no limit (released: 1.5)
    eval_capacity: float | None = None  # the same in evaluation; null: as capacity (released: 2.0, drops there too)

    def __post_init__(self) -> None:
        require_at_least(1, every=self.every, num_experts=self.num_experts)
        if not 1 <= self.top_k <= self.num_experts:
            raise ZooError(f"top_k must be from 1 to num_experts={self.num_experts}, got {self.top_k}.")
        require_at_least(0, balance=self.balance, capacity=self.capacity, eval_capacity=self.eval_capacity)
        if len(set(self.layers)) < len(self.layers):
            raise ZooError(f"layers names a layer twice: {list(self.layers)}.")


@register("adapter", "upcycle")
class Upcycle(Adapter, nn.Module):
    """Computes the dense model at the start, whatever the router chooses."""

    needs = frozenset({"dense"})
    concurrent = True
    losses: frozenset[str] = frozenset({"upcycle_balance"})

    _dense: dict[str, nn.Module]  # the language model's own layers; no children of this one

    def __init__(self, config: UpcycleConfig, *, llm: Any) -> None:
        super().__init__()
        self.config = config
        self.starts_as_base = config.normalize
        chosen = _layers(config, llm.num_layers)
        dense = {i: _feed_forward(llm, i) for i in chosen}
        self.passes = Passes(llm, always, "upcycle")
        layer = partial(SparseFeedForward, width=llm.hidden_size, config=config, passes=self.passes)
        self.layers: Any = nn.ModuleDict({str(i): layer(i, ffn) for i, (_, ffn) in dense.items()})
        refer(self, _dense={str(i): ffn for i, (_, ffn) in dense.items()})
        names = {id(m): n for n, m in llm.lm.named_modules()}
        self._aside = tuple(f"{names[id(ffn)]}." for _, ffn in dense.values())
        self._undo: list[Any] = []

    def attach(self) -> None:
        """Route the dense layers' calls to the experts."""
        if not self._undo:
            self._undo = self.passes.attach()
            self._undo += [compute_by(self._dense[i], layer.__call__) for i, layer in self.layers.items()]

    def detach(self) -> None:
        """Let the dense layers compute again."""
        for undo in self._undo:
            undo()
        self._undo = []

    def start(self) -> None:
        """Make every expert a copy of the dense layer as it is now, and draw new routers."""
        for i, layer in self.layers.items():
            layer.start(self._dense[i])

    def owns(self, name: str) -> bool:
        """False for every parameter of the language model: experts are this module's own."""
        return False

    def idles(self, name: str) -> bool:
        """Whether the parameter `name` of the language model has no effect while this adapter is attached."""
        return bool(self._undo) and name.startswith(self._aside)

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """Nothing here depends on the image."""

    def aux_losses(self) -> dict[str, Tensor]:
        """The balance of the pass in training, summed over layers and weighted.

        Raises:
            ZooError: a checkpointed pass left no gradient to it.
        """
        records = self.passes.records
        if not (self.config.balance and self.training and records):
            return {}
        total = self.config.balance * torch.stack([balance_of(*record) for record in records]).sum()
        routers = [layer.router.weight for layer in self.layers.values()]
        if torch.is_grad_enabled() and not total.requires_grad and any(w.requires_grad for w in routers):
            raise ZooError(
                "The balance of adapter 'upcycle' has no gradient under reentrant checkpointing: use_reentrant=False."
            )
        return {"upcycle_balance": total}

    def usage(self, passed: Pass) -> dict[int, list[float]]:
        """Say for each sparse layer how many choices per token each expert got in a pass."""
        e = self.config.num_experts
        shares = (expert_share(chosen, e, keep).tolist() for _, chosen, keep in self.passes.of(passed))
        return dict(zip(map(int, self.layers), shares, strict=False))


class SparseFeedForward(nn.Module):
    """A router and the stacked copies of one dense feed-forward layer."""

    def __init__(self, number: int, dense: nn.Module, width: int, config: UpcycleConfig, passes: Passes) -> None:
        super().__init__()
        self.number, self.passes = number, passes
        self.key = f"upcycle.{number}"  # of whose rows are whose, in the pass that runs
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.normalize = config.normalize
        self.capacity = config.capacity
        self.eval_capacity = config.capacity if config.eval_capacity is None else config.eval_capacity
        self.router = Router(width, config.num_experts, device=next(dense.parameters()).device)
        self.experts = stacked(dense, config.num_experts)
        for module in self.experts.modules():
            if isinstance(module, StackedLinear):
                module.groups = self.groups

    def forward(self, x: Tensor) -> Tensor:
        """Sum the weighted outputs of each token's experts: (..., C) to (..., C)."""
        flat = x.reshape(-1, x.shape[-1])  # (S, C)
        probs = self.router(flat).softmax(-1)  # (S, E) float32
        weights, chosen = self.route(probs)  # (S, k)
        self.passes.note(self.number, probs, chosen)
        weights, chosen = self._drop(weights, chosen)
        groups = group(chosen, self.num_experts)
        notes = self.passes.now.notes
        notes[self.key] = groups
        rows = self.experts(groups.gather(flat))  # (S * k, C)
        del notes[self.key]
        return groups.scatter(rows, weights).to(x.dtype).view_as(x)

    def groups(self) -> Groups:
        """Say whose rows the experts are given, while they run."""
        return self.passes.now.notes[self.key]

    def route(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts by their probability (S, E): weights and numbers, (S, k), the likeliest first."""
        weights, chosen = probs.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def start(self, dense: nn.Module) -> None:
        """Copy a dense layer into every expert; a new router."""
        with torch.no_grad():
            for name, stack in self.experts.named_parameters():
                path, _, leaf = name.rpartition(".")
                stack.copy_(_copies(_matrix_of(dense.get_submodule(path), leaf), self.num_experts))
            where = self.router.weight.device
            self.router.weight.copy_(Router(self.router.weight.shape[1], self.num_experts, device=where).weight)

    def _drop(self, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Take choices beyond an expert's capacity away, first choices served first, then in order of the tokens."""
        factor = self.capacity if self.training else self.eval_capacity
        if not factor:
            return weights, chosen
        limit = capacity(len(chosen), self.num_experts, factor, self.top_k)
        turns = chosen.t().flatten()  # (k * S,) all first choices, then all second ones
        hits = nn.functional.one_hot(turns, self.num_experts)  # (k * S, E)
        place = (hits.cumsum(0) * hits).sum(-1).view(self.top_k, -1).t()  # (S, k) from 1 on, in the expert's queue
        late = place > limit
        weights = weights.masked_fill(late, 0.0)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return weights, chosen.masked_fill(late, -1)


def balance_of(probs: Tensor, chosen: Tensor, keep: Tensor | None) -> Tensor:
    """The balance of a layer, of first choices as in GShard.

    Args:
        probs: (S, E).
        chosen: (S, k) experts, the likeliest first.
        keep: (S,) valid tokens; None: all.
    """
    return load_balance(probs, chosen[:, 0], keep)


def capacity(tokens: int, num_experts: int, factor: float, top_k: int) -> int:
    """Count the tokens that an expert may take: ceil(S / E * factor * k), all of the product rounded up at once.

    DeepSpeed's `_capacity`, which the release of LLaVA-MoD drops tokens by; in float32, as it is there.
    """
    return max(1, int((tokens / num_experts * torch.tensor(factor * top_k, dtype=torch.float32)).ceil()))


class StackedLinear(nn.Module):
    """A linear layer for each expert; rows come sorted, and `groups()` gives the slice of each expert."""

    groups: Callable[[], Groups]

    def __init__(self, dense: Any, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_copies(_matrix_of(dense, "weight"), num_experts))  # (E, O, I)
        self.bias = None if dense.bias is None else nn.Parameter(_copies(dense.bias.detach(), num_experts))  # (E, O)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply sorted rows (S, I) each by its expert's matrix: (S, O)."""
        groups = self.groups()
        out = grouped_linear(x, self.weight, groups)
        if self.bias is None:
            return out
        row = torch.arange(len(x), device=x.device, dtype=groups.ends.dtype)
        expert = torch.searchsorted(groups.ends, row, right=True)  # (S,)
        return out + self.bias.to(out.dtype)[expert.clamp(max=len(self.bias) - 1)]


def stacked(dense: nn.Module, num_experts: int) -> nn.Module:
    """Copy a feed-forward layer, every linear inside it once for each expert; the rest works on rows as it is."""
    shared = {id(value): value for value in vars(dense).values() if type(value).__name__.endswith("Config")}
    blank = {id(p): p for p in dense.parameters()}  # replaced below: no copy is needed
    result = copy.deepcopy(dense, {**shared, **blank})
    result.__dict__.pop("forward", None)  # of an adapter that is attached
    for name, module in list(result.named_modules()):
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            parent, _, leaf = name.rpartition(".")
            result.get_submodule(parent).add_module(leaf, StackedLinear(module, num_experts))
    return result


def _matrix_of(dense: Any, name: str) -> Tensor:
    """The weight (O, I) or the bias of a dense linear layer; GPT-2 keeps (in, out)."""
    value = getattr(dense, name).detach()
    return value.t() if name == "weight" and type(dense).__name__ == "Conv1D" else value


def _copies(weight: Tensor, num_experts: int) -> Tensor:
    return weight.expand(num_experts, *weight.shape).contiguous()


def _layers(config: UpcycleConfig, num_layers: int) -> list[int]:
    """Numbers of the layers that become sparse."""
    if wrong := [i for i in config.layers if not 0 <= i < num_layers]:
        raise ZooError(f"layers must be from 0 to {num_layers - 1} in this LLM, got {wrong[0]}.")
    return sorted(config.layers) or list(range(0, num_layers, config.every))


def _feed_forward(llm: Any, index: int) -> tuple[str, nn.Module]:
    """Find the dense feed-forward part of a decoder layer.

    Raises:
        ZooError: there is none that maps one tensor to one through linear layers, or it is sparse already.
    """
    layer = llm.layers[index]
    found = next(((n, getattr(layer, n)) for n in _NAMES if isinstance(getattr(layer, n, None), nn.Module)), None)
    who = f"layer {index} of {type(llm.lm).__name__}"
    if found is None:
        raise ZooError(f"adapter 'upcycle' finds no feed-forward module in {who}: looked for {', '.join(_NAMES)}.")
    ffn = found[1]
    inputs = [p for p in inspect.signature(ffn.forward).parameters.values() if p.default is p.empty]
    linears = [m for m in ffn.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    inside = {id(p) for m in linears for p in m.parameters()}
    changed = any(hasattr(m, "base_layer") or m._forward_hooks for m in ffn.modules())
    if changed or len(inputs) != 1 or any(id(p) not in inside for p in ffn.parameters()):
        raise ZooError(
            f"adapter 'upcycle' needs a dense feed-forward layer made of plain linear layers; {found[0]!r} in {who} is "
            f"{'not one' if len(inputs) == 1 else 'given more than hidden states'}. Adapters that change these "
            "layers, such as lora, come after upcycle: adapter=[upcycle,lora]."
        )
    return found
