"""The same CLIP weights give the same image tokens through all three libraries."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.vision_builders import open_clip_model, pixels, save_open_clip
from zoo.registry import build


def to_transformers(state):
    """Weights of open_clip's visual tower under transformers' names."""
    fixed = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
        "transformer.resblocks": "encoder.layers",
    }
    out = {}
    for key, value in state.items():
        if not key.startswith("visual.") or key == "visual.proj":
            continue
        name = key.removeprefix("visual.")
        for theirs, ours in fixed.items():
            name = name.replace(theirs, ours)
        if "attn.in_proj_" in name:
            for part, letter in zip(value.chunk(3), "qkv", strict=True):
                out[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part.contiguous()
        else:
            out[name] = value.contiguous()
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    root = tmp_path_factory.mktemp("clip")
    model, architecture = open_clip_model()
    save_open_clip(model, architecture, root / "open_clip")

    config = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8, intermediate_size=64,
        hidden_act="quick_gelu",
    )  # fmt: skip
    tower = CLIPVisionModel(config)
    tower.load_state_dict(to_transformers(model.state_dict()))
    tower.save_pretrained(root / "hf")

    (root / "timm").mkdir()
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items() if k.startswith("visual.")}
    save_file(state, root / "timm" / "model.safetensors")  # timm translates open_clip's names itself
    told = {
        "architecture": "vit_base_patch16_clip_quickgelu_224",
        "num_classes": 16,
        "model_args": {
            "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0,
        },
        "pretrained_cfg": {"num_classes": 16, "input_size": [3, 32, 32]},
    }  # fmt: skip
    (root / "timm" / "config.json").write_text(json.dumps(told))
    return {name: str(root / name) for name in ("hf", "timm", "open_clip")}


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("norm", [False, True])
def test_same_weights_same_tokens(folders, layer, norm):
    outs = {}
    for name, folder in folders.items():
        tower = build("vision", {"name": name, "checkpoint": folder, "layer": layer, "norm": norm}).eval()
        with torch.no_grad():
            outs[name] = tower(pixels(), need=tower.provides)
    for name in ("timm", "open_clip"):
        torch.testing.assert_close(outs[name].tokens, outs["hf"].tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outs[name].prefix, outs["hf"].prefix, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outs[name].cls_attention, outs["hf"].cls_attention, atol=1e-6, rtol=0)
