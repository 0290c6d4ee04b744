"""VScan against its rules, spelt out one token at a time, and what must hold in a whole model."""

import math
from dataclasses import replace

import pytest
import torch

from tests import test_left_out as left_out
from tests.conftest import sample, tiny_slots
from tests.dropping_builders import forward, kept, llm_of, row
from tests.fusion_builders import features, image_row
from tests.vision_builders import SIZED
from zoo import registry
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.registry import Cut, ZooError

WORD = "cls_attention@1"


def build(name="vscan", **options):
    given = {"shallow_layer": 1} if name == "vscan" else {}
    return registry.build("pruner", {"name": name, **given, **options}).eval()


def scored(m=3, grid=(8, 8), seed=0):
    image = features(m=m, grid=grid, seed=seed)
    shallow = torch.rand(m, math.prod(grid), generator=torch.Generator().manual_seed(seed + 9)).softmax(1)
    return replace(image, block_attention={WORD: shallow})


def naive(shallow, deep, grid, count, windows, side, share=0.5):
    """Tokens kept of one image: the spec's steps, in lists."""
    (h, w), n = grid, grid[0] * grid[1]
    down, across = max(1, h // side), max(1, w // side)
    of = [min(j // w // side, down - 1) * across + min(j % w // side, across - 1) for j in range(n)]
    local, walk = int(count * share), sorted(range(n), key=lambda j: (-float(shallow[j]), j))
    chosen, taken = [], [0] * (down * across)
    for j in walk:
        limit = local // (down * across) if windows == "square" else math.ceil(local / (down * across))
        if taken[of[j]] < limit and (windows == "square" or len(chosen) < local):
            chosen.append(j)
            taken[of[j]] += 1
    if windows == "capped":
        chosen += [j for j in walk if j not in chosen][: local - len(chosen)]
    rest = sorted((j for j in range(n) if j not in chosen), key=lambda j: (-float(deep[j]), j))
    return sorted(chosen + rest[: count - local])


@pytest.mark.parametrize("merge", ["projected", "none"])
def test_a_token_stays_where_windows_are_more_than_the_tokens(merge):
    """With all of them by windows, none of which has a share of a token: the best of the deep block."""
    image = scored()
    left = build(windows="square", window=2, local_share=1.0, num_keep=5, merge=merge)(image)
    best = image.cls_attention.argmax(1, keepdim=True)
    assert torch.equal(left.valid, torch.zeros_like(left.valid).scatter(1, best, True))


def averaged(y, stay):
    """Values of the tokens that stay: each with the mean of those that are most like it."""
    unit = [v / v.norm().clamp(min=1e-8) for v in y]
    members = {i: [y[i]] for i in stay}
    for j in range(len(y)):
        if j not in members:
            members[max(stay, key=lambda i: (float(unit[i] @ unit[j]), -i))].append(y[j])
    return torch.stack([torch.stack(members[i]).mean(0) for i in stay]), [len(members[i]) for i in stay]


@pytest.mark.parametrize("windows", ["capped", "square"])
@pytest.mark.parametrize(
    ("grid", "count", "side"),
    [
        ((8, 8), 16, 2),
        ((8, 8), 40, 2),
        ((8, 8), 7, 2),
        ((8, 8), 63, 4),
        ((9, 7), 20, 3),
        ((5, 11), 30, 2),
        ((2, 3), 4, 4),
    ],
)
def test_tokens_and_values_are_those_of_the_rule_spelt_out(grid, count, side, windows):
    image = scored(grid=grid)
    out = build(num_keep=count, window=side, windows=windows)(image)
    for i in range(3):
        want = naive(image.block_attention[WORD][i], image.cls_attention[i], grid, count, windows, side)
        assert out.valid[i].nonzero()[:, 0].tolist() == want
        values, _ = averaged(image.tokens[i], want)
        torch.testing.assert_close(out.tokens[i][out.valid[i]], values, atol=1e-6, rtol=1e-5)
    if windows == "capped":
        assert (out.valid.sum(1) == count).all()
    assert out.tokens.shape == image.tokens.shape and out.grid == grid


def test_the_counts_of_the_release_on_24_by_24():
    """16 (int(T / 2) // 16) + T - int(T / 2): T only where the windows divide its half."""
    image, default = scored(m=1, grid=(24, 24)), build(windows="square", window=6)
    for count in (64, 96, 192, 288, 40, 575, 20):
        part = build(windows="square", window=6, num_keep=count)
        found = int(part(image).valid.sum())
        assert found == 16 * (count // 2 // 16) + count - count // 2 <= part.tokens_of_image(576, Cut())
        assert int(build(num_keep=count)(image).valid.sum()) == count
    assert default.tokens_of_image(576, Cut(5, "crop")) == 5 * 144
    for preset, count in (("llava15_64", 96), ("llava15_128", 192), ("llava15_192", 288)):
        part = registry.build("pruner", {"name": "vscan", "preset": preset}, vision_depth=24)
        layers = part.tokens_per_layer(part.count(576), 32)
        assert layers == [count] * 16 + [count // 3] * 16 and sum(layers) / 32 == int(preset.split("_")[1])
        assert part.word == "cls_attention@6"


def test_what_must_hold_of_any_image():
    image = scored()
    part = build(num_keep=20, window=2)
    out, sizes = part(image), []
    for i in range(3):
        stay = out.valid[i].nonzero()[:, 0].tolist()
        size = averaged(image.tokens[i], stay)[1]
        total = sum(s * v for s, v in zip(size, out.tokens[i][out.valid[i]], strict=True))
        torch.testing.assert_close(total, image.tokens[i].sum(0), atol=1e-5, rtol=1e-5)  # nothing is lost
        assert sum(size) == 64
        alone = part(image_row(image, i))
        assert torch.equal(alone.valid[0], out.valid[i]) and torch.allclose(alone.tokens[0], out.tokens[i], atol=1e-6)
        sizes.append(size)
    alone = build(num_keep=20, local_share=0.0, merge="none")(image)
    faster = build("fastervlm", num_keep=20)(image)
    assert torch.equal(alone.valid.nonzero()[:, 1].view(3, 20), faster.keep)
    assert alone.tokens is image.tokens
    assert build(num_keep=64)(image) is image and build(keep_ratio=1.0)(image) is image
    per_window = out.valid.view(3, 4, 2, 4, 2).sum((2, 4))
    local = build(num_keep=10, window=2, local_share=1.0)(image).valid.view(3, 4, 2, 4, 2).sum((2, 4))
    assert local.max() == 1 and per_window.max() <= 4


def test_equal_scores_and_cosines_keep_the_first():
    image = scored(m=1, grid=(4, 4))
    same = torch.full((1, 16), 1 / 16)
    flat = replace(image, cls_attention=same, block_attention={WORD: same}, tokens=torch.ones(1, 16, 3))
    assert build(num_keep=4, window=2)(flat).valid[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_gradients(dtype):
    image = scored()
    part = build(num_keep=20)
    half = part(replace(image, tokens=image.tokens.to(dtype)))
    assert half.tokens.dtype == dtype and torch.equal(half.valid, part(image).valid)
    tokens = image.tokens.clone().requires_grad_()
    out = part(replace(image, tokens=tokens))
    out.tokens[out.valid].sum().backward()
    assert (tokens.grad > 0).all()  # every token, with the weight of its mean


# ---- inside the LLM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_the_second_stage_is_that_of_pyramiddrop_with_one_cut(dense):
    ids = row("tit", 12)
    found = []
    for name, options in (
        ("vscan", {"llm_layer": 2, "llm_ratio": 0.25}),
        ("pyramiddrop", {"layers": [2], "ratios": [0.25]}),
    ):
        llm = llm_of()
        build(name, **options).attach(llm)
        out = forward(llm, True, ids[None], dense=dense)
        found.append((out.last_hidden_state, [k.tolist() for k in kept(out)]))
    assert found[0][1] == found[1][1] and torch.equal(found[0][0], found[1][0])


def test_layers_and_counts():
    part = build()
    assert part.tokens_per_layer(96, 32) == [96] * 16 + [32] * 16 and part.tokens_per_layer(5, 1) == [5]
    assert build(llm_ratio=1.0).tokens_per_layer(96, 4) == [96] * 4
    assert build(llm_ratio=1.0).needs == {"cls_attention", WORD, "grid"} == part.needs - {"image_tokens"}
    llm = llm_of()
    alone = build(llm_ratio=1.0)
    alone.attach(llm)
    assert not alone.inside and not alone.shortens
    with pytest.raises(ZooError, match="llm_layer must be below the depth of the LLM, 4, got 4"):
        build(llm_layer=4).attach(llm)
    for options, what in (
        ({"llm_ratio": 0.0}, "llm_ratio must be in"),
        ({"local_share": 2.0}, "local_share must be in"),
        ({"merge": "features"}, "No merge named 'features'"),
    ):
        with pytest.raises(ZooError, match=what):
            build(**options)
    with pytest.raises(ZooError, match="shallow_layer=0 needs the encoder's depth"):
        registry.build("pruner", {"name": "vscan"})


# ---- in a whole model --------------------------------------------------------------------------------------------


def node(**options):
    return {"vscan": {"name": "vscan", "num_keep": 5, "window": 2, "llm_ratio": 1.0, **options}}


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_does_not_stay_is_hidden(make_model, side, positions):
    model, processor = left_out.made(make_model, node(), positions=positions)
    bare, _ = left_out.made(make_model, None)
    batch = left_out.batch_of(processor, side)
    out, rows = left_out.expected(model, bare, batch, positions)
    real = out.sequence.attention_mask.bool()
    for logits, valid, wanted in zip(out.logits, real, rows, strict=True):
        torch.testing.assert_close(logits[valid], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_rows_alone_training_and_generation(make_model, positions, ratio):
    given = (make_model, {"vscan": node(llm_ratio=ratio)}, "vscan")
    left_out.test_a_batch_is_generated_as_each_alone(*given, {})
    if ratio == 1.0:  # a longer prompt, or another dialog about an image, is another question
        for way in list(left_out.WAYS)[:2]:
            left_out.test_generation_is_forward_step_by_step(*given, way, positions)
        left_out.test_a_row_of_a_batch_is_the_row_alone(*given)
        left_out.test_packed_rows_learn_what_each_learns_alone(*given, positions)
        return
    model, processor = left_out.made(make_model, node(llm_ratio=ratio), positions=positions)
    many = left_out.pruned(model, left_out.batch_of(processor))
    layers = [k.sum(1).tolist() for k in many.passed.dropped.kept()]
    assert [a - b for a, b in zip(*layers, strict=True)] == [6, 3, 3]  # of 10, 5 and 5 image tokens 4, 2 and 2 are left
    for i, n in enumerate((2, 1, 1)):
        text = (left_out.QUESTIONS[i], left_out.ANSWERS[i])
        alone = left_out.pruned(model, processor.collate([processor.encode(sample(text, images=n, seed=3 * i))]))
        torch.testing.assert_close(many.logits[i, -1], alone.logits[0, -1], atol=1e-5, rtol=1e-4)


def test_training_behind_both_stages_reaches_every_part(make_model):
    model, processor = make_model(pruner=node(llm_ratio=0.4))
    batch = processor.collate([processor.encode(sample(("how many?", "two"), images=2))])
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.projector.parameters())


@pytest.mark.parametrize("newline", [True, False])
def test_crops_are_cut_each_by_itself(make_model, newline):
    layout = {"name": "anyres", "pinpoints": [[32, 32], [64, 32], [64, 64]], "newline": newline}
    model, _ = make_model(pruner=node(), layout=layout)
    g = torch.Generator().manual_seed(0)
    cuts = [Cut(5, "crop", (64, 64), (2, 2)), Cut(1, "crop", (32, 32))]
    rows = torch.randn(6, 3, 32, 32, generator=g)
    both = model.encode_images(rows, cuts)
    apart = [model.encode_images(rows[:5], cuts[:1]), model.encode_images(rows[5:], cuts[1:])]
    torch.testing.assert_close(both.tokens, torch.cat([x.tokens for x in apart]), atol=1e-6, rtol=1e-5)
    assert torch.equal(both.valid, torch.cat([x.valid for x in apart]))
    assert int(both.valid.sum()) == 6 * 5 + len(both.tokens) - 6 * 16  # and the newlines


@pytest.mark.fixes
def test_the_check():
    def plan(**slots):
        return Plan(tiny_slots(pruner={"vscan": {"name": "vscan"}}, **slots), 300)

    check(plan())
    with pytest.raises(RefusedError, match="'vscan' needs cls_attention") as no:
        check(plan(vision=SIZED["hf_siglip"]))
    assert "pruner.vscan.score=column_mean" in no.value.fixes
    with pytest.raises(RefusedError, match="'vscan' needs"):
        check(plan(projector={"name": "pool", "stride": 2}))
