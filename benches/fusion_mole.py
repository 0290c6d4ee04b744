"""MoLE's rows: a training step and its activations against plain LoRA of the same rank on the same linears.

Beside it, the way the authors' code has it: for each projection and expert, gather the tokens, multiply, add back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.benches.fusion import FusionPlace
from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.registry import build
from zoo.registry.forward_pass import running

# One layer of a 1.3 B Llama in width; tokens of a step.
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_layers": 1, "num_heads": 16}
RANK, EXPERTS, ROWS, LENGTH = 32, (4, 8), 4, 1024
LINEARS = ["gate_proj", "up_proj", "down_proj"]
MOST_CPU, MOST_CUDA, MOST_MEMORY = 1.10, 1.15, 1.2


def rows(place: FusionPlace) -> list[Row]:
    """Time one optimiser step of each; the language model is frozen, and the input wants a gradient."""
    tiny = place.options.sizes == "tiny"
    sizes, shape = ({}, (2, 16)) if tiny else (SIZES, (ROWS, LENGTH))
    rank = 4 if tiny else RANK
    lora = {"name": "lora", "rank": rank, "alpha": 2.0 * rank, "targets": LINEARS}
    mole = {"name": "mole", "rank": rank, "alpha": 2.0 * rank, "dropout": 0.0}
    steps: dict[str, Any] = {"lora": training_step(place, sizes, shape, lora)}
    for count in EXPERTS:
        steps[f"mole {count}"] = training_step(place, sizes, shape, {**mole, "num_experts": count})
        steps[f"loop {count}"] = training_step(place, sizes, shape, {**mole, "num_experts": count}, as_released)
    times = place.time(steps)
    kept = {name: step(count=True) for name, step in steps.items()}
    most = MOST_CUDA if place.device.type == "cuda" else MOST_CPU
    result = []
    for count in EXPERTS:
        what = f"mole, {count} experts, rank {rank}, {shape[0] * shape[1]} tokens"
        value = times.ratio(f"mole {count}", "lora")
        result.append(Row(f"{what}: step against lora", value, bound=most, at_most=True))
        loop = times.ratio(f"loop {count}", "lora")
        result.append(Row(f"{what}: the released loop against lora", loop))
        memory = Value.of([kept[f"mole {count}"] / kept["lora"]])
        result.append(Row(f"{what}: activations against lora", memory, bound=MOST_MEMORY, at_most=True))
    return result


def training_step(
    place: FusionPlace,
    sizes: dict[str, Any],
    shape: tuple[int, int],
    node: dict[str, Any] | None,
    change: Callable[[Any], None] | None = None,
    most: Callable[[Any], Any] = lambda llm: [],
) -> Callable[..., float]:
    """Make a step: forward, backward, AdamW on the adapter's parameters.

    Args:
        node: of the adapter; None: the language model as it is.
        change: what is done to the adapter before the first step.
        most: further parameters that train.

    Returns:
        A function that takes a step; with `count=True` it says how many bytes the forward pass keeps for backward.
    """
    llm = place.llm(**sizes)
    adapter = None if node is None else build("adapter", node, llm=llm)
    trained = list(most(llm))
    if adapter is not None:
        adapter.attach()
        adapter.to(place.device).train()
        if change is not None:
            change(adapter)
        trained += [*adapter.parameters(), *(p for n, p in llm.lm.named_parameters() if adapter.owns(n))]
    for parameter in trained:
        parameter.requires_grad_()
    llm.train()
    x = place.random(*shape, llm.hidden_size).requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def losses() -> Tensor:
        with running():
            hidden = llm.hidden(inputs_embeds=x).last_hidden_state
            aux = adapter.aux_losses().values() if adapter is not None else ()
        return hidden.float().square().mean() + sum(aux)

    def step(count: bool = False) -> float:
        if count:
            return bytes_kept(losses, [*llm.parameters(), *trained])
        losses().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        x.grad = None
        return 0.0

    return step


def bytes_kept(run: Callable[[], object], parameters: Any) -> float:
    """Count the bytes that a forward pass keeps for backward, parameters aside; each storage once."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}
    held = []  # so that no storage is freed and its address used again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run()
    return float(sum(kept.values()))


def as_released(adapter: Any) -> None:
    """Compute the terms as the authors' code does, expert by expert and projection by projection."""
    adapter.detach()
    adapter.passes.attach()
    for layer in adapter.layers.values():
        loop = _Loop(layer)
        layer.mlp.register_forward_pre_hook(loop.route)
        for name, linear in layer.linears.items():
            linear.register_forward_hook(partial(loop.add, layer.experts[name]))


class _Loop:
    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.scale = layer.config.alpha / layer.config.rank
        self.chosen = torch.empty(0)

    def route(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        probs = self.layer.router(args[0]).softmax(-1).flatten(0, 1)
        self.chosen = probs.argmax(-1)
        self.layer.passes.note(self.layer.number, probs, self.chosen)

    def add(self, experts: Any, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x, extra = args[0].flatten(0, 1), torch.zeros_like(out).flatten(0, 1)
        for e, (down, up) in enumerate(zip(experts.lora_A, experts.lora_B, strict=True)):
            at = torch.where(self.chosen == e)[0]
            extra[at] += F.linear(F.linear(x[at], down.to(x.dtype)), up.to(x.dtype)) * self.scale
        return out + extra.view_as(out)
