"""Rules for layouts, each built alone for rows of 16 tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from zoo.contracts.case import Case, add_no_trace_rule, add_options_rule
from zoo.contracts.given import features
from zoo.contracts.rules import NotForThisPart, Rules, expect, expect_close
from zoo.registry import Cut, ImageFeatures, Layout, build

TEXT, GRID, SIDE = 24, (4, 4), 32
CUTS: Sequence[Cut] = (Cut(1, "image", (SIDE, SIDE)), Cut(3, "frame", (SIDE, SIDE)))
RULES = Rules()


class LayoutCase(Case):
    """A layout of rows of 4 x 4 tokens of width 24, of images of 32 x 32 pixels."""

    def build(self, seed: int = 0, text_dim: int | None = TEXT, **options: Any) -> Any:
        torch.manual_seed(seed)
        derived = {"grid": GRID, "num_tokens": 16, "image_size": (SIDE, SIDE), "encoder_grid": GRID}
        derived |= {"pruned": False, "counted": {}}
        layout = build("layout", {**self.node, **options}, text_dim=text_dim, **derived).eval()
        if layout.native:
            raise NotForThisPart("its rows have unlike shapes: that is tried in a model")
        return layout


def shown(which: slice = slice(0, 2), dtype: torch.dtype = torch.float32) -> ImageFeatures:
    """The features of the image and the video of `CUTS`, or of one of them."""
    cuts = tuple(CUTS[which])
    rows = slice(0, 1) if which.stop == 1 else slice(which.start, 4)
    tokens = features(m=4, grid=GRID, dim=TEXT).tokens[rows].to(dtype)
    return ImageFeatures(tokens, GRID, prefix=tokens[:, :1], rows=tuple(cut.rows for cut in cuts), cuts=cuts)


def laid_out(layout: Any, which: slice = slice(0, 2), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The tokens (S, C) of the image and the video of `CUTS`, or of one of them."""
    return lay_out(layout, shown(which, dtype))


def lay_out(layout: Any, image: ImageFeatures) -> torch.Tensor:
    """The tokens (S, C) of features of some images."""
    out: torch.Tensor = layout(layout.project(image, lambda some: some.tokens, image.cuts), image.cuts)
    return out


@RULES.add("counts", "count(cut) is the number of tokens of an image, or video, that is cut so")
@torch.no_grad()
def counts(case: LayoutCase) -> str:
    layout, counter = case.build(), case.build(text_dim=None)
    expect(isinstance(layout, Layout), f"its class is {type(layout).__mro__[1].__name__}", "a Layout")
    found = []
    for i, cut in enumerate(CUTS):
        out, k = laid_out(layout, slice(i, i + 1)), layout.count(cut)
        expect(
            out.shape == (k, TEXT),
            f"count({cut.rows} rows, {cut.kind}) is {k}, and it gives {tuple(out.shape)}",
            f"({k}, {TEXT})",
        )
        expect(counter.count(cut) == k, f"built without text_dim it counts {counter.count(cut)}", f"{k}")
        found.append(f"{k} of {cut.rows} {cut.kind}{'s' if cut.rows > 1 else ''}")
    most = layout.num_tokens(16)
    expect(layout.count(CUTS[0]) <= most, f"an image has {layout.count(CUTS[0])}, num_tokens(16) is {most}", "no more")
    return ", ".join(found)


@RULES.add("alone", "an image and a video behind each other are what each is alone")
@torch.no_grad()
def alone(case: LayoutCase) -> str:
    layout = case.build()
    both, n = laid_out(layout), layout.count(CUTS[0])
    expect_close(laid_out(layout), both, "the same a second time", 0.0)
    expect_close(laid_out(layout, slice(0, 1)), both[:n], "the image alone", 1e-6)
    expect_close(laid_out(layout, slice(1, 2)), both[n:], "the video alone", 1e-6)
    return f"{len(both)} tokens"


@RULES.add("dtype", "of bfloat16 tokens and weights it gives bfloat16")
@torch.no_grad()
def dtype(case: LayoutCase) -> str:
    out = laid_out(case.build().to(torch.bfloat16), dtype=torch.bfloat16)
    expect(out.dtype == torch.bfloat16, f"it gives {out.dtype}", "torch.bfloat16")
    return "bfloat16"


add_no_trace_rule(RULES, lay_out, lambda case: shown())
add_options_rule(RULES)
