"""Shared by published families whose images keep their shapes: Qwen-VL, GLM-V and PaddleOCR-VL.

Each has the encoder `qwen_vision` of its own `model_type`, the projector `identity`, the layout `native` and the text
model of transformers beside its encoder.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from zoo.published.encoders import Encoder
from zoo.published.family import Family, different, layout_misfit, llm_slot, statistics, text_options

KEYS = (
    ("model.visual.", "vision.tower."),
    ("visual.", "vision.tower."),
    ("model.language_model.", "llm.lm.model."),
    ("lm_head.", "llm.lm.lm_head."),
    ("model.", "llm.lm.model."),
)


@dataclass(frozen=True)
class Native:
    """A family whose images keep their shapes.

    Attributes:
        name: `model_type` in config.json.
        words: how names of transformers' classes begin.
        processor: class of its processor.
        videos: class of its video processor; empty: it takes none.
        video: placeholder of a video in a prompt.
        marks: field of the config -> token that it has the number of.
        layout: vision config -> options of `native`, how videos are placed and written.
        encoder: family of the encoder, in `qwen_vision`.
        texts: `model_type`s of language models.
        keys: pairs of prefixes of weights, theirs and ours.
        canonical: pairs of pattern and replacement, of names in files.
    """

    name: str
    words: str
    processor: str
    videos: str
    video: str
    marks: Mapping[str, str]
    layout: Callable[[Any], dict[str, Any]]
    encoder: str
    texts: frozenset[str]
    keys: Sequence[tuple[str, str]] = KEYS
    canonical: Sequence[tuple[re.Pattern[str], str]] = ()

    def family(self) -> Family:
        """Return what the application asks of a family."""
        return Family(
            self.name,
            f"{self.words}ForConditionalGeneration",
            self.processor,
            partial(_slots, self),
            self.keys,
            partial(_config, self),
            partial(_processor_options, self),
            partial(_misfit, self),
            frozenset({f"{self.encoder}_vision", self.encoder}),  # transformers 5.21 calls the encoder as the whole
            partial(_tokens, self),
            canonical=self.canonical,
            marks=self.marks,
            videos=bool(self.videos),
            video_processor=self.videos,
        )


def _slots(own: Native, hf: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a config."""
    return {
        "vision": _vision_slot(own.encoder, hf.vision_config, hf.text_config.hidden_size, pixels),
        "projector": {"name": "identity"},
        "layout": {"name": "native", **own.layout(hf.vision_config)},
        "llm": llm_slot(hf.text_config, bool(hf.tie_word_embeddings)),
    }


def _vision_slot(name: str, vision: Any, text_width: int, pixels: Mapping[str, Any]) -> dict[str, Any]:
    from zoo.vision.encoders.qwen import FAMILIES, QwenVisionConfig, config_from_sizes
    from zoo.vision.images.processors import frames_counted

    known = FAMILIES[name]
    width = getattr(vision, known.width)
    node: dict[str, Any] = {
        "model_type": name,
        "patch_size": int(vision.patch_size),
        "width": width,
        "out_width": getattr(vision, known.out) if known.out else text_width,
        "depth": getattr(vision, "depth", 0) or vision.num_hidden_layers,
        "heads": getattr(vision, "num_heads", 0) or vision.num_attention_heads,
        "mlp_ratio": float(getattr(vision, "mlp_ratio", 0) or vision.intermediate_size / width),
    }
    size = pixels.get("size") or {}
    for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if isinstance(value := size.get(theirs), int):
            node[ours] = value // frames_counted(known.images)
    node |= {name: value for name, value in statistics(pixels).items() if name in ("mean", "std")}
    extra = different(vision, config_from_sizes(QwenVisionConfig(**node)), but=set())
    return {"name": "qwen_vision", **node, "extra": extra}


def _misfit(own: Native, model: Any, encoder: Encoder) -> str:
    """Return why the family's class does not support a model."""
    from zoo.fusion.layouts.native import NativeConfig

    plain = {"timestamps": False, "tokens_per_second": 0.0, "after_video": "side"}
    wanted = {**plain, **own.layout(encoder.config)}
    if wanted["timestamps"]:
        written = NativeConfig()
        wanted = {**{name: getattr(written, name) for name in ("clock", "begin", "end")}, **wanted}
    if wrong := layout_misfit(model, "native", **wanted):
        return wrong
    if (projector := model.config.slots["projector"]["name"]) != "identity":
        return f"its projector is {projector!r}, and the layout has none (projector=identity)"
    if (kind := model.llm.lm.config.model_type) not in own.texts:
        return f"its language model is of type {kind!r}, and the layout takes {', '.join(map(repr, sorted(own.texts)))}"
    return ""


def _config(own: Native, model: Any, encoder: Encoder) -> Any:
    """Translate a composed model to a config of the family's class."""
    import transformers

    vision = {k: v for k, v in encoder.config.to_dict().items() if k != "model_type"}
    return getattr(transformers, f"{own.words}Config")(
        vision_config=vision, image_token_id=model.image_token_id, **text_options(model)
    )


def _processor_options(own: Native, model: Any, processor: Any) -> dict[str, Any]:
    """Return the video processor, which the family's processors require, where the model has none."""
    from zoo.vision.images.processors import processor_of

    if processor.videos is not None or not own.videos:
        return {}
    sizes = {k: processor.pictures.config[k] for k in ("patch_size", "merge_size", "temporal_patch_size")}
    return {"video_processor": processor_of({**sizes, "video_processor_type": own.videos})}


def _tokens(own: Native, model: Any, processor: Any) -> dict[str, str]:
    """Return the tokens that the processors need in the tokenizer."""
    video = {"video_token": own.video} if own.video in processor.tokenizer.get_vocab() else {}
    return {"image_token": processor.image_token, **video}
