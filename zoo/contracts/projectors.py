"""Rules for projectors, each built alone with random features."""

from dataclasses import replace
from typing import Any

import torch

from zoo.contracts.case import (
    Case,
    add_compile_rule,
    add_device_rule,
    add_no_trace_rule,
    add_options_rule,
    add_saving_rule,
    add_structure_rule,
)
from zoo.contracts.given import features, image_row
from zoo.contracts.rules import NotForThisPart, Rules, expect, expect_close
from zoo.registry import ImageFeatures, Projector, ZooError, build

DIM, TEXT, GRID, OTHER_GRID = 24, 40, (4, 6), (3, 5)
RULES = Rules()


class ProjectorCase(Case):
    """A projector of 24 tokens from width 24 to width 40."""

    @property
    def width(self) -> int:
        return DIM if self.name == "identity" else TEXT  # which takes features that fit the LLM already

    def build(self, seed: int = 0, grid: tuple[int, int] = GRID, **options: Any) -> Any:
        torch.manual_seed(seed)
        sizes = {"vision_dim": DIM, "text_dim": self.width, "grid": grid, "num_tokens": grid[0] * grid[1]}
        return build("projector", {**self.node, **options}, **sizes).eval()


def image(grid: tuple[int, int] = GRID) -> ImageFeatures:
    """Features of three images."""
    return features(grid=grid, dim=DIM)


@RULES.add("counts", "num_tokens(n) is the number of tokens that it makes of n, of the LLM's width")
def counts(case: ProjectorCase) -> str:
    projector = case.build()
    expect(isinstance(projector, Projector), f"its class is {type(projector).__mro__[1].__name__}", "a Projector")
    expect(isinstance(case.cls.needs, frozenset), "needs of the class", "a frozenset of words")
    out, k = projector(image()), projector.num_tokens(24)
    given = f"num_tokens(24) is {k}, and forward gives {tuple(out.shape)}"
    expect(out.shape == (3, k, case.width), given, f"(3, {k}, {case.width})")
    return given


@RULES.add("unlike sizes", "an image with another grid gives num_tokens of its own n")
def unlike_sizes(case: ProjectorCase) -> str:
    try:
        projector = case.build(grid=OTHER_GRID)
        k = projector.num_tokens(15)
    except ZooError as refusal:
        raise NotForThisPart(f"it refuses a grid of 3 x 5: {refusal}") from refusal
    shape = tuple(projector(image(OTHER_GRID)).shape)
    expect(shape == (3, k, case.width), f"of 3 x 5 it gives {shape}, num_tokens(15) is {k}", f"(3, {k}, {case.width})")
    return f"{k} of 15"


@RULES.add("forward on meta", "its forward runs on the meta device, as `zoo check` runs it")
def forward_on_meta(case: ProjectorCase) -> str:
    with torch.device("meta"):
        projector = case.build()
    bare = replace(image(), tokens=torch.empty(3, 24, DIM, device="meta"), cls_attention=None)
    shape, real = tuple(projector(bare).shape), tuple(case.build()(image()).shape)
    expect(shape == real, f"on meta it gives {shape}", f"{real}")
    return f"{shape}"


@RULES.add("alone", "an image in a batch gives what it gives alone, and twice the same")
@torch.no_grad()
def alone(case: ProjectorCase) -> str:
    projector, given = case.build(), image()
    out = projector(given)
    expect_close(projector(given), out, "the same batch a second time", 0.0)
    for i in range(3):
        expect_close(projector(image_row(given, i)), out[i : i + 1], f"image {i} alone", 1e-5)
    return "3 images"


@RULES.add("gradient", "a gradient that is not 0 reaches every weight and the tokens, in float32 and bfloat16")
def gradient(case: ProjectorCase) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        projector = case.build().to(dtype).train()
        tokens = image().tokens.to(dtype).requires_grad_()
        out = projector(replace(image(), tokens=tokens))
        expect(out.dtype == dtype, f"of {dtype} tokens and weights it gives {out.dtype}", f"{dtype}")
        (out.float() ** 2).sum().backward()
        grads = {n: p.grad for n, p in projector.named_parameters()} | {"tokens": tokens.grad}
        bare = [n for n, g in grads.items() if g is None or not g.isfinite().all() or not g.any()]
        expect(not bare, f"in {dtype} no finite gradient reaches {', '.join(bare[:3])}", "one for each")
    return f"{len(grads)} tensors"


@RULES.add("size", "fresh weights make tokens of moderate size of tokens with standard deviation 1")
def size(case: ProjectorCase) -> str:
    std = float(case.build()(image()).detach().std())
    expect(0.01 < std < 3, f"the standard deviation is {std:.2g}", "0.01 to 3, as embeddings of text")
    return f"{std:.2g}"


add_structure_rule(RULES)
add_saving_rule(RULES, lambda projector: projector(image()))
add_device_rule(RULES, lambda part, given: part(given), lambda case: image())
add_compile_rule(RULES, lambda part, given: part(given), lambda case: image())
add_no_trace_rule(RULES, lambda part, given: part(given), lambda case: image())
add_options_rule(RULES)
