"""InternVL in the layout of transformers: tiles, pixel shuffle, a norm and two linear layers.

Paper: Chen et al., arXiv:2404.16821 (InternVL 1.5); Zhu et al., arXiv:2504.10479 (InternVL3). Published as
`OpenGVLab/InternVL3-1B-hf` and others that use `InternVLForConditionalGeneration`.
"""

from collections.abc import Mapping
from typing import Any

from zoo.published.composed import VIDEO, frames_as
from zoo.published.encoders import Encoder
from zoo.published.family import ACTIVATIONS, Family, layout_misfit, llm_slot, one_layer, text_options, vision_slot
from zoo.registry import ZooError, config_of

KEYS = (
    ("language_model.model.", "llm.lm.model."),
    ("language_model.lm_head.", "llm.lm.lm_head."),
    ("vision_tower.", "vision.tower."),
    ("multi_modal_projector.layer_norm.", "projector.norm."),
    ("multi_modal_projector.linear_1.", "projector.net.0."),
    ("multi_modal_projector.linear_2.", "projector.net.2."),
)


def slots(hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an `InternVLConfig`."""
    if hf.vision_feature_select_strategy != "default":
        raise ZooError("It keeps the [CLS] token among the image tokens (vision_feature_select_strategy='full').")
    if hf.projector_hidden_act not in ACTIVATIONS:
        raise ZooError(
            f"Its projector's activation is {hf.projector_hidden_act!r}; known are {', '.join(ACTIVATIONS)}."
        )
    layer = one_layer(hf.vision_feature_layer)
    norm = layer == -1 and not hf.vision_config.use_mean_pooling
    return {
        "vision": vision_slot(hf.vision_config, pixels, layer=layer, norm=norm),
        "projector": {
            "name": "pixel_shuffle",
            "factor": round(1 / hf.downsample_ratio),
            "norm": True,
            "depth": 2,
            "activation": ACTIVATIONS[hf.projector_hidden_act],
            "bias": True,
        },
        "layout": {
            "name": "tiles",
            "begin": "<img>",
            "end": "</img>",
            "most": int(pixels.get("max_patches") or 12) + 1,
        },
        "llm": llm_slot(hf.text_config, bool(hf.tie_word_embeddings)),
    }


def misfit(model: Any, encoder: Encoder) -> str:
    """Return why `InternVLForConditionalGeneration` does not support a model."""
    wrong = layout_misfit(model, "tiles", style="joined", begin=bool, end=bool)
    name, wanted = model.config.slots["projector"]["name"], {"depth": 2, "bias": True, "norm": True}
    _, node = config_of("projector", model.config.slots["projector"])
    if wrong:
        return wrong
    if name != "pixel_shuffle" or any(getattr(node, key) != value for key, value in wanted.items()):
        return f"its projector is {name!r}, and the layout's is 'pixel_shuffle' of a norm and two layers with bias"
    if encoder.norm and encoder.layer != -1:
        return f"image tokens are layer {encoder.layer} behind the final norm, and the layout norms the last layer only"
    return ""


def config(model: Any, encoder: Encoder) -> Any:
    """Translate a composed model to an `InternVLConfig`."""
    from transformers import InternVLConfig

    names = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    slots = model.config.slots
    if encoder.layer == -1:  # its class takes the last layer without the final norm
        encoder.config.use_mean_pooling = not encoder.norm
    return InternVLConfig(
        vision_config=encoder.config.to_dict(),
        image_token_id=model.image_token_id,
        image_seq_length=model.layout.tokens,
        downsample_ratio=1 / model.projector.factor,
        projector_hidden_act=names[slots["projector"].get("activation", "gelu")],
        vision_feature_layer=encoder.layer,
        **text_options(model),
    )


def processor_options(model: Any, processor: Any) -> dict[str, Any]:
    """Return the arguments by which `InternVLProcessor` counts image tokens; a video processor is required."""
    return {"image_seq_length": model.layout.tokens, **frames_as("InternVLVideoProcessor", processor)}


def tokens(model: Any, processor: Any) -> dict[str, str]:
    """Return the tokens that `InternVLProcessor` needs in the tokenizer."""
    layout = model.layout.config
    return {
        "start_image_token": layout.begin,
        "end_image_token": layout.end,
        "context_image_token": processor.image_token,
        "video_token": processor.video_token or VIDEO,
    }


FAMILY = Family(
    "internvl",
    "InternVLForConditionalGeneration",
    "InternVLProcessor",
    slots,
    KEYS,
    config,
    processor_options,
    misfit,
    frozenset({"internvl_vision"}),
    tokens,
    videos=True,
    call={"crop_to_patches": True},
)
