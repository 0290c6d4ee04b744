"""VisionZip and DivPrune against naive twins in double precision; what random draws by."""

from dataclasses import replace

import pytest
import torch

from tests.fusion_builders import features
from zoo import registry
from zoo.composed import behind
from zoo.composed.image_path import checksum_of
from zoo.fusion.pruners.divprune import farthest
from zoo.registry import Cut, ZooError


def build(name, **options):
    return registry.build("pruner", {"name": name, **options}, num_tokens=24).eval()


def image_of(m=3, **given):
    image = features(m=m, grid=(4, 6), **given)
    return replace(image, prefix=torch.randn(m, 1, 24, generator=torch.Generator().manual_seed(5)))


def zipped(image, kept, targets, cls):
    """One image: VisionZip with loops, (tokens, groups)."""
    tokens, keys = image.tokens[0].double(), image.keys[0].double().mean(1)
    scores = image.cls_attention[0].tolist()
    n = len(tokens)
    dominant = sorted(sorted(range(n), key=lambda j: -scores[j])[:kept])
    rest = [j for j in range(n) if j not in dominant]
    chosen = [rest[i] for i in range(0, len(rest), len(rest) // targets)][:targets]
    groups = [-1] * n
    for at, j in enumerate(dominant):
        groups[j] = cls + at
    sums, counts = [torch.zeros(24, dtype=torch.float64) for _ in chosen], [0] * targets
    for j in rest:
        if j in chosen:
            groups[j] = cls + kept + chosen.index(j)
            continue
        alike = [float(keys[j] @ keys[c] / keys[j].norm() / keys[c].norm()) for c in chosen]
        best = alike.index(max(alike))
        groups[j], counts[best] = cls + kept + best, counts[best] + 1
        sums[best] = sums[best] + tokens[j]
    merged = [tokens[c] + s / max(1, k) for c, s, k in zip(chosen, sums, counts, strict=True)]
    front = [image.prefix[0, 0].double()] if cls else []
    return torch.stack([*front, *(tokens[j] for j in dominant), *merged]), groups


@pytest.mark.parametrize("seed", range(3))
def test_visionzip_is_its_formula(seed):
    image = image_of(m=1, seed=seed)
    out = build("visionzip", dominant=5, targets=3)(image)
    tokens, groups = zipped(image, 5, 3, 1)
    torch.testing.assert_close(out.tokens[0].double(), tokens, atol=1e-6, rtol=1e-6)
    assert out.groups[0].tolist() == groups and out.keep is None


def test_visionzip_gradients_are_those_of_the_formula():
    image = image_of(m=1)
    weight = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    grads = []
    for run in (lambda i: build("visionzip", dominant=5, targets=3)(i).tokens[0], lambda i: zipped(i, 5, 3, 1)[0]):
        tokens = image.tokens.clone().requires_grad_()
        (run(replace(image, tokens=tokens)) * weight).sum().backward()
        grads.append(tokens.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "n", "counts"),
    [
        ({"dominant": 191, "targets": 30}, 576, (191, 30, 1)),
        ({"keep_ratio": 1 / 3}, 576, (161, 30, 1)),
        ({"keep_ratio": 1 / 9}, 576, (53, 10, 1)),
        ({"keep_ratio": 1 / 9, "score": "column_mean"}, 576, (54, 10, 0)),
        ({"keep_ratio": 0.1}, 24, (1, 0, 1)),
        ({"keep_ratio": 0.01}, 24, (1, 0, 0)),
        ({"keep_ratio": 0.5, "target_ratio": 0.99}, 24, (1, 10, 1)),
        ({"keep_ratio": 1.0}, 24, (24, 0, 0)),
        ({"dominant": 99}, 24, (24, 0, 0)),
    ],
)
def test_visionzip_counts(options, n, counts):
    pruner = build("visionzip", **options)
    assert pruner.counts(n) == counts and pruner.num_tokens(n) == sum(counts)


def test_visionzip_without_cls_ranks_by_column_means():
    pruner = build("visionzip", score="column_mean", keep_ratio=0.5)
    assert pruner.needs == {"key_attention", "keys"}
    image = replace(image_of(), cls_attention=None, prefix=None)
    out = pruner(image)
    assert out.tokens.shape == (3, 12, 24)
    first = image.key_attention[0].topk(10).indices.sort().values
    assert torch.equal(out.tokens[0, :10], image.tokens[0, first])


@pytest.mark.parametrize("before", ["random", "pool"])
def test_groups_reach_back_to_the_encoders_grid(before):
    image = image_of(m=2)
    half = {"keep_ratio": 0.5} if before == "random" else {}
    first = registry.build("pruner", {"name": before, **half}, grid=(4, 6))(image)
    out = build("visionzip", keep_ratio=0.5)(first)
    alone = build("visionzip", keep_ratio=0.5)(replace(first, keep=None, groups=None)).groups
    assert out.groups.shape == (2, 24)
    for i in range(2):
        for patch in range(24):
            if before == "random":
                at = first.keep[i].tolist().index(patch) if patch in first.keep[i] else None
            else:
                at = int(first.groups[i, patch])
            assert int(out.groups[i, patch]) == (-1 if at is None else int(alone[i, at]))


def test_visionzip_options_that_cannot_be_are_refused():
    for options, message in [
        ({"target_ratio": 1.0}, r"target_ratio must be in \[0, 1\), got 1.0"),
        ({"targets": 3}, "targets needs dominant"),
        ({"score": "probe"}, "No score named 'probe'"),
    ]:
        with pytest.raises(ZooError, match=message):
            build("visionzip", **options)
    with pytest.raises(ZooError, match="with score=cls needs cls_attention, keys, prefix_tokens"):
        build("visionzip")(replace(image_of(), keys=None))


def spread(tokens, k):
    """One image: the greedy choice with all distances, in double precision."""
    x = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
    distance = 1 - x @ x.T
    chosen = []
    while len(chosen) < k:
        if chosen:
            worth = [min(float(distance[j, c]) for c in chosen) for j in range(len(x))]
        else:
            worth = [min(float(distance[j, i]) for i in range(len(x)) if i != j) for j in range(len(x))]
        chosen.append(max((j for j in range(len(x)) if j not in chosen), key=lambda j: worth[j]))
    return chosen


@pytest.mark.parametrize("k", [1, 2, 7, 24])
def test_divprune_is_its_greedy_choice(k, monkeypatch):
    monkeypatch.setattr("zoo.fusion.pruners.divprune.BLOCK", 5)
    tokens = image_of().tokens
    assert farthest(tokens, k).tolist() == [spread(t, k) for t in tokens]


def test_divprune_takes_no_duplicate_while_there_is_something_else():
    tokens = torch.eye(4).repeat(1, 3, 1)  # (1, 12, 4): four directions, three times each
    out = build("divprune", keep_ratio=1 / 3)(replace(image_of(m=1), tokens=tokens))
    assert sorted((out.keep[0] % 4).tolist()) == [0, 1, 2, 3]
    assert (out.keep.diff(dim=1) > 0).all()


def test_divprune_looks_at_directions_alone():
    image = image_of()
    scaled = image.tokens * torch.rand(3, 24, 1, generator=torch.Generator().manual_seed(2)).add(0.5)
    assert torch.equal(build("divprune")(image).keep, build("divprune")(replace(image, tokens=scaled)).keep)


# ---- random ------------------------------------------------------------------------------------------------------


def drawn(pixels, **options):
    """Which tokens of 24 are kept of rows of pixels."""
    image = features(m=len(pixels), grid=(4, 6), checksum=checksum_of(pixels))
    rows = options.pop("rows", None)
    return build("random", **options)(replace(image, rows=rows)).keep


def test_each_image_draws_its_own_subset_the_same_in_every_batch():
    pixels = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = drawn(pixels)
    assert torch.equal(drawn(pixels[7:9]), kept[7:9])
    assert len({tuple(row) for row in kept.tolist()}) > 390
    share = torch.bincount(kept.flatten(), minlength=24) / 400  # each with 6 / 24, standard error 0.022
    assert (share - 0.25).abs().max() < 0.08
    assert not torch.equal(drawn(pixels, seed=1), kept)
    half = drawn(pixels, keep_ratio=0.5)
    assert all(set(few) <= set(many) for few, many in zip(kept.tolist(), half.tolist(), strict=True))


def test_frames_of_a_still_draw_unlike_and_alone_as_in_a_batch():
    still = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).expand(3, -1, -1, -1)
    kept = drawn(torch.cat([still, still]), rows=(3, 3))
    assert torch.equal(kept[:3], kept[3:]) and len({tuple(row) for row in kept.tolist()}) == 3
    fixed = build("random", draw="fixed")(features(m=3, grid=(4, 6), checksum=torch.arange(3))).keep
    assert torch.equal(fixed[:1].expand(3, -1), fixed)
    assert torch.equal(build("random")(features(m=3, grid=(4, 6))).keep, fixed)  # without pixels


def test_a_model_draws_by_pixels_and_one_from_before_as_it_did(make_model, tmp_path):
    import json

    from tests.conftest import picture
    from zoo.composed.model import ZooModel

    model, processor = make_model(pruner={"random": {"name": "random"}})
    pixels = torch.stack([processor.prepare([picture(i)])[0] for i in range(4)])
    kept = model.encode_images(pixels).kept.keep
    assert len({tuple(row) for row in kept.tolist()}) == 4
    assert torch.equal(model.encode_images(pixels[2:3]).kept.keep, kept[2:3])
    model.save_pretrained(tmp_path)
    assert torch.equal(ZooModel.from_pretrained(tmp_path).encode_images(pixels).kept.keep, kept)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["positions"]
    content["slots"]["pruner"]["random"].pop("draw", None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    before = ZooModel.from_pretrained(tmp_path).encode_images(pixels).kept.keep
    assert torch.equal(before, build("random", draw="fixed")(features(m=4, grid=(4, 4))).keep)


FIELDS = {"cls_attention": "cls_attention", "key_attention": "key_attention", "pooling_head": "pooling_attention"}
FIELDS |= {"keys": "keys", "text_tower": "patch_embeds", "next_block": "next_attention"}  # of capabilities
MORE = {"cdpruner": {"relevance": "none", "similarity": "encoder"}, "hiprune": {"object_layer": 1}}
MORE |= {"vscan": {"shallow_layer": 1, "llm_ratio": 1.0}}
READ_DATA = {"prumerge", "vscan", "visionzip"}  # which patches are left is read from scores


def described(m=2):
    """All that an encoder may give, as if another pruner had been ahead."""
    image, draw = image_of(m=m), torch.Generator().manual_seed(6)
    scores = image.key_attention.flip(1)
    vectors = torch.randn(m, 24, 8, generator=draw)
    known = {"pooling_attention": scores, "next_attention": scores, "next_keys": vectors, "patch_embeds": vectors}
    first = image.take_best(torch.arange(24).expand(m, -1)).rank
    words = {f"{word}@1": scores for word in ("cls_attention", "key_attention")}
    return replace(image, **known, rank=first, block_attention=words)


def any_pruner(name, **options):
    node = {"name": name, **MORE.get(name, {}), **options}
    return registry.build("pruner", node, grid=(4, 6), num_tokens=24, vision_dim=24, vision_depth=4).eval()


@pytest.mark.parametrize("name", registry.names("pruner"))
def test_what_is_known_of_tokens_is_of_those_left(name):
    """A capability that a pruner does not destroy is one of as many tokens as it leaves; others are gone."""
    image, pruner = described(), any_pruner(name)
    left = pruner(image)
    count = left.tokens.shape[1]
    assert count == pruner.num_tokens(24)
    for field in (*FIELDS.values(), "next_keys", "rank", "keep"):
        if (value := getattr(left, field)) is not None:
            assert value.shape[:2] == (2, count), field
    assert all(scores.shape == (2, count) for scores in left.block_attention.values())
    for word, field in FIELDS.items():
        assert (getattr(left, field) is None) <= (word in pruner.destroys), word


@pytest.mark.parametrize("name", registry.names("pruner"))
def test_autocast_changes_no_choice(name):
    """Tokens that are nearly alike, as those of one thing in a picture are, and of one place in a film."""
    image, draw = described(m=4), torch.Generator().manual_seed(7)
    things = torch.randn(3, 24, generator=draw)[torch.randint(3, (24,), generator=draw)]
    tokens = things + 0.02 * torch.randn(4, 24, 24, generator=draw)
    film = {"rows": (4,), "cuts": (Cut(4, "frame"),), "row_kind": "frame"}
    image = replace(image, tokens=tokens, projected=tokens, keys=tokens.unsqueeze(2), next_keys=tokens, **film)
    pruner = any_pruner(name, **{"evs": {"reference": "last_kept"}, "fastvid": {"keep_ratio": 0.5}}.get(name, {}))
    with torch.no_grad():
        wanted = behind.run(pruner, image)
        with torch.autocast("cpu", torch.bfloat16):
            got = behind.run(pruner, image)
    for field in ("tokens", "keep", "groups", "valid", "rank"):
        mine, other = getattr(got, field), getattr(wanted, field)
        assert (mine is None) is (other is None) and (mine is None or torch.equal(mine, other)), field


@pytest.mark.parametrize("name", sorted({*registry.names("pruner")} - READ_DATA))
def test_shapes_are_known_without_data(name):
    image, pruner = described(), any_pruner(name)
    empty = {k: v.to("meta") for k, v in vars(image).items() if isinstance(v, torch.Tensor)}
    blocks = {word: scores.to("meta") for word, scores in image.block_attention.items()}
    assert pruner(replace(image, **empty, block_attention=blocks)).tokens.shape[1] == pruner.num_tokens(24)
