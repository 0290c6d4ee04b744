"""Encoders of timm against timm itself, on tiny variants of named models, in the folders that it saves."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.vision_builders import TIMM, own_pooling, pixels, save_timm, timm_model
from zoo.registry import ZooError, build
from zoo.vision.images.transform import to_pixels

# Their scores are q.k and no more; BEiT adds a bias for each pair of positions, SigLIP has no [CLS].
WITH_ROW = set(TIMM) - {"beit_base_patch16_224", "vit_base_patch16_siglip_224"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = timm_model(name)
            save_timm(model, folder)
            made[name] = str(folder), model
        return made[name]

    return get


def reference(model, layer):
    """Patches, prefix and the whole attention matrix of one block, with timm's own unfused attention."""
    index = layer + 4 if layer < 0 else layer - 1
    matrix = []
    attention = model.blocks[index].attn
    handle = attention.attn_drop.register_forward_pre_hook(lambda m, args: matrix.append(args[0]))
    with torch.no_grad():
        (out,) = model.forward_intermediates(
            pixels(), indices=[index], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        attention.fused_attn, before = False, attention.fused_attn
        model.forward_features(pixels())
        attention.fused_attn = before
    handle.remove()
    patches, prefix = out if isinstance(out, tuple) else (out, None)
    return patches, prefix, matrix[-1]


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_and_row_are_timms(saved, name, layer):
    folder, model = saved(name)
    tower = build("vision", {"name": "timm", "checkpoint": folder, "layer": layer}).requires_grad_(False).eval()
    out = tower(pixels(), need=tower.provides)
    patches, prefix, matrix = reference(model, layer)
    assert torch.equal(out.tokens, patches)  # bit for bit: leaving out later blocks changes nothing
    if prefix is not None:
        assert torch.equal(out.prefix, prefix)
    assert ("cls_attention" in tower.provides) == (name in WITH_ROW)
    if name in WITH_ROW:
        p = prefix.shape[1]
        torch.testing.assert_close(out.cls_attention, matrix[:, :, 0, p:].mean(1), atol=1e-6, rtol=0)
    assert ("key_attention" in tower.provides) == (name != "beit_base_patch16_224")
    if out.key_attention is not None:
        p = matrix.shape[-1] - 16
        torch.testing.assert_close(out.key_attention, matrix.mean((1, 2))[:, p:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("layer", "norm"), [(-1, True), (-2, False), (1, True)])
def test_the_pooling_row_is_timms_whatever_the_layer(saved, layer, norm):
    folder, model = saved("vit_base_patch16_siglip_224")
    config = {"name": "timm", "checkpoint": folder, "layer": layer, "norm": norm, "pooling_head": True}
    tower = build("vision", config).eval()
    with torch.no_grad():
        want = own_pooling(model, "timm")(model.forward_features(pixels()))
    torch.testing.assert_close(tower(pixels(), need=tower.provides).pooling_attention, want, atol=1e-6, rtol=0)
    whole = build("vision", {**config, "pooling_head": False, "summary": True}).eval()
    with torch.no_grad():
        summary = model.forward_head(model.forward_features(pixels()), pre_logits=True)
    torch.testing.assert_close(whole(pixels(), need=frozenset({"summary"})).summary, summary, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_small_patch16_dinov3"])
def test_the_final_norm_is_timms(saved, name):
    folder, model = saved(name)
    tower = build("vision", {"name": "timm", "checkpoint": folder, "layer": -1, "norm": True}).eval()
    with torch.no_grad():
        want = model.forward_features(pixels())[:, -16:]
        torch.testing.assert_close(tower(pixels()).tokens, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_another_image_size_interpolates_positions(saved, name):
    folder, model = saved(name)
    tower = build("vision", {"name": "timm", "checkpoint": folder, "image_size": 48}).eval()
    assert tower.grid == (6, 6) and tower.transform.size == (48, 48)
    model = timm_model(name)
    model.set_input_size((48, 48))
    with torch.no_grad():
        (want,) = model.forward_intermediates(pixels(size=48), indices=[2], output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(tower(pixels(size=48)).tokens, want, atol=1e-5, rtol=1e-5)


def test_meta_builds_named_models_without_weights(saved, tmp_path):
    with torch.device("meta"):
        clip = build(
            "vision", {"name": "timm", "model": "vit_base_patch16_clip_224.openai", "checkpoint": "pretrained"}
        )
        big = build("vision", {"name": "timm", "model": "vit_so400m_patch14_siglip_384", "image_size": 224})
        folder, _ = saved("vit_tiny_patch16_224")
        shutil.copy(f"{folder}/config.json", tmp_path)
        local = build("vision", {"name": "timm", "checkpoint": str(tmp_path)})
    assert clip.grid == (14, 14) and clip.hidden_size == 768 and len(clip.tower.blocks) == 11
    assert clip.transform.mean[0] == pytest.approx(0.4815, abs=1e-3)
    assert big.grid == (16, 16) and big.provides == {"grid", "key_attention", "keys"} and big.transform.fit == "crop"
    assert local.grid == (4, 4)
    assert {p.device.type for t in (clip, big, local) for p in t.parameters()} == {"meta"}
    with pytest.raises(ZooError, match=r"has no model.safetensors"):
        build("vision", {"name": "timm", "checkpoint": str(tmp_path)})


def test_unknown_names_name_the_nearest():
    with pytest.raises(ZooError, match=r"named 'vit_bas_patch16_224'. Did you mean 'vit_base_patch16_224'"):
        build("vision", {"name": "timm", "model": "vit_bas_patch16_224"})
    with pytest.raises(ZooError, match=r"named 'openay'. Did you mean 'openai'"):
        build("vision", {"name": "timm", "model": "vit_base_patch16_clip_224.openay"})


def test_wrong_options_are_refused():
    for options, message in [
        ({"stem": "cnv"}, "No stem named 'cnv'"),
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"checkpoint": "pretrained"}, "loads timm.s weights of a `model`: name one"),
        ({"stem": "conv", "patch_size": 14}, "power of two"),
        ({"model": "vit_tiny_patch16_224", "image_size": 100}, "patch_size 16 does not divide image_size 100"),
    ]:
        with pytest.raises(ZooError, match=message):
            build("vision", {"name": "timm", **options})


def test_zero_init_starts_as_the_identity():
    config = {"name": "timm", "image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 2, "zero_init": True}
    tower = build("vision", {**config, "layer": -1, "bias": False, "stem": "conv", "cls_token": False})
    with torch.no_grad():
        stem = tower.tower.patch_embed(pixels()) + tower.tower.pos_embed
        torch.testing.assert_close(tower(pixels()).tokens, stem)
    assert not any(name.startswith("tower.blocks") and "bias" in name and "norm" not in name
                   for name, _ in tower.named_parameters())  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [
        "deit3",
        "flexivit",
        "vit_medium_patch16_rope",
        "vit_pe_spatial",
        "relpos",
        "eva_giant",
        "beitv2",
        "so400m_patch14_siglip_384",
    ],
)
def test_other_families_build(family):
    import timm

    name = next(n for n in timm.list_models(f"*{family}*"))
    with torch.device("meta"):
        tower = build("vision", {"name": "timm", "model": name})
    out = tower(torch.empty(1, 3, *tower.transform.size, device="meta"), need=tower.provides)
    assert out.tokens.shape == (1, tower.num_tokens, tower.hidden_size)


def test_a_weights_file_goes_with_a_named_model(tmp_path):
    """Weights alone say no sizes, so the model is one of timm's own."""
    import timm

    model = timm.create_model("test_vit")
    save_timm(model, tmp_path)
    file = str(tmp_path / "model.safetensors")
    tower = build("vision", {"name": "timm", "model": "test_vit", "checkpoint": file, "layer": -1}).eval()
    size = model.patch_embed.img_size[0]
    with torch.no_grad():
        (want,) = model.eval().forward_intermediates(
            pixels(size=size), indices=[len(model.blocks) - 1], output_fmt="NLC", intermediates_only=True
        )
        assert torch.equal(tower(pixels(size=size)).tokens, want)
    with pytest.raises(ZooError, match=r"has no config.json. It holds: nothing, it is not a folder"):
        build("vision", {"name": "timm", "checkpoint": file})


def test_a_named_model_takes_the_pixels_of_its_weights(tmp_path):
    """The config in a folder states them, also where the model is named beside it, on the meta device too."""
    import timm
    from timm.models._hub import save_for_hf

    model = timm.create_model("test_convnext")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.3,) * 3, "crop_mode": "squash"}
    save_for_hf(model, tmp_path, safe_serialization=True)
    alone = {"name": "timm", "checkpoint": str(tmp_path)}
    want = build("vision", alone).transform
    assert (want.mean, want.fit) == ((0.1, 0.2, 0.3), "squash")
    named = {**alone, "model": "test_convnext"}
    assert build("vision", named).transform == want
    with torch.device("meta"):
        assert build("vision", named).transform == want
        hub = {**named, "checkpoint": "timm/nowhere"}  # nothing is fetched for a model without weights
        assert build("vision", hub).transform.size == want.size


def test_a_checkpoint_of_another_library_is_said_to_be_one(tmp_path):
    from transformers import ConvNextConfig

    for name, content in (("timm", {"architecture": "resnet18"}), ("open_clip", None)):
        (tmp_path / name).mkdir()
        file = "config.json" if content else "open_clip_config.json"
        (tmp_path / name / file).write_text(json.dumps(content or {}))
    ConvNextConfig().save_pretrained(tmp_path / "hf")
    for library in ("timm", "hf", "open_clip"):
        for of in {"timm", "hf", "open_clip"} - {library}:
            with torch.device("meta"), pytest.raises(ZooError, match=f"which vision={of} reads"):
                build("vision", {"name": library, "checkpoint": str(tmp_path / of)})


def test_pixels_of_a_checkpoint_have_three_colours(tmp_path):
    content = {"architecture": "test_resnet", "pretrained_cfg": {"mean": [0.1, 0.2], "input_size": [3, 64, 64]}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with torch.device("meta"), pytest.raises(ZooError, match=r"The mean .* has three numbers, got \[0.1, 0.2\]"):
        build("vision", {"name": "timm", "checkpoint": str(tmp_path)})


def test_images_that_are_not_square_may_be_squashed_or_padded():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, :3] = 255  # white at the left end
    means = {}
    for fit in ("", "crop", "squash", "pad"):
        node = {"name": "timm", "image_size": 32, "patch_size": 16, "width": 32, "depth": 2, "heads": 2, "fit": fit}
        transform = build("vision", node).transform
        assert transform.fit == (fit or "crop")
        means[fit] = float(to_pixels(wide, transform).mean())
    assert means[""] == means["crop"] == -1.0  # the middle is black
    assert abs(means["squash"] + 0.5) < 0.02 and abs(means["pad"] + 0.5 / 3) < 0.02  # a third of the height, on grey
    with pytest.raises(ZooError, match="No fit of images named 'stretch'"):
        build("vision", {"name": "timm", "fit": "stretch"})
