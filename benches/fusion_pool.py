"""The pool-adapter's rows: projector and prefill with fewer and fewer image tokens, against the MLP on all of them."""

from typing import Any

import torch

from zoo.benches.flops import count_flops
from zoo.benches.fusion import FusionPlace
from zoo.benches.report import Row
from zoo.registry import ImageFeatures, build

GRID, DIM, TEXT, STRIDES = (24, 24), 1024, 32, (2, 3, 4, 6)


def rows(place: FusionPlace) -> list[Row]:
    """Measure the projector alone, and with the prefill behind it: each must cost less than with more tokens."""
    tiny = place.options.sizes == "tiny"
    dim, llm, b = (16 if tiny else DIM), place.llm(), place.options.rows
    image = ImageFeatures(place.random(b, GRID[0] * GRID[1], dim), GRID)
    ids = torch.arange(TEXT, device=place.device).expand(b, -1) % llm.vocab_size
    nodes = {576: {"name": "mlp"}} | {576 // s**2: {"name": "pool", "stride": s} for s in STRIDES}
    derived = {"vision_dim": dim, "text_dim": llm.hidden_size, "grid": GRID}
    projectors = {n: place.still(build("projector", node, **derived)) for n, node in nodes.items()}

    def prefill(projector: Any) -> Any:
        @torch.no_grad()
        def run() -> None:
            embeds = torch.cat([projector(image), llm.embed(ids)], dim=1)
            llm.head(llm.hidden(inputs_embeds=embeds, use_cache=True).last_hidden_state[:, -1:])

        return run

    def alone(projector: Any) -> Any:
        return torch.no_grad()(lambda: projector(image))

    result = []
    for what, step in (("projector", alone), ("projector and prefill", prefill)):
        steps = {str(n): step(p) for n, p in projectors.items()}
        flops = {n: count_flops(run) for n, run in steps.items()}
        times = place.time(steps)
        for before, n in zip(steps, list(steps)[1:], strict=False):
            against = f"pool, {what}, {n} tokens"
            note = f"FLOPs {flops[n] / flops['576']:.3g}x"
            result.append(Row(f"{against}: against mlp on 576", times.ratio(n, "576"), note=note))
            falls = times.ratio(n, before)
            result.append(Row(f"{against}: against {before} tokens", falls, bound=1.0, at_most=True))
    return result
