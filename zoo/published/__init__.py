"""Published layouts of vision-language models: the family of a config. One line per family.

A family translates the config of a published model and the names of its weights to our slots and back, and defines how
its images are prepared. Everything else (loading, checking, pruning, saving) is the same for all.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from zoo.registry import ZooError, unknown

# `model_type` in config.json -> module of the family
FAMILIES = {
    "glm46v": "zoo.published.glm4v",
    "glm4v": "zoo.published.glm4v",
    "glm4v_moe": "zoo.published.glm4v",
    "idefics3": "zoo.published.idefics3",
    "internvl": "zoo.published.internvl",
    "llava": "zoo.published.llava",
    "llava_next": "zoo.published.llava_next",
    "llava_next_video": "zoo.published.llava_next_video",
    "llava_onevision": "zoo.published.llava_onevision",
    "paddleocr_vl": "zoo.published.paddleocr_vl",
    "qwen2_5_vl": "zoo.published.qwen_vl",
    "qwen2_vl": "zoo.published.qwen_vl",
    "qwen3_vl": "zoo.published.qwen_vl",
    "qwen3_vl_moe": "zoo.published.qwen_vl",
    "smolvlm": "zoo.published.smolvlm",
    "video_llava": "zoo.published.video_llava",
}


def is_published(content: Any) -> bool:
    """Whether a config.json is that of a published model of a supported family."""
    kind = content.get("model_type") if isinstance(content, Mapping) else None
    return isinstance(kind, str) and kind in FAMILIES


def family_named(model_type: str) -> Any:
    """Return the family of a `model_type`.

    Raises:
        ZooError: there is none.
    """
    if model_type not in FAMILIES:
        raise unknown("published family", model_type, FAMILIES)
    module = import_module(FAMILIES[model_type])
    return module.FAMILIES[model_type] if hasattr(module, "FAMILIES") else module.FAMILY


def family_of(content: Mapping[str, Any], where: str) -> Any:
    """Return the family of a config.json."""
    if not is_published(content):
        raise ZooError(
            f"{where} holds a model of type {content.get('model_type')!r}; known families: {', '.join(FAMILIES)}."
        )
    return family_named(content["model_type"])
