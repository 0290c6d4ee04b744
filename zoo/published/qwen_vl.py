"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts: images keep their shapes, positions have three axes.

Papers: Wang et al., arXiv:2409.12191; Bai et al., arXiv:2502.13923 (2.5) and arXiv:2511.21631 (3). Published as
`Qwen/Qwen2-VL-2B-Instruct`, `Qwen/Qwen2.5-VL-7B-Instruct`, `Qwen/Qwen3-VL-8B-Instruct`,
`Qwen/Qwen3-VL-30B-A3B-Instruct` and others.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from zoo.published.encoders import Encoder
from zoo.published.family import Family, different, layout_misfit, llm_slot, text_options

VIDEO, BEGIN, END = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
KEYS = (
    ("model.visual.", "vision.tower."),
    ("visual.", "vision.tower."),
    ("model.language_model.", "llm.lm.model."),
    ("lm_head.", "llm.lm.lm_head."),
    ("model.", "llm.lm.model."),
)
_VIDEOS = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen2_5_vl": "Qwen2VLVideoProcessor"}
_VIDEOS |= dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), "Qwen3VLVideoProcessor")


def slots(name: str, hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a config of the family `name`."""
    return {
        "vision": _vision_slot(name, hf.vision_config, pixels),
        "projector": {"name": "identity"},
        "layout": {"name": "native", **videos_of(name, hf.vision_config)},
        "llm": llm_slot(hf.text_config, bool(hf.tie_word_embeddings)),
    }


def videos_of(name: str, vision: Any) -> dict[str, Any]:
    """Return how the family places and writes videos, as options of `native`."""
    if name.startswith("qwen3"):
        return {"timestamps": True}
    return {"tokens_per_second": float(vision.tokens_per_second)} if name == "qwen2_5_vl" else {}


def _vision_slot(name: str, vision: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    from zoo.vision.encoders.qwen import FAMILIES, QwenVisionConfig, config_from_sizes

    known = FAMILIES[name]
    width = getattr(vision, known.width)
    node: dict[str, Any] = {
        "model_type": name,
        "patch_size": int(vision.patch_size),
        "width": width,
        "out_width": getattr(vision, known.out),
        "depth": vision.depth,
        "heads": vision.num_heads,
        "mlp_ratio": float(getattr(vision, "mlp_ratio", 0) or vision.intermediate_size / width),
    }
    size = pixels.get("size") or {}
    for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if isinstance(value := size.get(theirs), int):
            node[ours] = value
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if pixels.get(theirs):
            node[ours] = [float(v) for v in pixels[theirs]]
    extra = different(vision, config_from_sizes(QwenVisionConfig(**node)), but=set())
    return {"name": "qwen_vision", **node, "extra": extra}


def misfit(name: str, model: Any, encoder: Encoder) -> str:
    """Return why the class of the family `name` does not support a model."""
    plain = {"timestamps": False, "tokens_per_second": 0.0, "after_video": "side"}
    if wrong := layout_misfit(model, "native", **{**plain, **videos_of(name, encoder.config)}):
        return wrong
    if (projector := model.config.slots["projector"]["name"]) != "identity":
        return f"its projector is {projector!r}, and the layout has none (projector=identity)"
    if (kind := model.llm.lm.config.model_type) != f"{name}_text":
        return f"its language model is of type {kind!r}, and the layout takes '{name}_text'"
    return ""


def config(cls: str, model: Any, encoder: Encoder) -> Any:
    """Translate a composed model to a config of the class `cls`."""
    import transformers

    processor = model.__dict__.get("processor")
    vocabulary = processor.tokenizer.get_vocab() if processor is not None else {}
    names = {"vision_start_token_id": BEGIN, "vision_end_token_id": END, "video_token_id": VIDEO}
    known = {key: vocabulary[token] for key, token in names.items() if token in vocabulary}
    vision = {k: v for k, v in encoder.config.to_dict().items() if k != "model_type"}
    return getattr(transformers, cls)(
        vision_config=vision, image_token_id=model.image_token_id, **known, **text_options(model)
    )


def processor_options(name: str, model: Any, processor: Any) -> dict[str, Any]:
    """Return the video processor, which the family's processors require, where the model has none."""
    from zoo.vision.images.processors import processor_of

    if processor.videos is not None:
        return {}
    own = {k: processor.pictures.config[k] for k in ("patch_size", "merge_size", "temporal_patch_size")}
    return {"video_processor": processor_of({**own, "video_processor_type": _VIDEOS[name]})}


def tokens(model: Any, processor: Any) -> dict[str, str]:
    """Return the tokens that the processors need in the tokenizer."""
    video = {"video_token": VIDEO} if VIDEO in processor.tokenizer.get_vocab() else {}
    return {"image_token": processor.image_token, **video}


def _family(name: str, words: str, processor: str) -> Family:
    return Family(
        name,
        f"{words}ForConditionalGeneration",
        processor,
        partial(slots, name),
        KEYS,
        partial(config, f"{words}Config"),
        partial(processor_options, name),
        partial(misfit, name),
        frozenset({f"{name}_vision", name}),  # transformers 5.21 calls the encoder as the whole
        tokens,
        canonical=(),
        videos=True,
        video_processor=_VIDEOS[name],
    )


FAMILIES = {
    "qwen2_vl": _family("qwen2_vl", "Qwen2VL", "Qwen2VLProcessor"),
    "qwen2_5_vl": _family("qwen2_5_vl", "Qwen2_5_VL", "Qwen2_5_VLProcessor"),
    "qwen3_vl": _family("qwen3_vl", "Qwen3VL", "Qwen3VLProcessor"),
    "qwen3_vl_moe": _family("qwen3_vl_moe", "Qwen3VLMoe", "Qwen3VLProcessor"),
}
