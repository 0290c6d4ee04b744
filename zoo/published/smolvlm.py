"""SmolVLM 2: the layout of Idefics3 under its own names, and videos, written as words and frames.

Its processor in transformers wants the package num2words, to spell the number of frames; ours spells it itself.
"""

from dataclasses import replace
from typing import Any

from zoo.published import idefics3
from zoo.published.encoders import Encoder


def config(model: Any, encoder: Encoder) -> Any:
    """Translate a composed model to a `SmolVLMConfig`."""
    return idefics3.config(model, encoder, "SmolVLMConfig")


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """Return the arguments of `SmolVLMProcessor` beside the image processor; a video processor is required."""
    from transformers import SmolVLMVideoProcessor

    more = {} if processor.videos is not None else {"video_processor": SmolVLMVideoProcessor()}
    return {**idefics3.processor_options(model, processor), **more}


FAMILY = replace(
    idefics3.FAMILY,
    model_type="smolvlm",
    model="SmolVLMForConditionalGeneration",
    processor="SmolVLMProcessor",
    config=config,
    processor_options=processor_options,
    encoders=frozenset({"smolvlm_vision"}),
    videos=True,
    video_token="<video>",
)
