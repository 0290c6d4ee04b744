"""LLaVA-OneVision: SigLIP, up to nine crops' tokens of an image, several images, frames at half their grid.

Paper: Li et al., arXiv:2408.03326. Published as `llava-hf/llava-onevision-qwen2-0.5b-ov-hf`, `-7b-ov-hf` and others
that use `LlavaOnevisionForConditionalGeneration`. One of several images of a sample is no longer cut: it is padded to a
square and seen whole.
"""

from collections.abc import Mapping
from typing import Any

from zoo.published import llava
from zoo.published.family import Family, plain
from zoo.registry import ZooError

KEYS = (*llava.KEYS, ("image_newline", "layout.newline"))


def slots(hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `LlavaOnevisionConfig`."""
    pinpoints = plain(pixels.get("image_grid_pinpoints") or hf.image_grid_pinpoints)
    ratio = str(hf.vision_aspect_ratio)
    if not ratio.removeprefix("anyres_max_").isdigit():
        raise ZooError(f"Its vision_aspect_ratio is {ratio!r}; known is 'anyres_max_<number of crops>'.")
    most = int(ratio.removeprefix("anyres_max_"))
    layout = {"name": "anyres", "pinpoints": pinpoints, "max_crops": most, "frames": "bilinear"}
    return {**llava.slots(hf, pixels), "layout": layout}


def config(model: Any) -> Any:
    """Say a composed model as a `LlavaOnevisionConfig`."""
    from transformers import LlavaOnevisionConfig

    layout = model.layout.config
    return LlavaOnevisionConfig(
        **llava.parts(model),
        image_grid_pinpoints=plain(layout.pinpoints),
        vision_aspect_ratio=f"anyres_max_{layout.max_crops}",
        video_token_index=model.config.video_token_id,
    )


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """What `LlavaOnevisionProcessor` counts image tokens with."""
    options = llava.processor_options(model, processor)
    return {
        "vision_feature_select_strategy": options["vision_feature_select_strategy"],
        "image_token": processor.image_token,
        "num_image_tokens": model.vision.num_tokens,
        "vision_aspect_ratio": f"anyres_max_{model.layout.config.max_crops}",
    }


FAMILY = Family(
    "llava_onevision",
    "LlavaOnevisionForConditionalGeneration",
    "LlavaOnevisionProcessor",
    slots,
    KEYS,
    config,
    processor_options,
    videos=True,
    whole_if_several=True,
)
