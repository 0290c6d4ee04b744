"""Encoders of transformers against transformers itself, on tiny checkpoints in the layout that it saves."""

import json
import shutil
import tempfile

import pytest
import torch

from tests.vision_builders import hf_model, own_pooling, pixels, shake
from zoo.registry import ImageTransform, ZooError, build

KINDS = ("clip", "clip_whole", "siglip", "siglip_whole", "siglip2", "dinov2", "dinov2_registers", "dinov3")
WITH_CLS = ("clip", "clip_whole", "dinov2", "dinov2_registers", "dinov3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind -> (folder, model), made on first use."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = hf_model(kind)
            model.save_pretrained(folder)
            made[kind] = str(folder), model
        return made[kind]

    return get


def reference(model, x, eager=False):
    """Hidden states (and attentions) of the encoder by the library's own forward."""
    tower = getattr(model, "vision_model", model)
    inputs = {"pixel_values": x}
    if tower.config.model_type.startswith("siglip2"):
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        inputs = {
            "pixel_values": torch.stack([convert_image_to_patches(image, 8) for image in x]),
            "pixel_attention_mask": torch.ones(len(x), 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * len(x)),
        }
    tower.set_attn_implementation("eager" if eager else "sdpa")
    with torch.no_grad():
        return tower(**inputs, output_hidden_states=True, output_attentions=eager)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
def test_features_are_the_hidden_states(saved, kind, layer):
    folder, model = saved(kind)
    tower = build("vision", {"name": "hf", "checkpoint": folder, "layer": layer}).requires_grad_(False).eval()
    out = tower(pixels(), need=tower.provides)
    want = reference(model, pixels()).hidden_states[layer]
    p = want.shape[1] - 16
    # Bit for bit: leaving out later blocks changes nothing. SigLIP 2 masks nothing here, so another kernel may run.
    tolerance = 2e-6 if kind == "siglip2" else 0
    torch.testing.assert_close(out.tokens, want[:, p:], atol=tolerance, rtol=tolerance)
    if p:
        assert torch.equal(out.prefix, want[:, :p])
    assert ("cls_attention" in tower.provides) == (kind in WITH_CLS and layer != 0)


@pytest.mark.parametrize("kind", WITH_CLS)
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_the_cls_row_is_that_of_the_block_that_made_the_features(saved, kind, layer):
    folder, model = saved(kind)
    tower = build("vision", {"name": "hf", "checkpoint": folder, "layer": layer}).eval()
    row = tower(pixels(), need=frozenset({"cls_attention"})).cls_attention
    attention = reference(model, pixels(), eager=True).attentions[layer if layer < 0 else layer - 1]
    p = attention.shape[-1] - 16
    torch.testing.assert_close(row, attention[:, :, 0, p:].mean(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-2, 1])
def test_column_means_are_those_of_the_whole_matrix(saved, kind, layer):
    folder, model = saved(kind)
    tower = build("vision", {"name": "hf", "checkpoint": folder, "layer": layer}).eval()
    means = tower(pixels(), need=frozenset({"key_attention"})).key_attention
    attention = reference(model, pixels(), eager=True).attentions[layer if layer < 0 else layer - 1]
    p = attention.shape[-1] - 16
    torch.testing.assert_close(means, attention.mean((1, 2))[:, p:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "siglip_whole"])
@pytest.mark.parametrize(("layer", "norm"), [(-1, False), (-2, False), (-2, True), (1, False)])
def test_the_pooling_row_is_that_of_the_library_whatever_the_layer(saved, kind, layer, norm):
    folder, model = saved(kind)
    config = {"name": "hf", "checkpoint": folder, "layer": layer, "norm": norm}
    tower = build("vision", {**config, "pooling_head": True}).eval()
    out = tower(pixels(), need=tower.provides)
    want = own_pooling(getattr(model, "vision_model", model), "hf")(reference(model, pixels()).last_hidden_state)
    torch.testing.assert_close(out.pooling_attention, want, atol=1e-6, rtol=0)
    assert torch.equal(out.tokens, build("vision", config).eval()(pixels()).tokens)


@pytest.mark.parametrize("kind", ["siglip", "siglip_whole"])
@pytest.mark.parametrize(("layer", "norm"), [(-1, False), (-2, True)])
def test_the_summary_is_the_librarys_pooled_output_whatever_the_layer(saved, kind, layer, norm):
    folder, model = saved(kind)
    config = {"name": "hf", "checkpoint": folder, "layer": layer, "norm": norm, "summary": True}
    tower = build("vision", config).eval()
    assert {"summary", "pooling_head"} <= tower.provides
    out = tower(pixels(), need=frozenset({"summary"}))
    torch.testing.assert_close(out.summary, reference(model, pixels()).pooler_output, atol=2e-6, rtol=1e-5)
    assert out.pooling_attention is None
    assert "summary" not in build("vision", {**config, "summary": False, "pooling_head": True}).provides


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dinov2", "dinov3"])
def test_the_final_norm_is_the_librarys(saved, kind):
    folder, model = saved(kind)
    tower = build("vision", {"name": "hf", "checkpoint": folder, "layer": -1, "norm": True}).eval()
    out = reference(model, pixels())
    want = out.last_hidden_state if kind != "clip" else model.post_layernorm(out.last_hidden_state)
    torch.testing.assert_close(tower(pixels()).tokens, want[:, want.shape[1] - 16 :], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_reads_no_weight(saved, kind, tmp_path):
    folder, _ = saved(kind)
    shutil.copy(f"{folder}/config.json", tmp_path)
    with torch.device("meta"):
        tower = build("vision", {"name": "hf", "checkpoint": str(tmp_path)})
    assert tower.grid == (4, 4) and tower.hidden_size == 32
    assert {p.device.type for p in tower.parameters()} == {"meta"}
    with pytest.raises(ZooError, match=r"has no model.safetensors. It holds: config.json"):
        build("vision", {"name": "hf", "checkpoint": str(tmp_path)})


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dinov2", "dinov3"])
def test_another_image_size_interpolates_positions(saved, kind):
    folder, model = saved(kind)
    tower = build("vision", {"name": "hf", "checkpoint": folder, "image_size": 48}).eval()
    assert tower.grid == (6, 6) and tower.num_tokens == 36 and tower.transform.size == (48, 48)
    out = tower(pixels(size=48), need=tower.provides)
    assert out.tokens.shape == (2, 36, 32)
    if kind in {"clip", "siglip"}:
        with torch.no_grad():
            want = model(pixels(size=48), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(out.tokens, want[:, -36:])
    with pytest.raises(ZooError, match="patch_size 8 does not divide image_size 50"):
        build("vision", {"name": "hf", "checkpoint": folder, "image_size": 50})


def test_a_published_size_need_not_divide():
    """SigLIP so400m: 384 pixels, 27 patches of 14, and 6 pixels that no patch sees."""
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = shake(t.SiglipVisionModel(t.SiglipVisionConfig(**sizes, image_size=38, patch_size=8)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tower = build("vision", {"name": "hf", "checkpoint": folder}).eval()
    assert tower.grid == (4, 4) and tower.transform.size == (38, 38)
    assert torch.equal(tower(pixels(size=38)).tokens, reference(model, pixels(size=38)).hidden_states[-2])


def test_the_transform_is_the_processors(saved, tmp_path):
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    folder, model = saved("clip")
    model.save_pretrained(tmp_path)
    bare = build("vision", {"name": "hf", "checkpoint": folder}).transform
    assert bare.mean[0] == pytest.approx(0.4815, abs=1e-3) and bare.fit == "crop" and bare.resample == "bicubic"
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], resample=2
    ).save_pretrained(tmp_path)
    told = build("vision", {"name": "hf", "checkpoint": str(tmp_path)}).transform
    assert told == ImageTransform((32, 32), (0.1, 0.2, 0.3), bare.std, "bilinear", "crop", "torchvision")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert build("vision", {"name": "hf", "checkpoint": str(tmp_path)}).transform.fit == "squash"


def test_dinov2_takes_the_size_of_its_processor(saved, tmp_path):
    """Its published config says 518, the size of the positions; its processor says 224, which people run."""
    from transformers import BitImageProcessor

    _, model = saved("dinov2")
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert build("vision", {"name": "hf", "checkpoint": str(tmp_path)}).grid == (2, 2)


def test_missing_weights_are_named(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, model = saved("clip")
    model.save_pretrained(tmp_path)
    state = load_file(f"{folder}/model.safetensors")
    gone = next(key for key in state if "layers.1.mlp.fc1.weight" in key)
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ZooError, match=r"lacks 1 weights of its encoder, e.g. .*layers\.1\.mlp\.fc1\.weight"):
        build("vision", {"name": "hf", "checkpoint": str(tmp_path)})


def test_pickled_weights_are_never_read(saved, tmp_path):
    _, model = saved("clip")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ZooError, match=r"has no model.safetensors"):
        build("vision", {"name": "hf", "checkpoint": str(tmp_path)})


def test_a_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ZooError, match=r"holds a model of type 'llama'; its encoder must be one of clip, siglip"):
        build("vision", {"name": "hf", "checkpoint": str(tmp_path)})
    with pytest.raises(ZooError, match=r"No checkpoint at './nowhere'"):
        build("vision", {"name": "hf", "checkpoint": "./nowhere"})
    with pytest.raises(ZooError, match=r"No model_type named 'clipp'. Did you mean 'clip'"):
        build("vision", {"name": "hf", "model_type": "clipp"})


@pytest.mark.parametrize("name", ["hf", "timm", "open_clip"])
def test_a_language_model_in_a_gguf_file_is_refused_by_the_name_that_was_typed(name, tmp_path):
    file = tmp_path / "llm.gguf"
    file.write_bytes(b"not read")
    with pytest.raises(
        ZooError, match=f"checkpoint '{file}' is a GGUF file, which holds a language model: llm.checkpoint="
    ):
        build("vision", {"name": name, "checkpoint": str(file)})
