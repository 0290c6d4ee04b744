"""Rules for encoders, each built alone with random weights."""

from typing import Any

import torch
from torch import Tensor

from zoo.contracts.case import (
    Case,
    add_compile_rule,
    add_device_rule,
    add_no_trace_rule,
    add_options_rule,
    add_saving_rule,
    add_structure_rule,
)
from zoo.contracts.rules import NotForThisPart, Rules, expect, expect_close
from zoo.registry import Encoder, ImageTransform, build

RULES = Rules()


class EncoderCase(Case):
    """An encoder with its own sizes."""

    def build(self, seed: int = 0, **options: Any) -> Any:
        torch.manual_seed(seed)
        encoder = build("vision", {**self.node, **options}).eval()
        if encoder.native:
            raise NotForThisPart("its images keep their shapes: that is tried in a model")
        return encoder

    def pixels(self, m: int = 3) -> Tensor:
        """Pixels of three images."""
        with torch.device("meta"):
            shape = self.build().transform.shape
        return torch.randn(m, *shape, generator=torch.Generator().manual_seed(1))


@RULES.add("counts", "num_tokens, grid and hidden_size are those of the features that it gives")
@torch.no_grad()
def counts(case: EncoderCase) -> str:
    encoder = case.build()
    expect(isinstance(encoder, Encoder), f"its class is {type(encoder).__mro__[1].__name__}", "an Encoder")
    right = isinstance(encoder.transform, ImageTransform)
    expect(right, f"transform is {type(encoder.transform).__name__}", "an ImageTransform")
    out = encoder(case.pixels())
    n, width = encoder.num_tokens, encoder.hidden_size
    given = f"num_tokens {n}, hidden_size {width}, and forward gives {tuple(out.tokens.shape)}"
    expect(out.tokens.shape == (3, n, width), given, f"(3, {n}, {width})")
    if "grid" in encoder.provides:
        grid = tuple(encoder.grid)
        expect(grid[0] * grid[1] == n and out.grid == grid, f"grid {grid}, forward gives {out.grid}", f"h * w == {n}")
    return given


@RULES.add("provides", "each word that it provides is there when it is needed, and not computed otherwise")
@torch.no_grad()
def provides(case: EncoderCase) -> str:
    encoder = case.build()
    words = {"cls_attention", "key_attention", "keys"} & set(encoder.provides)
    if not words:
        raise NotForThisPart("it provides tokens alone")
    encoder.prepare(frozenset(words))
    plain, out = encoder(case.pixels()), encoder(case.pixels(), need=frozenset(words))
    for word in sorted(words):
        found = getattr(out, word)
        shape = None if found is None else tuple(found.shape[:2])
        expect(shape == (3, encoder.num_tokens), f"{word} has shape {shape}", f"(3, {encoder.num_tokens}, ...)")
        expect(getattr(plain, word) is None, f"{word} is computed where nothing needs it", "None")
    expect_close(out.tokens, plain.tokens, "the tokens, with more that is needed,", 1e-5)
    return ", ".join(sorted(words))


@RULES.add("alone", "an image in a batch gives what it gives alone")
@torch.no_grad()
def alone(case: EncoderCase) -> str:
    encoder, pixels = case.build(), case.pixels()
    out = encoder(pixels).tokens
    for i in range(3):
        expect_close(encoder(pixels[i : i + 1]).tokens, out[i : i + 1], f"image {i} alone", 1e-5)
    return "3 images"


@RULES.add("sees", "another image gives other tokens")
@torch.no_grad()
def sees(case: EncoderCase) -> str:
    out = case.build()(case.pixels()).tokens
    off = float((out[0] - out[1]).abs().max())
    expect(off > 1e-6, f"the tokens of two images differ by {off:.1e}", "more than 1e-06")
    return f"by {off:.1e}"


@RULES.add("gradient", "with its weights in training, a gradient reaches all that the tokens depend on")
def gradient(case: EncoderCase) -> str:
    encoder = case.build().train()
    (encoder(case.pixels()).tokens.float() ** 2).sum().backward()
    trains = [p for p in encoder.parameters() if p.requires_grad]
    reached = [p for p in trains if p.grad is not None and p.grad.isfinite().all()]
    expect(reached or not trains, f"a gradient reaches none of {len(trains)} weights", "at least one")
    return f"{len(reached)} of {len(trains)} weights"


@RULES.add("dtype", "with weights of bfloat16 it takes and gives bfloat16")
@torch.no_grad()
def dtype(case: EncoderCase) -> str:
    out = case.build().to(torch.bfloat16)(case.pixels().bfloat16())
    expect(out.tokens.dtype == torch.bfloat16, f"it gives {out.tokens.dtype}", "torch.bfloat16")
    return "bfloat16"


add_structure_rule(RULES)
add_saving_rule(RULES, lambda encoder: encoder(torch.ones(1, *encoder.transform.shape)).tokens)
add_device_rule(RULES, lambda part, pixels: part(pixels).tokens, lambda case: case.pixels())  # type: ignore[attr-defined]
add_compile_rule(RULES, lambda part, pixels: part(pixels).tokens, lambda case: case.pixels())  # type: ignore[attr-defined]
add_no_trace_rule(RULES, lambda part, pixels: part(pixels), lambda case: case.pixels())  # type: ignore[attr-defined]
add_options_rule(RULES)
