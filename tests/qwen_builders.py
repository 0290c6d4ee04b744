"""Tiny models of the Qwen-VL families: encoders, and transformers' own towers and processors beside them."""

import numpy as np
import torch
from PIL import Image

from zoo.vision.encoders.qwen import QwenVision, QwenVisionConfig

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
SIZES = {"width": 32, "heads": 2, "depth": 4, "patch_size": 4, "out_width": 64, "max_pixels": 64 * 64, "min_pixels": 64}
EXTRA = {
    "qwen2_vl": {},
    "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    "qwen3_vl": {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]},
}
EXTRA["qwen3_vl_moe"] = EXTRA["qwen3_vl"]


def encoder_node(family: str, **options) -> dict:
    return {"name": "qwen_vision", "model_type": family, **SIZES, "extra": EXTRA[family], **options}


def encoder(family: str, seed: int = 0, **options) -> QwenVision:
    """An encoder whose attention is sharp enough for a wrong segment to show."""
    torch.manual_seed(seed)
    node = encoder_node(family, **options)
    node.pop("name")
    made = QwenVision(QwenVisionConfig(**node)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.mul_(6) if p.dim() > 1 and "merger" not in name else None
    return made


def patches(vision: QwenVision, grids, seed: int = 0):
    """Random pixels of rows with these grids, in tokens: (S, P)."""
    unit, width = vision.patch_shape
    n = sum(h * w for h, w in grids) * unit
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB"):
    """Noise of a size."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)
