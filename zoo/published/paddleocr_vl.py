"""PaddleOCR-VL: documents at native resolution, a ViT as SigLIP's and ERNIE 4.5 0.3B with positions of three axes.

Paper: Cui et al., arXiv:2510.14528. Published as `PaddlePaddle/PaddleOCR-VL` and `PaddlePaddle/PaddleOCR-VL-1.5`.
"""

import re
from typing import Any

from zoo.published.native import Native

KEYS = (
    ("model.visual.", "vision.tower.visual."),
    ("model.projector.", "vision.tower.projector."),
    ("model.language_model.", "llm.lm.model."),
    ("lm_head.", "llm.lm.lm_head."),
)
# Names of repositories -> those of transformers' memory.
CANONICAL = (
    (re.compile(r"^mlp_AR\."), "model.projector."),
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!visual\.|projector\.|language_model\.)"), "model.language_model."),
)
MARKS = {
    "vision_start_token_id": "<|IMAGE_START|>",
    "vision_end_token_id": "<|IMAGE_END|>",
    "video_token_id": "<|video_pad|>",
}


def _layout(vision: Any) -> dict[str, Any]:
    return {}


FAMILY = Native(
    "paddleocr_vl",
    "PaddleOCRVL",
    "PaddleOCRVLProcessor",
    "",
    "",
    MARKS,
    _layout,
    "paddleocr_vl",
    frozenset({"paddleocr_vl_text"}),
    KEYS,
    CANONICAL,
).family()
