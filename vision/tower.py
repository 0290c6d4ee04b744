"""What the encoders of transformers, timm and open_clip have in common: layers, the [CLS] row, frozen running.

Layers are counted as in `hidden_states` of transformers, for all three libraries: 0 is what enters the first block, k
what leaves block k, -1 what leaves the last one, always before the encoder's final norm (`norm=true` applies it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ImageFeatures, ImageTransform, ZooError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and std of SigLIP, and of what is trained from scratch here


class Tower(nn.Module):
    """A wrapped encoder. Subclasses build `self.tower`, set what is declared here and say how to run it."""

    needs: frozenset[str] = frozenset()
    destroys: frozenset[str] = frozenset()
    provides: frozenset[str]
    tower: nn.Module
    hidden_size: int
    grid: tuple[int, int]
    transform: ImageTransform
    num_prefix: int  # [CLS] and register tokens in front of the patches

    def __init__(self) -> None:
        super().__init__()
        self.wants_row = False
        self.query: Tensor | None = None
        self.key: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Run the blocks: (M, 3, S, S) -> (M, P + N, D), prefix tokens first."""
        raise NotImplementedError

    def cls_query_key(self) -> tuple[Tensor, Tensor, float]:
        """Give what the last block's attention just saw: the [CLS] query (M, H, 1, d), the keys (M, H, P + N, d), and
        the factor of their product."""
        raise NotImplementedError

    def set_attention(self, name: str) -> None:
        """Choose the attention kernel: eager, sdpa, or another one that the library knows."""
        raise NotImplementedError

    def set_gradient_checkpointing(self, enable: bool) -> None:
        raise NotImplementedError

    def forward(self, pixel_values: Tensor, *, need: frozenset[str] = frozenset()) -> ImageFeatures:
        """Encode images.

        A frozen tower builds no graph and keeps no activation, unless the pixels themselves ask for a gradient.

        Args:
            pixel_values: (M, 3, S, S), prepared as `transform` says.
            need: cls_attention and prefix_tokens are computed on request; `grid` is always there.

        Returns:
            Patch tokens (M, N, D); cls_attention (M, N) float32, without gradient: the row of the block that made the
            tokens, mean over heads, normalised over all P + N keys, the prefix columns dropped; prefix (M, P, D).
        """
        if missing := need - self.provides:
            raise ZooError(f"This encoder does not give {sorted(missing)}; it provides {sorted(self.provides)}.")
        if tuple(pixel_values.shape[-2:]) != self.transform.size:
            given, wanted = tuple(pixel_values.shape[-2:]), self.transform.size
            raise ZooError(f"The encoder takes images of {wanted[0]} x {wanted[1]}, got {given[0]} x {given[1]}.")
        trains = pixel_values.requires_grad or any(p.requires_grad for p in self.tower.parameters())
        self.wants_row = "cls_attention" in need
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            tokens = self.encode(pixel_values)  # (M, P + N, D)
        row = self._cls_row() if self.wants_row else None
        self.wants_row, self.query, self.key = False, None, None
        prefix = tokens[:, : self.num_prefix] if "prefix_tokens" in need else None
        return ImageFeatures(tokens[:, self.num_prefix :], self.grid, cls_attention=row, prefix=prefix)

    def _cls_row(self) -> Tensor:
        """One row of the attention matrix from q and k, in float32; the kernel that ran stays as fused as it was."""
        query, key, scale = self.cls_query_key()
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            key = key.float()
            if key.shape[1] != query.shape[1]:  # grouped queries
                key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = (query.float() * scale) @ key.transpose(-1, -2)  # (M, H, 1, P + N)
            return scores.softmax(-1).mean(1)[:, 0, self.num_prefix :]  # (M, N)

    # Hooks, as bound methods so that a deep copy of the tower listens to itself. They act only while a row is wanted.
    def keep_query(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.wants_row:
            self.query = out.detach()

    def keep_key(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.wants_row:
            self.key = out.detach()


def block_count(layer: int, depth: int, lowest: int = 0) -> int:
    """Return how many blocks run to reach `layer` of an encoder with `depth` blocks: layer -2 of 24 is 23.

    Raises:
        ZooError: there is no such layer; the allowed range is named.
    """
    count = layer if layer >= 0 else depth + 1 + layer
    if not lowest <= count <= depth:
        raise ZooError(
            f"The encoder has {depth} blocks: layer must be {lowest} to {depth}, or {lowest - depth - 1} to -1"
            f" counted from the end, got {layer}."
        )
    return count


def on_meta() -> bool:
    """Whether structure only is wanted: no weight is read then."""
    return torch.get_default_device().type == "meta"


def check_divides(patch_size: int, image_size: int) -> None:
    if patch_size < 1 or image_size % patch_size:
        raise ZooError(f"patch_size {patch_size} does not divide image_size {image_size}.")
