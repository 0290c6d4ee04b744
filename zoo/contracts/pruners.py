"""Rules for pruners, in front of the LLM and inside it, each built alone with random features."""

import inspect
from dataclasses import replace
from typing import Any

import torch

from zoo.composed.behind import run
from zoo.contracts.case import (
    Case,
    add_compile_rule,
    add_device_rule,
    add_no_trace_rule,
    add_options_rule,
    add_structure_rule,
)
from zoo.contracts.given import features, image_row, tiny_llm
from zoo.contracts.rules import NotForThisPart, Rules, expect, expect_close
from zoo.registry import ImageFeatures, Pruner, ZooError, build

DIM, GRID, OTHER_GRID = 24, (4, 6), (3, 5)
RULES = Rules()
_IN_STEP = (
    "cls_attention", "key_attention", "pooling_attention", "keys", "next_attention", "next_keys", "patch_embeds",
    "projected", "valid",
)  # fmt: skip


class PrunerCase(Case):
    """A pruner for 24 tokens of width 24."""

    def build(self, seed: int = 0, grid: tuple[int, int] = GRID, **options: Any) -> Any:
        torch.manual_seed(seed)
        wants_llm = "llm" in inspect.signature(self.cls.__init__).parameters
        derived = {"vision_dim": DIM, "vision_depth": 3, "grid": grid, "num_tokens": grid[0] * grid[1]}
        derived["llm"] = tiny_llm() if wants_llm else None
        return build("pruner", {**self.node, **options}, **derived).eval()

    def image(self, grid: tuple[int, int] = GRID) -> ImageFeatures:
        """Features of three images with all that the pruner may ask for."""
        words = {w for w in getattr(self.build(), "needs", ()) if "@" in w} | {"key_attention@1", "cls_attention@1"}
        return features(m=3, grid=grid, dim=DIM, blocks=tuple(sorted(words)), prefix=torch.zeros(3, 1, DIM))


@RULES.add("counts", "num_tokens(n) is the number of tokens that it gives of n, and is known beforehand")
def counts(case: PrunerCase) -> str:
    pruner = case.build()
    expect(isinstance(pruner, Pruner), f"its class is {type(pruner).__mro__[1].__name__}", "a Pruner")
    for word in ("needs", "destroys"):  # read without building
        expect(isinstance(getattr(case.cls, word), frozenset), f"{word} of the class", "a frozenset of words")
    out, k = run(pruner, case.image()), pruner.num_tokens(24)
    expect(1 <= k <= 24, f"num_tokens(24) is {k}", "1 to 24")
    given = f"num_tokens(24) is {k}, and forward gives {tuple(out.tokens.shape)}"
    expect(out.tokens.shape == (3, k, DIM), given, f"(3, {k}, {DIM})")
    return given


@RULES.add("grid", "behind it the grid is true: that of its tokens, or None and 'grid' among `destroys`")
def grid(case: PrunerCase) -> str:
    pruner = case.build()
    out, k = run(pruner, case.image()), pruner.num_tokens(24)
    if "grid" in pruner.destroys:
        expect(out.grid is None, f"it destroys 'grid' and gives the grid {out.grid}", "grid=None")
        return "none is left"
    expect(out.grid is not None, "it gives no grid, and does not destroy 'grid'", "'grid' among `destroys`")
    assert out.grid is not None
    expect(out.grid[0] * out.grid[1] == k, f"{k} tokens with the grid {out.grid}", "h * w tokens, or destroys 'grid'")
    own = tuple(pruner.grid or GRID)
    expect(own == tuple(out.grid), f"`grid` is {own} and that of its output {out.grid}", "the same")
    return f"{k} tokens on {out.grid[0]} x {out.grid[1]}"


@RULES.add("in step", "what is known of each token goes with it, or is gone: attention, keys, crops")
def in_step(case: PrunerCase) -> str:
    pruner = case.build()
    given = replace(case.image(), rows=(2, 1), row_kind="crop")
    out, k = run(pruner, given), pruner.num_tokens(24)
    known = {word: getattr(out, word) for word in _IN_STEP} | dict(out.block_attention)
    for word, tensor in known.items():
        right = tensor is None or tensor.shape[:2] == (3, k)
        expect(right, f"{word} has shape {None if right else tuple(tensor.shape)}", f"(3, {k}, ...) or None")
    expect((out.rows, out.row_kind) == ((2, 1), "crop"), f"rows of crops became {out.rows}", "(2, 1)")
    return ", ".join(word for word in _IN_STEP if known[word] is not None) or "nothing is left to check"


@RULES.add("indices", "`keep` has, for each token that it gives, where that was in the encoder's grid")
def indices(case: PrunerCase) -> str:
    image = case.image()
    out = run(case.build(), image)
    if out.keep is None:
        raise NotForThisPart("it gives merged tokens, or all of them")
    expect(out.keep.shape == out.tokens.shape[:2], f"keep has shape {tuple(out.keep.shape)}", "one index a token")
    twice = [i for i, row in enumerate(out.keep) if len(row.unique()) < len(row)]
    expect(not twice, f"keep of image {twice[:1]} has an index twice", "each once")
    if not out.mixed:  # else each begins with the token that it names, and others are added
        index = out.keep.unsqueeze(-1).expand(-1, -1, DIM)
        expect_close(out.tokens, image.tokens.gather(1, index), "the tokens at keep", 0.0)
    return f"{tuple(out.keep.shape)}"


@RULES.add("groups", "`groups` of a pruner that merges has the token that each patch went into")
def groups(case: PrunerCase) -> str:
    pruner, image = case.build(), case.image()
    out = run(pruner, image)
    if out.groups is None:
        raise NotForThisPart("it merges nothing")
    k = out.tokens.shape[1]
    whole = out.keep is None and out.groups.shape == (3, 24) and bool(out.groups.min() >= -1)
    expect(whole, f"groups {tuple(out.groups.shape)}, keep {None if out.keep is None else 'given'}", "(3, 24), no keep")
    summaries = {0} if "prefix_tokens" in pruner.needs else set()  # [CLS] is made of no patch
    for row in out.groups:
        missing = sorted(set(range(k)) - summaries - set(row.tolist()))
        expect(not missing, f"no patch went into the tokens {missing}", "one or more")
    # One patch moves its own token alone.
    moved = image.tokens.clone()
    moved[:, 5] += 0.01
    same = (run(pruner, replace(image, tokens=moved)).tokens - out.tokens).abs().amax(-1) < 1e-7  # (M, K)
    for i in range(3):
        changed = (~same[i]).nonzero().flatten().tolist()
        own = int(out.groups[i, 5])
        expect(own in {-1, *changed}, f"patch 5 of image {i} changed the tokens {changed}", f"its own, {own}")
    return f"24 patches in {k} tokens"


@RULES.add("alone", "an image in a batch gives what it gives alone, and twice the same")
def alone(case: PrunerCase) -> str:
    pruner, image = case.build(), case.image()
    out = run(pruner, image)
    expect_close(run(pruner, image).tokens, out.tokens, "the same batch a second time", 0.0)
    for i in range(3):
        one = run(pruner, image_row(image, i))
        expect_close(one.tokens, out.tokens[i : i + 1], f"image {i} alone", 1e-6)
        if out.keep is not None:
            same = one.keep is not None and torch.equal(one.keep, out.keep[i : i + 1])
            expect(same, f"image {i} alone keeps other tokens", "the same")
    return "3 images"


@RULES.add("unlike sizes", "an image with another grid gives num_tokens of its own n")
def unlike_sizes(case: PrunerCase) -> str:
    n = OTHER_GRID[0] * OTHER_GRID[1]
    try:
        pruner = case.build(grid=OTHER_GRID)
        k = pruner.num_tokens(n)
    except ZooError as refusal:
        raise NotForThisPart(f"it refuses a grid of 3 x 5: {refusal}") from refusal
    shape = tuple(run(pruner, case.image(OTHER_GRID)).tokens.shape)
    expect(shape == (3, k, DIM), f"of a grid of 3 x 5 it gives {shape}, num_tokens(15) is {k}", f"(3, {k}, {DIM})")
    return f"{k} of {n}"


@RULES.add("keeps all", "with keep_ratio=1 it is no pruner")
def keeps_all(case: PrunerCase) -> str:
    if "keep_ratio" not in case.options:
        raise NotForThisPart("it has no option keep_ratio")
    pruner, image = case.build(keep_ratio=1.0), case.image()
    out = run(pruner, image)
    expect(pruner.num_tokens(24) == 24, f"num_tokens(24) is {pruner.num_tokens(24)}", "24")
    expect_close(out.tokens, image.tokens, "the tokens", 0.0)
    kept = out.grid == image.grid and "grid" not in pruner.destroys
    expect(kept, f"the grid is {out.grid}, destroys is {sorted(pruner.destroys)}", f"the grid {image.grid}")
    return "24 of 24"


@RULES.add("gradient", "a gradient reaches the tokens, and every weight that it has")
def gradient(case: PrunerCase) -> str:
    pruner = case.build().train()
    tokens = case.image().tokens.requires_grad_()
    run(pruner, replace(case.image(), tokens=tokens)).tokens.sum().backward()
    expect(tokens.grad is not None and tokens.grad.any(), "no gradient reaches the tokens", "one that is not 0")
    if pruner.num_tokens(24) < 24:  # one that acts inside the LLM has its weights there
        bare = [n for n, p in pruner.named_parameters() if p.grad is None]
        expect(not bare, f"no gradient reaches {', '.join(bare[:3])}", "one for every parameter")
    return f"{sum(1 for _ in pruner.parameters())} weights"


@RULES.add("dtype", "of bfloat16 tokens it gives bfloat16 tokens")
def dtype(case: PrunerCase) -> str:
    image = case.image()
    out = run(case.build(), replace(image, tokens=image.tokens.bfloat16()))
    expect(out.tokens.dtype == torch.bfloat16, f"it gives {out.tokens.dtype}", "torch.bfloat16")
    return "bfloat16"


add_structure_rule(RULES)
add_device_rule(RULES, lambda part, image: part(image).tokens, lambda case: case.image())  # type: ignore[attr-defined]
add_compile_rule(RULES, lambda part, image: part(image).tokens, lambda case: case.image())  # type: ignore[attr-defined]
add_no_trace_rule(RULES, run, lambda case: case.image())  # type: ignore[attr-defined]


add_options_rule(RULES)
