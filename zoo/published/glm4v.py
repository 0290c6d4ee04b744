"""GLM-4.1V, GLM-4.5V, GLM-4.6V-Flash: images keep their shapes, positions have three axes, videos are frames as images.

Paper: GLM-V team, arXiv:2507.01006. Published as `zai-org/GLM-4.1V-9B-Thinking`, `zai-org/GLM-4.1V-9B-Base`,
`zai-org/GLM-4.5V` (a mixture of experts) and `zai-org/GLM-4.6V-Flash`.
"""

from functools import partial
from typing import Any

from zoo.published.family import Family
from zoo.published.native import Native

VIDEO, BEGIN, END = "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"
_MARKS = {
    "image_start_token_id": BEGIN,
    "image_end_token_id": END,
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
    "video_token_id": VIDEO,
}


def _videos(clock: str, vision: Any) -> dict[str, Any]:
    """Return how videos are written, as options of `native`: each pair of frames is an image, with its time behind."""
    return {"timestamps": True, "clock": clock, "begin": BEGIN, "end": END}


def _family(name: str, words: str, prepared: str, parts: str = "glm4v", clock: str = "glm4v") -> Family:
    processor, videos = f"{prepared}Processor", f"{prepared}VideoProcessor"
    layout, texts = partial(_videos, clock), frozenset({f"{parts}_text"})
    return Native(name, words, processor, videos, VIDEO, _MARKS, layout, parts, texts).family()


FAMILIES = {
    "glm4v": _family("glm4v", "Glm4v", "Glm4v"),
    "glm4v_moe": _family("glm4v_moe", "Glm4vMoe", "Glm4v", "glm4v_moe"),
    "glm46v": _family("glm46v", "Glm46V", "Glm46V", clock="glm46v"),
}
