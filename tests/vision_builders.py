"""Tiny encoders of the three libraries, with weights in which no part is idle, and folders as each saves them."""

import json

import torch
from safetensors.torch import save_file

SIZES = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "heads": 2}

# Every way to build an encoder from sizes.
SIZED = {
    "timm": {"name": "timm", **SIZES},
    "timm_registers": {"name": "timm", **SIZES, "registers": 3},
    "timm_conv": {"name": "timm", **SIZES, "stem": "conv", "cls_token": False},
    "open_clip": {"name": "open_clip", **SIZES},
    "hf_clip": {"name": "hf", **SIZES, "model_type": "clip"},
    "hf_siglip": {"name": "hf", **SIZES, "model_type": "siglip"},
    "hf_siglip_head": {"name": "hf", **SIZES, "model_type": "siglip", "pooling_head": True},
    "hf_siglip2": {"name": "hf", **SIZES, "model_type": "siglip2"},
    "hf_dinov2": {"name": "hf", **SIZES, "model_type": "dinov2"},
    "hf_dinov2_registers": {"name": "hf", **SIZES, "model_type": "dinov2_with_registers"},
    "hf_dinov3": {"name": "hf", **SIZES, "model_type": "dinov3_vit"},
}


def shake(model, seed=0):
    """Give every parameter a value of its own size: fresh models start with zeros, ones and near-uniform attention."""
    generator = torch.Generator().manual_seed(seed)
    fixed = [b for b in model.buffers() if b.is_floating_point()] if getattr(model, "pooling", None) else []
    with torch.no_grad():
        for parameter in [*model.parameters(), *fixed]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def pixels(m=2, size=32, seed=1):
    return torch.randn(m, 3, size, size, generator=torch.Generator().manual_seed(seed))


def own_pooling(model, kind):
    """The row of SigLIP's pooling head by the library's own modules, (M, N), given the normed tokens."""
    if kind == "timm":
        pool = model.attn_pool

        def row(x):
            q = pool.q_norm(pool.q(pool.latent).view(1, pool.num_heads, 1, pool.head_dim))
            k = pool.kv(x).view(len(x), -1, 2, pool.num_heads, pool.head_dim).permute(2, 0, 3, 1, 4)[0]
            return ((q * pool.scale) @ pool.k_norm(k).transpose(-1, -2)).softmax(-1).mean(1)[:, 0]

        return row
    head = model.head
    return lambda x: head.attention(head.probe.repeat(len(x), 1, 1), x, x, need_weights=True)[1][:, 0]


def hf_model(kind):
    """Build a tiny model of transformers: an encoder alone, or a whole CLIP or SigLIP that holds one."""
    import transformers as t

    sizes = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8
    }  # fmt: skip
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text |= {"vocab_size": 99, "max_position_embeddings": 8, "projection_size": 32}
    built = {
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**sizes, intermediate_size=64)),
        "clip_whole": lambda: t.CLIPModel(
            t.CLIPConfig(text_config=text, vision_config={**sizes, "intermediate_size": 64}, projection_dim=16)
        ),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**sizes, intermediate_size=64)),
        "siglip_whole": lambda: t.SiglipModel(
            t.SiglipConfig(text_config=text, vision_config={**sizes, "intermediate_size": 64})
        ),
        "siglip2": lambda: t.Siglip2VisionModel(
            t.Siglip2VisionConfig(
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                patch_size=8,
                num_patches=16,
                intermediate_size=64,
            )
        ),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**sizes, mlp_ratio=2)),
        "dinov2_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=3)
        ),
        "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**sizes, intermediate_size=64, num_register_tokens=3)),
    }
    return shake(built[kind]())


TIMM = {  # architecture -> what makes it tiny
    "vit_tiny_patch16_224": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_small_patch14_reg4_dinov2": {"init_values": 0.5},
    "vit_base_patch16_siglip_224": {},
    "vit_small_patch16_dinov3": {},
    "eva02_tiny_patch14_224": {},
    "beit_base_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
}


def timm_model(name):
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **sizes, **TIMM[name])
    model.made_with = {**sizes, **TIMM[name]}
    return shake(model)


MAPS = {  # architectures of timm with feature maps -> what makes them tiny
    "test_efficientnet": {},
    "test_resnet": {},
    "test_convnext": {},
    "test_nfnet": {},
    "test_byobnet": {},
    "test_mambaout": {},
    "mobilenetv4_conv_small_035": {},
    "fastvit_mci0": {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 3), "window_size": 4
    },
    "swinv2_tiny_window8_256": {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 3), "window_size": 4},
    "hiera_tiny_224": {"embed_dim": 16, "stages": (1, 1, 1, 1)},
    "levit_128s": {
        "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)
    },
    "tiny_vit_5m_224": {"embed_dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "xcit_nano_12_p16_224": {"embed_dim": 32, "depth": 2},
    "cait_xxs24_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}  # fmt: skip
SIZED_BY_IMAGE = ("swin", "hiera", "cait", "xcit", "levit")  # architectures with tables for one size


def settle(model, size=64):
    """Give no weight the value of an idle part, and batch norms the statistics of what reaches them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d)]
        for norm in norms:
            norm.momentum = 0.5
        model.train()
        for seed in range(2 if norms else 0):
            model(pixels(8, size, seed))
    return model.eval()


def timm_map_model(name, size=64):
    import timm

    torch.manual_seed(0)
    sizes = {**MAPS[name], **({"img_size": size} if name.startswith(SIZED_BY_IMAGE) else {})}
    model = timm.create_model(name, num_classes=5, **sizes)
    model.made_with = {"num_classes": 5, **sizes}
    model.pretrained_cfg["input_size"] = (3, size, size)
    return settle(model, size)


def save_timm(model, folder):
    from timm.models import save_for_hf

    save_for_hf(model, folder, model_args=getattr(model, "made_with", None), safe_serialization=True)
    for file in folder.glob("*.bin"):
        file.unlink()


OPEN_CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1},
}


def open_clip_model(**vision):
    import open_clip

    torch.manual_seed(0)
    architecture = {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], **vision}}
    return shake(open_clip.CLIP(**architecture)), architecture


def save_open_clip(model, architecture, folder, **preprocess):
    folder.mkdir(exist_ok=True)
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": architecture, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def clip_checkpoint(folder, kind="clip", tokenizer=True):
    """Save a whole tiny CLIP or SigLIP with its text tower and a tokenizer of letters; returns the model.

    The encoder is that of `hf_model`: the same sizes and weights.
    """
    import transformers as t

    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "?</w>", "<|startoftext|>", "<|endoftext|>"]
    begin, end = len(tokens) - 2, len(tokens) - 1
    model = hf_model(f"{kind}_whole")
    inner = model.config.text_config
    inner.bos_token_id, inner.eos_token_id, inner.pad_token_id = begin, end, end
    model.text_model.eos_token_id = end
    model.save_pretrained(folder)
    if tokenizer:
        t.CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return model
