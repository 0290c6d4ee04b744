"""Run an encoder with feature maps (convolutional, hierarchical, hybrid) up to a stage, whose map becomes the tokens.

Stages are counted from 1 for the first map that the library lists, and from -1 for the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.vision.encoders.map_attention import last_attention, split_qkv
from zoo.vision.encoders.runner import QueryKey, Runner


class MapRunner(Runner):
    """Runs the tower up to its map, by `map` of a subclass, which calls `measure` when the tower is cut.

    Tokens are the map in row-major order; there is no prefix.
    """

    num_prefix, has_cls, has_scores, num_blocks, depth = 0, False, False, 0, 0
    name: str  # of the encoder, for messages
    stage: int  # of the map, from 1
    NO_SCORES = "its tokens are a feature map, and no attention between all of them is read."

    def map(self, pixel_values: Tensor) -> Tensor:
        """Run the tower: (M, 3, H, W) -> (M, D, h, w)."""
        raise NotImplementedError

    def encode(self, pixel_values: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            # ResNet-18 and EfficientNet-Lite0 take a fifth less time on a CPU, and the tokens need no copy. Without
            # gradients only: that of a 1x1 convolution of stride 2 over 3 channels, in the stem of FastViT, then
            # writes outside of its memory on the CPU (torch 2.14.1).
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        out = self.map(pixel_values)  # (M, D, h, w)
        return out.flatten(2).transpose(1, 2)  # (M, N, D)

    def measure(self, size: tuple[int, int]) -> list[str]:
        """Find the grid for images of `size` by a run without data, and hold weights that the map does not depend on as
        buffers: data parallelism would wait for their gradients.

        Returns:
            The names of those weights.

        Raises:
            ZooError: the tower takes no images of this size, or its map is not of the width that the library states.
        """
        self.grid, idle = self._dry_run(size)
        self.hold(idle)
        return idle

    def hold(self, idle: list[str]) -> None:
        """Turn weights of the tower into buffers of the same names."""
        for name in idle:
            holder, _, last = name.rpartition(".")
            module = self.tower.get_submodule(holder)
            module.register_buffer(last, module._parameters.pop(last).detach())

    def resize(self, grid: tuple[int, int]) -> None:
        size = (grid[0] * self.patch[0], grid[1] * self.patch[1])
        found, _ = self._dry_run(size, idle=False)
        if found != grid:
            raise ZooError(f"{self.name!r} makes a map of {found[0]} x {found[1]} of {size[0]} x {size[1]} pixels")
        self.grid = grid

    def _dry_run(self, size: tuple[int, int], idle: bool = True) -> tuple[tuple[int, int], list[str]]:
        """Run the tower on the meta device: the grid for images of `size`, and names of weights without effect."""
        tower, training = self.tower, self.tower.training
        tower.eval()
        try:
            with _on_meta(tower) as learnt, torch.device("meta"), torch.enable_grad():
                x = torch.zeros(1, 3, *size, dtype=next(iter(learnt.values())).dtype)
                out = self.map(x)  # (1, D, h, w)
                gradients = torch.autograd.grad(out.sum(), list(learnt.values()), allow_unused=True) if idle else ()
        except Exception as error:  # of shapes that do not fit: each model raises its own class
            why = " ".join(str(error).split()) or type(error).__name__
            raise ZooError(f"{self.name!r} takes no images of {size[0]} x {size[1]} pixels: {why}") from error
        finally:
            tower.train(training)
        if out.shape[1] != self.hidden_size:
            raise ZooError(f"{self.name!r} states a width of {self.hidden_size}, and its map has {out.shape[1]}.")
        return (out.shape[2], out.shape[3]), [n for n, g in zip(learnt, gradients, strict=False) if g is None]


def tables_follow(tower: nn.Module) -> None:
    """Let the layers that read a table of coordinates (Swin v2) cast it: buffers stay float32 where weights do not."""
    for module in tower.modules():
        if not {"relative_coords_table", "relative_coordinates_log"}.isdisjoint(module._buffers):
            for layers in module.children():
                if isinstance(first := next(layers.children(), None), nn.Linear):
                    first.register_forward_pre_hook(_as_weight)


def _as_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (args[0].to(weight.dtype), *args[1:])


@contextmanager
def _on_meta(tower: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Replace all weights and buffers by ones on the meta device, for a while: yields the weights, each by one name.

    `torch.func.functional_call` does not put back what modules share (CoaT).
    """
    kept: list[tuple[Any, str, Any]] = [
        (own, n, t) for m in tower.modules() for own in (m._parameters, m._buffers) for n, t in own.items()
    ]
    learnt = dict(tower.named_parameters())
    stand_ins: dict[int, Tensor] = {}
    for own, name, tensor in kept:
        if tensor is not None and id(tensor) not in stand_ins:
            meta = torch.empty_like(tensor, device="meta")
            stand_ins[id(tensor)] = nn.Parameter(meta) if isinstance(tensor, nn.Parameter) else meta
        own[name] = None if tensor is None else stand_ins[id(tensor)]
    try:
        yield {name: stand_ins[id(tensor)] for name, tensor in learnt.items()}
    finally:
        for own, name, tensor in kept:
            own[name] = tensor


class TimmMapRunner(MapRunner):
    """Runs a model of timm through its feature interface, `forward_intermediates`, up to `stage`.

    Width and reduction are those of its `feature_info`.

    Args:
        tower: of timm; its later stages are removed.
        stage: counted as in this file.
        norm: apply the final norm, which some have behind their last map.
        size: (height, width) of images in pixels.
        name: for messages.

    Raises:
        ZooError: the model gives no maps, or has no such stage or norm.
    """

    def __init__(self, tower: Any, stage: int, norm: bool, size: tuple[int, int], name: str) -> None:
        super().__init__()
        info = getattr(tower, "feature_info", None)
        info = getattr(info, "info", info)
        if not info or not all(hasattr(tower, part) for part in ("forward_intermediates", "prune_intermediate_layers")):
            raise ZooError(
                f"{name!r} is a {type(tower).__name__}, of which timm gives neither blocks on one patch grid nor "
                "feature maps (`forward_intermediates`)."
            )
        self.tower, self.name, self.norm = tower, name, norm
        self.index = stage_index(stage, len(info), name)
        self.stage = self.index + 1
        taken = info[self.index]
        self.hidden_size = taken.get("num_chs_norm", taken["num_chs"]) if norm else taken["num_chs"]
        self.patch = (taken["reduction"], taken["reduction"])
        if norm:
            self._require_norm(size)
        tower.prune_intermediate_layers([self.index], prune_norm=not norm, prune_head=True)
        tables_follow(tower)
        self.measure(size)
        self.last = last_attention(tower)
        if self.last is None:
            self.lacks |= dict.fromkeys(("key_attention", "keys"), self.NO_SCORES)
        else:
            self.has_scores, self.num_blocks = True, 1
            self.listen_to(1)

    def hook(self, block: int) -> None:
        assert self.last is not None, "it gives scores"
        self.last.qkv.register_forward_hook(self._keep_qkv)

    def _keep_qkv(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if (taken := self.wanted(1)) is not None:
            taken.query = out.detach()

    def gives_scores(self, block: int) -> bool:
        return False  # by its number: blocks are not counted

    def query_key(self, block: int, taken: QueryKey) -> tuple[Tensor, Tensor, float]:
        assert self.last is not None and taken.query is not None, "the hook of the last attention did not fire"
        query, key = split_qkv(self.last, taken.query)
        return query, key, self.last.scale

    def bias(self, block: int) -> Tensor | None:
        known: Tensor | None = getattr(self.last, "attention_biases", None)
        return None if known is None else known.detach()[:, self.last.attention_bias_idxs]

    def map(self, pixel_values: Tensor) -> Tensor:
        (out,) = self.tower.forward_intermediates(
            pixel_values, indices=[self.index], norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        return out

    def _require_norm(self, size: tuple[int, int]) -> None:
        """Refuse `norm` where it changes nothing: weights of a norm are those that only a normed map depends on."""
        _, idle = self._dry_run(size)
        self.norm = False
        plain = idle if self.hidden_size != self.tower.feature_info[self.index]["num_chs"] else self._dry_run(size)[1]
        self.norm = True
        if len(plain) == len(idle):
            raise ZooError(f"timm applies no final norm to this map of {self.name!r}: norm must be false.")

    def set_attention(self, name: str) -> None:
        for module in self.tower.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = not name.endswith("eager")

    def set_gradient_checkpointing(self, enable: bool) -> None:
        with suppress(AssertionError):  # of models that cannot: they keep their activations
            self.tower.set_grad_checkpointing(enable)


def stage_index(stage: int, count: int, name: str) -> int:
    """Return the index of a stage, from 0.

    Raises:
        ZooError: there is no such stage.
    """
    index = stage - 1 if stage > 0 else count + stage
    if stage == 0 or not 0 <= index < count:
        raise ZooError(
            f"{name!r} has {count} feature maps: stage must be 1 to {count}, or {-count} to -1, got {stage}."
        )
    return index


def require_map_options(config: Any, about: str) -> None:
    """Refuse options that are of ViTs.

    Args:
        config: of the encoder.
        about: beginning of a sentence: "'resnet18' is a ResNet, not a plain ViT".

    Raises:
        ZooError: `layer` is set, or what is read of blocks.
    """
    if config.layer != -2:
        raise ZooError(f"{about}: set stage, the number of a feature map, not layer.")
    for name in ("pooling_head", "summary", "next_block"):
        if getattr(config, name):
            raise ZooError(f"{about}, and {name} is of ViTs: it must be false.")


def own_size(tower: Any) -> tuple[int, int]:
    """(height, width) of the images that a model of timm is made for."""
    size = getattr(getattr(tower, "patch_embed", None), "img_size", None) or tower.pretrained_cfg["input_size"][-2:]
    return int(size[0]), int(size[1])
