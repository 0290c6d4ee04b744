"""The text side of contrastive encoders: equal to the libraries' own, read on request, saved with a model."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import zoo
from tests import published_builders, vision_builders
from tests.saved_builders import checkpoints
from zoo import registry
from zoo.checking.checker import check, show
from zoo.registry import ImageFeatures, ZooError

NEED = frozenset({"text_tower"})
TEXTS = ["a red cube?", "", "is it there", "what is left of the cube"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = checkpoints(tmp_path_factory.mktemp("texts"))
    vision_builders.clip_checkpoint(root / "clip")
    vision_builders.clip_checkpoint(root / "siglip", "siglip")
    return root


@dataclass
class NeedsTextConfig:
    pass


@pytest.fixture(autouse=True)
def needs_text():
    """A pruner that needs the text tower, and keeps all tokens."""

    class NeedsText(registry.Pruner, nn.Module):
        needs = NEED

        def __init__(self, config: NeedsTextConfig) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            assert image.patch_embeds is not None
            return image

    registry.register("pruner", "needs_text")(NeedsText)


def by_hand(model, ids):
    found = model.get_text_features(torch.tensor([ids]))
    return found.pooler_output


def test_clip_embeds_texts_and_patches_as_transformers_does(places):
    whole, encoder = vision_builders.hf_model("clip_whole"), _encoder(places / "clip")
    whole.load_state_dict(_state(places / "clip"))
    whole.text_model.eos_token_id = 54
    words = encoder.text.words
    for text, found in zip(TEXTS, encoder.embed_texts(TEXTS), strict=True):
        pieces = words.pieces(text, 8)
        assert all(piece[0] == 53 and piece[-1] == 54 and len(piece) <= 8 for piece in pieces)
        assert [i for piece in pieces for i in piece[1:-1]] == words.encode(text), "no id is lost"
        want = torch.cat([by_hand(whole, piece) for piece in pieces])
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    x = vision_builders.pixels()
    tokens = whole.vision_model(x, output_hidden_states=True).hidden_states[-2][:, 1:]
    want = whole.visual_projection(whole.vision_model.post_layernorm(tokens))
    assert torch.equal(encoder(x, need=NEED).patch_embeds, want)
    behind = _encoder(places / "clip", norm=True)
    torch.testing.assert_close(behind(x, need=NEED).patch_embeds, want)


def test_siglip_embeds_each_patch_as_its_pooling_head_would_alone(places):
    whole, encoder = vision_builders.hf_model("siglip_whole"), _encoder(places / "siglip")
    whole.load_state_dict(_state(places / "siglip"))
    pad, x = encoder.text.words.pad, vision_builders.pixels()
    piece = encoder.text.words.pieces("a cube", 8)[0]
    want = by_hand(whole, piece + [pad] * (8 - len(piece)))
    torch.testing.assert_close(encoder.embed_texts(["a cube"])[0], want, rtol=1e-5, atol=1e-6)
    tokens = whole.vision_model.post_layernorm(whole.vision_model(x, output_hidden_states=True).hidden_states[-2])
    want = torch.stack([whole.vision_model.head(tokens[:, i : i + 1]) for i in range(16)], dim=1)
    torch.testing.assert_close(encoder(x, need=NEED).patch_embeds, want, rtol=1e-5, atol=1e-5)


def test_open_clip_embeds_texts_and_patches_as_it_does(tmp_path):
    whole, architecture = vision_builders.open_clip_model()
    architecture["text_cfg"] = {**architecture["text_cfg"], "vocab_size": 49408}
    whole = vision_builders.shake(type(whole)(**architecture))
    vision_builders.save_open_clip(whole, architecture, tmp_path)
    encoder = registry.build("vision", {"name": "open_clip", "checkpoint": str(tmp_path)}).eval()
    assert encoder.text is None and "text_tower" in encoder.provides
    encoder.prepare(NEED)
    from open_clip.tokenizer import SimpleTokenizer

    tokenize = SimpleTokenizer(context_length=8)
    for text, found in zip(["a red cube", ""], encoder.embed_texts(["a red cube", ""]), strict=True):
        torch.testing.assert_close(found, whole.encode_text(tokenize(text)), rtol=1e-5, atol=1e-6)
    x = vision_builders.pixels()
    image = encoder(x, need=NEED)
    torch.testing.assert_close(image.patch_embeds, whole.visual.ln_post(image.tokens) @ whole.visual.proj)


def test_it_is_read_only_where_a_part_needs_it(places, capsys):
    plain, _ = _composed(places)
    model, _ = _composed(places, "pruner=needs_text")
    assert plain.vision.text is None and model.vision.text is not None
    assert sum(p.numel() for p in plain.vision.parameters()) == sum(p.numel() for p in model.vision.parameters())
    report = check(_plan(places, "needs_text"))
    assert report.rows[0].parameters == sum(t.numel() for t in model.vision.state_dict().values())
    show(report)
    assert "vision includes its text tower, which a part needs: 13.1 K parameters" in capsys.readouterr().out
    assert report.text_tower == report.rows[0].parameters - check(_plan(places)).rows[0].parameters > 0
    assert model.set_trainable(["vision"])["vision"] == sum(p.numel() for p in model.vision.parameters())


@pytest.mark.parametrize(
    ("vision", "why"),
    [
        ({"name": "timm", **vision_builders.SIZES}, "it was not trained with texts"),
        ({"name": "hf", **vision_builders.SIZES}, "built from sizes, without a text tower; vision.text_checkpoint="),
        ({"name": "hf", **vision_builders.SIZES, "model_type": "dinov2"}, "type 'dinov2' was not trained with texts"),
        ({"name": "open_clip", **vision_builders.SIZES}, "has no text tower"),
        ({"name": "hf", "checkpoint": "hf"}, "has no text tower .its model is of type 'clip_vision_model'"),
        ({"name": "hf", **vision_builders.SIZES, "text_checkpoint": "siglip"}, "belongs to another encoder"),
    ],
)
def test_where_there_is_none_the_reason_is_given(places, vision, why):
    vision = {k: str(places / v) if k.endswith("checkpoint") else v for k, v in vision.items()}
    with pytest.raises(ZooError, match=f"'needs_text' needs text_tower, but vision .* does not give it: .*{why}"):
        check(_plan(places, "needs_text", vision=vision))


def test_a_tokenizer_has_to_lie_beside_it(tmp_path):
    vision_builders.clip_checkpoint(tmp_path, tokenizer=False)
    encoder = registry.build("vision", {"name": "hf", "checkpoint": str(tmp_path)})
    assert "text_tower" not in encoder.provides and "has no tokenizer" in encoder.lacks["text_tower"]


@pytest.mark.parametrize("whole", [False, True])
def test_it_is_saved_and_loaded_with_the_model(places, tmp_path, whole):
    shutil.copytree(places / "clip", tmp_path / "clip")
    shutil.copytree(places / "llm", tmp_path / "llm")
    model, processor = _composed(tmp_path, "pruner=needs_text")
    wanted, x = model.vision.embed_texts(TEXTS), vision_builders.pixels()
    with torch.no_grad():
        next(iter(model.vision.tower.parameters())).add_(0.01)
    model.save_pretrained(tmp_path / "saved", include_base=whole)
    processor.save_pretrained(tmp_path / "saved")
    from safetensors.torch import load_file

    held = [n for n in load_file(tmp_path / "saved/model.safetensors") if n.startswith("vision.")]
    assert len(held) == (len(model.vision.state_dict()) if whole else 1)
    if whole:
        shutil.rmtree(tmp_path / "clip")
        shutil.rmtree(tmp_path / "llm")
    for again in (zoo.load(f"dir:{tmp_path / 'saved'}")[0], zoo.ZooModel.from_pretrained(tmp_path / "saved")):
        for found, want in zip(again.vision.embed_texts(TEXTS), wanted, strict=True):
            assert torch.equal(found, want)
        assert torch.equal(again.vision(x, need=NEED).patch_embeds, model.vision(x, need=NEED).patch_embeds)


@pytest.mark.parametrize("name", ["siglip", "open_clip"])
def test_it_is_saved_with_other_encoders_and_loaded_in_16_bits(places, tmp_path, name):
    folder, library = places / name, "hf"
    if name == "open_clip":
        whole, architecture = vision_builders.open_clip_model()
        architecture["text_cfg"] = {**architecture["text_cfg"], "vocab_size": 49408}
        folder, library = tmp_path / name, name
        vision_builders.save_open_clip(vision_builders.shake(type(whole)(**architecture)), architecture, folder)
    parts = [f"vision={library}", f"vision.checkpoint={folder}", f"llm.checkpoint={places / 'llm'}", "llm=hf"]
    model, processor = zoo.compose(*parts, "projector=linear", "device=cpu", "pruner=needs_text")
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = zoo.load(f"dir:{tmp_path / 'saved'}", dtype="bfloat16")
    for found, want in zip(again.vision.embed_texts(TEXTS), model.vision.embed_texts(TEXTS), strict=True):
        assert torch.equal(found, want), "its weights stay as they were read"
    x = vision_builders.pixels()
    found, want = (m.vision(p, need=NEED).patch_embeds for m, p in ((again, x.bfloat16()), (model, x)))
    assert found.dtype == torch.float32 and torch.cosine_similarity(found, want, dim=-1).min() > 0.99


def test_a_published_model_takes_it_from_the_clip_that_its_encoder_is(tmp_path):
    """LLaVA's files hold no text tower."""
    published_builders.llava(tmp_path / "llava")
    content = json.loads((tmp_path / "llava/config.json").read_text())["vision_config"]
    clip = _clip_like(content)
    clip.save_pretrained(tmp_path / "clip")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        vision_builders.clip_checkpoint(tmp_path / "letters")
        shutil.copy(tmp_path / "letters" / file, tmp_path / "clip" / file)
    words = ["pruner=needs_text", f"vision.text_checkpoint={tmp_path / 'clip'}"]
    model, processor = zoo.load(f"dir:{tmp_path / 'llava'}", *words, device="cpu")
    wanted = model.vision.embed_texts(TEXTS)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    base = json.loads((tmp_path / "saved/config.json").read_text())["base"]
    assert base["text_tower"]["checkpoint"] == str(tmp_path / "clip") and base["model"]["family"] == "llava"
    assert not [f for f in (tmp_path / "saved").glob("*.safetensors") if f.stat().st_size > 10_000]
    again, _ = zoo.load(f"dir:{tmp_path / 'saved'}", device="cpu")
    for found, want in zip(again.vision.embed_texts(TEXTS), wanted, strict=True):
        assert torch.equal(found, want)


def test_scores_of_patches_follow_the_patches_that_are_kept():
    image = ImageFeatures(torch.randn(2, 6, 3), (2, 3), patch_embeds=torch.randn(2, 6, 4))
    kept = image.take(torch.tensor([[0, 3], [2, 5]]))
    assert torch.equal(kept.patch_embeds[1], image.patch_embeds[1, [2, 5]])


def _encoder(folder, **more):
    encoder = registry.build("vision", {"name": "hf", "checkpoint": str(folder), **more}).eval()
    assert encoder.text is None, "not asked for yet"
    encoder.prepare(NEED)
    return encoder


def _state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _composed(places, *words):
    parts = ["vision=hf", f"vision.checkpoint={places / 'clip'}", f"llm.checkpoint={places / 'llm'}", "llm=hf"]
    return zoo.compose(*parts, "projector=linear", "device=cpu", *words)


def _plan(places, pruner="", vision=None):
    from tests.conftest import tiny_slots
    from zoo.checking.plan import Plan

    vision = vision or {"name": "hf", "checkpoint": str(places / "clip")}
    return Plan(tiny_slots(vision=vision, pruner={pruner: {}} if pruner else {}), vocab_size=360)


def _clip_like(vision):
    import transformers as t

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text |= {"vocab_size": 99, "max_position_embeddings": 8, "bos_token_id": 53, "eos_token_id": 54}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
