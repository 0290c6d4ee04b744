"""VLoRA's rows: reading an image as weights against reading it as tokens, and a step of decoding against the plain LLM.

The encoder is the same on both sides and left out. The generator has its official sizes, so next to a small LLM it is
most of the work. FLOPs are those of the method as published, which projects all patches to keys and values in each
block; ours takes the products in another order (`zoo.fusion.adapters.vlora.generator`), and what it really does is in
the note.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zoo.benches.flops import count_flops
from zoo.benches.fusion import FusionPlace
from zoo.benches.report import Row
from zoo.fusion.adapters.vlora.generator import GeneratorBlock
from zoo.registry import ImageFeatures, build
from zoo.registry.versions import cache_argument, cache_of

GRID, DIM, TEXT = (24, 24), 1024, 32  # CLIP ViT-L/14 at 336 px; tokens of text
TINY = {"rank": 4, "width": 16, "depth": 1, "num_heads": 2}


def rows(place: FusionPlace) -> list[Row]:
    """Measure prefill and decoding."""
    tiny = place.options.sizes == "tiny"
    grid, dim, b = ((4, 4), 16, place.options.rows) if tiny else (GRID, DIM, place.options.rows)
    n = grid[0] * grid[1]
    plain, changed = place.llm(), place.llm()
    projector = place.still(build("projector", {"name": "mlp"}, vision_dim=dim, text_dim=plain.hidden_size))
    node = {"name": "vlora", **(TINY if tiny else {})}
    adapter = build("adapter", node, llm=changed, vision_dim=dim, text_dim=plain.hidden_size, grid=grid)
    place.still(adapter).attach()
    image = ImageFeatures(place.random(b, n, dim), grid)
    ids = torch.arange(TEXT, device=place.device).expand(b, -1) % plain.vocab_size

    @torch.no_grad()
    def as_tokens() -> Any:
        embeds = torch.cat([projector(image), plain.embed(ids)], dim=1)
        out = plain.hidden(inputs_embeds=embeds, use_cache=True)
        return plain.head(out.last_hidden_state[:, -1:]), cache_of(out)

    @torch.no_grad()
    def as_weights() -> Any:
        adapter.condition(image, [1] * b)
        out = changed.hidden(input_ids=ids, use_cache=True)
        return changed.head(out.last_hidden_state[:, -1:]), cache_of(out)

    @torch.no_grad()
    def text() -> Any:
        out = plain.hidden(input_ids=ids, use_cache=True)
        return plain.head(out.last_hidden_state[:, -1:]), cache_of(out)

    times = place.time({"tokens": as_tokens, "weights": as_weights, "text": text})
    flops = {name: count_flops(step) for name, step in (("tokens", as_tokens), ("weights", as_weights), ("text", text))}
    with _as_published():
        published = count_flops(as_weights)
    share = published / flops["tokens"]
    measured = times.ratio("weights", "tokens")
    what = f"vlora prefill, {TEXT} tokens of text and {n} patches"
    note = f"{published / 1e9:.3g} GFLOP ({flops['weights'] / 1e9:.3g} done) against {flops['tokens'] / 1e9:.3g}"
    result = [
        Row(f"{what}: time against {n} image tokens", measured, note=note),
        Row(
            f"{what}: that ratio over the ratio of FLOPs",
            measured.over(share),
            bound=1.3,
            at_most=True,
            note=f"FLOPs {share:.3g}x",
        ),
        Row(f"{what}: time against text alone", times.ratio("weights", "text")),
    ]
    return [*result, _decoding(place, adapter, (plain, text()[1]), (changed, as_weights()[1]), ids[:, -1:])]


@contextmanager
def _as_published() -> Iterator[None]:
    """Let blocks project the whole memory, as torch's own attention does."""
    ours = GeneratorBlock.read

    def read(self: GeneratorBlock, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.cross(queries, memory, memory, need_weights=False)[0]

    GeneratorBlock.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        GeneratorBlock.read = ours  # type: ignore[method-assign]


def _decoding(place: FusionPlace, adapter: Any, plain: Any, changed: Any, ids: torch.Tensor) -> Row:
    """A step behind the same text; caches are cut back after each."""

    def step(llm: Any, cache: Any) -> Any:
        @torch.no_grad()
        def run() -> None:
            llm.head(llm.hidden(input_ids=ids, use_cache=True, **cache_argument(cache)).last_hidden_state)
            cache.crop(-1)

        return run

    variants = {"plain": step(*plain), "vlora": step(*changed)}
    # Steps are short and their difference is small: many turns, so that a busy neighbour meets both alike.
    times = place.time(variants, steps=8 * place.options.steps, rounds=6 * place.options.rounds)
    own = sum(p.numel() for p in adapter.b.values()) / 1e6
    note = f"B has {own:.3g} M parameters, A as many numbers for each image"
    value = times.ratio("vlora", "plain")
    return Row("vlora: a step of decoding against the plain LLM", value, bound=1.08, at_most=True, note=note)
