"""PruMerge against its equations, spelt out one image and one token at a time, and what must hold in a whole model."""

import math
from dataclasses import replace

import pytest
import torch

from tests import test_left_out as left_out
from tests.conftest import tiny_slots
from tests.fusion_builders import features, image_row
from tests.vision_builders import shake
from zoo import registry
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.registry import Cut, ZooError


def build(**options):
    return registry.build("pruner", {"name": "prumerge", **options}).eval()


def peaked(m=3, grid=(6, 8), seed=0, outliers=(2, 5, 0), dim=12):
    """Features in which each image has a number of outliers of its own, at least."""
    image = features(m=m, grid=grid, dim=dim, seed=seed)
    a = torch.rand(image.tokens.shape[:2], generator=torch.Generator().manual_seed(seed)) + 1
    for row, count in zip(a, outliers, strict=True):
        row[torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(seed))[:count]] += 3 + torch.rand(count)
    return replace(image, next_attention=a / (a.sum(1, True) * 1.1))


def naive(f, k, a, plus=False, count=None, near=32, extra=True, raster=False, last=True, least=1):
    """Values and places of the tokens of one image: the spec's reference steps, in lists."""
    n, order = len(a), sorted(range(len(a)), key=lambda j: (-float(a[j]), j))
    ordered = sorted(a.tolist())

    def quartile(p):
        at = p * (n - 1)
        low = math.floor(at)
        return ordered[low] + (ordered[min(low + 1, n - 1)] - ordered[low]) * (at - low)

    q1, q3 = quartile(0.25), quartile(0.75)
    top = count if count is not None else max(least, sum(float(x) > q3 + 1.5 * (q3 - q1) for x in a))
    chosen = order[:top]
    if plus:
        step = int(int(1 / (top / n)) / 3)
        chosen = chosen + [j for j in range(0, n if last else n - 1, max(step, 2)) if j not in chosen]
    chosen = sorted(chosen) if raster else chosen
    unit = k / k.norm(dim=-1, keepdim=True)
    out = []
    for i in chosen:
        alike = (unit @ unit[i]).tolist()
        best = sorted((j for j in range(n) if j != i), key=lambda j: (-alike[j], j))[:near]
        out.append(f[i] + sum((a[j] * f[j] for j in best), torch.zeros_like(f[i])))
    rest = [j for j in range(n) if j not in chosen]
    if extra and rest:
        out.append(sum(a[j] * f[j] for j in rest))
    return torch.stack(out), chosen, top


@pytest.mark.parametrize("order", ["raster", "score"])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("grid", "near"), [((6, 8), 32), ((6, 8), 3), ((4, 5), 32), ((7, 7), 0)])
def test_tokens_are_those_of_the_equations(grid, near, plus, order):
    image = peaked(grid=grid)
    out = build(plus=plus, order=order, neighbours=near)(image)
    counts = set()
    for i in range(3):
        known = (image.tokens[i], image.next_keys[i], image.next_attention[i])
        want, chosen, top = naive(*known, plus=plus, near=near, raster=order == "raster")
        valid = out.valid[i]
        assert int(valid.sum()) == len(want) and out.keep[i][: len(chosen)].tolist() == chosen
        torch.testing.assert_close(out.tokens[i][valid], want, atol=2e-6, rtol=1e-5)
        assert sorted(out.keep[i].tolist()) == list(range(len(valid)))  # each has a place of its own, padding too
        assert sorted(out.rank[i][valid].tolist()) == list(range(len(want)))  # a layout gives up padding first
        counts.add(top)
    assert len(counts) > 1 and out.mixed and out.grid is None


@pytest.mark.parametrize("n", [576, 256, 196])
def test_evenly_spaced_patches_are_as_far_apart_as_in_the_release(n):
    part = build(plus=True)
    for top in range(1, n // 6 + 1):
        assert int(part._step(torch.tensor([top]), n)) == max(2, int(int(1 / (top / n)) / 3)), top


def test_the_counts_of_the_release_at_576():
    """K + 575 / step + 1, where no evenly spaced patch is an outlier."""
    for top, step, total in ((32, 6, 129), (40, 4, 185), (30, 6, 127)):
        a = torch.rand(1, 576, generator=torch.Generator().manual_seed(1)) + 1
        free = [j for j in range(576) if j % step][: 7 * top : 7]
        a[0, free] += 5
        image = features(m=1, grid=(24, 24), dim=4)
        out = build(plus=True, samples="released", order="score", neighbours=1)(replace(image, next_attention=a))
        assert int(out.valid.sum()) == top + len(range(0, 575, step)) + 1 == total


def test_what_must_hold_of_any_image():
    image = peaked()
    part = build()
    out, scaled = part(image), part(replace(image, tokens=2 * image.tokens, next_attention=image.next_attention))
    torch.testing.assert_close(scaled.tokens, 2 * out.tokens)  # linear in the features
    moved = part(replace(image, next_attention=0.5 * image.next_attention + 0.01))
    assert torch.equal(moved.valid, out.valid) and torch.equal(moved.keep, out.keep)  # the same outliers
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    permuted = image.take(order.expand(3, -1))
    other = build(order="score")(replace(permuted, keep=None, grid=(6, 8)))
    mine = build(order="score")(image)
    torch.testing.assert_close(other.tokens[other.valid], mine.tokens[mine.valid], atol=2e-6, rtol=1e-5)
    plain = build(neighbours=0, extra=False)(image)
    for i in range(3):
        kept = plain.keep[i][plain.valid[i]]
        assert torch.equal(plain.tokens[i][plain.valid[i]], image.tokens[i, kept])
        assert set(kept.tolist()) == set(image.next_attention[i].topk(len(kept)).indices.tolist())
    every = build(min_keep=48)(image)
    assert every.valid.all() and every.tokens.shape[1] == 48  # all are chosen: no extra token, which would be 0
    torch.testing.assert_close(every.tokens[0], naive(*(x[0] for x in known(image)), count=48, raster=True)[0])


def known(image):
    return image.tokens, image.next_keys, image.next_attention


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("statistic", ["image", "batch"])
def test_a_batch_is_each_alone_unless_quartiles_are_of_the_batch(statistic, plus):
    image = peaked(m=3, outliers=(1, 9, 4))
    part = build(statistic=statistic, plus=plus)
    out = part(image)
    same = []
    for i in range(3):
        alone = part(image_row(image, i))
        equal = torch.equal(alone.valid[0], out.valid[i])
        same.append(equal and torch.allclose(alone.tokens[0][alone.valid[0]], out.tokens[i][out.valid[i]], atol=1e-6))
    assert all(same) == (statistic == "image")
    if statistic == "batch":
        a = image.next_attention
        q1, q3 = (torch.quantile(a.flatten(), q) for q in (0.25, 0.75))
        assert len(set(out.valid.sum(1).tolist())) == 1 or plus
        top = int(48 * ((a > q3 + 1.5 * (q3 - q1)).float().mean() + 1e-6))
        assert plus or int(out.valid[0].sum()) == top + 1


def test_bounds_are_kept_and_fixed_counts_met():
    image = peaked(outliers=(2, 12, 0))
    for most in (4, 9, 20):
        for plus in (False, True):
            part = build(plus=plus, max_keep=most, min_keep=2)
            out = part(image)
            assert out.tokens.shape[1] == part.num_tokens(48) == most
            assert (out.valid.sum(1) <= most).all() and (out.valid.sum(1) >= 3).all()
    for count in range(1, 49):
        for plus in (False, True):
            part = build(num_keep=count, plus=plus)
            out = part(image)
            assert out.tokens.shape[1] == count and out.valid is None and not part.ragged
            if count < 48:
                assert all(len(set(row.tolist())) == count for row in out.keep)
    assert build(keep_ratio=0.25).num_tokens(48) == 12
    half = build(plus=True, num_keep=25, order="score")(image)
    best = image.next_attention.argsort(dim=1, descending=True)
    assert torch.equal(half.keep[:, :12], best[:, :12])
    gaps = half.keep[:, 12:24].diff(dim=1)
    assert gaps.min() > 0 and gaps.max() <= 9  # evenly spaced among the 36 others


def test_equal_scores_keep_the_first_and_nothing_else_fails():
    image = features(m=2, grid=(6, 8))
    flat = replace(image, next_attention=torch.full((2, 48), 1 / 49))
    out = build()(flat)
    assert out.valid.sum(1).tolist() == [2, 2] and out.keep[:, 0].tolist() == [0, 0]  # one patch and the extra token
    assert build(plus=True)(flat).valid.sum(1).tolist() == [4, 4]  # 0, 16, 32, the extra token: 48 / 3 apart
    one = features(m=1, grid=(1, 1))
    assert build()(one).tokens.shape[1] == 1


def test_weighted_means():
    image = peaked(outliers=(3, 6, 2))
    out = build(weights="normalised", neighbours=5)(replace(image, tokens=torch.ones_like(image.tokens)))
    torch.testing.assert_close(out.tokens[out.valid], torch.ones_like(out.tokens[out.valid]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_by_float32(dtype):
    image = peaked()
    half = build()(replace(image, tokens=image.tokens.to(dtype), next_keys=image.next_keys.to(dtype)))
    assert half.tokens.dtype == dtype and torch.equal(half.valid, build()(image).valid)
    assert torch.equal(half.keep, build()(image).keep)


def test_other_scores_need_no_other_block():
    image = peaked()
    for score, name in (("cls", "cls_attention"), ("column_mean", "key_attention")):
        got = build(score=score)(replace(image, **{name: image.next_attention}, next_attention=None, next_keys=None))
        want = naive(image.tokens[0], image.keys[0].flatten(1), image.next_attention[0], raster=True)[0]
        torch.testing.assert_close(got.tokens[0][got.valid[0]], want, atol=2e-6, rtol=1e-5)
        with pytest.raises(ZooError, match=f"score={score} needs {name} and keys"):
            build(score=score)(replace(image, **{name: None}))


def test_options_that_do_not_fit():
    with pytest.raises(ZooError, match="max_keep must be at least min_keep and the extra token, 6; got 5"):
        build(min_keep=5, max_keep=5)
    with pytest.raises(ZooError, match="Did you mean 'image'"):
        build(statistic="imag")
    with pytest.raises(ZooError, match=r"keep_ratio must be in \(0, 1\]"):
        build(keep_ratio=1.5)


def vision(**more):
    node = {"name": "timm", "image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "depth": 2, "layer": -2}
    return node | {"next_block": True} | more


def plan(**slots):
    return Plan(tiny_slots(pruner={"prumerge": {"name": "prumerge"}}, **slots), 300)


@pytest.mark.fixes
def test_the_check_names_what_is_missing_and_how_to_get_it():
    with pytest.raises(RefusedError, match="needs next_block, but vision 'timm' does not give it: it keeps") as no:
        check(plan(vision=vision(next_block=False)))
    assert "vision.next_block=true" in no.value.fixes
    for options, why in (({"layer": -1}, "features are those of the last block"), ({"cls_token": False}, "no .CLS.")):
        with pytest.raises(RefusedError, match=rf"needs next_block, but vision 'timm' does not give it: .*{why}"):
            check(plan(vision=vision(next_block=False, **options)))
    assert check(plan(vision=vision())).num_image_tokens == 16


@pytest.mark.parametrize("inside", ["dart", "fastv", "pyramiddrop", "sparsevlm"])
def test_a_pruner_inside_the_llm_may_follow(inside):
    named = {"prumerge": {"name": "prumerge", "score": "column_mean"}, inside: {"name": inside}}
    if inside in ("dart", "fastv"):
        named[inside]["layer"] = 1
    for slots in (named, dict(reversed(named.items()))):
        assert check(Plan(tiny_slots(vision=vision(), pruner=slots), 300)).num_image_tokens == 16


# ---- in a whole model --------------------------------------------------------------------------------------------


@pytest.fixture
def with_next(make_model):
    """`make_model` with an encoder whose next block is kept, and looks at few of the patches."""

    def made(**slots):
        model, processor = make_model(**{"vision": vision(), **slots})
        shake(model.vision, seed=3)
        with torch.no_grad():
            for name, weight in model.vision.named_buffers():
                weight.mul_(9) if "qkv.weight" in name else None
        return model, processor

    return made


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_two_images_of_unlike_counts_in_one_batch(with_next, side, positions, plus):
    # Dense: in raster order but for the extra token, which is the last one.
    node = {"prumerge": {"name": "prumerge", "plus": plus, "neighbours": 4, "extra": positions == "kept"}}
    model, processor = left_out.made(with_next, node, positions=positions)
    bare, _ = left_out.made(with_next, None)
    batch = left_out.batch_of(processor, side)
    out, rows = left_out.expected(model, bare, batch, positions)
    real = out.sequence.attention_mask.bool()
    assert len({int(v.sum()) for v in out.image_kept.valid}) > 1
    for logits, valid, row in zip(out.logits, real, rows, strict=True):
        torch.testing.assert_close(logits[valid], row, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["kept", "dense"])
def test_rows_alone_packed_training_and_generation(with_next, positions):
    node = {"prumerge": {"prumerge": {"name": "prumerge", "plus": True, "order": "score", "max_keep": 12}}}
    given = (with_next, node, "prumerge")
    left_out.test_a_row_of_a_batch_is_the_row_alone(*given)
    left_out.test_packed_rows_learn_what_each_learns_alone(*given, positions)
    for way in left_out.WAYS:
        left_out.test_generation_is_forward_step_by_step(*given, way, positions)
    left_out.test_a_batch_is_generated_as_each_alone(*given, {"num_beams": 2, "num_return_sequences": 2})


def test_where_the_image_is_padded_tokens_of_the_picture_stay(with_next):
    layout = {"name": "anyres", "pinpoints": [[64, 64]], "newline": True}
    model, _ = with_next(pruner={"prumerge": {"name": "prumerge", "extra": False}}, layout=layout)
    cut = Cut(5, "crop", (64, 32), (2, 2))  # the left and the right quarter of the tiles are padding
    out = model.encode_images(torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)), [cut])
    kept = out.kept
    column = kept.keep % 4
    stays = int(kept.valid[0].sum())
    for i in range(1, 5):  # tiles row by row
        picture = column[i] >= 2 if i in (1, 3) else column[i] < 2
        stays += int((kept.valid[i] & picture).sum())
    ends = 1  # one newline ends an image whose lines are gone
    assert int(out.valid.sum()) == stays + ends and len(out.tokens) == model.layout.count(cut)


@pytest.mark.parametrize("newline", [True, False])
def test_crops_are_counted_and_chosen_each_by_itself(with_next, newline):
    layout = {"name": "anyres", "pinpoints": [[32, 32], [64, 32], [64, 64]], "newline": newline}
    for options in ({"neighbours": 4}, {"num_keep": 6}):
        model, _ = with_next(pruner={"prumerge": {"name": "prumerge", **options}}, layout=layout)
        g = torch.Generator().manual_seed(0)
        cuts = [Cut(5, "crop", (64, 64), (2, 2)), Cut(1, "crop", (32, 32))]
        rows = torch.randn(6, 3, 32, 32, generator=g)
        both = model.encode_images(rows, cuts)
        apart = [model.encode_images(rows[:5], cuts[:1]), model.encode_images(rows[5:], cuts[1:])]
        torch.testing.assert_close(both.tokens, torch.cat([x.tokens for x in apart]), atol=1e-6, rtol=1e-5)
        assert len(both.tokens) == sum(map(model.layout.count, cuts))
        if "num_keep" not in options:
            assert torch.equal(both.valid, torch.cat([x.valid for x in apart]))
            ends = len(both.tokens) - 6 * 16
            assert int(both.valid.sum()) == int(both.kept.valid.sum()) + ends < len(both.tokens)
