"""LLaVA-NeXT-Video: LLaVA-NeXT whose frames are pooled two by two ahead of the projector, without newlines.

Published as `llava-hf/LLaVA-NeXT-Video-7B-hf` and others that use `LlavaNextVideoForConditionalGeneration`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.published import llava, llava_next
from zoo.published.encoders import Encoder
from zoo.published.family import layout_misfit, plain
from zoo.registry import ZooError


def slots(hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `LlavaNextVideoConfig`."""
    if hf.spatial_pool_mode not in ("average", "max") or hf.spatial_pool_stride != 2:
        raise ZooError(
            f"Its frames are pooled by {hf.spatial_pool_mode!r} with a stride of {hf.spatial_pool_stride}; known are "
            f"average and max with a stride of 2."
        )
    found = llava_next.slots(hf, pixels)
    return {**found, "layout": {**found["layout"], "frames": hf.spatial_pool_mode}}


def misfit(model: Any, encoder: Encoder) -> str:
    """Why `LlavaNextVideoForConditionalGeneration` has no place for a model."""
    frames = ("average", "max").__contains__
    wrong = layout_misfit(model, "anyres", pinpoints=bool, newline=True, max_crops=0, frames=frames)
    return wrong or videos_misfit(model) or llava.common_misfit(model, encoder)


def videos_misfit(model: Any) -> str:
    """Why a layout for videos has no place for a model that takes none."""
    return "" if model.config.video_token_id is not None else "it has no token for videos"


def config(model: Any, encoder: Encoder) -> Any:
    """Say a composed model as a `LlavaNextVideoConfig`."""
    from transformers import LlavaNextVideoConfig

    return LlavaNextVideoConfig(
        **llava.parts(model, encoder),
        image_grid_pinpoints=plain(model.layout.config.pinpoints),
        spatial_pool_mode=model.layout.config.frames,
        video_token_index=model.config.video_token_id,
    )


FAMILY = replace(
    llava_next.FAMILY,
    model_type="llava_next_video",
    model="LlavaNextVideoForConditionalGeneration",
    processor="LlavaNextVideoProcessor",
    slots=slots,
    config=config,
    misfit=misfit,
    videos=True,
)
