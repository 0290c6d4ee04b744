"""The encoder of PaddleOCR-VL (arXiv:2510.14528) as one tower: a ViT at native resolution, and what merges its patches.

transformers keeps the merger beside the ViT, as a projector. Patches come row by row, not token by token, and stay so:
the merger gathers the four of each token.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class PaddleOCRTower(nn.Module):
    """The ViT and the merger.

    Args:
        config: of the ViT.
        out_width: of a merged token.
    """

    def __init__(self, config: Any, out_width: int) -> None:
        super().__init__()
        from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector, PaddleOCRVisionModel

        self.visual: Any = PaddleOCRVisionModel(config)
        whole: Any = SimpleNamespace(vision_config=config, text_config=SimpleNamespace(hidden_size=out_width))
        self.projector = PaddleOCRProjector(whole)

    @property
    def config(self) -> Any:
        """That of the ViT."""
        return self.visual.config

    @property
    def blocks(self) -> Any:
        return self.visual.vision_model.encoder.layers

    def forward(self, pixels: Tensor, grid_thw: Tensor) -> Any:
        """Encode patches (S, P) of images; `pooler_output` is (S / 4, C), token by token."""
        side = int(self.config.patch_size)
        shown = pixels.to(self.visual.dtype).view(1, len(pixels), -1, side, side)
        maps = self.visual(pixel_values=shown, grid_thw=grid_thw).last_hidden_state
        return SimpleNamespace(pooler_output=self.projector(maps, grid_thw))
