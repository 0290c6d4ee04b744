"""LLaVA-1.5: one image of 336 pixels, 576 tokens of CLIP's last layer but one, a two-layer MLP, a Llama.

Paper: Liu et al., arXiv:2310.03744. Published as `llava-hf/llava-1.5-7b-hf` and others that use
`LlavaForConditionalGeneration` (LLaVA-Interleave, BakLLaVA).
"""

from collections.abc import Mapping
from typing import Any

from zoo.published.encoders import Encoder
from zoo.published.family import (
    Family,
    layout_misfit,
    llm_slot,
    mlp_misfit,
    mlp_slot,
    one_layer,
    refuse_odd_cls,
    text_options,
    vision_slot,
)

# Encoders that `AutoModel` builds, that take only pixels and return hidden states.
ENCODERS = frozenset(
    {"clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "internvl_vision"}
    | {"idefics3_vision", "smolvlm_vision"}
)
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
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


def parts(model: Any, encoder: Encoder) -> dict[str, Any]:
    """Return the fields that configs of all LLaVA models have, from a composed model."""
    projector = model.config.slots["projector"]
    return {
        "vision_config": encoder.config.to_dict(),
        "image_token_index": model.image_token_id,
        "vision_feature_layer": encoder.layer,
        "vision_feature_select_strategy": selection(model),
        "projector_hidden_act": ACTIVATIONS[projector.get("activation", "gelu")],
        "multimodal_projector_bias": projector.get("bias", True),
        **text_options(model),
    }


def selection(model: Any) -> str:
    """Return how LLaVA's classes drop a [CLS] token, if there is one."""
    return "default" if model.vision.runner.num_prefix else "full"


def common_misfit(model: Any, encoder: Encoder) -> str:
    """Return why an encoder or a projector is not supported by LLaVA; empty if both are."""
    if encoder.norm:
        return "image tokens go through the encoder's final norm (vision.norm), and LLaVA's classes take them before it"
    if encoder.num_prefix > 1:
        return f"its encoder puts {encoder.num_prefix} tokens ahead of the patches, and LLaVA's classes drop one"
    return mlp_misfit(model)


def misfit(model: Any, encoder: Encoder) -> str:
    """Return why `LlavaForConditionalGeneration` does not support a model."""
    return layout_misfit(model, "") or common_misfit(model, encoder)


def config(model: Any, encoder: Encoder) -> Any:
    """Translate a composed model to a `LlavaConfig`."""
    from transformers import LlavaConfig

    return LlavaConfig(**parts(model, encoder), image_seq_length=model.num_image_tokens)


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """Return the arguments by which `LlavaProcessor` counts image tokens."""
    height, width = model.vision.transform.size
    patch = height // model.vision.grid[0]
    assert (height // patch, width // patch) == tuple(model.vision.grid), "square patches"
    return {
        "patch_size": patch,
        "vision_feature_select_strategy": selection(model),
        "num_additional_image_tokens": model.vision.runner.num_prefix,
        "image_token": processor.image_token,
    }


def tokens(model: Any, processor: Any) -> dict[str, str]:
    """Return the tokens that LLaVA's processors need in the tokenizer."""
    return {"image_token": processor.image_token}


FAMILY = Family(
    "llava",
    "LlavaForConditionalGeneration",
    "LlavaProcessor",
    slots,
    KEYS,
    config,
    processor_options,
    misfit,
    ENCODERS,
    tokens,
)
