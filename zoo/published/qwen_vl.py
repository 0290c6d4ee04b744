"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts: images keep their shapes, positions have three axes.

Papers: Wang et al., arXiv:2409.12191; Bai et al., arXiv:2502.13923 (2.5) and arXiv:2511.21631 (3). Published as
`Qwen/Qwen2-VL-2B-Instruct`, `Qwen/Qwen2.5-VL-7B-Instruct`, `Qwen/Qwen3-VL-8B-Instruct`,
`Qwen/Qwen3-VL-30B-A3B-Instruct` and others.
"""

from functools import partial
from typing import Any

from zoo.published.family import Family
from zoo.published.native import Native

VIDEO = "<|video_pad|>"
_MARKS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "video_token_id": VIDEO,
}


def videos_of(name: str, vision: Any) -> dict[str, Any]:
    """Return how the family places and writes videos, as options of `native`."""
    if name.startswith("qwen3"):
        return {"timestamps": True}
    return {"tokens_per_second": float(vision.tokens_per_second)} if name == "qwen2_5_vl" else {}


def _family(name: str, words: str, processor: str) -> Family:
    videos = "Qwen3VLVideoProcessor" if name.startswith("qwen3") else "Qwen2VLVideoProcessor"
    layout, texts = partial(videos_of, name), frozenset({f"{name}_text"})
    return Native(name, words, processor, videos, VIDEO, _MARKS, layout, name, texts).family()


FAMILIES = {
    "qwen2_vl": _family("qwen2_vl", "Qwen2VL", "Qwen2VLProcessor"),
    "qwen2_5_vl": _family("qwen2_5_vl", "Qwen2_5_VL", "Qwen2_5_VLProcessor"),
    "qwen3_vl": _family("qwen3_vl", "Qwen3VL", "Qwen3VLProcessor"),
    "qwen3_vl_moe": _family("qwen3_vl_moe", "Qwen3VLMoe", "Qwen3VLProcessor"),
}
