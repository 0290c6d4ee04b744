"""Several encoders at once: features, joins, pixels, scores, what trains, what is saved."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import zoo
from tests import saved_builders, vision_builders
from tests.conftest import ANSWERS, QUESTIONS, sample
from zoo.registry import ZooError, build
from zoo.vision.images.transform import split_row, to_pixels

A = {"name": "hf", "model_type": "siglip", "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
B = {"name": "timm", "image_size": 48, "patch_size": 16, "width": 48, "depth": 2, "heads": 3, "layer": -1}
C = {"name": "hf", "model_type": "dinov2", "image_size": 28, "patch_size": 7, "width": 24, "depth": 2, "heads": 2}
LLM = ("llm=hf", "llm.hidden_size=32", "llm.num_layers=2", "llm.num_heads=2", "device=cpu")


def fused(encoders, **options):
    return vision_builders.shake(build("vision", {"name": "fused", "encoders": encoders, **options}))


def photo(size=(50, 40), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def rows(encoder, m=2):
    return torch.stack([to_pixels(photo(seed=i), encoder.transform) for i in range(m)])


def words(encoders, *more):
    listed = json.dumps(encoders).replace('"', "")
    return ["vision=fused", f"vision.encoders={listed}", "projector=mlp", *LLM, *more]


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_one_decoded_image_gives_each_encoder_its_own_transform(monkeypatch):
    from zoo.vision.images import transform as module

    decoded = []
    monkeypatch.setattr(module, "open_image", lambda *a, real=module.open_image: decoded.append(1) or real(*a))
    encoder = fused({"a": A, "b": B, "c": C}, grid="b")
    row = to_pixels(photo(), encoder.transform)
    assert len(decoded) == 1
    assert row.shape == encoder.transform.shape == (3 * (32 * 32 + 48 * 48 + 28 * 28),)
    for name, pixels in encoder.split(row[None]).items():
        assert torch.equal(pixels[0], to_pixels(photo(), encoder.encoders[name].transform))
    assert split_row(row, encoder.transform)[0].shape == (3, 48, 48), "the encoder whose grid is kept comes first"


def test_a_processor_of_several_encoders_is_saved_and_read(tmp_path):
    model, processor = zoo.compose(*words({"a": A, "b": B}), texts=QUESTIONS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, again = zoo.load(f"dir:{tmp_path}", device="cpu")
    assert again.transform == processor.transform == model.vision.transform
    from transformers import AutoProcessor

    assert AutoProcessor.from_pretrained(tmp_path).transform == processor.transform
    one, other = (p(images=photo(), text=p.image_token)["pixel_values"] for p in (processor, again))
    assert torch.equal(one, other)


def test_pixels_of_one_encoder_are_refused():
    with pytest.raises(ZooError, match=r"Rows of pixels for 2 encoders have the shape \[9984\].*got \[3, 32, 32\]"):
        fused({"a": A, "b": B})(torch.zeros(1, 3, 32, 32))


# ---- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["a", "b"])
def test_features_are_those_of_each_encoder_alone_joined_by_hand(kept):
    encoder = fused({"a": A, "b": B}, grid=kept)
    pixels = rows(encoder)
    out = encoder(pixels)
    alone = {n: e(encoder.split(pixels)[n]) for n, e in encoder.members.items()}
    h, w = alone[kept].grid
    by_hand = []
    for f in alone.values():
        flat = f.tokens.transpose(1, 2).reshape(2, -1, *f.grid)
        if f.grid != (h, w):
            flat = F.interpolate(flat, (h, w), mode="bilinear", antialias=True)
        by_hand.append(flat.flatten(2).transpose(1, 2))
    assert torch.equal(out.tokens, torch.cat(by_hand, -1))
    at = 0 if kept == "a" else 32
    assert torch.equal(out.tokens[..., at : at + alone[kept].tokens.shape[-1]], alone[kept].tokens)
    assert out.grid == encoder.grid == (h, w)
    assert encoder.num_tokens == h * w and encoder.hidden_size == 80


def test_two_of_one_component_with_equal_grids_are_concatenated():
    encoder = fused({"sem": A, "dino": C})
    pixels = rows(encoder)
    one, two = (encoder.encoders[n](x).tokens for n, x in encoder.split(pixels).items())
    assert torch.equal(encoder(pixels).tokens, torch.cat([one, two], -1))


def test_joined_by_tokens_each_keeps_its_own_channels():
    encoder = fused({"a": A, "b": B}, join="tokens")
    pixels = rows(encoder)
    out = encoder(pixels)
    a, b = (encoder.encoders[n](x).tokens for n, x in encoder.split(pixels).items())
    assert out.tokens.shape == (2, 32, 80) and encoder.num_tokens == 32 and out.grid is None
    assert torch.equal(out.tokens[:, :16, :32], a) and not out.tokens[:, :16, 32:].any()
    assert not out.tokens[:, 16:, :32].any() and b.shape == (2, 9, 48)
    assert "grid" not in encoder.provides and "keys" in encoder.lacks


def test_gradients_are_those_of_the_naive_twin():
    encoder = fused({"a": A, "b": B}).train()
    pixels, target = rows(encoder), torch.randn(2, 16, 80, generator=torch.Generator().manual_seed(3))
    (encoder(pixels).tokens * target).sum().backward()
    found = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    a, b = (encoder.encoders[n](x).tokens for n, x in encoder.split(pixels).items())
    b = F.interpolate(b.transpose(1, 2).reshape(2, 48, 3, 3), (4, 4), mode="bilinear", antialias=True)
    (torch.cat([a, b.flatten(2).transpose(1, 2)], -1) * target).sum().backward()
    assert found and all(torch.equal(g, dict(encoder.named_parameters())[n].grad) for n, g in found.items())


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_comes_from_one_encoder_and_only_it_computes_it():
    encoder = fused({"a": A, "b": B})
    assert encoder.givers["key_attention"] == "a" and encoder.givers["cls_attention"] == "b"
    pixels = rows(encoder)
    need = frozenset({"key_attention", "cls_attention", "prefix_tokens", "key_attention@1"})
    out = encoder(pixels, need=need)
    split = encoder.split(pixels)
    a, b = (
        encoder.encoders["a"](split["a"], need=frozenset({"key_attention"})),
        encoder.encoders["b"](split["b"], need=frozenset({"cls_attention", "prefix_tokens"})),
    )
    assert torch.equal(out.key_attention, a.key_attention)
    assert out.cls_attention.shape == (2, 16)
    assert torch.allclose(out.cls_attention.sum(1), b.cls_attention.sum(1), atol=1e-6), "resampled, the sum is kept"
    assert torch.equal(out.prefix[..., 32:], b.prefix) and not out.prefix[..., :32].any()
    assert out.block_attention.keys() == {"key_attention@1"}
    chosen = fused({"a": A, "b": B}, gives={"key_attention": "b"}, grid="b")
    assert torch.equal(
        chosen(rows(chosen), need=frozenset({"key_attention"})).key_attention,
        chosen.encoders["b"](chosen.split(rows(chosen))["b"], need=frozenset({"key_attention"})).key_attention,
    )


def test_a_pruner_keeps_the_tokens_that_it_keeps_with_the_encoder_alone():
    several = fused({"a": B, "b": A})
    alone, split = several.encoders["a"], several.split(rows(several))
    pruner = build("pruner", {"name": "fastervlm", "keep_ratio": 0.5}, vision_dim=80, num_tokens=9, grid=(3, 3))
    need = frozenset(pruner.needs)
    kept = pruner(several(rows(several), need=need)).keep
    assert torch.equal(kept, pruner(alone(split["a"], need=need)).keep)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": {"a": A}}, "encoders names 1, and at least two are joined"),
        (
            {"encoders": {"a": A, "second": {"width": 32}}},
            "'second' has no component. Write vision.encoders.second.name=",
        ),
        ({"encoders": {"dino": A, "b": B, "dinp": {"width": 32}}}, "'dinp' has no component. Did you mean 'dino'"),
        ({"encoders": {"a": A, "b": {"name": "hff"}}}, "Did you mean 'hf'"),
        ({"encoders": {"a": A, "b": {**B, "dept": 2}}}, "encoder 'b': .*Did you mean 'depth'"),
        ({"encoders": {"a": A, "b": {**B, "width": 50}}}, "encoder 'b'"),
        ({"encoders": {"a": A, "b": {"name": "fused", "encoders": {"c": A, "d": B}}}}, "itself of several"),
        ({"encoders": {"a": A, "b": B}, "join": "channel"}, "Did you mean 'channels'"),
        ({"encoders": {"a": A, "b": B}, "grid": "c"}, r"No encoder \(of which the grid is kept\) named 'c'"),
        ({"encoders": {"a": A, "b": B}, "gives": {"cls": "a"}}, "Did you mean 'cls_attention'"),
        ({"encoders": {"a": A, "b": B}, "gives": {"cls_attention": "a"}}, "'a' does not provide it; 'b' would"),
        ({"encoders": {"a": A, "my b": B}}, "a word of letters"),
        ({"encoders": {"a": A, "keys": B}}, "encoder 'keys': every torch module has an attribute"),
    ],
)
def test_what_cannot_be_joined_is_refused(options, message):
    with pytest.raises(ZooError, match=message):
        build("vision", {"name": "fused", **options})


def test_the_check_shows_what_does_not_fit_before_weights():
    with pytest.raises(ZooError, match=r"needs grid, but vision 'fused' does not give it: with join=tokens"):
        zoo.compose(*words({"a": A, "b": B}, "vision.join=tokens"), "projector=pool", texts=QUESTIONS)
    with pytest.raises(ZooError, match=r"needs pooling_head, summary.*vision.encoders.a.summary=true"):
        zoo.compose(*words({"a": A, "b": B}), "pruner=fastvid", "pruner.fastvid.summary=head", texts=QUESTIONS)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return saved_builders.checkpoints(tmp_path_factory.mktemp("fused"))


def composed(places, *more):
    a = {"name": "hf", "checkpoint": str(places / "hf")}
    b = {"name": "timm", "checkpoint": str(places / "timm")}
    parts = [f"llm.checkpoint={places / 'llm'}", "llm=hf", "projector=linear", "device=cpu"]
    return zoo.compose("vision=fused", f"vision.encoders={{a: {_flow(a)}, b: {_flow(b)}}}", *parts, *more)


def _flow(node):
    return "{" + ", ".join(f"{k}: '{v}'" for k, v in node.items()) + "}"


@pytest.mark.parametrize("train", [["projector"], ["vision.b"], ["vision"]])
def test_each_encoder_is_saved_thin_against_its_own_checkpoint(places, tmp_path, train):
    model, processor = composed(places)
    assert model.config.base.keys() == {"vision.a", "vision.b", "llm"}
    model.set_trainable(train)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * p.requires_grad)
    names = saved_builders.saved(model, tmp_path)
    processor.save_pretrained(tmp_path)
    trained = {n for n, p in model.named_parameters() if p.requires_grad} | {
        n for n in names if n.startswith("projector")
    }
    assert names == trained
    for again in (zoo.load(f"dir:{tmp_path}", device="cpu")[0], zoo.ZooModel.from_pretrained(tmp_path)):
        assert torch.equal(saved_builders.answers(again, processor), saved_builders.answers(model, processor))
        assert list(again.vision.encoders) == ["a", "b"]


def test_a_whole_folder_is_read_by_itself(places, tmp_path):
    model, processor = zoo.compose(*words({"z": A, "b": B}), texts=QUESTIONS)
    assert saved_builders.saved(model, tmp_path) == set(model.state_dict())
    processor.save_pretrained(tmp_path)
    again, _ = zoo.load(f"dir:{tmp_path}", device="cpu")
    assert list(again.vision.encoders) == ["z", "b"], "the order of channels is kept"
    assert again.config.slots["vision"]["encoders"]["z"]["mlp_ratio"] == 4.0, "defaults are written out"
    assert torch.equal(saved_builders.answers(again, processor), saved_builders.answers(model, processor))


def test_training_changes_the_encoder_that_trains_alone():
    model, processor = zoo.compose(*words({"a": A, "b": B}), texts=QUESTIONS)
    count = model.set_trainable(["vision.b", "projector"])
    assert count.keys() == {"vision.b", "projector"}
    model.train()
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    model(**batch).loss.backward()
    assert {model.part_of(n) for n, p in model.named_parameters() if p.grad is not None} == {"vision.b", "projector"}
    with pytest.raises(ZooError, match=r"Did you mean 'vision.b'"):
        model.set_trainable(["vision.bb"])


def test_sixteen_bits_gradient_checkpointing_and_compiled_parts_agree():
    model, processor = zoo.compose(*words({"a": A, "b": B}), texts=QUESTIONS)
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    model.set_trainable(["vision", "projector"])
    model.train()

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.vision.set_gradient_checkpointing(True)
    after = gradients()
    assert all(torch.allclose(before[n], after[n], atol=1e-7) for n in before)
    short = model.eval().to(torch.bfloat16)
    assert torch.isfinite(short(**batch).loss)
    short.vision.encoders["b"].float()  # one in float32 gets its pixels unrounded
    assert short.vision(batch["pixel_values"]).tokens.dtype == torch.float32


# ---- on the command line ---------------------------------------------------------------------------------------------


def test_a_list_of_encoders_is_the_encoder_that_joins_them():
    from zoo.settings.config import compose
    from zoo.settings.several_encoders import with_encoders

    assert with_encoders(["vision=hf", "vision=[hf]", "pruner=[a,b]"]) == ["vision=hf", "vision=[hf]", "pruner=[a,b]"]
    sizes = ["vision.encoders.loc.width=48", "vision.encoders.loc.revision=12e4567"]
    cfg = compose("check", ["recipe=null", "vision=[sem:hf,loc:hf]", "projector=mlp", "llm=hf", *sizes])
    node = cfg.vision
    assert node.name == "fused" and list(node.encoders) == ["sem", "loc"]
    assert node.encoders.loc == {"name": "hf", "width": 48, "revision": "12e4567"}, "text stays text"
    with pytest.raises(ZooError, match=r"vision=\[hf,timm,\] has an encoder without a name"):
        compose("check", ["vision=[hf,timm,]"])
    with pytest.raises(ZooError, match=r"two encoders named 'hf'.*vision=\[a:hf,b:hf\]"):
        with_encoders(["vision=[hf,hf]"])
    with pytest.raises(ZooError, match=r"encoder 'tim': No vision named 'tim'\. Did you mean 'timm'"):
        compose("check", ["recipe=null", "vision=[hf,tim]", "projector=mlp", "llm=hf"])
    with pytest.raises(ZooError, match=r"encoder 'efficientnet_lite': .*Did you mean 'efficientnet_lite0'"):
        compose("check", ["recipe=null", "vision=[hf,efficientnet_lite]", "projector=mlp", "llm=hf"])


def test_encoders_of_a_preset_are_replaced_not_joined(tmp_path):
    from zoo.settings.config import compose

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "eyes.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /vision: [hf, timm]\n  - override /projector: mlp\n"
        "  - override /llm: hf\nvision:\n  join: tokens\n  encoders:\n    timm: {width: 48}\n"
    )
    words = ["recipe=null", "model=eyes"]
    cfg = compose("check", words, config_dir=tmp_path)
    assert cfg.vision.encoders == {"hf": {"name": "hf"}, "timm": {"name": "timm", "width": 48}}
    cfg = compose("check", [*words, "vision=[a:timm,b:hf]"], config_dir=tmp_path)
    assert list(cfg.vision.encoders) == ["a", "b"] and cfg.vision.join == "tokens"


def test_the_check_shows_each_encoder_and_what_it_gives(capsys):
    from zoo.checking.checker import check, show
    from zoo.checking.plan import plan_from
    from zoo.settings.config import compose

    given = words({"a": A, "b": B}, "pruner=fastervlm", "vision.gives.cls_attention=b")
    show(check(plan_from(compose("check", ["recipe=null", *given]))))
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "vision.a: hf, images of 32 x 32, 4 x 4 tokens of width 32, 19.4 K parameters; gives key_attention, keys"
        in shown
    )
    assert "vision.b: timm, images of 48 x 48, 3 x 3 tokens of width 48" in shown
    assert "vision: joined on 4 x 4 tokens of width 80" in shown


# ---- crops, smaller images, exports ---------------------------------------------------------------------------------


def test_crops_are_the_same_parts_of_an_image_for_each_encoder(tmp_path):
    c = {**C, "image_size": 42, "patch_size": 7}
    layout = ["layout=anyres", "layout.pinpoints=[[32,64],[64,32],[64,64]]"]
    model, processor = zoo.compose(*words({"a": A, "c": c}, *layout), texts=QUESTIONS)
    picture = processor.prepare([photo((90, 40))])[0]
    assert picture.pixels.shape == (3, *model.vision.transform.shape) and picture.cut.rows == 3
    _, own = zoo.compose(
        "vision=hf",
        *[f"vision.{k}={v}" for k, v in A.items() if k != "name"],
        "projector=mlp",
        *LLM,
        *layout,
        texts=QUESTIONS,
    )
    assert torch.equal(model.vision.split(picture.pixels)["a"], own.prepare([photo((90, 40))])[0].pixels)
    processor.save_pretrained(tmp_path)
    again = zoo.ZooProcessor.from_pretrained(tmp_path)
    assert torch.equal(again.prepare([photo((90, 40))])[0].pixels, picture.pixels)
    shown = sample((QUESTIONS[0], ANSWERS[0]))
    shown.images = [photo((90, 40))]
    batch = processor.collate([processor.encode(shown)])
    assert torch.isfinite(model(**batch).loss)
    assert model.encode_images(batch["pixel_values"], batch["cuts"]).tokens.shape[0] == int(
        (batch["input_ids"] == model.image_token_id).sum()
    )
    with pytest.raises(ZooError, match="take images of one shape"):
        from zoo.loading.build import _also

        _also((32, 32), zoo.registry.ImageTransform((32, 48), (0.5,) * 3, (0.5,) * 3))


def test_a_pruner_in_front_makes_the_images_of_all_encoders_smaller():
    model, processor = zoo.compose(
        *words({"a": A, "c": {**C, "image_size": 56}}, "pruner=downsample", "pruner.downsample.keep_ratio=0.25"),
        texts=QUESTIONS,
    )
    assert model.vision.grid == (2, 2) and model.vision.own_size == (32, 32)
    assert [e.transform.size for e in model.vision.members.values()] == [(16, 16), (28, 28)]
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    assert batch["pixel_values"].shape[1:] == model.vision.transform.shape and torch.isfinite(model(**batch).loss)


def test_published_layouts_have_one_encoder(tmp_path):
    model, _ = zoo.compose(*words({"a": A, "b": B}), texts=QUESTIONS)
    with pytest.raises(ZooError, match=r"joins 2 encoders \('a', 'b'\), and published layouts have one"):
        zoo.export(model, tmp_path, "llava")


def test_a_teacher_shares_features_of_the_same_encoders_alone():
    from zoo.teaching.teacher import Teacher

    student, _ = zoo.compose(*words({"a": A, "b": B}), texts=QUESTIONS)
    for more, shared in ((), True), (("vision.join=tokens",), False), (("vision.grid=b",), False):
        other, _ = zoo.compose(*words({"a": A, "b": B}, *more), texts=QUESTIONS)
        other.vision.load_state_dict(student.vision.state_dict())
        teacher = Teacher(other)
        student.vision.requires_grad_(False)
        teacher.share_vision(student)
        assert teacher.same_vision is shared


# ---- what else a model does with its encoder -------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_the_text_tower_of_one_encoder_is_read_saved_and_asked(places, tmp_path, whole):
    vision_builders.clip_checkpoint(tmp_path / "clip")
    clip = {"name": "hf", "checkpoint": str(tmp_path / "clip")}
    parts = [f"llm.checkpoint={places / 'llm'}", "llm=hf", "projector=linear", "device=cpu"]
    asks = ["pruner=cdpruner", "pruner.cdpruner.keep_ratio=0.5"]
    b = {"name": "hf", "checkpoint": str(places / "hf")}
    encoders = f"vision.encoders={{b: {_flow(b)}, clip: {_flow(clip)}}}"
    model, processor = zoo.compose("vision=fused", encoders, *parts, *asks)
    assert model.vision.givers["text_tower"] == "clip" and model.vision.encoders["b"].text is None
    names = saved_builders.saved(model, tmp_path / "saved", include_base=whole)
    assert any(".text." in n for n in names) is whole
    processor.save_pretrained(tmp_path / "saved")
    again, other = zoo.load(f"dir:{tmp_path / 'saved'}", device="cpu")
    ask = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    one, two = (m.encode_images(ask["pixel_values"], None, _asking(m, ask)).kept for m in (model, again))
    assert torch.equal(one.keep, two.keep) and one.keep.shape[1] == 8
    assert torch.equal(again.vision.embed_texts(["a red cube"])[0], model.vision.embed_texts(["a red cube"])[0])
    assert other.transform == processor.transform


def _asking(model, batch):
    from zoo.composed.inputs import Inputs

    return Inputs(**{k: batch[k] for k in ("input_ids", "attention_mask", "questions", "images_per_row") if k in batch})


def test_an_encoder_of_a_plugin_is_one_of_several():
    from torch import nn

    from zoo import registry

    class MineConfig:
        pass

    import dataclasses

    MineConfig = dataclasses.dataclass(MineConfig)

    class Mine(registry.Encoder, nn.Module):
        provides = frozenset({"grid"})
        hidden_size, grid, num_tokens = 8, (2, 2), 4

        def __init__(self, config: MineConfig) -> None:
            super().__init__()
            self.transform = registry.ImageTransform((20, 20), (0.5,) * 3, (0.5,) * 3)
            self.proj = nn.Conv2d(3, 8, 10, stride=10)

        def forward(self, pixel_values, *, need=frozenset()):
            return registry.ImageFeatures(self.proj(pixel_values).flatten(2).transpose(1, 2), (2, 2))

    Mine.__init__.__annotations__["config"] = MineConfig
    registry.register("vision", "mine_of_several")(Mine)
    encoder = fused({"a": A, "mine": {"name": "mine_of_several"}})
    pixels = rows(encoder)
    mine = encoder.encoders["mine"](encoder.split(pixels)["mine"]).tokens
    assert mine.shape == (2, 4, 8)
    assert encoder(pixels).tokens.shape == (2, 16, 40)
    with pytest.raises(ZooError, match=r"encoder 'mine': it takes images of one size only"):
        encoder.resize((2, 2))
