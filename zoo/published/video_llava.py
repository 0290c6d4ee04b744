"""Video-LLaVA: an encoder for images and another one for frames, whose [CLS] tokens stay; one projector, a Llama.

Paper: Lin et al., arXiv:2311.10122. Published as `LanguageBind/Video-LLaVA-7B-hf`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.published import llava
from zoo.published.encoders import Encoder
from zoo.published.family import layout_misfit
from zoo.published.llava_next_video import videos_misfit

KEYS = (*(k for k in llava.KEYS if k[0] != "vision_tower."), ("image_tower.", "vision.tower."),
        ("video_tower.", "vision.frame_tower."))  # fmt: skip


def slots(hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `VideoLlavaConfig`."""
    found = llava.slots(hf, pixels)
    has_cls = hf.vision_feature_select_strategy == "default"  # "full": an encoder without [CLS], see `refuse_odd_cls`
    return {
        **found,
        "vision": {**found["vision"], "frame_tower": True},
        "layout": {"name": "frames", "cls": has_cls},
    }


def misfit(model: Any, encoder: Encoder) -> str:
    """Return why `VideoLlavaForConditionalGeneration` does not support a model."""
    wrong = layout_misfit(model, "frames", cls=model.vision.runner.num_prefix > 0)
    if not wrong and model.vision.frame_runner is None:
        wrong = "it has one encoder for images and frames (vision.frame_tower=false), and the layout has two"
    return wrong or videos_misfit(model) or llava.common_misfit(model, encoder)


def config(model: Any, encoder: Encoder) -> Any:
    """Translate a composed model to a `VideoLlavaConfig`."""
    from transformers import VideoLlavaConfig

    return VideoLlavaConfig(
        **llava.parts(model, encoder),
        video_token_index=model.config.video_token_id,
        image_seq_length=model.num_image_tokens,
    )


FAMILY = replace(
    llava.FAMILY,
    model_type="video_llava",
    model="VideoLlavaForConditionalGeneration",
    processor="VideoLlavaProcessor",
    slots=slots,
    keys=KEYS,
    config=config,
    misfit=misfit,
    call={
        "return_legacy_image_output": False,
        "input_data_format": "channels_last",
    },  # its detection is wrong for one row
    videos=True,
)
