"""Shared by families of published models: translation of transformers' configs to slots, and names of weights."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from zoo.registry import ZooError, config_of
from zoo.registry.quiet import errors_alone
from zoo.vision.images.processors import RESAMPLES

ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    "silu": "silu", "swish": "silu",
}  # fmt: skip

# Files name the same weights in several ways: as hub repositories do, as transformers 5 has them in memory, and both
# with or without a level `vision_model`. Here: the hub's names, without that level.
CANONICAL = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.(vision_tower|image_tower|video_tower|multi_modal_projector|image_newline)"), r"\1"),
    (re.compile(r"^(vision_tower|image_tower|video_tower)\.vision_model\."), r"\1."),
)

# Weights that files may have and models do not: blocks and norms after the used layer, and buffers of old files.
SPARE = re.compile(
    r"^vision\.(frame_)?tower\.((encoder|model)\.layers?\.\d+|post_layernorm|layernorm|norm|head)\."
    r"|^vision\.tower\.visual\.vision_model\.(head|embeddings\.packing_position_embedding)\."
    r"|^vision\.(frame_)?tower\.embeddings\.mask_token$|rotary_emb\.inv_freq$|position_ids$"
)


_BACKBONE = {"_out_features", "_out_indices"}  # of classes that can also return feature maps


@dataclass(frozen=True)
class Family:
    """A published layout.

    Attributes:
        model_type: in config.json.
        model: class of transformers that loads it.
        processor: class of its processor.
        slots: (config of transformers, values of the image processor) -> our slots.
        keys: pairs of prefixes, theirs (canonical) and ours.
        config: (composed model, its encoder as it is written) -> config of transformers, for the export.
        processor_options: (composed model, our processor) -> what else the processor's class takes.
        misfit: (composed model, its encoder as it is written) -> why the layout has no place for it; nothing if it has.
        encoders: `model_type`s of encoders that the class takes.
        tokens: (composed model, our processor) -> names that the processor's class wants tokens to have.
        canonical: pairs of pattern and replacement, in this order.
        marks: field of the config -> token of the tokenizer that it has the number of.
        call: options of the image processor's call.
        whole_if_several: do not cut an image that is one of several of a sample.
        videos: whether the family takes videos.
        video_processor: class of its video processor; empty: named as the model.
        video_token: placeholder of a video, if neither the config nor the tokenizer names one.
    """

    model_type: str
    model: str
    processor: str
    slots: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    keys: Sequence[tuple[str, str]]
    config: Callable[[Any, Any], Any]
    processor_options: Callable[[Any, Any], dict[str, Any]]
    misfit: Callable[[Any, Any], str]
    encoders: frozenset[str]
    tokens: Callable[[Any, Any], dict[str, str]]
    canonical: Sequence[tuple[re.Pattern[str], str]] = CANONICAL
    marks: Mapping[str, str] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    whole_if_several: bool = False
    videos: bool = False
    video_processor: str = ""
    video_token: str | None = None

    def ours(self, name: str) -> str | None:
        """Return our name of a published weight; None if the family has no such weight."""
        for pattern, new in self.canonical:
            name = pattern.sub(new, name)
        for theirs, ours in self.keys:
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return None


def parse(content: Mapping[str, Any], where: str) -> Any:
    """Read a config.json with transformers' own class, so that its defaults are the family's."""
    try:
        return _parsed(json.dumps(content))
    except Exception as error:  # transformers raises a class of its own for each check
        raise ZooError(f"{where} cannot be read: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=4)
def _parsed(text: str) -> Any:
    """Parse a config once: it is needed several times while a model loads, and is never modified."""
    from transformers import CONFIG_MAPPING

    content = json.loads(text)
    with errors_alone():  # it finds positions of three axes odd in PaddleOCR-VL's
        config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    if (
        content.get("tie_word_embeddings") is False and "text_config" not in content
    ):  # of PaddleOCR-VL it takes a default
        config.tie_word_embeddings = False
    return config


def llm_slot(text: Any, tie: bool) -> dict[str, Any]:
    """Translate a text config of transformers to options of our `hf` language model; the rest goes to `extra`."""
    from zoo.fusion.llm.hf_config import HFLanguageModelConfig, transformers_config

    node = {
        "model_type": type(text).model_type,
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "max_positions": text.max_position_embeddings,
        "tie_embeddings": tie,
    }
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if isinstance(value := getattr(text, name, None), int):
            node["intermediate_size"] = value
            break
    if node["num_kv_heads"] == node["num_heads"]:
        node["num_kv_heads"] = 0
    loose = {"head_dim": 0} if node["hidden_size"] % node["num_heads"] else {}
    probe = transformers_config(HFLanguageModelConfig(**node, extra=dict(loose)), text.vocab_size)
    extra = different(text, probe, but={"tie_word_embeddings"})
    return {"name": "hf", **node, "extra": {**extra, "vocab_size": text.vocab_size}}


def vision_slot(vision: Any, pixels: Mapping[str, Any], *, layer: int, norm: bool = False) -> dict[str, Any]:
    """Translate a vision config of transformers, and its image processor's statistics, to options of `hf`."""
    from zoo.vision.encoders.hf import FAMILIES, HFVisionConfig, _from_sizes

    name = type(vision).model_type.removesuffix("_vision_model")  # of the class: files may state the whole model's type
    if name not in FAMILIES:
        raise ZooError(f"Its encoder is of type {type(vision).model_type!r}; known are {', '.join(FAMILIES)}.")
    size, patch = (_side(getattr(vision, key)) for key in ("image_size", "patch_size"))
    node: dict[str, Any] = {
        "model_type": name,
        "layer": layer,
        "norm": norm,
        "image_size": size,
        "patch_size": patch,
        "width": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "mlp_ratio": getattr(vision, "mlp_ratio", None) or vision.intermediate_size / vision.hidden_size,
    }
    probe = _from_sizes(HFVisionConfig(**node, extra={"image_size": getattr(vision, "image_size", size)}))
    extra = different(vision, probe, but={"vision_use_head", *_BACKBONE})
    extra["image_size"] = plain(vision.image_size)
    return {"name": "hf", **node, "extra": extra, **statistics(pixels)}


def statistics(pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an image processor's mean, standard deviation, resampling and fit."""
    found: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        value = pixels.get(theirs)
        if value is not None and pixels.get("do_normalize", True):
            found[ours] = [float(v) for v in ([value] * 3 if isinstance(value, (int, float)) else value)]
    if pixels.get("resample") in RESAMPLES:
        found["resample"] = RESAMPLES[pixels["resample"]]
    found["fit"] = "crop" if pixels.get("do_center_crop") else "squash"
    return found


def mlp_slot(activation: str, bias: bool = True) -> dict[str, Any]:
    """Translate LLaVA's projector to options of `mlp`."""
    if activation not in ACTIVATIONS:
        raise ZooError(f"Its projector's activation is {activation!r}; known are {', '.join(ACTIVATIONS)}.")
    return {"name": "mlp", "depth": 2, "activation": ACTIVATIONS[activation], "bias": bool(bias)}


def one_layer(layer: int | Sequence[int]) -> int:
    """Return the encoder layer that image tokens are taken from.

    Raises:
        ZooError: features of several layers are joined, which is not supported.
    """
    if isinstance(layer, int):
        return layer
    if len(layer) != 1:
        raise ZooError(f"It joins the encoder's layers {list(layer)}; one layer is supported.")
    return layer[0]


def refuse_odd_cls(select: str, vision: Any) -> None:
    """Refuse a selection of tokens that leaves others than patches."""
    from zoo.vision.encoders.hf import FAMILIES

    kind = type(vision).model_type
    known = FAMILIES.get(kind.removesuffix("_vision_model"))
    if known is None:
        return  # `vision_slot` refuses it
    first = int(known.has_cls) * (1 + getattr(vision, "num_register_tokens", 0))
    if select == "full" and first:
        raise ZooError("It keeps the [CLS] token among the image tokens (vision_feature_select_strategy='full').")
    if select == "default" and first > 1:
        raise ZooError(
            f"It drops the first image token (vision_feature_select_strategy='default'), and its encoder {kind!r} puts "
            f"{first} ahead of the patches: register tokens would be image tokens, which is not supported."
        )
    if select == "default" and not first:
        raise ZooError(
            f"It drops the first image token (vision_feature_select_strategy='default'), but its encoder "
            f"{kind!r} has no [CLS] token: that would be a patch. Such an encoder needs 'full'."
        )


def different(config: Any, other: Any, but: set[str]) -> dict[str, Any]:
    """Fields of a config of transformers, as plain values, that differ from those of another of the same class.

    A class may write a field by another name (its `attribute_map`), as Qwen3-MoE its number of experts.
    """
    known = set(type(config).__dataclass_fields__)
    names = {theirs: ours for ours, theirs in type(config).attribute_map.items() if theirs not in known}
    mine, theirs = ({names.get(k, k): v for k, v in c.to_dict().items()} for c in (config, other))
    skip = but | {"transformers_version", "model_type", "architectures", "dtype", "torch_dtype", "_name_or_path"}
    return {k: plain(v) for k, v in mine.items() if k in known - skip and plain(v) != plain(theirs.get(k))}


def plain(value: Any) -> Any:
    """Convert tuples to lists, recursively."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _side(value: Any) -> int:
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if sides[0] != sides[-1]:
        raise ZooError(f"Its encoder takes images of {sides[0]} x {sides[-1]} pixels; only squares are supported.")
    return int(sides[0])


def mlp_misfit(model: Any) -> str:
    """Return why a projector is not LLaVA's (two linear layers, as wide as the language model); empty if it is."""
    _, node = config_of("projector", (model.config.slots or {})["projector"])
    name = model.config.slots["projector"]["name"]
    if name != "mlp" or node.depth != 2:
        had = f"{name!r}" + (f" of {node.depth} layers" if name == "mlp" else "")
        return f"its projector is {had}, and the layout's is 'mlp' of 2 layers (train with projector=mlp)"
    if node.hidden_size not in (0, model.llm.hidden_size):
        return f"its projector is {node.hidden_size} wide inside, and the layout's {model.llm.hidden_size}, as the LLM"
    return ""


def layout_misfit(model: Any, name: str, **wanted: Any) -> str:
    """Return why a model's layout is not the one of this name with these options; empty if it is."""
    node = (model.config.slots or {}).get("layout")
    if not name or not node or node["name"] != name:
        had, needs = (repr(n) if n else "none" for n in ((node or {}).get("name"), name))
        return "" if had == needs else f"the layout of its images is {had}, and it takes {needs}"
    _, typed = config_of("layout", node)
    for key, value in wanted.items():
        found = getattr(typed, key)
        if not (value(found) if callable(value) else found == value):
            return f"layout.{key} is {found!r}, which it does not take"
    return ""


def text_options(model: Any) -> dict[str, Any]:
    """Return the fields on the language model that configs of all families have."""
    text = model.llm.lm.config
    return {
        "text_config": {**text.to_dict(), "vocab_size": model.llm.vocab_size},
        "tie_word_embeddings": model.llm.lm.get_output_embeddings().weight
        is model.llm.lm.get_input_embeddings().weight,
    }
