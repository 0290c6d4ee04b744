"""GLM-4.1V: images keep their shapes, positions have three axes, a video is its pairs of frames as images.

Paper: GLM-V team, arXiv:2507.01006. Published as `zai-org/GLM-4.1V-9B-Thinking` and `zai-org/GLM-4.1V-9B-Base`.
"""

from typing import Any

from zoo.published.native import Native

VIDEO = "<|video|>"
_MARKS = {
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
    "video_token_id": VIDEO,
}


def _videos(vision: Any) -> dict[str, Any]:
    """Return how videos are written, as options of `native`: each pair of frames is an image in front of its second."""
    begin, end = _MARKS["image_start_token_id"], _MARKS["image_end_token_id"]
    return {"timestamps": True, "clock": "glm4v", "begin": begin, "end": end}


FAMILY = Native(
    "glm4v",
    "Glm4v",
    "Glm4vProcessor",
    "Glm4vVideoProcessor",
    VIDEO,
    _MARKS,
    _videos,
    "glm4v",
    frozenset({"glm4v_text"}),
).family()
