"""Convert encoders of timm and open_clip to equivalent encoders of transformers.

A plain ViT is read into one form, whatever the names of its weights, and written as the class that supports all of it:
CLIP's with a norm before the blocks, DINOv2's with a [CLS] token, else SigLIP's. Missing biases become zeros, and the
scale of a residual branch becomes DINOv2's layer scale or is multiplied into the last matrix of the branch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.vision.encoders.next_block import NextBlock

Pair = tuple[Tensor, Tensor | None]  # weight and bias


@dataclass
class Block:
    """A block of a ViT: norms, attention and feed-forward layers, and the scales (D,) of both branches."""

    norm1: Pair
    query: Pair
    key: Pair
    value: Pair
    out: Pair
    scale1: Tensor | None
    norm2: Pair
    up: Pair
    down: Pair
    scale2: Tensor | None


@dataclass
class PlainViT:
    """The weights of a standard ViT.

    Attributes:
        patch: of the convolution that embeds patches, (D, 3, p, p) and (D,).
        cls: (D,); None: without a [CLS] token.
        positions: (1 + N, D), the [CLS] token's first, or (N, D).
        pre_norm: ahead of the blocks.
        activation: by its name in transformers.
        eps: of the norms.
    """

    patch: Pair
    cls: Tensor | None
    positions: Tensor
    pre_norm: Pair | None
    blocks: list[Block]
    heads: int
    activation: str
    eps: float


def plain_vit(tower: Any) -> PlainViT:
    """Read a tower of timm or open_clip.

    Raises:
        ZooError: it has what no encoder of transformers has, with what that is.
    """
    from open_clip.transformer import VisionTransformer as OpenClipViT
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    readers = {TimmViT: _of_timm, OpenClipViT: _of_open_clip}
    if type(tower) not in readers:
        raise _no_twin(f"it is a {type(tower).__name__}, not a plain ViT")
    return readers[type(tower)](tower)


def _no_twin(why: str) -> ZooError:
    return ZooError(f"no encoder of transformers computes what the vision part does: {why}")


def _of_timm(vit: Any) -> PlainViT:
    from timm.layers import Attention, LayerScale, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block as TimmBlock

    if type(vit.patch_embed) is not PatchEmbed or _is_there(vit.patch_embed.norm):
        raise _no_twin(f"patches are embedded by a {type(vit.patch_embed).__name__}, not by one convolution")
    if vit.num_reg_tokens:
        raise _no_twin(f"it has {vit.num_reg_tokens} register tokens")
    if vit.pos_embed is None:
        raise _no_twin("it has no learnt positions")
    cls, positions = (None if vit.cls_token is None else vit.cls_token[0, 0]), vit.pos_embed[0]
    if cls is not None and vit.no_embed_class:
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    blocks, whole = [], [b for b in vit.blocks if not isinstance(b, NextBlock)]
    for block in whole:
        attention, mlp = block.attn, block.mlp
        plain = (type(block), type(attention), type(mlp)) == (TimmBlock, Attention, Mlp)
        if not plain or _is_there(getattr(attention, "gate", None)) or attention.proj.in_features != vit.embed_dim:
            raise _no_twin(f"its blocks are made of {type(attention).__name__} and {type(mlp).__name__}")
        inside = (attention.q_norm, attention.k_norm, getattr(attention, "norm", None), mlp.norm)
        if any(map(_is_there, inside)):
            raise _no_twin("it has norms inside of attention or feed-forward layers")
        scales = [scale.gamma if type(scale) is LayerScale else None for scale in (block.ls1, block.ls2)]
        blocks.append(
            Block(_pair(block.norm1), *_thirds(attention.qkv.weight, attention.qkv.bias), _pair(attention.proj),
                  scales[0], _pair(block.norm2), _pair(mlp.fc1), _pair(mlp.fc2), scales[1])
        )  # fmt: skip
    norms = [n for block in whole for n in (block.norm1, block.norm2)]
    pre_norm = vit.norm_pre if _is_there(vit.norm_pre) else None
    return PlainViT(
        _pair(vit.patch_embed.proj), cls, positions, None if pre_norm is None else _pair(pre_norm), blocks,
        vit.blocks[0].attn.num_heads, _activation(vit.blocks[0].mlp.act), _eps([*norms, pre_norm]),
    )  # fmt: skip


def _of_open_clip(vit: Any) -> PlainViT:
    from open_clip.transformer import LayerScale, ResidualAttentionBlock

    blocks, whole = [], [b for b in vit.transformer.resblocks if not isinstance(b, NextBlock)]
    for block in whole:
        if type(block) is not ResidualAttentionBlock:
            raise _no_twin(f"its blocks are {type(block).__name__}")
        attention = block.attn
        scales = [scale.gamma if type(scale) is LayerScale else None for scale in (block.ls_1, block.ls_2)]
        blocks.append(
            Block(_pair(block.ln_1), *_thirds(attention.in_proj_weight, attention.in_proj_bias),
                  _pair(attention.out_proj), scales[0], _pair(block.ln_2), _pair(block.mlp.c_fc),
                  _pair(block.mlp.c_proj), scales[1])
        )  # fmt: skip
    first = vit.transformer.resblocks[0]
    norms = [n for block in whole for n in (block.ln_1, block.ln_2)]
    pre_norm = vit.ln_pre if _is_there(vit.ln_pre) else None
    return PlainViT(
        _pair(vit.conv1), vit.class_embedding, vit.positional_embedding, None if pre_norm is None else _pair(pre_norm),
        blocks, first.attn.num_heads, _activation(first.mlp.gelu), _eps([*norms, pre_norm]),
    )  # fmt: skip


def as_transformers(vit: PlainViT) -> tuple[Any, dict[str, Tensor]]:
    """Convert a plain ViT to a config of transformers, and its weights by their names in files.

    Returns:
        The config, without the final norm's epsilon meaning anything, and the weights.
    """
    width, _, patch, _ = vit.patch[0].shape
    inner = vit.blocks[0].up[0].shape[0]
    side = round((len(vit.positions) - (vit.cls is not None)) ** 0.5)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.heads,
        "hidden_act": vit.activation,
        "layer_norm_eps": vit.eps,
        "image_size": side * patch,
        "patch_size": patch,
    }
    if side**2 != len(vit.positions) - (vit.cls is not None):
        raise _no_twin("its images are not square")
    if vit.pre_norm is None and vit.cls is not None:
        if inner % width:
            raise _no_twin(f"its feed-forward layers are {inner} wide, which is not a multiple of {width}")
        return _as_dinov2(vit, sizes, inner // width)
    return _as_clip_or_siglip(vit, {**sizes, "intermediate_size": inner})


def _as_dinov2(vit: PlainViT, sizes: dict[str, Any], ratio: int) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Dinov2Config

    assert vit.cls is not None, "asked before"
    state = dict(_linear("embeddings.patch_embeddings.projection", vit.patch))
    state["embeddings.cls_token"] = vit.cls.view(1, 1, -1)
    state["embeddings.position_embeddings"] = vit.positions[None]
    for number, block in enumerate(vit.blocks):
        name = f"encoder.layer.{number}"
        state |= dict(_linear(f"{name}.norm1", block.norm1)) | dict(_linear(f"{name}.norm2", block.norm2))
        for part, pair in (("query", block.query), ("key", block.key), ("value", block.value)):
            state |= dict(_linear(f"{name}.attention.attention.{part}", pair))
        state |= dict(_linear(f"{name}.attention.output.dense", block.out))
        state |= dict(_linear(f"{name}.mlp.fc1", block.up)) | dict(_linear(f"{name}.mlp.fc2", block.down))
        for branch, scale in ((1, block.scale1), (2, block.scale2)):
            state[f"{name}.layer_scale{branch}.lambda1"] = torch.ones_like(vit.cls) if scale is None else scale
    return Dinov2Config(**sizes, mlp_ratio=ratio, use_mask_token=False), state


def _as_clip_or_siglip(vit: PlainViT, sizes: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    if vit.pre_norm is not None and vit.cls is None:
        raise _no_twin("it has a norm ahead of its blocks and no [CLS] token")
    weight, bias = vit.patch
    positions = vit.positions
    state: dict[str, Tensor] = {"embeddings.patch_embedding.weight": weight}
    if vit.pre_norm is None:
        state["embeddings.patch_embedding.bias"] = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias
    else:
        assert vit.cls is not None, "asked above"
        state["embeddings.class_embedding"] = vit.cls
        state |= dict(_linear("pre_layrnorm", vit.pre_norm))
        if bias is not None:  # CLIP's patch embedding has none: it is added to the positions
            positions = torch.cat([positions[:1], positions[1:] + bias])
    state["embeddings.position_embedding.weight"] = positions
    for number, block in enumerate(vit.blocks):
        name = f"encoder.layers.{number}"
        state |= dict(_linear(f"{name}.layer_norm1", block.norm1)) | dict(_linear(f"{name}.layer_norm2", block.norm2))
        for part, pair in (("q", block.query), ("k", block.key), ("v", block.value)):
            state |= dict(_linear(f"{name}.self_attn.{part}_proj", pair))
        state |= dict(_linear(f"{name}.self_attn.out_proj", _scaled(block.out, block.scale1)))
        state |= dict(_linear(f"{name}.mlp.fc1", block.up))
        state |= dict(_linear(f"{name}.mlp.fc2", _scaled(block.down, block.scale2)))
    if vit.pre_norm is None:
        return SiglipVisionConfig(**sizes, vision_use_head=False), state
    return CLIPVisionConfig(**sizes), state


def _linear(name: str, pair: Pair) -> Iterator[tuple[str, Tensor]]:
    weight, bias = pair
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight.new_zeros(weight.shape[0]) if bias is None else bias


def _scaled(pair: Pair, scale: Tensor | None) -> Pair:
    """Fold a scale (D,) of a linear layer's output into its weights."""
    weight, bias = pair
    if scale is None:
        return pair
    return weight * scale[:, None], None if bias is None else bias * scale


def _pair(module: Any) -> Pair:
    return module.weight, module.bias


def _thirds(weight: Tensor, bias: Tensor | None) -> tuple[Pair, Pair, Pair]:
    """Split the fused projection of queries, keys and values."""
    biases = [None] * 3 if bias is None else bias.chunk(3)
    one, two, three = zip(weight.chunk(3), biases, strict=True)
    return one, two, three


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and type(module) is not nn.Identity


def _activation(module: nn.Module) -> str:
    """Return transformers' name of an activation of timm or open_clip."""
    kind = type(module).__name__
    if kind == "GELU":
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_pytorch_tanh"
    names = {"GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu", "SiLU": "silu"}
    if kind not in names:
        raise _no_twin(f"its activation is {kind}")
    return names[kind]


def _eps(norms: list[Any]) -> float:
    """Return the epsilon of all norms."""
    found = {norm.eps for norm in norms if norm is not None}
    if len(found) != 1 or any(not isinstance(norm, nn.LayerNorm) for norm in norms if norm is not None):
        raise _no_twin("its norms are not all layer norms of one epsilon")
    return found.pop()
