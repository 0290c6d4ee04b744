"""Encoders of open_clip: the visual tower of its models, ViT, ResNet or one of timm; the text tower where needed."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import ImageTransform, ZooError, register, unknown
from zoo.registry.foreign import require_model_config
from zoo.vision.encoders.base import (
    CLIP_MEAN,
    CLIP_STD,
    Tower,
    on_meta,
)
from zoo.vision.encoders.checkpoints import (
    fetch,
    is_local,
    place_of,
    read_beside,
    read_json,
    require_filled,
    with_revision,
)
from zoo.vision.encoders.map_runner import TimmMapRunner, require_map_options
from zoo.vision.encoders.open_clip_maps import ResNetMapRunner
from zoo.vision.encoders.open_clip_text import text_tower_of
from zoo.vision.encoders.runner import QueryKey, Runner, block_count, count_with_next
from zoo.vision.encoders.sizes import check_divides, check_sizes
from zoo.vision.encoders.vit_runner import TimmRunner, is_vit
from zoo.vision.images.transform import LIBRARIES

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
FITS = {"shortest": "crop", "squash": "squash", "longest": "pad"}


@dataclass
class OpenClipVisionConfig:
    model: str = ""  # a name of open_clip, e.g. ViT-B-32; empty: the checkpoint's, or the sizes below
    # a tag of `model` (openai, laion2b_s34b_b79k); a hub name, or a folder, with open_clip_config.json and
    # open_clip_model.safetensors; empty: random weights
    checkpoint: str = ""
    revision: str = ""  # branch, tag or commit of a hub checkpoint
    layer: int = -2  # block after which tokens are taken: 1 the first, -1 the last; later ones are removed
    # instead of `layer` where the tower has feature maps (ConvNeXt, FastViT, ResNet): the map that becomes the tokens,
    # 1 the first, -1 the last, with the fewest tokens; later stages are removed
    stage: int = -1
    norm: bool = False  # apply the final norm to the tokens
    image_size: int = 0  # pixels a side; 0: the model's own, positions are interpolated otherwise
    # pillow: as open_clip's own transforms | torchvision: as transformers' image processors, faster, and what
    # `zoo.export` writes; pixels differ by a step or two of a byte
    resample_by: str = "pillow"
    pooling_head: bool = False  # SigLIP: keep the pooling head, and the blocks before it, for a pruner's scores
    summary: bool = False  # SigLIP: keep that head whole, for a pruner that compares frames by its output
    next_block: bool = False  # keep what a pruner reads of the block behind `layer`: its norm, queries and keys
    # what a checkpoint's open_clip_config.json had, in its place: of models saved with all their weights
    architecture: dict[str, Any] = field(default_factory=dict)
    # Sizes, used without `model` and `checkpoint`.
    patch_size: int = 16  # pixels a side
    width: int = 192  # D
    depth: int = 12  # blocks
    heads: int = 3  # attention heads
    mlp_ratio: float = 4.0  # hidden width of the feed-forward part over `width`
    quick_gelu: bool = False  # OpenAI's activation

    def __post_init__(self) -> None:
        if self.resample_by not in LIBRARIES:
            raise unknown("library to resample by", self.resample_by, LIBRARIES)
        if (self.pooling_head or self.summary) and self.next_block:
            raise ZooError("pooling_head, or summary, and next_block need the same blocks: set one of them.")
        if self.architecture and (self.model or self.checkpoint):
            raise ZooError("architecture is a checkpoint's config without its weights: leave model and checkpoint out.")
        if not self.model and not self.checkpoint and not self.architecture:
            check_sizes(self)


@register("vision", "open_clip")
class OpenClipVision(Tower):
    """Towers that wrap a model of timm (SigLIP, EVA-CLIP, ConvNeXt, MobileCLIP) run as timm's encoders do."""

    # What the check may propose beside defaults.
    choices = {"pooling_head": (True,), "summary": (True,), "next_block": (True,)}

    def __init__(self, config: OpenClipVisionConfig) -> None:
        name = config.model or config.checkpoint or "the encoder"
        source, architecture, preprocess = _resolve(config)
        if source and not on_meta():
            require_filled(lambda: _build(architecture, config.image_size, name), [source], f"The config of {name!r}")
        visual = _build(architecture, config.image_size, name)
        if source and not on_meta():
            _load(visual, source, name)
        text = text_tower_of(architecture, visual, source, name, config.norm)
        runner, size = _runner(config, visual, name)
        transform = ImageTransform(
            size=(size[0], size[1]),
            mean=tuple(preprocess.get("mean") or CLIP_MEAN),
            std=tuple(preprocess.get("std") or CLIP_STD),
            resample=preprocess.get("interpolation") or "bicubic",
            fit=FITS.get(preprocess.get("resize_mode") or "shortest", "crop"),
            resample_by=config.resample_by,
        )
        super().__init__(runner, transform, text=text)


def _runner(config: OpenClipVisionConfig, visual: Any, name: str) -> tuple[Runner, tuple[int, int]]:
    """Return what runs a tower, and the (height, width) of its images."""
    inner = getattr(visual, "trunk", visual)
    if hasattr(visual, "transformer") or is_vit(inner):
        if config.stage != -1:
            raise ZooError(f"{name!r} is a ViT, whose tokens are of a block: set layer, not stage.")
        if inner is not visual:
            kept = (config.pooling_head or config.summary, config.next_block, config.summary)
            return TimmRunner(inner, config.layer, config.norm, name, *kept), inner.patch_embed.img_size
        if config.pooling_head or config.summary:
            raise ZooError(
                f"{name!r} has no pooling head with a learned probe: pooling_head and summary must be false."
            )
        return OpenClipRunner(visual, config.layer, config.norm, config.next_block), visual.image_size
    require_map_options(config, f"{name!r} is a {type(inner).__name__}, not a plain ViT")
    height, width = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    kind = ResNetMapRunner if inner is visual else TimmMapRunner
    return kind(inner, config.stage, config.norm, (height, width), name), (height, width)


class OpenClipRunner(Runner):
    """Runs open_clip's own `VisionTransformer` up to a layer; it always has one [CLS] token."""

    num_prefix, has_cls = 1, True

    def __init__(self, tower: Any, layer: int, norm: bool, following: bool = False) -> None:
        super().__init__()
        self.depth = len(tower.transformer.resblocks)
        self.index = block_count(layer, self.depth, lowest=1) - 1
        later = tower.transformer.resblocks[count_with_next(self.index + 1, self.depth) - 1] if following else None
        tower.prune_intermediate_layers([self.index], prune_norm=not norm, prune_head=True)
        tower.attn_pool = None
        if norm and tower.ln_post.normalized_shape != (tower.transformer.width,):
            raise ZooError("The final norm of this encoder comes after its pooling: norm must be false.")
        self.tower, self.norm = tower, norm
        self.hidden_size = tower.transformer.width
        self.grid, self.patch, self.resized = tuple(tower.grid_size), tuple(tower.patch_size), False
        self.num_blocks = len(tower.transformer.resblocks)
        self.has_scores = self.gives_scores(self.num_blocks)
        if self.has_scores:
            self.listen_to(self.num_blocks)
        if later is not None:
            self.put_next(tower.transformer.resblocks, later)

    def resize(self, grid: tuple[int, int]) -> None:
        self.grid, self.resized = grid, True

    def encode(self, pixel_values: Tensor) -> Tensor:
        if self.resized:
            _, (tokens,) = self.tower.transformer.forward_intermediates(self._embed(pixel_values), indices=[self.index])
            return self.tower.ln_post(tokens) if self.norm else tokens  # (M, 1 + N, D)
        out = self.tower.forward_intermediates(
            pixel_values,
            indices=[self.index],
            normalize_intermediates=self.norm,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)  # (M, 1 + N, D)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Embed patches and [CLS] with resampled positions, which open_clip does only when it reads a checkpoint."""
        from timm.layers import resample_abs_pos_embed

        tower = self.tower
        patches = tower.conv1(pixel_values).flatten(2).transpose(1, 2)  # (M, N, D)
        first = tower.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        own = tower.positional_embedding.unsqueeze(0)  # (1, 1 + N0, D)
        positions = resample_abs_pos_embed(own, new_size=list(self.grid), old_size=list(tower.grid_size))
        x = torch.cat([first, patches], dim=1) + positions.to(patches.dtype)
        return tower.ln_pre(tower.patch_dropout(x))

    def attention(self, block: int) -> Any:
        return self.tower.transformer.resblocks[block - 1].attn

    def gives_scores(self, block: int) -> bool:
        return type(self.attention(block)) is nn.MultiheadAttention

    def hook(self, block: int) -> None:
        self.attention(block).register_forward_pre_hook(partial(self._keep, block))

    def _keep(self, block: int, module: Any, args: tuple[Tensor, ...]) -> None:
        """Compute q and k from the attention's input: torch's `MultiheadAttention` does not expose them."""
        if (taken := self.wanted(block)) is None:
            return
        looks = slice(None) if "key_attention" in taken.wants else slice(1)
        x, width = args[0], module.embed_dim  # (M, 1 + N, D)
        weight, bias = module.in_proj_weight, module.in_proj_bias
        with torch.no_grad():
            taken.query = F.linear(x[:, looks], weight[:width], bias[:width])  # (M, 1 or 1 + N, D)
            taken.key = F.linear(x, weight[width : 2 * width], bias[width : 2 * width])  # (M, 1 + N, D)

    def query_key(self, block: int, taken: QueryKey) -> tuple[Tensor, Tensor, float]:
        assert taken.query is not None and taken.key is not None, f"the hook of block {block} did not fire"
        heads = (self.attention(block).num_heads, -1)
        query = taken.query.unflatten(-1, heads).transpose(1, 2)  # (M, H, 1 or 1 + N, d)
        return query, taken.key.unflatten(-1, heads).transpose(1, 2), query.shape[-1] ** -0.5

    def final_norm(self) -> nn.Module:
        return self.tower.ln_post

    def set_attention(self, name: str) -> None:
        """Do nothing: torch's `MultiheadAttention` runs its fused kernel."""

    def set_gradient_checkpointing(self, enable: bool) -> None:
        self.tower.set_grad_checkpointing(enable)


def _resolve(config: OpenClipVisionConfig) -> tuple[Path | None, dict[str, Any], dict[str, Any]]:
    """Find the weights file (none for random weights), the architecture and the preprocessing."""
    import open_clip

    if config.architecture:
        require_model_config(config.architecture, "The architecture of the encoder")
        told = dict(config.architecture)
        return None, told.get("model_cfg", told), told.get("preprocess_cfg", {})
    if not config.model and not config.checkpoint:
        vision = {
            "image_size": config.image_size or 224,
            "patch_size": config.patch_size,
            "width": config.width,
            "layers": config.depth,
            "head_width": config.width // config.heads,
            "mlp_ratio": config.mlp_ratio,
        }
        return None, {"embed_dim": config.width, "vision_cfg": vision, "quick_gelu": config.quick_gelu}, {}
    place = place_of(config.checkpoint)
    hub = "/" in place or is_local(place)
    source = with_revision(place, config.revision) if hub else place
    if not config.model:
        told = read_json(source, CONFIG)
        weights = None if on_meta() else fetch(source, WEIGHTS)
        return weights, told.get("model_cfg", told), told.get("preprocess_cfg", {})
    architecture = open_clip.get_model_config(config.model)
    if architecture is None:
        raise unknown("open_clip model", config.model, open_clip.list_models())
    if not source:
        return None, architecture, {}
    if hub:
        told = read_beside(source, CONFIG, reach=not on_meta())
        stated = told.get("model_cfg", told)
        if isinstance(stated, dict) and "quick_gelu" in stated:  # no shape shows the activation
            architecture["quick_gelu"] = stated["quick_gelu"]
        return None if on_meta() else fetch(source, WEIGHTS), architecture, told.get("preprocess_cfg", {})
    tag = open_clip.get_pretrained_cfg(config.model, config.checkpoint)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(config.model)
        raise unknown(f"weights of open_clip model {config.model!r}", config.checkpoint, tags)
    # The activation belongs to the weights, not to the architecture: OpenAI's were trained with QuickGELU.
    architecture["quick_gelu"] = tag.get("quick_gelu", architecture.get("quick_gelu", False))
    if on_meta():
        return None, architecture, tag
    place, _, filename = (tag.get("hf_hub") or "").rpartition("/")
    if not place:
        raise ZooError(f"open_clip has no safetensors weights {config.checkpoint!r} of {config.model!r} on the hub.")
    weights = fetch(
        with_revision(place, config.revision),
        filename.replace("pytorch_model.bin", "model.safetensors") or WEIGHTS,
    )
    return weights, architecture, tag


def repository(config: OpenClipVisionConfig) -> str:
    """Return the repository of the hub that a tag's weights are in; empty: the weights are named otherwise."""
    import open_clip

    if not config.model or "/" in config.checkpoint or is_local(config.checkpoint):
        return ""
    tag = open_clip.get_pretrained_cfg(config.model, config.checkpoint) or {}
    return str(tag.get("hf_hub") or "").rpartition("/")[0]


def description(config: OpenClipVisionConfig) -> dict[str, Any]:
    """Return what an encoder's checkpoint or name describes, as the option `architecture` takes it."""
    with torch.device("meta"):
        _, architecture, preprocess = _resolve(config)
    told = {k: preprocess[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in preprocess}
    plain: dict[str, Any] = json.loads(json.dumps({"model_cfg": architecture, "preprocess_cfg": told}))
    return plain


def _build(architecture: dict[str, Any], image_size: int, name: str) -> Any:
    from open_clip.model import _build_vision_tower

    if not isinstance(architecture, dict) or not isinstance(architecture.get("vision_cfg"), dict):
        raise ZooError(f"The config of {name!r} has no 'vision_cfg'.")
    vision = dict(architecture["vision_cfg"])
    vision["timm_model_pretrained"] = False  # weights come from the checkpoint, never from timm
    if not re.fullmatch(r"[\w.]*", str(vision.get("timm_model_name") or "")):
        raise ZooError(f"The config of {name!r} names the repository {vision['timm_model_name']!r} as its encoder.")
    if image_size:
        vision["image_size"] = image_size
    visual = _build_vision_tower(architecture["embed_dim"], vision, architecture.get("quick_gelu", False))
    inner = getattr(visual, "trunk", visual)
    if image_size and (patch := getattr(getattr(inner, "patch_embed", inner), "patch_size", None)):
        check_divides(patch[0], image_size)
    if image_size and hasattr(visual, "trunk"):  # timm's trunk ignores `image_size` of the config
        visual.set_input_size(image_size)
    if hasattr(visual, "attnpool"):  # a ResNet: its maps are ahead of it, and it has positions for one size
        visual.attnpool = nn.Identity()
    return visual


def _load(visual: Any, path: Path, name: str) -> None:
    """Load the visual part of a checkpoint, without reading the text tower."""
    from open_clip.model import resize_pos_embed
    from safetensors import SafetensorError, safe_open
    from timm.models.vision_transformer import resample_abs_pos_embed

    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith("visual.")]  # noqa: SIM118  not a mapping
            kept = [k for k in keys if not k.startswith("visual.attnpool.")]  # of a ResNet
            state: dict[str, Tensor] = OrderedDict((key, file.get_tensor(key)) for key in kept)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{str(path)!r} cannot be read: {error}") from error
    if not keys:
        raise ZooError(f"{path.name} of {name!r} holds no visual tower of open_clip (weights named visual.*).")
    resize_pos_embed(state, SimpleNamespace(visual=visual))
    trunk, position = getattr(visual, "trunk", None), "visual.trunk.pos_embed"
    if trunk is not None and position in state and state[position].shape != trunk.pos_embed.shape:
        prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        state[position] = resample_abs_pos_embed(
            state[position], new_size=list(trunk.patch_embed.grid_size), num_prefix_tokens=prefix
        )
    try:
        visual.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
    except RuntimeError as error:
        raise ZooError(f"The weights of {name!r} do not fit its architecture: {error}") from error
