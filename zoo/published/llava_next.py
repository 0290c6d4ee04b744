"""LLaVA-NeXT (1.6): crops by pinpoints, an overview, a newline token behind each line of the joined grid.

Published as `llava-hf/llava-v1.6-vicuna-7b-hf`, `llava-v1.6-mistral-7b-hf` and others that use
`LlavaNextForConditionalGeneration`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.published import llava
from zoo.published.encoders import Encoder
from zoo.published.family import layout_misfit, plain

KEYS = (*llava.KEYS, ("image_newline", "layout.newline"))


def slots(hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `LlavaNextConfig`."""
    pinpoints = plain(pixels.get("image_grid_pinpoints") or hf.image_grid_pinpoints)
    return {**llava.slots(hf, pixels), "layout": {"name": "anyres", "pinpoints": pinpoints}}


def misfit(model: Any, encoder: Encoder) -> str:
    """Why `LlavaNextForConditionalGeneration` has no place for a model."""
    wrong = layout_misfit(model, "anyres", pinpoints=bool, newline=True, max_crops=0)
    return wrong or llava.common_misfit(model, encoder)


def config(model: Any, encoder: Encoder) -> Any:
    """Say a composed model as a `LlavaNextConfig`."""
    from transformers import LlavaNextConfig

    pinpoints = plain(model.layout.config.pinpoints)
    return LlavaNextConfig(**llava.parts(model, encoder), image_grid_pinpoints=pinpoints)


FAMILY = replace(
    llava.FAMILY,
    model_type="llava_next",
    model="LlavaNextForConditionalGeneration",
    processor="LlavaNextProcessor",
    slots=slots,
    keys=KEYS,
    config=config,
    misfit=misfit,
)
