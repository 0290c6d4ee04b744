"""SmolVLM 2: the layout of Idefics3 under names of its own."""

from dataclasses import replace
from typing import Any

from zoo.published import idefics3


def config(model: Any) -> Any:
    """Say a composed model as a `SmolVLMConfig`."""
    return idefics3.config(model, "SmolVLMConfig")


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """What `SmolVLMProcessor` takes beside the image processor; it has one for videos."""
    from transformers import SmolVLMVideoProcessor

    return {**idefics3.processor_options(model, processor), "video_processor": SmolVLMVideoProcessor()}


FAMILY = replace(
    idefics3.FAMILY,
    model_type="smolvlm",
    model="SmolVLMForConditionalGeneration",
    processor="SmolVLMProcessor",
    config=config,
    processor_options=processor_options,
)
