"""Kernels of `zoo bench device`: AIM's walk, the divergence in chunks, MoLE against LoRA; values before speed."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from zoo.benches import divergence
from zoo.benches.device import DevicePlace
from zoo.benches.fusion import FusionPlace
from zoo.benches.fusion_mole import LINEARS, training_step
from zoo.benches.measure import Value
from zoo.fusion.pruners.inside import attention_flow as flow

HEADS, KV, WIDE, STEPS, HOT = 28, 4, 128, 5, 0.1  # of a 7B decoder; of AIM's walk
MOLE = {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 1, "num_heads": 32}


def aim(place: DevicePlace) -> None:
    """The walk along attention: by the matrix, in blocks, and by the kernels where there are any."""
    lengths = (40, 80) if place.tiny else (1024, 2944, 6336)
    for number, length in enumerate(lengths):
        if number and place.left <= 0:
            place.left_out.append(f"no time: {length} tokens")
            continue
        _walk(place, length, 1 / (len(lengths) - number))
    if not flow._kernel(place.device):
        place.left_out.append("kernels: Triton cannot compile for this device")


def _walk(place: DevicePlace, length: int, share: float) -> None:
    heads, kv, wide = (2, 1, 8) if place.tiny else (HEADS, KV, WIDE)
    generator = torch.Generator(place.device).manual_seed(0)
    shapes = ((1, heads, length, wide), (1, kv, length, wide))
    query, key = (torch.randn(s, generator=generator, device=place.device).bfloat16() for s in shapes)
    start = torch.full((1, length), 1 / length, device=place.device)
    given = {"scaling": wide**-0.5, "steps": STEPS, "temperature": HOT}
    ways: dict[str, Callable[[], torch.Tensor]] = {"blockwise": lambda: _blockwise(query, key, start, **given)}
    if flow._kernel(place.device):
        ways["kernels"] = lambda: flow.attention_flow(query, key, start, **given)  # type: ignore[arg-type]
    short = length <= 3000  # else the matrix would not fit
    exact, best = _by_matrix(query, key, start) if short else ways["blockwise"](), min(length, 64)
    at = f"AIM's walk, {length} tokens"
    for way, walk in ways.items():
        got = walk()
        gap = (got.float() - exact).abs().max().item() / exact.abs().max().item()
        note = f"of the largest; {len(_top(got, best) & _top(exact, best))} of the {best} best tokens are the same"
        place.row(f"{at}: {way} against the {'matrix' if short else 'blockwise form'}", Value.one(gap), "", note)
    times = {way: place.seconds(walk, share / 2) for way, walk in ways.items()}
    for way, took in times.items():
        note = f"{times['blockwise'].median / took.median:.1f}x the speed" if way == "kernels" else ""
        place.row(f"{at}: {way}", took.over(1e-3), " ms", note)


def _blockwise(*args: torch.Tensor, **given: float) -> torch.Tensor:
    kernel, flow._kernel = flow._kernel, lambda device: None  # type: ignore[assignment]
    try:
        return flow.attention_flow(*args, **given)  # type: ignore[arg-type]
    finally:
        flow._kernel = kernel


def _by_matrix(query: torch.Tensor, key: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The walk with the whole matrix in float32."""
    length = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 / HOT)
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    p = scores.masked_fill_(later, -torch.inf).softmax(-1)  # (1, H, T, T)
    u = start[:, None, None].expand(1, query.shape[1], 1, -1)
    for _ in range(STEPS):
        u = u @ p
    return u[:, :, 0]


def _top(walk: torch.Tensor, count: int) -> set[int]:
    return set(walk.float().mean(1)[0].topk(count).indices.tolist())


def kl(place: DevicePlace) -> None:
    """The divergence of two heads in chunks, against both logits in full: value, gradients, memory, time."""
    positions, vocab, width = (64, 96, 16) if place.tiny else (2048, 152064, 3584)
    x = divergence.inputs(positions, vocab, width, place.device)
    place.begin()
    at = f"KL of {positions} positions, vocabulary {vocab}, width {width}"
    naive, ours = (divergence.step(way, x) for way in ("naive", "chunked"))
    for what, a, b in zip(("value", "gradient of states", "gradient of the head"), naive, ours, strict=True):
        gap = ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()
        place.row(f"{at}: {what}, chunked against naive", Value.one(gap), "", "largest difference, of the largest")
    del naive, ours
    times = {}
    for way in ("naive", "chunked"):
        if place.device.type == "cuda":
            x.rows.grad = x.weight.grad = None
            place.clean()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times[way] = place.seconds(partial(divergence.step, way, x), 0.4)
        held = f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB" if place.device.type == "cuda" else ""
        more = f"{times[way].median / times['naive'].median:.2f} of naive" if way == "chunked" else ""
        place.row(f"{at}: {way}", times[way].over(1e-3), " ms", ", ".join(x for x in (held, more) if x))


def mole(place: DevicePlace) -> None:
    """An optimiser step of MoLE against LoRA of the same rank on the same linears of one layer."""
    sizes, shape, rank = ({}, (2, 16), 4) if place.tiny else (MOLE, (8, 1024), 32)
    options = SimpleNamespace(sizes="tiny" if place.tiny else "m100", dtype="float32" if place.tiny else "bfloat16")
    here = FusionPlace(options, place.clock, place.show)
    lora = {"rank": rank, "alpha": 2.0 * rank}
    nodes: dict[str, dict[str, Any] | None] = {"lora": {**lora, "name": "lora", "targets": LINEARS}, "no adapter": None}
    nodes |= {f"mole, {n} experts": {**lora, "name": "mole", "num_experts": n, "dropout": 0.0} for n in (4, 8)}
    at = f"one layer, {shape[0]} x {shape[1]} tokens, rank {rank}"
    plain = 0.0
    for number, (name, node) in enumerate(nodes.items()):
        with place.trying(name):
            step = training_step(here, sizes, shape, node)
            took = place.seconds(step, 1 / (len(nodes) - number), most=20)
            plain = plain or took.median
            kept = step(count=True)
            note = f"{took.median / plain:.2f} of lora, {kept / 1e6:.0f} MB kept for backward"
            place.row(f"{name}: a step of {at}", took.over(1e-3), " ms", note)
