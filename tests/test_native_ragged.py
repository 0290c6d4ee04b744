"""Pruners of grids, of whole videos and of a number that depends on the image, where images keep their shapes."""

import pytest
import torch

from tests.qwen_builders import NATIVE, encoder, patches, picture, sharpen, slots
from zoo import registry
from zoo.registry import Cut, ImageFeatures, ZooError
from zoo.registry.versions import cache_argument

ROWS = [  # the images of each sequence
    [Cut(4, "frame", patches=(3, 2), interval=1.0)],
    [Cut(patches=(3, 5)), Cut(patches=(1, 4))],
    [Cut(3, "frame", patches=(2, 2), interval=1.0), Cut(patches=(3, 2))],
]
CUTS = [cut for row in ROWS for cut in row]
FIXED = {"do_sample": False, "pad_token_id": 0}
DROP = {  # what only drops
    "hiprune": {"keep_ratio": 0.4, "object_layer": 2, "alpha": 1.0},
    "hiprune image": {"keep_ratio": 0.4, "object_layer": 2, "alpha": 1.0, "budget": "image"},
    "holov": {"keep_ratio": 0.4, "score": "column_mean", "shape": "grid"},
    "holov image": {"num_keep": 9, "score": "column_mean", "shape": "grid", "budget": "image"},
    "prumerge": {"score": "column_mean", "neighbours": 0, "extra": False},
    "vscan": {"keep_ratio": 0.5, "score": "column_mean", "shallow_layer": 2, "merge": "none", "llm_ratio": 1.0},
    "evs": {"keep_ratio": 0.4},
    "dycoke": {"keep_ratio": 0.5},
    "dycoke released": {"k": 0.5, "order": "released"},
    "fastvid": {"keep_ratio": 0.5, "context_ratio": 0.0},
}
MERGE = {
    "pool": {"stride": 2},
    "aim": {"merge_ratio": 0.5, "prune": False},
    "prumerge": {"score": "column_mean", "neighbours": 2},
    "vscan": {"keep_ratio": 0.5, "score": "column_mean", "shallow_layer": 2, "llm_ratio": 1.0},
    "fastvid": {"keep_ratio": 0.6, "context_ratio": 0.6, "stride": 2, "scenes": 2},
}


def node(case, table):
    name = case.split()[0]
    return {name: {"name": name, **table[case]}}


def made(make_model, family, pruner=None, **more):
    model, _ = make_model(**slots(family, pruner=pruner or {}), **more)
    sharpen(model)
    return model


def batch_of(model, rows=ROWS, left=False, seed=0):
    """Sequences of text and images without a processor: one number for a token, padded on a side."""
    ids = []
    for i, cuts in enumerate(rows):
        ids.append([7 + i])
        for cut in cuts:
            ids[-1] += [model.image_token_id] * model.layout.count(cut) + [11, 12 + i]
    longest = max(map(len, ids))
    pad = [[0] * (longest - len(row)) for row in ids]
    mask = [
        ([0] * len(p) + [1] * len(r)) if left else ([1] * len(r) + [0] * len(p)) for p, r in zip(pad, ids, strict=True)
    ]
    ids = [p + r if left else r + p for p, r in zip(pad, ids, strict=True)]
    cuts = [cut for row in rows for cut in row]
    grids = [cut.patches for cut in cuts for _ in range(cut.rows)]
    shown = patches(model.vision, grids, seed)
    return {
        "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "pixel_values": shown, "cuts": cuts,
        "images_per_row": [len(row) for row in rows],
    }  # fmt: skip


def stays_of(out):
    """Which tokens of the whole images a pruner left: (S,) bool."""
    groups = out.image_kept
    valid = groups.in_order(lambda g: g.tokens.new_ones(g.tokens.shape[:2]).bool() if g.valid is None else g.valid)
    places, at, found = groups.in_order(lambda g: g.places), 0, []
    for cut in groups.cuts:
        for _ in range(cut.rows):
            n = cut.patches[0] * cut.patches[1]
            found.append(torch.zeros(n, dtype=torch.bool).scatter(0, places[at], valid[at]))
            at += 1
    return torch.cat(found)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("case", DROP)
@torch.no_grad()
def test_dropping_is_hiding(make_model, case, left):
    for family in NATIVE if case in ("hiprune", "evs") else ["qwen3_vl"]:
        model, bare = made(make_model, family, node(case, DROP)), made(make_model, family)
        bare.load_state_dict(model.state_dict())
        out, whole = model(**batch_of(model, left=left)), batch_of(bare, left=left)
        image, mask = whole["input_ids"] == bare.image_token_id, whole["attention_mask"].bool()
        stays = mask.clone()
        stays[image] = stays_of(out)
        columns = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = bare(**{**whole, "attention_mask": stays.long(), "position_ids": columns}).logits[stays]
        got = out.logits[out.passed.sequence.attention_mask.bool()]
        assert got.shape == wanted.shape and int((~stays & mask).sum()) > 0
        assert (got - wanted).abs().max() <= 3e-6 * max(1.0, float(wanted.abs().max())), family


@pytest.mark.parametrize("case", [*DROP, *(f"{name} merging" for name in MERGE)])
@torch.no_grad()
def test_a_row_is_the_row_alone_and_a_cache_goes_on(make_model, case):
    table = {f"{name} merging": options for name, options in MERGE.items()} | DROP
    model = made(make_model, "qwen3_vl", node(case, table))
    many = batch_of(model, left=True)
    answers = model.generate(**many, **FIXED, max_new_tokens=4, min_new_tokens=4)
    at = 0
    for i, row in enumerate(ROWS):
        one = batch_of(model, [row])
        own = sum(cut.rows * cut.patches[0] * cut.patches[1] * 4 for cut in row)
        one["pixel_values"] = many["pixel_values"][at : at + own]
        one["input_ids"] = many["input_ids"][i][many["attention_mask"][i].bool()][None]
        at += own
        alone = model.generate(**one, **FIXED, max_new_tokens=4, min_new_tokens=4)
        assert torch.equal(alone[0, -4:], answers[i, -4:])
        step, ids = model(**one, use_cache=True), []
        for _ in range(4):
            ids.append(step.logits[:, -1:].argmax(-1))
            step = model(ids[-1], **cache_argument(step.cache), use_cache=True)
        assert torch.equal(torch.cat(ids, 1), alone[:, -4:])
    beams = model.generate(**many, **FIXED, max_new_tokens=3, num_beams=2)
    assert beams.shape[0] == len(ROWS)


@torch.no_grad()
def test_counts_are_those_that_the_methods_state(make_model):
    model = made(make_model, "qwen3_vl", node("evs", DROP))
    passed = model(**batch_of(model)).passed.sequence.image_mask.sum(1).tolist()
    assert passed == [9, 15 + 4, 4 + 6]  # max(P, int(T P r)) of videos, images whole
    model = made(make_model, "qwen3_vl", node("holov image", DROP))
    passed = model(**batch_of(model)).passed.sequence.image_mask.sum(1).tolist()
    assert passed == [9, 9 + 4, 9 + 6]  # of an image, all rows together
    model = made(make_model, "qwen3_vl", node("pool", MERGE))
    counts = [model.layout.count(cut) for cut in CUTS]
    assert counts == [4 * 2, 2 * 3, 1 * 2, 3 * 1, 2 * 1] and model.num_image_tokens == 4 * 4


@torch.no_grad()
def test_pooled_tokens_are_means_of_windows_with_the_place_of_a_middle_one(make_model):
    model, bare = made(make_model, "qwen3_vl", node("pool", MERGE)), made(make_model, "qwen3_vl")
    cut = Cut(patches=(3, 5))
    one = batch_of(model, [[cut]])
    encoded = model.encode_images(one["pixel_values"], [cut])
    plain = bare.encode_images(one["pixel_values"], [cut])
    for pooled, whole in zip((encoded.tokens, *encoded.deep), (plain.tokens, *plain.deep), strict=True):
        maps = whole.T.unflatten(1, (3, 5))[None]
        wanted = torch.nn.functional.adaptive_avg_pool2d(maps, (2, 3))[0].flatten(1).T
        torch.testing.assert_close(pooled, wanted)
    axes = model(**one).passed.sequence.axes[:, 0]
    first = axes[:, 1] - 1 * 0
    assert (
        (axes[0, 1:7] == 1).all()
        and (axes[1:, 1:7] >= 1).all()
        and axes[1, 1:7].tolist() == sorted(axes[1, 1:7].tolist())
    )
    assert first[0] == 1 and axes[0, 7] == 1 + 5  # text goes on behind the longer side of the whole grid


@pytest.mark.parametrize("case", ["aim", "vscan", "fastvid"])
def test_features_for_further_layers_are_merged_by_the_weights_of_the_tokens(case):
    from tests.fusion_builders import features

    name, options = case, MERGE[case]
    image = features(4, (3, 4))
    score = torch.rand(4, 12).softmax(1)
    known = {**vars(image), "deep": (image.tokens, 2 * image.tokens), "key_attention": score}
    known |= {"block_attention": {"key_attention@2": score.flip(1)}, "row_kind": "frame", "rows": (4,)}
    part = registry.build("pruner", {"name": name, **options}, vision_dim=24, vision_depth=4, grid=None, num_tokens=12)
    left = part.eval()(ImageFeatures(**known))
    stays = torch.ones(left.tokens.shape[:2]).bool() if left.valid is None else left.valid
    assert stays.sum() < 48 and not torch.equal(left.tokens, image.tokens)
    torch.testing.assert_close(left.deep[0][stays], left.tokens[stays], atol=0, rtol=0)
    torch.testing.assert_close(left.deep[1][stays], 2 * left.tokens[stays], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_of_a_middle_block_is_that_of_whole_rows_or_refused():
    vision, grids = encoder("qwen2_5_vl"), [(2, 3), (3, 2)]  # whole rows in blocks 2 and 4
    pixels = patches(vision, grids)
    both = vision(pixels, grids=grids, need=frozenset({"key_attention", "key_attention@2", "key_attention@4"}))
    for group in both.groups:
        assert torch.equal(group.block_attention["key_attention@4"], group.key_attention)
        assert not torch.allclose(group.block_attention["key_attention@2"], group.key_attention)
        torch.testing.assert_close(group.block_attention["key_attention@2"].sum(1), torch.ones(len(group.tokens)))
    with pytest.raises(ZooError, match=r"does not provide \['key_attention@1'\]"):
        vision(pixels, grids=grids, need=frozenset({"key_attention@1"}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"pruner": node("hiprune", {"hiprune": {"object_layer": 3}})},
            "block 3 attends inside of windows, not to whole images as blocks 2, 4",
        ),
        ({"pruner": {"downsample": {"name": "downsample"}}}, r"vision\.max_pixels makes them smaller"),
        ({"pruner": {"visionzip": {"name": "visionzip"}}}, "it has no .CLS."),
        ({"projector": {"name": "pool"}}, "is made for one grid"),
        ({"pruner": node("evs", DROP), "positions": "dense"}, "positions=kept"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(make_model, changed, message):
    positions = changed.pop("positions", "auto") if "positions" in changed else "auto"
    with pytest.raises(ZooError, match=message):
        make_model(positions=positions, **slots("qwen2_5_vl", **changed))


@torch.no_grad()
def test_the_processor_counts_and_an_inspection_shows(make_model):
    from zoo.inspection.xray import look

    for case in ("pool", "evs", "vscan"):
        model, processor = make_model(**slots("qwen3_vl", pruner=node(case, MERGE if case == "pool" else DROP)))
        sharpen(model)
        view, _ = look(model, processor, picture(40, 24), "is it red?")
        kept = {t for t in view.layers[0] if t >= 0}
        assert view.grid == (3, 5) and len(view.layers[0]) == 15 and view.tokens[0] == len(kept), case


def test_every_pruner_goes_with_it_but_those_that_the_page_names():
    """The table of docs/concepts/native.md; `score=column_mean` where there is a choice."""
    from zoo.checking.checker import check
    from zoo.checking.plan import Plan

    refused = {}
    for name in registry.names("pruner"):
        scored = (
            {"score": "column_mean"}
            if "column_mean" in registry.get("pruner", name).cls.choices.get("score", ())
            else {}
        )
        try:
            check(
                Plan({"adapter": {}, **slots("qwen3_vl", pruner={name: {"name": name, **scored}})}, vocab_size=512),
                fixes=0,
            )
        except ZooError as error:
            refused[name] = str(error)
    assert set(refused) == {"downsample", "cdpruner"}, refused
    assert "vision.max_pixels" in refused["downsample"] and "no text tower was trained with it" in refused["cdpruner"]
