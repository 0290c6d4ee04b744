"""VisPruner against its rule, spelt out one token at a time, and what must hold at any size."""

import pytest
import torch

from tests.fusion_builders import features, image_row
from zoo import registry
from zoo.fusion.pruners import vispruner
from zoo.fusion.pruners.scores import SCORES
from zoo.registry import ImageFeatures, ZooError

ORDERS = pytest.mark.parametrize("order", ["score", "released"])


def build(name="vispruner", **options):
    return registry.build("pruner", {"name": name, **options}).eval()


def naive(tokens, scores, count, share=0.5, step=8, order="score"):
    """Places kept of the tokens (N, D) of one image, in lists: the rule as the paper and its code have it."""
    unit = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
    ranked = sorted(range(len(scores)), key=lambda j: -float(scores[j]))
    important, rest = ranked[: int(count * share)], ranked[int(count * share) :]
    diverse = count - len(important)
    while diverse and len(rest) > diverse:
        a, b = rest[0::2], rest[1::2]
        nearest = {i: float((unit[b] @ unit[i]).max()) for i in a}
        dropped = min(step, len(rest) - diverse, len(a))
        rest = sorted(a, key=lambda i: -nearest[i])[dropped:] + b
        if order == "score":
            rest.sort(key=ranked.index)
    return sorted(important + (rest if diverse else []))


@ORDERS
@pytest.mark.parametrize(
    ("grid", "count", "options"),
    [
        ((6, 6), 12, {}),
        ((6, 6), 31, {}),  # 15 important, 16 diverse of 21
        ((5, 5), 12, {}),  # 19 to thin, an odd number: ten in A
        ((15, 15), 40, {"important_ratio": 0.75}),
        ((27, 27), 96, {"step": 24}),
        ((6, 6), 3, {}),  # fewer diverse tokens than a round drops
        ((6, 6), 1, {}),
        ((6, 6), 20, {"important_ratio": 0.0, "step": 3}),
        ((6, 6), 35, {}),
        ((4, 4), 5, {"step": 100}),  # all of A in each round
    ],
)
def test_the_kept_set_is_that_of_the_rule_spelt_out(grid, count, options, order):
    image = features(m=2, grid=grid)
    out = build(num_keep=count, order=order, **options)(image)
    names = {"share": options.get("important_ratio", 0.5), "step": options.get("step", 8)}
    for i in range(2):
        assert out.keep[i].tolist() == naive(image.tokens[i], image.cls_attention[i], count, order=order, **names)
        assert torch.equal(out.tokens[i], image.tokens[i, out.keep[i]])
    assert out.grid is None


def test_by_hand():
    """Scores fall from left to right. Of six tokens to thin, those at even places are compared with the others."""
    angles = torch.tensor([0.0, 10.0, 90.0, 95.0, 200.0, 300.0, 310.0]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], -1)[None]
    image = ImageFeatures(tokens, None, cls_attention=torch.linspace(1, 0.4, 7)[None])
    # 0 is important. A = 10, 95, 300; B = 90, 200, 310: 95 is 5 degrees from 90, 300 is 10 from 310, 10 is 60 from 310.
    assert build(num_keep=5, important_ratio=0.2)(image).keep.tolist() == [[0, 1, 2, 4, 6]]
    # One at a time: 95 goes; then A = 10, 200, 310 and B = 90, 300, and 310 is the nearest, 10 degrees from 300.
    assert build(num_keep=5, important_ratio=0.2, step=1)(image).keep.tolist() == [[0, 1, 2, 4, 5]]


@ORDERS
def test_the_count_is_exact_at_every_size(order):
    for n in (1, 2, 3, 7, 10):
        image = features(m=2, grid=(1, n), dim=3)
        for count in range(1, n + 1):
            for share in (0.0, 0.3, 0.5, 0.99, 1.0):
                pruner = build(num_keep=count, important_ratio=share, order=order)
                out = pruner(image)
                assert out.tokens.shape[1] == count == pruner.num_tokens(n)
                places = torch.arange(n).expand(2, n) if out.keep is None else out.keep
                assert (places.diff(dim=1) > 0).all()
                best = image.cls_attention.topk(int(count * share), dim=1).indices
                assert all(set(b.tolist()) <= set(p.tolist()) for b, p in zip(best, places, strict=True))


@pytest.mark.parametrize("score", list(SCORES))
def test_without_a_diverse_part_it_is_fastervlm(score):
    image = features(m=3, grid=(5, 7))
    mine = build(num_keep=11, important_ratio=1.0, score=score)(image)
    other = build("fastervlm", num_keep=11, score=score)(image)
    assert torch.equal(mine.keep, other.keep) and torch.equal(mine.tokens, other.tokens)
    assert torch.equal(mine.rank, other.rank)


def test_where_a_layout_has_room_for_fewer_the_important_tokens_come_first():
    image = features(m=2, grid=(5, 7))
    out = build(num_keep=10)(image)
    for scores, keep, rank in zip(image.cls_attention, out.keep, out.rank, strict=True):
        chosen = keep[rank.argsort()]
        assert chosen[:5].tolist() == scores.topk(5).indices.tolist()
        assert (scores[chosen[5:]].diff() < 0).all()


def test_keeping_all_is_the_same_object():
    image = features(m=2)
    assert build(num_keep=16)(image) is image and build(num_keep=99)(image) is image
    assert build(keep_ratio=1.0)(image) is image


@ORDERS
def test_many_images_at_once_are_each_alone(order, monkeypatch):
    monkeypatch.setattr(vispruner, "ROWS", 3)
    image, pruner = features(m=7, grid=(9, 9), dim=32), build(num_keep=20, order=order)
    together = pruner(image)
    for i in range(7):
        assert torch.equal(pruner(image_row(image, i)).keep[0], together.keep[i])


def clustered(m=3, n=576, dim=48, seed=1):
    """Tokens around 32 centres, as encoders give them; scores as they come."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(32, dim, generator=g)[torch.randint(32, (m, n), generator=g)]
    return tokens + 0.5 * torch.randn(m, n, dim, generator=g), torch.rand(m, n, generator=g)


def test_rounding_changes_nothing_at_576_tokens_and_never_the_important_ones():
    tokens, scores = clustered()
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))

    def kept(tokens, order="score"):
        return build(num_keep=64, order=order)(ImageFeatures(tokens, (24, 24), cls_attention=scores)).keep

    assert torch.equal(kept(tokens), kept(tokens * (1 + 1e-7 * noise)))
    assert torch.equal(kept(tokens), kept(tokens.double()))
    best = scores.topk(32, dim=1).indices
    for order in ("score", "released"):
        before, after = kept(tokens, order), kept(tokens * (1 + 1e-2 * noise), order)
        assert not torch.equal(before, after)
        for found in (before, after):
            assert all(set(b.tolist()) <= set(f.tolist()) for b, f in zip(best, found, strict=True))


@ORDERS
def test_factors_of_features_and_the_scale_of_scores_do_not_matter(order):
    image, pruner = features(m=2, grid=(6, 6)), build(num_keep=12, order=order)
    keep = pruner(image).keep
    factors = 2.0 ** torch.randint(-3, 4, (2, 36, 1), generator=torch.Generator().manual_seed(3))
    scaled = ImageFeatures(image.tokens * factors, image.grid, cls_attention=image.cls_attention.log())
    assert torch.equal(pruner(scaled).keep, keep)


@ORDERS
def test_permuted_tokens_are_kept_wherever_they_are(order):
    image, pruner = features(m=1, grid=(6, 6)), build(num_keep=13, order=order)
    at = torch.randperm(36, generator=torch.Generator().manual_seed(4))
    moved = ImageFeatures(image.tokens[:, at], image.grid, cls_attention=image.cls_attention[:, at])
    assert set(at[pruner(moved).keep[0]].tolist()) == set(pruner(image).keep[0].tolist())


@ORDERS
def test_copies_go_before_all_that_is_less_alike(order):
    tokens = torch.randn(1, 24, 40, generator=torch.Generator().manual_seed(5))
    tokens[:, [6, 14, 22]] = tokens[:, [3, 9, 5]]  # one of each pair at an even place, the other at an odd one
    image = ImageFeatures(tokens, None, cls_attention=torch.linspace(1, 0.1, 24)[None])
    out = build(num_keep=21, important_ratio=0.0, order=order)(image)
    assert set(range(24)) - set(out.keep[0].tolist()) == {6, 14, 22}


def test_equal_tokens_and_equal_scores_go_from_the_front_of_the_list():
    image = ImageFeatures(torch.ones(2, 9, 4), (3, 3), cls_attention=torch.ones(2, 9))
    out = build(num_keep=6, important_ratio=0.34)(image)  # 0 and 1 kept; of 2..8 the first of even places: 2, 4, 6
    assert out.keep.tolist() == [[0, 1, 3, 5, 7, 8]] * 2


def test_a_feature_of_zeros_is_like_nothing_and_gives_no_nan():
    image = features(m=1, grid=(5, 5))
    image.tokens[0, [2, 9, 17]] = 0
    out = build(num_keep=9)(image)
    assert out.keep.shape == (1, 9) and out.tokens.isfinite().all()


def test_bf16_is_the_rule_on_the_rounded_features_and_autocast_changes_nothing():
    image, pruner = features(m=2, grid=(6, 6)), build(num_keep=12)
    tokens = image.tokens.bfloat16()
    low = ImageFeatures(tokens, image.grid, cls_attention=image.cls_attention)
    out = pruner(low)
    assert out.tokens.dtype == torch.bfloat16
    for i in range(2):
        assert out.keep[i].tolist() == naive(tokens[i], image.cls_attention[i], 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pruner(low).keep, out.keep)


def test_crops_and_frames_are_chosen_from_one_by_one():
    image = features(m=5, rows=(3, 2), row_kind="crop")
    image.cls_attention[0] *= 100
    out = build(num_keep=6)(image)
    assert out.tokens.shape == (5, 6, 24) and out.rows == (3, 2)
    assert out.keep[0].tolist() == naive(image.tokens[0], image.cls_attention[0], 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\], got 1.5"),
        ({"num_keep": -1}, "num_keep must not be negative"),
        ({"important_ratio": 1.1}, r"important_ratio must be in \[0, 1\], got 1.1"),
        ({"step": 0}, "step must be at least 1"),
        ({"score": "clss"}, "No score named 'clss'. Did you mean 'cls'"),
        ({"order": "release"}, "No order named 'release'. Did you mean 'released'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


def test_a_score_that_was_not_computed_is_an_error_that_names_it():
    with pytest.raises(ZooError, match="'vispruner' with score=cls needs cls_attention"):
        build()(ImageFeatures(torch.zeros(1, 16, 4), (4, 4)))
