"""LLaVA-NeXT (1.6): crops by pinpoints, an overview, a newline token behind each line of the joined grid.

Published as `llava-hf/llava-v1.6-vicuna-7b-hf`, `llava-v1.6-mistral-7b-hf` and others that use
`LlavaNextForConditionalGeneration`.
"""

from collections.abc import Mapping
from typing import Any

from zoo.published import llava
from zoo.published.family import Family, plain

KEYS = (*llava.KEYS, ("image_newline", "layout.newline"))


def slots(hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `LlavaNextConfig`."""
    pinpoints = plain(pixels.get("image_grid_pinpoints") or hf.image_grid_pinpoints)
    return {**llava.slots(hf, pixels), "layout": {"name": "anyres", "pinpoints": pinpoints}}


def config(model: Any) -> Any:
    """Say a composed model as a `LlavaNextConfig`."""
    from transformers import LlavaNextConfig

    pinpoints = plain(model.layout.config.pinpoints)
    return LlavaNextConfig(**llava.parts(model), image_grid_pinpoints=pinpoints)


FAMILY = Family(
    "llava_next",
    "LlavaNextForConditionalGeneration",
    "LlavaNextProcessor",
    slots,
    KEYS,
    config,
    llava.processor_options,
)
