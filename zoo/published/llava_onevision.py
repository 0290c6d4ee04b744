"""LLaVA-OneVision: SigLIP, up to nine crops' tokens of an image, several images, frames at half their grid.

Paper: Li et al., arXiv:2408.03326. Published as `llava-hf/llava-onevision-qwen2-0.5b-ov-hf`, `-7b-ov-hf` and others
that use `LlavaOnevisionForConditionalGeneration`. One of several images of a sample is no longer cut: it is padded to a
square and seen whole.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.published import llava
from zoo.published.composed import VIDEO, frames_as
from zoo.published.encoders import Encoder
from zoo.published.family import layout_misfit, plain
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


def misfit(model: Any, encoder: Encoder) -> str:
    """Why `LlavaOnevisionForConditionalGeneration` has no place for a model."""
    wrong = layout_misfit(model, "anyres", pinpoints=bool, newline=True, max_crops=bool, frames="bilinear")
    return wrong or llava.common_misfit(model, encoder)


def config(model: Any, encoder: Encoder) -> Any:
    """Say a composed model as a `LlavaOnevisionConfig`."""
    from transformers import LlavaOnevisionConfig

    layout = model.layout.config
    return LlavaOnevisionConfig(
        **llava.parts(model, encoder),
        image_grid_pinpoints=plain(layout.pinpoints),
        vision_aspect_ratio=f"anyres_max_{layout.max_crops}",
        video_token_index=model.config.video_token_id,
    )


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """What `LlavaOnevisionProcessor` counts image tokens with; a processor for videos it must have."""
    return {
        **frames_as("LlavaOnevisionVideoProcessor", processor),
        "vision_feature_select_strategy": llava.selection(model),
        "image_token": processor.image_token,
        "num_image_tokens": model.vision.num_tokens + model.vision.runner.num_prefix,
        "vision_aspect_ratio": f"anyres_max_{model.layout.config.max_crops}",
    }


def tokens(model: Any, processor: Any) -> dict[str, str]:
    """Return the tokens that `LlavaOnevisionProcessor` needs in the tokenizer."""
    return {"image_token": processor.image_token, "video_token": processor.video_token or VIDEO}


FAMILY = replace(
    llava.FAMILY,
    model_type="llava_onevision",
    model="LlavaOnevisionForConditionalGeneration",
    processor="LlavaOnevisionProcessor",
    slots=slots,
    keys=KEYS,
    config=config,
    processor_options=processor_options,
    misfit=misfit,
    tokens=tokens,
    videos=True,
    whole_if_several=True,
)
