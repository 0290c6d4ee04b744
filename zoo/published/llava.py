"""LLaVA-1.5: one image of 336 pixels, 576 tokens of CLIP's last layer but one, a two-layer MLP, a Llama.

Paper: Liu et al., arXiv:2310.03744. Published as `llava-hf/llava-1.5-7b-hf` and others that use
`LlavaForConditionalGeneration` (LLaVA-Interleave, BakLLaVA).
"""

from collections.abc import Mapping
from typing import Any

from zoo.published.family import Family, llm_slot, mlp_slot, one_layer, refuse_odd_cls, vision_slot, whole_vision_config

KEYS = (
    ("language_model.model.", "llm.lm.model."),
    ("language_model.lm_head.", "llm.lm.lm_head."),
    ("vision_tower.", "vision.tower."),
    ("multi_modal_projector.linear_1.", "projector.net.0."),
    ("multi_modal_projector.linear_2.", "projector.net.2."),
)


def slots(hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `LlavaConfig`."""
    refuse_odd_cls(hf.vision_feature_select_strategy, hf.vision_config)
    return {
        "vision": vision_slot(hf.vision_config, pixels, layer=one_layer(hf.vision_feature_layer)),
        "projector": mlp_slot(hf.projector_hidden_act, hf.multimodal_projector_bias),
        "llm": llm_slot(hf.text_config, hf.tie_word_embeddings),
    }


def parts(model: Any) -> dict[str, Any]:
    """What the configs of all LLaVA models have in common, from a composed one."""
    vision = model.config.slots["vision"]
    has_cls = model.vision.runner.num_prefix > 0
    names = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
    projector = model.config.slots["projector"]
    return {
        "vision_config": whole_vision_config(model).to_dict(),
        "text_config": model.llm.lm.config.to_dict(),
        "image_token_index": model.image_token_id,
        "vision_feature_layer": vision["layer"],
        "vision_feature_select_strategy": "default" if has_cls else "full",
        "projector_hidden_act": names[projector.get("activation", "gelu")],
        "multimodal_projector_bias": projector.get("bias", True),
        "tie_word_embeddings": bool(model.llm.lm.config.tie_word_embeddings),
    }


def config(model: Any) -> Any:
    """Say a composed model as a `LlavaConfig`."""
    from transformers import LlavaConfig

    return LlavaConfig(**parts(model), image_seq_length=model.num_image_tokens)


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """What `LlavaProcessor` counts image tokens with."""
    has_cls = model.vision.runner.num_prefix > 0
    return {
        "patch_size": model.config.slots["vision"]["patch_size"],
        "vision_feature_select_strategy": "default" if has_cls else "full",
        "num_additional_image_tokens": int(has_cls),
        "image_token": processor.image_token,
    }


FAMILY = Family("llava", "LlavaForConditionalGeneration", "LlavaProcessor", slots, KEYS, config, processor_options)
