"""Encoders of open_clip against open_clip itself, on tiny checkpoints in the layout of its hub repositories."""

import json
from pathlib import Path

import pytest
import torch

from tests.vision_builders import OPEN_CLIP, open_clip_model, pixels, save_open_clip, settle, shake
from zoo.registry import ImageTransform, ZooError, build


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    model, architecture = open_clip_model()
    save_open_clip(model, architecture, folder, mean=[0.1, 0.2, 0.3], resize_mode="squash", interpolation="bilinear")
    return str(folder), model


def reference(model, layer):
    index = layer + 4 if layer < 0 else layer - 1
    block, matrix = model.visual.transformer.resblocks[index], []

    def look(module, args):
        matrix.append(module.forward(*args, need_weights=True, average_attn_weights=False)[1])

    handle = block.attn.register_forward_pre_hook(look)
    with torch.no_grad():
        out = model.visual.forward_intermediates(
            pixels(), indices=[index], intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
        )
    handle.remove()
    return out["image_intermediates"][0], out["image_intermediates_prefix"][0], matrix[0]


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_and_row_are_open_clips(saved, layer):
    folder, model = saved
    tower = build("vision", {"name": "open_clip", "checkpoint": folder, "layer": layer}).requires_grad_(False).eval()
    out = tower(pixels(), need=tower.provides)
    patches, prefix, matrix = reference(model, layer)
    assert torch.equal(out.tokens, patches) and torch.equal(out.prefix, prefix)
    torch.testing.assert_close(out.cls_attention, matrix[:, :, 0, 1:].mean(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.key_attention, matrix.mean((1, 2))[:, 1:], atol=1e-6, rtol=0)
    assert tower.transform == ImageTransform((32, 32), (0.1, 0.2, 0.3), tower.transform.std, "bilinear", "squash")
    assert type(tower.tower.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_only_the_visual_tower_is_kept(saved):
    tower = build("vision", {"name": "open_clip", "checkpoint": saved[0]})
    assert not [name for name, _ in tower.named_parameters() if "token_embedding" in name or name[-4:] == "proj"]
    assert len(tower.tower.transformer.resblocks) == 3


def test_another_image_size_interpolates_positions(saved):
    tower = build("vision", {"name": "open_clip", "checkpoint": saved[0], "image_size": 48}).eval()
    assert tower.grid == (6, 6) and tower(pixels(size=48)).tokens.shape == (2, 36, 32)
    small = build("vision", {"name": "open_clip", "checkpoint": saved[0]})
    a, b = tower.tower.positional_embedding, small.tower.positional_embedding
    assert torch.equal(a[0], b[0]) and a.shape == (37, 32)
    torch.testing.assert_close(a[1:].mean(0), b[1:].mean(0), atol=0.05, rtol=0)


def test_a_tower_that_wraps_timm_is_run_as_timm_does(tmp_path):
    import open_clip

    # One block of a real size: open_clip gives no way to make its timm towers tiny.
    vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    architecture = {**OPEN_CLIP, "vision_cfg": vision}
    model = open_clip.CustomTextCLIP(**architecture)
    shake(model)
    save_open_clip(model, architecture, tmp_path)
    tower = build("vision", {"name": "open_clip", "checkpoint": str(tmp_path), "layer": 1}).eval()
    x = pixels(1, 224)
    with torch.no_grad():
        want = model.visual.forward_intermediates(x, indices=[0], intermediates_only=True, output_fmt="NLC")
        out = tower(x, need=tower.provides)
    assert torch.equal(out.tokens, want["image_intermediates"][0]) and out.cls_attention.shape == (1, 196)
    resized = build("vision", {"name": "open_clip", "checkpoint": str(tmp_path), "layer": 1, "image_size": 64})
    assert resized.grid == (4, 4) and resized(pixels(1, 64)).tokens.shape == (1, 16, 192)


def test_meta_builds_named_models_without_weights(saved, tmp_path):
    with torch.device("meta"):
        clip = build("vision", {"name": "open_clip", "model": "ViT-B-32", "checkpoint": "openai"})
        plain = build("vision", {"name": "open_clip", "model": "ViT-B-32"})
        siglip = build("vision", {"name": "open_clip", "model": "ViT-B-16-SigLIP-256", "checkpoint": "webli"})
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
        local = build("vision", {"name": "open_clip", "checkpoint": str(tmp_path)})
    assert clip.grid == (7, 7) and clip.hidden_size == 768 and len(clip.tower.transformer.resblocks) == 11
    # The activation is a fact of the weights: OpenAI's need another one than the name's default.
    names = [type(t.tower.transformer.resblocks[0].mlp.gelu).__name__ for t in (clip, plain)]
    assert names == ["QuickGELU", "GELU"]
    assert (
        siglip.grid == (16, 16)
        and siglip.provides == {"grid", "key_attention", "keys"}
        and siglip.transform.fit == "squash"
    )
    assert local.grid == (4, 4)
    assert {p.device.type for t in (clip, plain, siglip, local) for p in t.parameters()} == {"meta"}
    with pytest.raises(ZooError, match=r"has no open_clip_model.safetensors"):
        build("vision", {"name": "open_clip", "checkpoint": str(tmp_path)})


def test_a_named_model_takes_pixels_and_activation_of_its_weights(saved, tmp_path, monkeypatch):
    """The config in a folder states them, also where the model is named beside it."""
    import open_clip

    folder = Path(saved[0])
    told = json.loads((folder / "open_clip_config.json").read_text())
    told["model_cfg"]["quick_gelu"] = not told["model_cfg"].get("quick_gelu", False)
    plain = {k: v for k, v in told["model_cfg"].items() if k != "quick_gelu"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", plain)
    told["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    alone = {"name": "open_clip", "checkpoint": str(tmp_path)}
    one, two = (build("vision", {**alone, **more}).eval() for more in ({}, {"model": "tiny"}))
    assert one.transform == two.transform and two.transform.fit == "squash"
    images = pixels(size=two.transform.size[0])
    with torch.no_grad():
        assert torch.equal(one(images).tokens, two(images).tokens)


def test_wrong_names_are_refused():
    for options, message in [
        ({"model": "ViT-B-33"}, "No open_clip model named 'ViT-B-33'. Did you mean 'ViT-B-32'"),
        ({"model": "ViT-B-32", "checkpoint": "openay"}, "named 'openay'. Did you mean 'openai'"),
        ({"model": "ViT-B-32", "image_size": 100}, "patch_size 32 does not divide image_size 100"),
        ({"model": "ViT-B-16-SigLIP", "image_size": 100}, "patch_size 16 does not divide image_size 100"),
        ({"model": "RN50", "norm": True}, "is a ResNet without a final norm"),
        ({"model": "RN50", "layer": -1}, "'RN50' is a ModifiedResNet, not a plain ViT: set stage"),
        ({"model": "ViT-B-32", "stage": -2}, "'ViT-B-32' is a ViT, whose tokens are of a block: set layer"),
        ({"model": "convnext_base", "summary": True}, "is a ConvNeXt, not a plain ViT, and summary is of ViTs"),
        ({"model": "convnext_base", "stage": 5}, "has 4 feature maps: stage must be 1 to 4"),
    ]:
        with torch.device("meta"), pytest.raises(ZooError, match=message):
            build("vision", {"name": "open_clip", **options})


MAPS = {
    "resnet": {"layers": [1, 1, 2, 1], "width": 8, "image_size": 64, "head_width": 64, "patch_size": None},
    "convnext": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    "byobnet": {"timm_model_name": "test_byobnet", "timm_pool": "avg", "timm_proj": None, "image_size": 64},
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("stage", [-1, -2])
def test_tokens_are_a_map_of_open_clips_tower(kind, stage, tmp_path):
    import open_clip

    torch.manual_seed(0)
    architecture = {**OPEN_CLIP, "vision_cfg": {**MAPS[kind], "timm_model_pretrained": False}}
    if kind == "byobnet":
        architecture["embed_dim"] = 256
    model = open_clip.CustomTextCLIP(**architecture)
    settle(model.visual)
    save_open_clip(model.eval(), architecture, tmp_path, mean=[0.1, 0.2, 0.3], resize_mode="squash")
    tower = build("vision", {"name": "open_clip", "checkpoint": str(tmp_path), "stage": stage}).eval()
    assert tower.transform.mean == (0.1, 0.2, 0.3) and tower.transform.fit == "squash"
    tower.train()
    tower(pixels(size=64)).tokens.sum().backward()
    assert [n for n, p in tower.named_parameters() if p.grad is None] == []
    tower.requires_grad_(False).eval()
    count = 5 if kind != "convnext" else 4
    with torch.no_grad():
        x = pixels(size=64).contiguous(memory_format=torch.channels_last)
        out = model.visual.forward_intermediates(x, indices=[count + stage], intermediates_only=True)
    (want,) = out["image_intermediates"]
    got = tower(pixels(size=64))
    assert tower.grid == got.grid == tuple(want.shape[-2:]) and "grid" in tower.provides
    assert torch.equal(got.tokens, want.flatten(2).transpose(1, 2))  # bit for bit
    other = build("vision", {"name": "open_clip", "checkpoint": str(tmp_path), "stage": stage, "image_size": 96})
    assert other.eval()(pixels(size=96)).tokens.shape == (2, other.num_tokens, tower.hidden_size)
    with torch.device("meta"):
        assert build("vision", {"name": "open_clip", "checkpoint": str(tmp_path), "stage": stage}).grid == tower.grid


def test_weights_of_something_else_are_refused(saved, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    save_file({"text.weight": torch.zeros(2)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ZooError, match="holds no visual tower of open_clip"):
        build("vision", {"name": "open_clip", "checkpoint": str(tmp_path)})
    save_file({"visual.proj": torch.zeros(2)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ZooError, match="do not fit its architecture"):
        build("vision", {"name": "open_clip", "checkpoint": str(tmp_path)})
