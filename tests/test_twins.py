"""Encoders of timm and open_clip against the encoders of transformers that they are written as."""

import pytest
import torch

from tests.published_builders import shake
from zoo.published.file_names import as_files
from zoo.published.twins import as_transformers, plain_vit
from zoo.registry import ZooError

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
TIMM = {  # options of timm's VisionTransformer -> type of the twin
    "plain": ({}, "dinov2"),
    "positions of patches only": ({"no_embed_class": True}, "dinov2"),
    "layer scale": ({"init_values": 0.1}, "dinov2"),
    "no biases": ({"qkv_bias": False, "proj_bias": False, "act_layer": "silu"}, "dinov2"),
    "no [CLS]": ({"class_token": False, "global_pool": "avg", "act_layer": "gelu_tanh"}, "siglip_vision_model"),
    "no [CLS], layer scale": (
        {"class_token": False, "global_pool": "", "init_values": 0.1, "mlp_ratio": 2.5}, "siglip_vision_model"
    ),
    "a norm ahead": ({"pre_norm": True}, "clip_vision_model"),
    "a norm ahead, layer scale": ({"pre_norm": True, "init_values": 0.1, "act_layer": "relu"}, "clip_vision_model"),
}  # fmt: skip


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    return shake(VisionTransformer(**{**SIZES, **options}))


def open_clip_vit(**options):
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 4.0}
    return shake(VisionTransformer(**sizes, output_dim=8, **options))


def hidden(tower, kind):
    """What the last block of the twin gives for random pixels, and the pixels."""
    from transformers import AutoModel

    config, state = as_transformers(plain_vit(tower))
    assert config.model_type == kind
    twin = AutoModel.from_config(config).eval()
    names = {id(tensor): name for name, tensor in twin.state_dict(keep_vars=True).items()}
    files = as_files(twin, twin.state_dict(keep_vars=True))
    filled = {names[id(files[name])]: tensor for name, tensor in state.items()}
    left = twin.load_state_dict(filled, strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith(("layernorm", "post_layernorm")) for name in left.missing_keys)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return twin(pixels, output_hidden_states=True).hidden_states[-1], pixels


@pytest.mark.parametrize("case", TIMM)
@torch.no_grad()
def test_a_twin_gives_what_timms_tower_gives(case):
    options, kind = TIMM[case]
    tower = timm_vit(**options)
    got, pixels = hidden(tower, kind)
    (out,) = tower.forward_intermediates(
        pixels, indices=[1], return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
    )
    want = torch.cat([out[1], out[0]], 1) if isinstance(out, tuple) else out
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "clip_vision_model"),
        ({"act_layer": "QuickGELU"}, "clip_vision_model"),
        ({"ls_init_value": 0.1}, "clip_vision_model"),
        ({"no_ln_pre": True}, "dinov2"),
    ],
)
@torch.no_grad()
def test_a_twin_gives_what_open_clips_tower_gives(options, kind):
    from open_clip import transformer

    if "act_layer" in options:
        options = {"act_layer": getattr(transformer, options["act_layer"])}
    tower = open_clip_vit(**options)
    got, pixels = hidden(tower, kind)
    out = tower.forward_intermediates(
        pixels, indices=[1], normalize_intermediates=False, intermediates_only=True, output_fmt="NLC",
        output_extra_tokens=True,
    )  # fmt: skip
    want = torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"qk_norm": True}, "norms inside of attention"),
        ({"scale_mlp_norm": True}, "norms inside of attention or feed-forward"),
        ({"reg_tokens": 2}, "2 register tokens"),
        ({"pos_embed": "none"}, "no learnt positions"),
        ({"act_layer": "mish"}, "its activation is Mish"),
        ({"mlp_ratio": 2.5}, "40 wide, which is not a multiple of 16"),
        ({"pre_norm": True, "class_token": False, "global_pool": "avg"}, r"no \[CLS\] token"),
        ({"img_size": (32, 16)}, "not square"),
    ],
    ids=str,
)
def test_what_has_no_twin_says_why(options, why):
    with pytest.raises(ZooError, match=f"no encoder of transformers computes .*{why}"):
        as_transformers(plain_vit(timm_vit(**options)))


def test_another_architecture_has_no_twin():
    from timm.models.eva import Eva

    with pytest.raises(ZooError, match="it is a Eva, not a plain ViT"):
        plain_vit(Eva(**SIZES))
