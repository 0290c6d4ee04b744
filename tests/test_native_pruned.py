"""Pruners on images that keep their shapes: dropping a token is hiding it, with three axes and deep features."""

import pytest
import torch

from tests.conftest import QUESTIONS
from tests.qwen_builders import NATIVE, for_whole, picture, sharpen, slots, whole_of
from zoo.registry import ImageFeatures, ZooError
from zoo.registry.versions import cache_argument

SHOWN = [picture(40, 24, 1), picture(33, 90, 2), picture(8, 8, 3)]
TEXTS = [f"<image> {QUESTIONS[0]} <image> {QUESTIONS[1]}", f"{QUESTIONS[2]} <image> no", QUESTIONS[3]]
FIXED = {"do_sample": False, "pad_token_id": 0}
DROP = {
    "random": {},
    "fastervlm": {"score": "column_mean"},
    "vispruner": {"score": "column_mean"},
    "divprune": {},
    "holov": {"score": "column_mean", "shape": "run"},
}
MERGE = {
    "visionzip": {"score": "column_mean", "target_ratio": 0.3},
    "prumerge": {"score": "column_mean"},
}


def pruner_slot(name, **options):
    return {name: {"name": name, "keep_ratio": 0.4, **{**DROP, **MERGE}[name], **options}}


def made(make_model, family="qwen3_vl", pruner=None, positions="auto", **more):
    model, processor = make_model(positions=positions, **slots(family, pruner=pruner or {}, **more))
    sharpen(model)
    return model, processor


def hidden_in_whole(model, bare, bare_processor, out, side):
    """Logits of transformers' class over whole images, dropped tokens hidden, and which columns stay."""
    batch = bare_processor(images=SHOWN, text=TEXTS, padding_side=side)
    theirs = whole_of(bare, model_family(model))
    given = for_whole(batch, bare.image_token_id)
    positions = theirs.model.get_rope_index(**given)[0]
    rows = out.image_kept.in_order(lambda g: g.places)
    image = batch["input_ids"] == bare.image_token_id
    alive, at = [], 0
    for cut, places in zip(batch["cuts"], rows, strict=True):
        n = cut.patches[0] * cut.patches[1]
        alive.append(torch.zeros(n, dtype=torch.bool).scatter(0, places, True))
        at += n
    stays = torch.ones_like(image)
    stays[image] = torch.cat(alive)
    stays &= batch["attention_mask"].bool()
    given["attention_mask"] = stays.long()
    given.pop("mm_token_type_ids")
    return theirs(**given, position_ids=positions).logits, stays


def model_family(model):
    return model.config.slots["vision"]["model_type"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_dropping_is_hiding_in_the_whole_model(make_model, family, side):
    model, processor = made(make_model, family, pruner_slot("fastervlm"))
    bare, whole_processor = made(make_model, family)
    bare.load_state_dict(model.state_dict())
    batch = processor(images=SHOWN, text=TEXTS, padding_side=side)
    out = model(**batch)
    wanted, stays = hidden_in_whole(model, bare, whole_processor, out, side)
    mask = batch["attention_mask"].bool()
    got, wanted = out.logits[mask], wanted[stays]
    assert got.shape == wanted.shape and len(got) < int(bare_tokens(whole_processor))
    assert (got - wanted).abs().max() <= 3e-6 * max(1.0, float(wanted.abs().max()))
    dense, _ = made(make_model, family, pruner_slot("fastervlm"), positions="dense")
    assert (dense(**batch).logits[mask] - got).abs().max() > 1e-2


def bare_tokens(processor):
    return processor(images=SHOWN, text=TEXTS)["attention_mask"].sum()


@pytest.mark.parametrize("name", DROP)
@torch.no_grad()
def test_every_pruner_that_drops_equals_hiding(make_model, name):
    model, processor = made(make_model, "qwen3_vl", pruner_slot(name))
    bare, whole_processor = made(make_model, "qwen3_vl")
    batch = processor(images=SHOWN, text=TEXTS)
    out = model(**batch)
    wanted, stays = hidden_in_whole(model, bare, whole_processor, out, "right")
    got, wanted = out.logits[batch["attention_mask"].bool()], wanted[stays]
    assert (got - wanted).abs().max() <= 3e-6 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("name", [*DROP, *MERGE])
@torch.no_grad()
def test_counts_are_those_of_the_prompt_and_a_row_is_the_row_alone(make_model, name):
    model, processor = made(make_model, "qwen3_vl", pruner_slot(name))
    g = torch.Generator().manual_seed(0)
    sizes = [tuple(torch.randint(1, 70, (2,), generator=g).tolist()) for _ in range(12)]
    shown = [picture(w, h, i) for i, (w, h) in enumerate(sizes)]
    many = processor(images=shown, text=["<image> a"] * len(shown))
    out = model(**many)
    counts = [model.layout.count(c) for c in many["cuts"]]
    assert ((many["input_ids"] == model.image_token_id).sum(1)).tolist() == counts and len(set(counts)) > 3
    for i, image in enumerate(shown):
        one = model(**processor(images=image, text="<image> a")).logits[0]
        row = out.logits[i][many["attention_mask"][i].bool()]
        assert (row - one).abs().max() <= 2e-5 * max(1.0, float(one.abs().max()))
    twice = model.generate(
        **processor(images=shown[:3], text=["<image> a"] * 3, padding_side="left"), **FIXED, max_new_tokens=3
    )
    assert twice.shape[0] == 3


@torch.no_grad()
def test_keeping_all_is_no_pruner_to_the_bit(make_model):
    bare, processor = made(make_model, "qwen3_vl")
    batch = processor(images=SHOWN, text=TEXTS)
    for name in DROP:
        model, _ = made(make_model, "qwen3_vl", pruner_slot(name, keep_ratio=1.0))
        assert torch.equal(model(**batch).logits, bare(**batch).logits)


@pytest.mark.parametrize("name", MERGE)
def test_deep_features_are_merged_by_the_weights_of_the_tokens(name):
    """Maps equal to the tokens stay equal to them."""
    from tests.fusion_builders import features
    from zoo import registry

    node = pruner_slot(name)[name]
    image = features(3, (5, 6))
    part = registry.build("pruner", node, vision_dim=24, vision_depth=4, grid=None, num_tokens=30).eval()
    left = part(ImageFeatures(**{**vars(image), "deep": (image.tokens, 2 * image.tokens)}))
    assert left.tokens.shape[1] == part.num_tokens(30) < 30
    torch.testing.assert_close(left.deep[0], left.tokens, atol=0, rtol=0)
    torch.testing.assert_close(left.deep[1], 2 * left.tokens, atol=1e-5, rtol=1e-5)


# ---- inside the LLM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layer"),
    [("qwen2_vl", 2), ("qwen2_5_vl", 1), *(("qwen3_vl", i) for i in (1, 2, 3)), *(("qwen3_vl_moe", i) for i in (1, 3))],
)
@torch.no_grad()
def test_deep_features_follow_the_tokens_left_inside(make_model, family, layer):
    fastv = {"fastv": {"name": "fastv", "layer": layer, "keep_ratio": 0.5}}
    found = []
    for hide in (False, True):
        model, processor = made(make_model, family, fastv)
        model.pruner["fastv"].dropper.hide = hide
        batch = processor(images=SHOWN, text=TEXTS, padding_side="left")
        out = model(**batch)
        beams = model.generate(**batch, **FIXED, max_new_tokens=6, min_new_tokens=6, num_beams=2)
        found.append((out.logits[:, -1], beams, model.pruner["fastv"].kept(out.passed)))
    (dropped, first, kept), (hidden, second, same) = found
    assert (dropped - hidden).abs().max() <= 2e-5 * max(1.0, float(hidden.abs().max()))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(kept, same, strict=True)) and kept[-1].sum() < kept[0].sum()


@torch.no_grad()
def test_a_pruner_ahead_and_one_inside_and_a_second_turn(make_model):
    fastv = {"fastv": {"name": "fastv", "layer": 2, "keep_ratio": 0.5}}
    model, processor = made(make_model, "qwen3_vl", {**pruner_slot("fastervlm"), **fastv})
    batch = processor(images=SHOWN[:2], text=TEXTS[0])
    out = model(**batch, use_cache=True)
    new = out.logits[:, -1:].argmax(-1)
    wanted = model.generate(**batch, **FIXED, max_new_tokens=2, min_new_tokens=2)
    step = model(new, **cache_argument(out.cache), use_cache=True)
    assert torch.equal(wanted[:, -2:], torch.cat([new, step.logits[:, -1:].argmax(-1)], 1))


def test_dense_places_inside_are_refused(make_model):
    fastv = {"fastv": {"name": "fastv", "layer": 1, "keep_ratio": 0.5}}
    model, processor = made(make_model, "qwen2_vl", fastv, positions="dense")
    with pytest.raises(ZooError, match="whose positions have 3 axes"):
        model(**processor(images=SHOWN, text=TEXTS))


@torch.no_grad()
def test_images_that_are_encoded_ahead_of_their_question_draw_as_in_the_pass(make_model):
    """The features alone are there until the question is known; what was drawn by pixels is drawn by them still."""
    asks = {"name": "cdpruner", "keep_ratio": 0.5, "relevance": "embeddings"}
    pruners = {"random": {"name": "random", "keep_ratio": 0.5}, "cdpruner": asks}
    model, processor = make_model(**slots("qwen2_vl", pruner=pruners))
    batch = processor(images=[picture(40, 24, 0), picture(24, 48, 1)], text=["<image> a b", "<image> c"])
    encoded = model.encode_images(batch["pixel_values"], batch["cuts"])
    assert encoded.kept is None and encoded.tokens is None
    given = {name: value for name, value in batch.items() if name != "pixel_values"}
    assert torch.equal(model(**given, encoded=encoded).image_tokens, model(**batch).image_tokens)
