"""`downsample` and `frames`, the controls in front of the encoder, in composed and published models."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import zoo
from tests import published_builders as build
from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from tests.fusion_builders import same_state
from tests.published_builders import said
from tests.test_published_families import FAMILIES, SIZES, film  # noqa: F401 (a fixture)
from tests.train_builders import config, losses, recipe, train_up_to
from zoo import registry
from zoo.benches.flops import count_flops
from zoo.checking.checker import check
from zoo.checking.plan import Plan
from zoo.composed.assembly import assemble
from zoo.fusion.pruners.topk import count_kept
from zoo.registry import Encoder, ImageFeatures, ImageTransform, Pruner, ZooError
from zoo.training.loop import Run
from zoo.training.loop import main as train

SHAPES = [*SIZES, (96, 96), (64, 64), (31, 33), (300, 200)]


def node(name, **options):
    return {name: {"name": name, **options}}


def chosen(grid, keep_ratio, rounding="below", tokens=lambda grid, kept=0: kept or math.prod(grid)):
    pruner = registry.build("pruner", {"name": "downsample", "keep_ratio": keep_ratio, "rounding": rounding})
    return pruner.encoder_grid(grid, tokens)


# ---- which grid ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 8, 16, 24, 27, 32])
@pytest.mark.parametrize("keep", [0.01, 0.04, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.999])
def test_the_grid_is_the_largest_square_within_what_a_pruner_leaves(side, keep):
    (h, w), most = chosen((side, side), keep), count_kept(side**2, keep)
    assert h == w and h * w <= most < (h + 1) ** 2


@pytest.mark.parametrize(("keep", "side"), [(0.5, 17), (1 / 3, 14), (0.25, 12), (2 / 9, 11), (1 / 9, 8), (1e-4, 1)])
def test_the_nearest_grid_may_have_a_few_patches_more(keep, side):
    assert chosen((24, 24), keep, "nearest") == (side, side)


def test_a_grid_keeps_its_proportions_and_is_one_that_parts_behind_it_take():
    assert chosen((8, 16), 0.25) == (4, 8) and chosen((16, 4), 0.25) == (8, 2)
    even = lambda grid, kept=0: None if kept or grid[0] % 4 else math.prod(grid) // 16  # noqa: E731  pixel shuffle
    assert chosen((32, 32), 0.5, tokens=even) == (20, 20) and chosen((32, 32), 0.5, "nearest", even) == (20, 20)
    newlines = lambda grid, kept=0: kept + 1 if kept else math.prod(grid) + grid[0]  # noqa: E731  of each line
    assert chosen((24, 24), 0.25, tokens=newlines) == (11, 11)
    assert chosen((24, 24), 0.25, tokens=lambda grid, kept=0: None) == (12, 12)  # refused later, with the reason


def test_options_that_cannot_be_are_refused():
    for options, words in (({"keep_ratio": 0}, "keep_ratio must be in"), ({"rounding": "near"}, "'near'")):
        with pytest.raises(ZooError, match=words):
            registry.build("pruner", {"name": "downsample", **options})
    with pytest.raises(ZooError, match="keep_ratio must be in"):
        registry.build("pruner", {"name": "frames", "keep_ratio": 1.5})
    for name in ("downsample", "frames"):
        with pytest.raises(ZooError, match=f"'{name}' acts in front of the encoder: it needs a composed model"):
            zoo.pruner(name, grid=(4, 4))


# ---- one model -----------------------------------------------------------------------------------------------------


def batch_of(processor, side="right"):
    rows = [sample((QUESTIONS[i], ANSWERS[i]), images=n, seed=3 * i) for i, n in enumerate((2, 1, 1))]
    return processor.collate([processor.encode(row) for row in rows], padding_side=side), rows


def given(batch):
    return {k: v for k, v in batch.items() if k not in ("labels", "position_ids")}


@torch.no_grad()
def test_keeping_all_changes_no_bit(make_model):
    model, processor = make_model(pruner=node("downsample", keep_ratio=1.0))
    plain, own = make_model()
    batch, wanted = batch_of(processor)[0], batch_of(own)[0]
    assert batch.keys() == wanted.keys()
    assert all(torch.equal(v, wanted[k]) for k, v in batch.items() if isinstance(v, torch.Tensor))
    assert torch.equal(model(**batch).logits, plain(**wanted).logits)


@torch.no_grad()
def test_every_count_follows_from_the_smaller_grid(make_model):
    model, processor = make_model(pruner=node("downsample"))
    plain, _ = make_model()
    assert (model.vision.grid, model.vision.own_size, processor.transform.size) == ((2, 2), (32, 32), (16, 16))
    assert model.num_image_tokens == processor.num_image_tokens == 4
    assert [(s.kind, s.tokens) for s in model.steps][:3] == [("vision", 16), ("pruner", 4), ("projector", 4)]
    weights = plain.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    small, large = (
        count_flops(lambda m=m: m.vision(torch.zeros(1, 3, *m.vision.transform.size))) for m in (model, plain)
    )
    assert small < 0.3 * large  # (1 + 4) of (1 + 16) tokens
    for side in ("left", "right"):
        batch, rows = batch_of(processor, side)
        out = model(**given(batch), all_logits=True)
        assert out.image.tokens.shape == (4, 4, 32) and out.image.grid == (2, 2)
        for i, row in enumerate(rows):
            alone = model(**given(processor.collate([processor.encode(row)])), all_logits=True).logits[0]
            torch.testing.assert_close(out.logits[i][batch["attention_mask"][i].bool()], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("behind", ["random", "divprune", "pool", "fastv"])
def test_another_pruner_counts_what_it_leaves(make_model, behind):
    options = {"layer": 1} if behind == "fastv" else {}
    both = node(behind, **options) | node("downsample", keep_ratio=0.6)  # in front, wherever it is named
    model, processor = make_model(pruner=both)
    side = 2 if behind == "pool" else 3  # 3 x 3 pooled are as many as 4 x 4 pooled, more than 0.6 of them
    assert model.vision.grid == (side, side) and next(iter(model.pruner)) == "downsample"
    left = {"pool": 1, "fastv": 9}.get(behind, count_kept(9, 0.25))
    assert model.num_image_tokens == left
    batch, rows = batch_of(processor)
    out = model(**given(batch), all_logits=True)
    alone = model(**given(processor.collate([processor.encode(rows[0])])), all_logits=True).logits[0]
    if behind != "fastv":  # which drops columns of padding and text alike
        torch.testing.assert_close(out.logits[0][batch["attention_mask"][0].bool()], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("names", [("downsample", "frames"), ("frames", "downsample")])
def test_several_in_front_of_the_encoder_count_what_it_makes(names):
    both = {name: {"name": name} for name in names}
    report = check(Plan(tiny_slots(pruner=both), vocab_size=400))
    assert [(r.kind, r.tokens) for r in report.rows[:3]] == [("vision", 16), ("pruner", 4), ("pruner", 4)]


def test_a_checkerboard_becomes_even_grey_and_the_same_file_the_same_pixels(make_model):
    _, processor = make_model(pruner=node("downsample"))
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    first, again = (processor.prepare([np.stack([board] * 3, -1)])[0] for _ in range(2))
    assert first.shape == (3, 16, 16) and torch.equal(first, again)
    assert float(first[:, 1:-1, 1:-1].std()) < 0.01 and abs(float(first.mean())) < 0.02  # 0 is grey


def test_it_trains(make_model):
    model, processor = make_model(pruner=node("downsample"))
    model.train().requires_grad_(True)
    model(**batch_of(processor)[0]).loss.backward()
    assert model.vision.tower.pos_embed.grad.abs().sum() > 0


def test_adapters_take_the_smaller_grid():
    vlora = {"name": "vlora", "rank": 4, "skip": 1, "width": 16, "depth": 2, "num_heads": 2}
    slots = tiny_slots(pruner=node("downsample"), projector=None, adapter={"vlora": vlora})
    with torch.device("meta"):
        parts = assemble(slots, vocab_size=300)
    assert parts.vision.grid == (2, 2) and parts.num_image_tokens == 0


def test_the_check_prints_what_is_left():
    report = check(Plan(tiny_slots(pruner=node("downsample")), vocab_size=400))
    assert [(r.kind, r.tokens, r.grid) for r in report.rows[:2]] == [("vision", 16, (4, 4)), ("pruner", 4, (2, 2))]
    assert report.num_image_tokens == 4


# ---- refused -------------------------------------------------------------------------------------------------------


@dataclass
class PlainConfig:
    size: int = 8


class Plain(Encoder, nn.Module):
    """An encoder of one patch size whose author wrote no `resize`."""

    provides = frozenset({"grid"})

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.hidden_size, self.grid, self.num_tokens = 4, (4, 4), 16
        self.transform = ImageTransform((32, 32), (0.5,) * 3, (0.5,) * 3)
        self.net = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, pixel_values, *, need=frozenset()):
        x = self.net(pixel_values)
        return ImageFeatures(x.flatten(2).transpose(1, 2), tuple(x.shape[2:]))


class AnySize(Plain):
    def resize(self, grid):
        self.grid, self.num_tokens = grid, math.prod(grid)
        self.transform = ImageTransform((8 * grid[0], 8 * grid[1]), (0.5,) * 3, (0.5,) * 3)


@dataclass
class HalfConfig:
    more: int = 0  # patches beyond half of each side


class Half(Pruner, nn.Module):
    """A pruner of a plug-in that acts in front of the encoder."""

    front = True

    def __init__(self, config: HalfConfig, *, grid: tuple[int, int], num_tokens: int) -> None:
        super().__init__()
        self.more, self.built_for = config.more, (grid, num_tokens)

    def encoder_grid(self, grid, tokens):
        assert tokens(grid) == 16 and tokens((2, 2)) == 4 and tokens(grid, kept=5) == 5
        return grid[0] // 2 + self.more, grid[1] // 2 + self.more

    def num_tokens(self, n):
        return n

    def forward(self, image):
        return image


@pytest.fixture
def plugged(monkeypatch):
    entries = registry.table._entries
    for kind, classes in (("vision", {"plain": Plain, "any_size": AnySize}), ("pruner", {"halved": Half})):
        monkeypatch.setitem(entries, kind, dict(entries[kind]))
        for name, cls in classes.items():
            registry.register(kind, name)(cls)


def test_parts_of_plugins_have_the_hooks_too(plugged, make_model):
    with pytest.raises(
        ZooError,
        match=r"'downsample' needs smaller images, and vision 'plain' cannot: it takes images of one size only",
    ):
        check(Plan(tiny_slots(vision={"name": "plain"}, pruner=node("downsample")), vocab_size=400), fixes=0)
    with pytest.raises(ZooError, match=r"'halved' asks for a grid \[6, 6\], and that of the encoder is \[4, 4\]"):
        make_model(pruner=node("halved", more=4))
    for vision in ({"name": "any_size"}, tiny_slots()["vision"]):
        model, processor = make_model(vision=vision, pruner=node("halved"))
        assert model.pruner["halved"].built_for == ((4, 4), 16) and model.num_image_tokens == 4
        check(Plan(tiny_slots(vision=vision, pruner=node("halved")), vocab_size=400))
        with torch.no_grad():
            assert model(**batch_of(processor)[0]).logits.isfinite().all()


# ---- published models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, folder, model and processor as published, and with the control."""
    folder = tmp_path_factory.mktemp("published") / request.param
    getattr(build, request.param)(folder)
    words = ["pruner=[downsample]", "pruner.downsample.keep_ratio=0.3"]
    return request.param, folder, zoo.load(f"dir:{folder}"), zoo.load(f"dir:{folder}", *words)


def asked(processor, size, text="hi"):
    return processor(images=[build.photo(*size)], text=f"{processor.image_token} {text}")


def shown(model, batch):
    return int(model._placeholders(batch["input_ids"]).sum())


@torch.no_grad()
def test_images_of_a_family_are_cut_as_before_and_each_crop_is_smaller(family):
    _, _, (full, own), (model, processor) = family
    assert model.vision.grid == (2, 2) and model.num_image_tokens <= 0.3 * full.num_image_tokens + 1
    for size in SHAPES:
        before, after = asked(own, size), asked(processor, size)
        assert after["pixel_values"].shape[-2:] == (16, 16)
        assert [(c.rows, c.grid, c.size) for c in before.get("cuts", [])] == [
            (c.rows, c.grid, c.size) for c in after.get("cuts", [])
        ]
        assert shown(model, after) <= 0.35 * shown(full, before)
        assert model(**after).logits.isfinite().all()


@torch.no_grad()
def test_a_batch_of_unlike_images_is_each_of_them_alone_and_answers_are(family):
    _, _, _, (model, processor) = family
    processor.tokenizer.padding_side = "left"
    texts = [processor.apply_chat_template(said(1, q), add_generation_prompt=True) for q in ("yes", "no blue two red")]
    images = [[build.photo(*size, seed=i)] for i, size in enumerate(SIZES[:2])]
    batch = processor(images=images, text=texts)
    options = {"max_new_tokens": 6, "do_sample": False}
    logits, ids = model(**batch).logits, model.generate(**batch, **options)
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        one = processor(images=[image], text=text)
        torch.testing.assert_close(
            logits[i][batch["attention_mask"][i].bool()], model(**one).logits[0], atol=2e-5, rtol=1e-4
        )
        answer = model.generate(**one, **options)[0, one["input_ids"].shape[1] :]
        assert torch.equal(ids[i, batch["input_ids"].shape[1] :][: len(answer)], answer)


@torch.no_grad()
def test_saved_it_loads_to_the_same_answers_and_without_the_control_to_the_whole_model(family, tmp_path):
    _, _, (full, own), (model, processor) = family
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 100  # no weight changed
    again, theirs = zoo.load(f"dir:{tmp_path}")
    alone = zoo.ZooProcessor.from_pretrained(tmp_path)
    for size in SHAPES[:3]:
        batch, wanted = asked(theirs, size), asked(processor, size)
        assert torch.equal(again(**batch).logits, model(**wanted).logits)
        assert torch.equal(asked(alone, size)["pixel_values"], wanted["pixel_values"])
    options = {"image": build.photo(40, 90), "max_new_tokens": 6}
    assert again.chat("yes no?", **options) == model.chat("yes no?", **options)
    whole, large = zoo.load(f"dir:{tmp_path}", "pruner=null")
    batch, wanted = asked(large, (40, 90)), asked(own, (40, 90))
    assert torch.equal(whole(**batch).logits, full(**wanted).logits)


def test_frames_of_a_video_are_smaller_or_fewer(family, film):  # noqa: F811
    name, folder, (full, own), (model, processor) = family
    if name in ("idefics3", "llava", "llava_next"):
        pytest.skip(f"{name} has no videos")
    video = film[0]  # five frames of twenty
    fewer, fewer_of = zoo.load(f"dir:{folder}", "pruner=[frames]", "pruner.frames.keep_ratio=0.4")
    before, small, few = (p(videos=[video], text=f"{p.video_token} hi") for p in (own, processor, fewer_of))
    assert [len(b["pixel_values"]) for b in (before, small, few)] == [5, 5, 2]
    assert torch.equal(few["pixel_values"], before["pixel_values"][[0, 2]])
    assert small["pixel_values"].shape[-2:] == (16, 16)
    counts = [shown(m, b) for m, b in ((full, before), (model, small), (fewer, few))]
    newline = name == "llava_onevision"  # at the end of a video
    assert counts[2] - newline == 2 * (counts[0] - newline) / 5 and counts[1] < 0.4 * counts[0]
    with torch.no_grad():
        for m, batch in ((model, small), (fewer, few)):
            assert m(**batch).logits.isfinite().all()
    assert torch.equal(asked(fewer_of, (40, 90))["input_ids"], asked(own, (40, 90))["input_ids"])  # images are whole


@torch.no_grad()
def test_an_adapter_that_learned_on_whole_images_reads_smaller_ones(make_model, tmp_path):
    vlora = {"name": "vlora", "rank": 4, "skip": 1, "width": 16, "depth": 2, "num_heads": 2}
    model, processor = make_model(projector=None, adapter={"vlora": vlora})
    for parameter in model.adapter["vlora"].parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    small, own = zoo.load(f"dir:{tmp_path}", "pruner=[downsample]", device="cpu")
    assert small.vision.grid == (2, 2) and not small.fresh_parts
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in small.state_dict().items())
    rows = [sample((QUESTIONS[0], ANSWERS[0]), seed=i) for i in range(2)]
    batch = own.collate([own.encode(row) for row in rows])
    both = small(**given(batch), all_logits=True).logits
    for i, row in enumerate(rows):
        alone = small(**given(own.collate([own.encode(row)])), all_logits=True).logits
        torch.testing.assert_close(both[i], alone[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-4)  # the image is read


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_and_loads(tmp_path):
    words = recipe(tmp_path, {"main": "steps: 4, batch_size: 4, checkpoint_every: 2"})
    place, more = (
        {name: tmp_path / name for name in ("whole", "stopped")},
        ["pruner=[downsample]", "data.scenes.scenes=8"],
    )
    train(config(words, *more, f"run.folder={place['whole']}"))
    run = Run(config(words, *more, f"run.folder={place['stopped']}"))
    train_up_to(run)
    run.close()
    train(config(words, f"resume={place['stopped']}"))
    assert losses(place["whole"]) == losses(place["stopped"])
    weights = [load_file(folder / "model" / "model.safetensors") for folder in place.values()]
    assert same_state(*weights) and weights[0]["vision.tower.pos_embed"].shape[1] == 16  # of the whole image
    model, processor = zoo.load(f"dir:{place['whole']}", device="cpu")
    assert model.vision.grid == (2, 2) and processor.transform.size == (16, 16)
    assert isinstance(model.chat("what color?", image=build.photo(40, 60), max_new_tokens=3), str)
