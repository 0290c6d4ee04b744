"""GLM-4.1V and GLM-4.6V-Flash: images keep their shapes, positions have three axes, a video is its frames as images.

Paper: GLM-V team, arXiv:2507.01006. Published as `zai-org/GLM-4.1V-9B-Thinking`, `zai-org/GLM-4.1V-9B-Base` and
`zai-org/GLM-4.6V-Flash`.
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


def _videos(name: str, vision: Any) -> dict[str, Any]:
    """Return how videos are written, as options of `native`: each pair of frames is an image, with its time behind."""
    return {"timestamps": True, "clock": name, "begin": BEGIN, "end": END}


def _family(name: str, words: str) -> Family:
    processor, videos = f"{words}Processor", f"{words}VideoProcessor"
    texts = frozenset({"glm4v_text"})
    return Native(name, words, processor, videos, VIDEO, _MARKS, partial(_videos, name), "glm4v", texts).family()


FAMILIES = {"glm4v": _family("glm4v", "Glm4v"), "glm46v": _family("glm46v", "Glm46V")}
