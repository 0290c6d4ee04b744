"""HiPrune against its rule, spelt out one token at a time, and what must hold at any size."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import tiny_slots
from tests.fusion_builders import features, image_row
from tests.vision_builders import SIZED, pixels, shake
from zoo import registry
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.composed.assembly import assemble
from zoo.registry import ImageFeatures, ZooError

EDGES = pytest.mark.parametrize("edges", ["grid", "released"])
WORD = "key_attention@1"


def build(name="hiprune", **options):
    given = {"object_layer": 1} if name == "hiprune" else {}
    return registry.build("pruner", {"name": name, **given, **options}).eval()


def naive(middle, deep, grid, count, alpha=0.1, edges="grid"):
    """Places kept, in lists: the rule as the paper and its code have it, with fewer anchors until the union fits."""
    (h, w), n = grid, grid[0] * grid[1]
    best = sorted(range(n), key=lambda j: -float(middle[j]))
    for anchors in range(round(count * alpha / 5), -1, -1):
        union = set()
        for i in best[:anchors]:
            if edges == "released":
                union |= {i} | {min(max(j, 0), n - 1) for j in (i - 1, i + 1, i - w, i + w)}
            else:
                r, c = divmod(i, w)
                near = ((r, c), (r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c))
                union |= {y * w + x for y, x in near if 0 <= y < h and 0 <= x < w}
        if len(union) <= count:
            break
    rest = sorted((j for j in range(n) if j not in union), key=lambda j: -float(deep[j]))
    return sorted(union | set(rest[: count - len(union)]))


@EDGES
@pytest.mark.parametrize(
    ("grid", "count", "alpha"),
    [
        ((24, 24), 192, 0.1),  # 4 anchors, as released for LLaVA-1.5
        ((24, 24), 64, 0.1),  # 1 anchor
        ((24, 24), 25, 0.1),  # round(0.5) is 0: registers alone
        ((6, 6), 20, 1.0),
        ((5, 7), 20, 0.6),  # more columns than rows
        ((7, 5), 34, 1.0),
        ((4, 4), 8, 1.0),  # two anchors, whose union may be too large
        ((4, 4), 3, 1.0),  # one anchor and its neighbours never fit
        ((1, 9), 5, 1.0),  # one row
        ((9, 1), 5, 1.0),
    ],
)
def test_the_kept_set_is_that_of_the_rule_spelt_out(grid, count, alpha, edges):
    image = features(m=4, grid=grid)
    out = build(num_keep=count, alpha=alpha, edges=edges)(image)
    assert out.tokens.shape[1] == count and out.grid is None
    for i in range(4):
        want = naive(image.block_attention[WORD][i], image.key_attention[i], grid, count, alpha, edges)
        assert out.keep[i].tolist() == want
        assert torch.equal(out.tokens[i], image.tokens[i, out.keep[i]])
        assert torch.equal(out.block_attention[WORD][i], image.block_attention[WORD][i, out.keep[i]])


def placed(grid, middle, deep):
    n = grid[0] * grid[1]
    scores = [torch.zeros(1, n), torch.zeros(1, n)]
    for row, order in zip(scores, (middle, deep), strict=True):
        for place, patch in enumerate(order):
            row[0, patch] = n - place
    return ImageFeatures(torch.randn(1, n, 3), grid, key_attention=scores[1], block_attention={WORD: scores[0]})


def test_by_hand():
    """The anchor is the first patch of the second row of a 3 x 4 grid: 4, with 0 above, 5 beside and 8 below."""
    image = placed((3, 4), [4], [11, 10])
    assert build(num_keep=5, alpha=1.0)(image).keep.tolist() == [[0, 4, 5, 8, 11]]
    assert build(num_keep=5, alpha=1.0, edges="released")(image).keep.tolist() == [[0, 3, 4, 5, 8]]  # 3 ends row one
    corner = placed((3, 4), [2], [11, 10, 9])  # top row: the release adds patch 0
    assert build(num_keep=5, alpha=1.0)(corner).keep.tolist() == [[1, 2, 3, 6, 11]]
    assert build(num_keep=5, alpha=1.0, edges="released")(corner).keep.tolist() == [[0, 1, 2, 3, 6]]


def test_without_anchors_it_is_fastervlm_by_column_means():
    image = features(m=3, grid=(6, 6))
    for count in (1, 7, 20, 35):
        mine = build(num_keep=count, alpha=0.0)(image)
        other = build("fastervlm", num_keep=count, score="column_mean")(image)
        assert torch.equal(mine.keep, other.keep) and torch.equal(mine.rank, other.rank)
    assert build(alpha=0.0).needs == {"key_attention"}


@EDGES
def test_the_count_is_exact_and_the_best_of_the_object_block_stay(edges):
    for grid in ((1, 1), (1, 7), (3, 3), (4, 6)):
        n = grid[0] * grid[1]
        image = features(m=2, grid=grid, dim=3)
        for count in range(1, n + 1):
            for alpha in (0.0, 0.1, 0.5, 1.0):
                pruner = build(num_keep=count, alpha=alpha, edges=edges)
                out, anchors = pruner(image), round(count * alpha / 5)
                assert out.tokens.shape[1] == count == pruner.num_tokens(n)
                keep = torch.arange(n).expand(2, n) if out.keep is None else out.keep
                assert (keep.diff(dim=1) > 0).all()
                if 5 * anchors <= count:
                    best = image.block_attention[WORD].topk(anchors, dim=1).indices
                    assert all(set(b.tolist()) <= set(k.tolist()) for b, k in zip(best, keep, strict=True))


def test_a_mirrored_image_gives_the_mirrored_set_unless_neighbours_wrap():
    same = {"grid": True, "released": True}
    for seed in range(8):
        image = features(m=3, grid=(5, 6), seed=seed)
        at = torch.arange(30).view(5, 6).flip(1).flatten()
        mirrored = replace(
            image,
            tokens=image.tokens[:, at],
            key_attention=image.key_attention[:, at],
            block_attention={WORD: image.block_attention[WORD][:, at]},
        )
        for edges in same:
            pruner = build(num_keep=15, alpha=1.0, edges=edges)
            kept = zip(pruner(image).keep, pruner(mirrored).keep, strict=True)
            same[edges] &= all(set(a.tolist()) == set(at[b].tolist()) for a, b in kept)
    assert same == {"grid": True, "released": False}


@EDGES
def test_constants_change_nothing_and_object_scores_count_by_their_best_alone(edges):
    image, pruner = features(m=3, grid=(6, 6)), build(num_keep=20, alpha=1.0, edges=edges)
    keep, middle = pruner(image).keep, image.block_attention[WORD]
    best = middle.topk(4, dim=1).indices
    lower = torch.rand(3, 36).scatter(1, best, 2 + middle.gather(1, best))
    for scores, deep in ((middle + 1, image.key_attention), (middle, image.key_attention + 1), (lower, None)):
        deep = image.key_attention if deep is None else deep
        assert torch.equal(pruner(replace(image, key_attention=deep, block_attention={WORD: scores})).keep, keep)


def test_equal_scores_go_from_the_front():
    image = ImageFeatures(
        torch.ones(2, 9, 4), (3, 3), key_attention=torch.ones(2, 9), block_attention={WORD: torch.ones(2, 9)}
    )
    assert build(num_keep=5, alpha=1.0)(image).keep.tolist() == [[0, 1, 2, 3, 4]] * 2  # 0 with 1 and 3, then 2, 4


@EDGES
def test_a_batch_is_each_image_alone_and_low_precision_changes_no_choice(edges):
    image, pruner = features(m=16, grid=(9, 9)), build(num_keep=30, alpha=1.0, edges=edges)
    together = pruner(image)
    for i in range(16):
        assert torch.equal(pruner(image_row(image, i)).keep[0], together.keep[i])
    with torch.autocast("cpu", torch.bfloat16):
        low = pruner(replace(image, tokens=image.tokens.bfloat16()))
    assert torch.equal(low.keep, together.keep) and low.tokens.dtype == torch.bfloat16


def test_where_a_layout_has_room_for_fewer_the_anchors_come_first():
    image = features(m=2, grid=(8, 8))
    out = build(num_keep=30, alpha=0.7)(image)  # four anchors
    for scores, keep, rank in zip(image.block_attention[WORD], out.keep, out.rank, strict=True):
        chosen = keep[rank.argsort()].tolist()
        assert chosen[0] == int(scores.argmax()) and set(scores.topk(4).indices.tolist()) <= set(chosen[:20])


def test_keeping_all_is_the_same_object():
    image = features(m=2)
    assert build(num_keep=16)(image) is image and build(keep_ratio=1.0)(image) is image


@pytest.mark.parametrize(("depth", "block"), [(24, 9), (12, 4), (27, 10), (32, 12), (2, 1), (1, 1)])
def test_the_object_block_follows_from_the_depth(depth, block):
    pruner = registry.build("pruner", {"name": "hiprune"}, vision_depth=depth)
    assert pruner.needs == {"key_attention", "grid", f"key_attention@{block}"}
    assert build(object_layer=7).word == "key_attention@7"


def tower_plan(**options):
    slots = tiny_slots(vision={**SIZED["hf_siglip"], "depth": 6}, pruner={"hiprune": options})
    return Plan(slots, vocab_size=360)


@pytest.mark.fixes
@pytest.mark.parametrize(
    ("layer", "reason"),
    [(7, "runs 5 blocks of its 6: key_attention@1 to key_attention@5"), (6, "needs key_attention@6")],
)
def test_blocks_that_do_not_run_are_refused_with_a_fix(layer, reason):
    with pytest.raises(RefusedError, match=reason) as refusal:
        check(tower_plan(object_layer=layer), fixes=3)
    assert "pruner.hiprune.object_layer=0" in refusal.value.fixes


@EDGES
def test_an_encoder_without_cls_gives_what_it_needs(edges):
    assert check(tower_plan(keep_ratio=0.5, edges=edges), fixes=0).num_image_tokens == 8
    torch.manual_seed(0)
    parts = assemble(tower_plan(num_keep=8, alpha=1.0, edges=edges).slots, vocab_size=360)
    tower, pruner = shake(parts.vision), parts.pruner["hiprune"]
    assert parts.requested == {"key_attention", "key_attention@2"}
    image = tower(pixels(3), need=parts.requested)
    for i, keep in enumerate(pruner(image).keep):
        middle, deep = image.block_attention["key_attention@2"][i], image.key_attention[i]
        assert keep.tolist() == naive(middle, deep, (4, 4), 8, 1.0, edges)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\], got 1.5"),
        ({"num_keep": -1}, "num_keep must not be negative"),
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\], got 1.1"),
        ({"object_layer": -2}, "object_layer must not be negative"),
        ({"object_layer": 0}, "object_layer=0 needs the encoder's depth"),
        ({"edges": "gird"}, "No edges named 'gird'. Did you mean 'grid'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


def test_what_was_not_computed_is_an_error_that_names_it():
    image = features(m=1, grid=(6, 6))
    with pytest.raises(ZooError, match="needs key_attention"):
        build()(replace(image, key_attention=None))
    with pytest.raises(ZooError, match="needs the grid and key_attention@1"):
        build(num_keep=30, alpha=1.0)(replace(image, block_attention={}))
