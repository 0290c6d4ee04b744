"""HoloV against its equation, crop by crop in float64, and what must hold of quotas."""

import math
from dataclasses import replace

import pytest
import torch

from tests.fusion_builders import features, image_row
from zoo import registry
from zoo.fusion.pruners.holov import _parts
from zoo.registry import ImageFeatures, ZooError

RELEASED = {"spread": "crop", "shape": "run"}


def build(name="holov", **options):
    return registry.build("pruner", {"name": name, **options}).eval()


def image_of(m=4, grid=(12, 12), dim=16, seed=0, peaks=2.0):
    """Random tokens with attention as peaked as that of an encoder."""
    image = features(m=m, grid=grid, dim=dim, seed=seed)
    noise = torch.randn(m, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed + 1))
    return replace(image, cls_attention=(peaks * noise).softmax(-1))


def runs(n, parts):
    """The first n mod parts runs are one longer."""
    sizes = [n // parts + (p < n % parts) for p in range(parts)]
    return [list(range(sum(sizes[:p]), sum(sizes[: p + 1]))) for p in range(parts) if sizes[p]]


def windows(grid, parts):
    h, w = grid
    side = math.sqrt(h * w / parts)
    lines, columns = (min(s, max(1, round(s / side))) for s in grid)
    return [[y * w + x for y in ys for x in xs] for ys in runs(h, lines) for xs in runs(w, columns)]


def crop_scores(x, a, crops, alpha, spread):
    """Score the crops of one image in plain loops: tokens (N, D) and attention (N,) in float64."""
    means, varieties = [], []
    for crop in crops:
        m, f = len(crop), x[crop] / (x[crop].norm(dim=1, keepdim=True) + 1e-6)
        s = f @ f.T
        v = []
        for i in range(m if m > 1 else 0):
            row = [0.0 if i == j else float(s[i, j]) for j in range(m)]
            mu = sum(row) / (m - 1)
            counted = row if spread == "crop" else [row[j] for j in range(m) if j != i]
            v.append(sum((y - mu) ** 2 for y in counted) / (m - 1))
        means.append(1000 * float(a[crop].mean()))
        varieties.append(sum(v) / len(v) if v else 0.0)
    p = len(crops)
    if spread == "image":
        unit = sum(means) / p / (sum(varieties) / p + 1e-6)
        return [mean + alpha * v * unit for mean, v in zip(means, varieties, strict=True)]
    scores = []
    for crop, mean, v in zip(crops, means, varieties, strict=True):
        scores.append(mean / 1000 if len(crop) == 1 else mean + alpha * mean / (v + 1e-6) * v)
    return scores


def naive(x, a, crops, t, alpha=0.09, spread="crop"):
    """The kept tokens of one image, ascending, and how many rows of zeros the authors' code would append."""
    x, a = x.double(), a.double()
    c = crop_scores(x, a, crops, alpha, spread)
    w = [s / (sum(c) + 1e-6) for s in c]
    by_w = sorted(range(len(c)), key=lambda p: -w[p])
    quota = [math.floor(s * t) for s in w]
    for p in by_w[: t - sum(quota)]:
        quota[p] += 1
    left = sum(max(0, q - len(crop)) for q, crop in zip(quota, crops, strict=True))
    zeros, quota = left, [min(q, len(crop)) for q, crop in zip(quota, crops, strict=True)]
    while left:
        for p in by_w:
            if left and quota[p] < len(crops[p]):
                quota[p], left = quota[p] + 1, left - 1
    kept = [j for q, crop in zip(quota, crops, strict=True) for j in sorted(crop, key=lambda j: -a[j])[:q]]
    return sorted(kept), zeros


@pytest.mark.parametrize("spread", ["crop", "image"])
@pytest.mark.parametrize("shape", ["run", "grid"])
@pytest.mark.parametrize(
    ("grid", "t", "crops"), [((12, 12), 16, 0), ((12, 12), 30, 7), ((5, 9), 12, 4), ((7, 7), 1, 5)]
)
def test_it_is_the_equation(shape, spread, grid, t, crops):
    image, n = image_of(grid=grid), grid[0] * grid[1]
    kept = build(num_keep=t, crops=crops, shape=shape, spread=spread)(image).keep
    p = crops or int(1024 * n / 576 / t)
    cut = runs(n, p) if shape == "run" else windows(grid, p)
    for row, x, a in zip(kept, image.tokens, image.cls_attention, strict=True):
        assert row.tolist() == naive(x, a, cut, t, spread=spread)[0]


@pytest.mark.parametrize("t", [6, 14, 24, 40, 47])
@pytest.mark.parametrize("crops", [1, 5, 16, 48, 100])
def test_full_crops_give_to_the_others_and_no_row_of_zeros_is_left(t, crops):
    image = image_of(grid=(6, 8), m=6)
    out = build(num_keep=t, crops=crops, **RELEASED)(image)
    assert out.tokens.shape == (6, t, 16) and (out.keep.diff() > 0).all() and out.keep.max() < 48
    for row, x, a in zip(out.keep, image.tokens, image.cls_attention, strict=True):
        assert row.tolist() == naive(x, a, runs(48, min(crops, 48)), t)[0]


def test_the_authors_code_would_append_zeros_in_those():
    image = image_of(grid=(8, 8))
    rows = list(zip(image.tokens, image.cls_attention, strict=True))
    assert all(naive(x, a, runs(64, 16), 48)[1] > 0 for x, a in rows)
    assert all(naive(x, a, runs(64, 4), 6)[1] == 0 for x, a in rows)


def test_the_count_of_crops_is_the_authors():
    tokens = torch.zeros(1, 576, 1)
    for k, p in ((64, 16), (128, 8), (192, 5), (432, 2), (570, 1)):
        crops, real = build(**RELEASED)._crops(ImageFeatures(tokens, (24, 24)), k)
        assert crops.shape == (p, -(-576 // p)) and int(real.sum()) == 576
    crops, real = build()._crops(ImageFeatures(tokens, (24, 24)), 64)  # windows of 6 x 6
    assert crops.shape == (16, 36) and real.all() and crops[5].tolist() == windows((24, 24), 16)[5]


@pytest.mark.parametrize(("n", "parts"), [(10, 1), (10, 3), (10, 10), (7, 4), (576, 16)])
def test_runs_are_cut_as_evenly_as_they_go(n, parts):
    assert [[i for i in row if i < n] for row in _parts(n, parts, torch.device("cpu")).tolist()] == runs(n, parts)


def test_crops_hold_every_token_once():
    for grid, asked in (((5, 9), 4), ((1, 12), 5), ((7, 3), 21), ((4, 6), 50), ((24, 24), 8)):
        n = grid[0] * grid[1]
        for shape in ("run", "grid"):
            crops, real = build(crops=asked, shape=shape)._crops(ImageFeatures(torch.zeros(1, n, 1), grid), 2)
            assert crops[real].sort().values.tolist() == list(range(n))
            assert real.any(1).all()


@pytest.mark.parametrize("shape", ["run", "grid"])
@pytest.mark.parametrize("spread", ["crop", "image"])
def test_one_crop_is_fastervlm(shape, spread):
    image = image_of(grid=(6, 20))
    for t in (1, 13, 119):
        other = build("fastervlm", num_keep=t)(image)
        out = build(num_keep=t, crops=1, shape=shape, spread=spread)(image)
        assert torch.equal(out.keep, other.keep) and torch.equal(out.rank, other.rank)


@pytest.mark.parametrize("options", [{}, RELEASED])
def test_a_share_of_a_whole_token_keeps_one(options):
    image, t = image_of(m=20), 16
    pruner = build(num_keep=t, **options)
    kept = pruner(image).keep
    cut = runs(144, 16) if options else windows((12, 12), 16)
    for row, x, a in zip(kept, image.tokens, image.cls_attention, strict=True):
        c = crop_scores(x.double(), a.double(), cut, 0.09, pruner.config.spread)
        for crop, score in zip(cut, c, strict=True):
            assert score / (sum(c) + 1e-6) * t < 1 or set(crop) & set(row.tolist())


def test_variety_counts_between_crops_and_cancels_within():
    image = image_of(m=20)
    for spread, same in (("crop", True), ("image", False)):
        few, many = (build(num_keep=16, alpha=alpha, spread=spread, shape="run")(image).keep for alpha in (0.0, 10.0))
        assert torch.equal(few, many) is same
    without = build(num_keep=16, alpha=0.0)(image).keep
    assert torch.equal(build(num_keep=16, alpha=0.0, spread="crop")(image).keep, without)


def test_a_blank_crop_gets_less_than_a_varied_one_with_the_same_attention():
    image = image_of(m=3)
    tokens = image.tokens.clone()
    blank = torch.tensor(runs(144, 16)[3])
    tokens[:, blank] = tokens[:, blank[:1]]
    image = replace(image, tokens=tokens, cls_attention=torch.full((3, 144), 1 / 144))
    kept = build(num_keep=64, crops=16, alpha=1.0, shape="run")(image).keep
    counts = torch.stack([torch.isin(kept, torch.tensor(run)).sum(1) for run in runs(144, 16)], 1)
    assert (counts[:, 3] == counts.amin(1)).all() and (counts[:, 3] < 4).all()


@pytest.mark.parametrize("factor", [0.5, 3.0, 1000.0])
def test_the_scale_of_attention_does_not_matter(factor):
    image = image_of()
    scaled = replace(image, cls_attention=image.cls_attention * factor)
    for options in ({}, RELEASED):
        pruner = build(num_keep=20, **options)
        assert torch.equal(pruner(image).keep, pruner(scaled).keep)


@pytest.mark.parametrize("spread", ["crop", "image"])
def test_even_attention_makes_even_quotas(spread):
    image = replace(image_of(), cls_attention=torch.full((4, 144), 1 / 144))
    tiled = replace(image, tokens=image.tokens[:, :9].repeat(1, 16, 1))  # every crop has the same variety
    for t in (16, 20, 32, 45):
        for given, alpha in ((image, 0.0), (tiled, 0.09)):
            kept = build(num_keep=t, crops=16, shape="run", spread=spread, alpha=alpha)(given).keep
            for row in kept:
                counts = torch.bincount(row // 9, minlength=16)
                assert counts.max() - counts.min() <= 1


def test_attention_of_zeros_still_gives_all_the_tokens():
    image = replace(image_of(), cls_attention=torch.zeros(4, 144))
    for t in (5, 100):
        kept = build(num_keep=t, crops=16)(image).keep
        assert kept.shape == (4, t) and (kept.diff() > 0).all()


@pytest.mark.parametrize("options", [{}, RELEASED, {"crops": 7}, {"keep_ratio": 0.9, "crops": 30}])
def test_a_batch_is_each_image_alone(options):
    image, pruner = image_of(m=16, grid=(9, 11)), build(**options)
    out = pruner(image)
    for i in range(16):
        alone = pruner(image_row(image, i))
        assert torch.equal(alone.keep, out.keep[i : i + 1]) and torch.equal(alone.rank, out.rank[i : i + 1])


def test_rounded_tokens_change_no_released_set():
    image = image_of()
    half = build(**RELEASED)(replace(image, tokens=image.tokens.bfloat16()))
    assert half.tokens.dtype == torch.bfloat16 and torch.equal(half.keep, build(**RELEASED)(image).keep)


def test_all_tokens_are_no_change_and_destroy_nothing():
    image = image_of()
    for options in ({"keep_ratio": 1.0}, {"num_keep": 144}, {"num_keep": 900}):
        assert build(**options)(image) is image
    whole = registry.build("pruner", {"name": "holov", "num_keep": 144}, num_tokens=144)
    assert whole.destroys == frozenset() and whole.num_tokens(144) == 144


def test_what_is_given_up_first_is_spread_over_crops():
    image = replace(image_of(m=1), cls_attention=torch.full((1, 144), 1 / 144))
    out = build(num_keep=32, crops=16, alpha=0.0, shape="run")(image)
    first = out.keep[0][out.rank[0] < 16] // 9  # half of them: one of each crop
    assert first.tolist() == list(range(16))


def test_other_scores_and_no_grid():
    image = image_of()
    mean = build(num_keep=9, score="column_mean")
    swapped = replace(image, cls_attention=image.key_attention)
    assert torch.equal(mean(image).keep, build(num_keep=9)(swapped).keep)
    assert mean.needs == {"key_attention", "grid"} and build(shape="run").needs == {"cls_attention"}
    with pytest.raises(ZooError, match="'holov' with score=cls needs cls_attention"):
        build()(replace(image, cls_attention=None))
    with pytest.raises(ZooError, match="shape=grid needs grid; shape=run does not"):
        build()(replace(image, grid=None))
    assert build(shape="run")(replace(image, grid=None)).keep.shape == (4, 36)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be in"),
        ({"crops": -1}, "crops must not be negative, got -1"),
        ({"num_keep": -1}, "num_keep must not be negative"),
        ({"alpha": -0.1}, "alpha must not be negative"),
        ({"spread": "crops"}, "'crops'. Did you mean 'crop'"),
        ({"shape": "square"}, "square"),
        ({"score": "clss"}, "'clss'. Did you mean 'cls'"),
        ({"fill": "zeros"}, "fill"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ZooError, match=words):
        build(**options)
