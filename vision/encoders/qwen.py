"""The encoders of Qwen-VL and GLM-V: images keep their shapes, and 2 x 2 patches become one token.

An image is a grid of patches of its own size, and attention stays inside of it; a video is one row for each pair of
frames. The merger, which makes a token of the LLM's width of neighbouring patches, belongs to the encoder: pruners get
what it makes. Qwen3-VL also gives maps of middle blocks, each merged, for layers of the LLM (`ImageFeatures.deep`;
DeepStack, arXiv:2406.04334). GLM-4.1V's (arXiv:2507.01006) has positions of a table, bicubic, besides rotary ones.

transformers' own towers run, on the rows of a batch packed one behind the other, with attention by
`zoo.vision.encoders.segments`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import Encoder, ImageFeatures, ImageTransform, UnlikeRows, ZooError, groups_of, register, unknown
from zoo.registry.forward_pass import Pass, current, joined
from zoo.registry.part import block_of
from zoo.registry.versions import checkpoint_activations, keep_activations
from zoo.vision.encoders.attention_scores import column_mean
from zoo.vision.encoders.base import CLIP_MEAN, CLIP_STD, HALF, on_meta
from zoo.vision.encoders.checkpoints import load_part, read_json, with_revision
from zoo.vision.encoders.paddle_ocr import PaddleOCRTower
from zoo.vision.encoders.segments import use_segments
from zoo.vision.images.processors import frames_counted

MERGE = 2  # patches of a token, a side
FRAMES = 2  # of a row: a still image is shown twice


@dataclass(frozen=True)
class Family:
    """A generation: where its tower is in transformers, and what its image processor does by default."""

    module: str  # of transformers.models
    tower: str  # class of the tower; empty: `PaddleOCRTower`
    patch: int  # pixels a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    least: int  # pixels of an image
    width: str = "hidden_size"  # field of the tower's width
    out: str = "out_hidden_size"  # field of the width behind the merger; empty: none, it is the LLM's
    images: str = "Qwen2VLImageProcessor"  # class of its image processor
    frames: int = FRAMES  # of a row
    vit: str = ""  # the model of transformers in the tower; empty: all of it
    attention: tuple[str, ...] = ("attn", "qkv")  # of a block, and in it what gives queries and keys, or each of them
    raster: bool = False  # patches come row by row, not token by token
    read: tuple[tuple[str, tuple[str, ...]], ...] = (("", ("model.visual.", "visual.")),)  # prefixes in checkpoints


FAMILIES = {
    "qwen2_vl": Family(
        "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", 14, CLIP_MEAN, CLIP_STD, 56 * 56, "embed_dim",
        "hidden_size",
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", 14, CLIP_MEAN, CLIP_STD, 56 * 56,
    ),
    "qwen3_vl": Family("qwen3_vl", "Qwen3VLVisionModel", 16, HALF, HALF, 256 * 256),
    "qwen3_vl_moe": Family("qwen3_vl_moe", "Qwen3VLMoeVisionModel", 16, HALF, HALF, 256 * 256),
    "glm4v": Family(
        "glm4v", "Glm4vVisionModel", 14, CLIP_MEAN, CLIP_STD, 112 * 112 // 2, images="Glm4vImageProcessor"
    ),
    "glm4v_moe": Family(
        "glm4v_moe", "Glm4vMoeVisionModel", 14, CLIP_MEAN, CLIP_STD, 112 * 112 // 2, images="Glm4vImageProcessor"
    ),
    "paddleocr_vl": Family(
        "paddleocr_vl", "", 14, CLIP_MEAN, CLIP_STD, 384 * 384, out="", images="PaddleOCRVLImageProcessor", frames=1,
        vit="visual", attention=("self_attn", "q_proj", "k_proj"), raster=True,
        read=(("visual", ("model.visual.", "visual.")), ("projector", ("model.projector.", "mlp_AR."))),
    ),
}  # fmt: skip


@dataclass
class QwenVisionConfig:
    checkpoint: str = ""  # hub name or folder of a model that holds the encoder; empty: random weights
    revision: str = ""  # branch, tag or commit of a hub checkpoint
    min_pixels: int = 0  # least pixels of an image, smaller ones are enlarged; 0: the family's
    max_pixels: int = 1024 * 1024  # most pixels of an image, larger ones are made smaller
    # Sizes, used without a `checkpoint`. The families: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, glm4v,
    # glm4v_moe, paddleocr_vl.
    model_type: str = "qwen2_vl"  # family
    patch_size: int = 0  # pixels a side; 0: the family's, 14 or 16
    width: int = 192  # of a patch inside the encoder
    out_width: int = 0  # D, of a token behind the merger, for projector=identity the LLM's; 0: `width`
    depth: int = 12  # blocks
    heads: int = 3  # attention heads
    mlp_ratio: float = 4.0  # hidden width of the feed-forward part over `width`; of glm4v: of the merger's
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the family's transformers config
    # Pixels; empty: the family's.
    mean: list[float] = field(default_factory=list)  # of RGB in [0, 1]
    std: list[float] = field(default_factory=list)  # of RGB in [0, 1]

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise unknown("model_type", self.model_type, FAMILIES)
        if self.checkpoint and self.extra:
            raise ZooError(f"extra is for random weights; the checkpoint {self.checkpoint!r} has its own config.")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise ZooError(f"{name} must be three numbers, got {getattr(self, name)}.")
        side = (self.patch_size or FAMILIES[self.model_type].patch) * MERGE
        if self.max_pixels < max(self.min_pixels, side**2) or self.min_pixels < 0:
            raise ZooError(
                f"max_pixels must be at least min_pixels and those of a token, {side**2}, and min_pixels at least 0; "
                f"got min_pixels {self.min_pixels}, max_pixels {self.max_pixels}."
            )
        if not self.checkpoint and (self.heads < 1 or self.width % (4 * self.heads) or self.depth < 1):
            raise ZooError(
                "width must be a multiple of 4 * heads (rotary positions of two axes) and depth at least 1, got width "
                f"{self.width}, heads {self.heads}, depth {self.depth}."
            )
        if self.model_type == "qwen2_vl" and self.mlp_ratio != int(self.mlp_ratio):
            raise ZooError(f"mlp_ratio of qwen2_vl is a whole number, got {self.mlp_ratio}.")


@register("vision", "qwen_vision")
class QwenVision(Encoder, nn.Module):
    """Images of any shape within a number of pixels; tokens of 2 x 2 patches, attention by rows."""

    native = True
    streams = True  # may be built on the meta device and filled with weights afterwards

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        source = with_revision(config.checkpoint, config.revision)
        name, spec, out = _from_json(source) if source else (config.model_type, config_from_sizes(config), 0)
        self.family = family = FAMILIES[name]
        self.hidden_size = int(getattr(spec, family.out)) if family.out else out or config.out_width or config.width
        self.tower: Any = _class(family)(spec, *([] if family.out else [self.hidden_size]))
        if source and not on_meta():
            for part, prefixes in family.read:
                load_part(source, self.tower.get_submodule(part), prefixes, "encoder")
        if self.tower.config._attn_implementation == "sdpa":
            use_segments(self.tower)
        frames = getattr(spec, "temporal_patch_size", 1)
        if spec.spatial_merge_size != MERGE or frames != family.frames:
            raise ZooError(
                f"Its encoder merges {spec.spatial_merge_size} x {spec.spatial_merge_size} patches of {frames} frames; "
                f"{MERGE} x {MERGE} of {family.frames} are supported."
            )
        patch = int(spec.patch_size)
        self.depth = len(self.tower.blocks)
        self.deep = len(getattr(spec, "deepstack_visual_indexes", ()))
        self.patch_shape = (MERGE**2, 3 * frames * patch**2)
        self.heads = int(getattr(spec, "num_heads", 0) or spec.num_attention_heads)
        self.window = int(spec.window_size) // (MERGE * patch) if hasattr(spec, "window_size") else 0  # tokens a side
        if hasattr(spec, "window_size") and not self.window:
            raise ZooError(f"window_size must be at least a token's side, {MERGE * patch}, got {spec.window_size}.")
        whole = spec.fullatt_block_indexes if self.window else range(self.depth)
        self.whole = sorted(i for i in whole if i < self.depth)  # blocks that attend to whole rows
        self.scored = self.whole[-1] if self.whole else -1  # block whose attention is asked for
        self.provides = frozenset({"grid", *(("key_attention", "keys") if self.whole else ())})
        self.attention_blocks = self.depth if self.whole else 0
        self.lacks = {
            **dict.fromkeys(("cls_attention", "prefix_tokens", "next_block"), "it has no [CLS]."),
            "text_tower": "no text tower was trained with it.",
            **{f"key_attention@{i + 1}": self._windowed(i + 1) for i in range(self.depth) if i not in self.whole},
        }
        least = config.min_pixels or family.least
        counted = frames_counted(family.images)
        mean, std = tuple(config.mean) or family.mean, tuple(config.std) or family.std
        side = patch * MERGE
        if config.max_pixels < side**2:  # a checkpoint's patches may be larger than the options'
            raise ZooError(f"max_pixels must be at least those of a token, {side**2}, got {config.max_pixels}.")
        self.grid = _grid_of_most(config.max_pixels // side**2)
        size = (self.grid[0] * side, self.grid[1] * side)
        self.transform = ImageTransform(size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
        self.pictures: Mapping[str, Any] = {
            "image_processor_type": family.images,
            "patch_size": patch,
            "merge_size": MERGE,
            "temporal_patch_size": frames,
            "size": {
                "shortest_edge": min(least, config.max_pixels) * counted,
                "longest_edge": config.max_pixels * counted,
            },
            "image_mean": list(mean),
            "image_std": list(std),
        }
        self.alone = Pass()
        self._listens: set[int] = set()  # blocks with hooks

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        return self.grid[0] * self.grid[1]

    def prepare(self, need: frozenset[str]) -> None:
        """Put hooks on the block whose attention is asked for."""
        for block in self._blocks(need) - self._listens:
            self._listens.add(block)
            name, *parts = self.family.attention
            attention = self.tower.blocks[block].get_submodule(name)
            attention.register_forward_pre_hook(partial(_keep_position, self), with_kwargs=True)
            for part in parts:
                attention.get_submodule(part).register_forward_hook(partial(_keep_qkv, self, block))

    def _blocks(self, need: frozenset[str]) -> set[int]:
        """Name the blocks, from 0, whose attention is asked for."""
        named = {word: block_of(word) for word in need}
        found = {block - 1 for block in named.values() if block is not None}
        return found | ({self.scored} if need & {"key_attention", "keys"} else set())

    def _windowed(self, block: int) -> str:
        wide = ", ".join(str(i + 1) for i in self.whole)
        return f"block {block} attends inside of windows, not to whole images as blocks {wide}."

    def resize(self, grid: tuple[int, int]) -> None:
        """Refuse: there is no size that all images have."""
        raise ZooError("its images keep their shapes, and vision.max_pixels makes them smaller")

    def set_attention(self, name: str) -> None:
        """Choose the attention kernel: eager, sdpa, flash_attention_2, ..."""
        self._vit.set_attn_implementation("eager" if name.endswith("eager") else name)
        if name == "sdpa":
            use_segments(self.tower)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        if enable:
            checkpoint_activations(self._vit)
        else:
            keep_activations(self._vit)

    def train(self, mode: bool = True) -> QwenVision:
        """Switch to training; a frozen tower stays in evaluation."""
        super().train(mode)
        if not any(p.requires_grad for p in self.tower.parameters()):
            self.tower.eval()
        return self

    def forward(  # type: ignore[override]  # rows of unlike grids
        self,
        pixel_values: Tensor,
        *,
        need: frozenset[str] = frozenset(),
        grids: Sequence[tuple[int, int]],
    ) -> UnlikeRows:
        """Encode images, or pairs of frames.

        A frozen tower builds no graph and keeps no activations, unless the pixels require a gradient.

        Args:
            pixel_values: (S, P), patches of all rows: the four of a token one behind the other, tokens row by row.
            need: requested capabilities of `provides`.
            grids: (h, w) of each row, in tokens.

        Returns:
            Tokens (M, N, D) of each grid, and `deep`; key_attention (M, N) float32, without gradient: the attention
            that the patches of a token get in the last block that attends to whole rows, mean over heads and queries,
            summed over the patches, so that a row sums to 1; keys (M, N, H, d) of that block, rotated, mean over the
            patches; block_attention by words such as key_attention@8, of other blocks that attend to whole rows.

        Raises:
            ZooError: a capability that the encoder does not provide, or pixels that do not fit the grids.
        """
        known = self.provides | {f"key_attention@{i + 1}" for i in self.whole}
        if missing := sorted(need - known):
            raise ZooError(f"This encoder does not provide {missing}; it provides {sorted(self.provides)}.")
        counts = [h * w for h, w in grids]
        wanted = (sum(counts) * self.patch_shape[0], self.patch_shape[1])
        if tuple(pixel_values.shape) != wanted:
            raise ZooError(
                f"Rows of {list(grids)} tokens have pixels of {wanted[0]} x {wanted[1]}, got "
                f"{' x '.join(map(str, pixel_values.shape))}."
            )
        self.prepare(need)
        if pixel_values.is_meta:  # transformers reads the grids as numbers, from a tensor
            weight = next(self.tower.parameters())
            maps = [weight.new_empty(sum(counts), self.hidden_size) for _ in range(1 + self.deep)]
            taken = _Taken({block: [weight.new_empty(wanted[0], 3 * self._inner)] for block in self._blocks(need)})
        else:
            maps, taken = self._run(pixel_values, grids, bool(need))
        groups, members = [], []
        rows = [m.split(counts) for m in maps]
        asked = self._asked(taken, counts, grids, need) if need else {}
        for grid, of in groups_of(grids).items():
            tokens, *deep = (torch.stack([some[i] for i in of]) for some in rows)  # (M, N, D)
            given: dict[str, Any] = {name: torch.stack([values[i] for i in of]) for name, values in asked.items()}
            blocks = {word: given.pop(word) for word in sorted(given) if block_of(word) is not None}
            groups.append(ImageFeatures(tokens, grid, deep=tuple(deep), block_attention=blocks, **given))
            members.append(tuple(of))
        return UnlikeRows(tuple(groups), tuple(members))

    @property
    def _vit(self) -> Any:
        return self.tower.get_submodule(self.family.vit)

    @property
    def _inner(self) -> int:
        return int(getattr(self.tower.config, self.family.width))

    def _run(self, pixels: Tensor, grids: Sequence[tuple[int, int]], keep: bool) -> tuple[list[Tensor], _Taken]:
        """Run the tower: maps (sum of N, D), the tokens first, and what its hooks took."""
        shapes = torch.tensor([(1, h * MERGE, w * MERGE) for h, w in grids], device=pixels.device)
        learns = torch.is_grad_enabled() and (
            pixels.requires_grad or any(p.requires_grad for p in self.tower.parameters())
        )
        taken = _Taken()
        with joined(self.alone) as now, torch.set_grad_enabled(learns):
            now.taken = taken if keep else None
            out = self.tower(pixels, grid_thw=shapes)
            now.taken = None  # recomputation in backward finds none and stores nothing
        return [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())], taken

    def _asked(
        self, taken: _Taken, counts: Sequence[int], grids: Sequence[tuple[int, int]], need: frozenset[str]
    ) -> dict[str, list[Tensor]]:
        """Compute what is asked of the attention, row by row."""
        unit = self.patch_shape[0]
        found: dict[str, list[Tensor]] = {}
        for block in sorted(self._blocks(need)):
            assert block in taken.qkv, "the hook of the block did not fire"
            joined = torch.cat(taken.qkv[block], -1)
            query, key = joined.unflatten(-1, (-1, self.heads, self._inner // self.heads)).unbind(1)[:2]  # (S, H, d)
            if taken.position is not None:
                query, key = (_rotated(x, *taken.position) for x in (query, key))
            words = {f"key_attention@{block + 1}", *(("key_attention", "keys") if block == self.scored else ())}
            made: dict[str, list[Tensor]] = {word: [] for word in sorted(need & words)}
            at = 0
            for count, grid in zip(counts, grids, strict=True):
                row = self._patches(at, grid, key.device)
                back = self._back(grid, key.device)
                if "keys" in made:
                    mean = key[row].unflatten(0, (count, unit)).float().mean(1).to(key.dtype)  # (N, H, d)
                    made["keys"].append(mean[back])
                if scored := [word for word in made if word != "keys"]:
                    q, k = (x[row].transpose(0, 1)[None] for x in (query, key))  # (1, H, L, d)
                    scores = column_mean(q, k, q.shape[-1] ** -0.5)[0]  # (L,)
                    for word in scored:
                        made[word].append(scores.unflatten(0, (count, unit)).sum(1)[back])
                at += count * unit
            found |= made
        return found

    def _patches(self, at: int, grid: tuple[int, int], device: torch.device) -> slice | Tensor:
        """Return the patches of a row that begins at patch `at`, those of a token one behind the other."""
        count = grid[0] * grid[1] * self.patch_shape[0]
        if not self.family.raster:
            return slice(at, at + count)
        order = torch.arange(at, at + count, device=device)
        return order.view(grid[0], MERGE, grid[1], MERGE).transpose(1, 2).flatten()

    def _back(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return where the tokens of a grid are in the tower's order, which may go window by window."""
        cells = torch.arange(grid[0] * grid[1], device=device)
        if not self.window:
            return cells
        across = -(-grid[1] // self.window)
        window = cells // grid[1] // self.window * across + cells % grid[1] // self.window
        return window.argsort(stable=True).argsort()


@dataclass
class _Taken:
    """What hooks take from one pass: queries, keys and values of blocks before rotation, and their rotary tables."""

    qkv: dict[int, list[Tensor]] = field(default_factory=dict)  # of a block, from 0: (S, 3 * H * d), or one by one
    position: tuple[Tensor, Tensor] | None = None  # cos and sin (S, d)


def _taken_now(vision: QwenVision) -> _Taken | None:
    found = (current() or vision.alone).taken
    return found if isinstance(found, _Taken) else None


def _keep_position(vision: QwenVision, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if (taken := _taken_now(vision)) is not None:
        taken.position = kwargs.get("position_embeddings")


def _keep_qkv(vision: QwenVision, block: int, module: nn.Module, args: Any, out: Tensor) -> None:
    if (taken := _taken_now(vision)) is not None:
        taken.qkv.setdefault(block, []).append(out.detach())


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (S, H, d) in float32, as the towers do."""
    wide, (cos, sin) = x.float(), (cos.unsqueeze(1).float(), sin.unsqueeze(1).float())
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _grid_of_most(most: int) -> tuple[int, int]:
    """Return a grid of the fewest tokens, `most` or more, whose sides are at most 2 to 1."""
    n = most
    while True:
        h = math.isqrt(n)
        while n % h:
            h -= 1
        if n <= 2 * h * h:
            return h, n // h
        n += 1


def _class(family: Family) -> Any:
    if not family.tower:
        return PaddleOCRTower
    return getattr(
        importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}"), family.tower
    )


def _config_class(family: Family) -> Any:
    from transformers import CONFIG_MAPPING

    return _class(family).config_class if family.tower else CONFIG_MAPPING[f"{family.module}_vision"]


def config_from_sizes(config: QwenVisionConfig) -> Any:
    """Translate options to the family's vision config of transformers."""
    family, depth = FAMILIES[config.model_type], config.depth
    patch = config.patch_size or family.patch
    known = _config_class(family)
    values: dict[str, Any] = {
        **dict.fromkeys(("depth", "num_hidden_layers"), depth),
        **dict.fromkeys(("num_heads", "num_attention_heads"), config.heads),
        "patch_size": patch,
        "intermediate_size": round(config.width * config.mlp_ratio),
        "mlp_ratio": int(config.mlp_ratio),
        "window_size": 8 * patch,
        "fullatt_block_indexes": sorted({*range(3, depth, 4), depth - 1}),
        "deepstack_visual_indexes": sorted({max(0, depth * k // 4 - 1) for k in (1, 2, 3)}),
    }
    fields = known.__dataclass_fields__
    for name in config.extra:
        if name not in fields:
            raise unknown(f"field of {known.__name__}", str(name), fields)
    values = {name: value for name, value in values.items() if name in fields}
    values |= {family.out: config.out_width or config.width} if family.out else {}
    values |= {family.width: config.width}
    return known(**{**values, **config.extra})


def _from_json(source: str) -> tuple[str, Any, int]:
    """Read the family, the vision config and the LLM's width of a checkpoint's `config.json`."""
    content = read_json(source)
    name = str(content.get("model_type", ""))
    if name not in FAMILIES:
        raise ZooError(
            f"{source!r} holds a model of type {name or 'unknown'!r}; it must be one of {', '.join(FAMILIES)}."
        )
    inner = {k: v for k, v in (content.get("vision_config") or {}).items() if k != "model_type"}
    width = int((content.get("text_config") or content).get("hidden_size", 0))
    return name, _config_class(FAMILIES[name]).from_dict(inner), width
