"""The text towers of CLIP and SigLIP checkpoints of transformers, for encoders of `zoo.vision.encoders.hf`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from zoo.registry import ZooError
from zoo.vision.encoders.base import on_meta
from zoo.vision.encoders.checkpoints import fetch, is_local, load_hf, read_json, read_tensors, with_revision
from zoo.vision.encoders.text_tower import FILES, Linear, Pooled, TextTower, Words, has_words, read_words

MODELS = {  # family -> classes of transformers: text tower, config of the whole model, pooling head
    "clip": ("CLIPTextModelWithProjection", "CLIPConfig", ""),
    "siglip": ("SiglipTextModel", "SiglipConfig", "SiglipMultiheadAttentionPoolingHead"),
    "siglip2": ("Siglip2TextModel", "Siglip2Config", "Siglip2MultiheadAttentionPoolingHead"),
}

_TOKENIZER = "tokenizer.json, or vocab.json and merges.txt"  # what is read


def text_tower_of(config: Any, source: str, family: str, spec: Any) -> Callable[[], TextTower] | str:
    """Return what builds the text tower of an encoder and reads its weights, or why there is none.

    Args:
        config: options of the encoder.
        source: its own checkpoint; empty: it is built from sizes.
        family: of the encoder.
        spec: config of its vision tower.
    """
    asked = "vision.text_checkpoint= names a whole CLIP or SigLIP of the same encoder that has one"
    if config.frame_tower:
        return "it has two encoders (frame_tower=true), and a text tower belongs to one."
    if family not in MODELS:
        return f"an encoder of type {family!r} was not trained with texts."
    if config.text_sizes:
        return partial(_from_sizes, config.text_sizes, family, spec, bool(config.norm))
    place = with_revision(config.text_checkpoint, config.text_revision) or source
    if not place:
        return f"it is built from sizes, without a text tower; {asked}."
    plain = read_json(place)
    kind = str(plain.get("model_type", ""))
    if kind not in MODELS or not isinstance(plain.get("text_config"), Mapping):
        return f"{place!r} has no text tower (its model is of type {kind or 'unknown'!r}); {asked}."
    import transformers

    whole = getattr(transformers, MODELS[kind][1]).from_dict(plain)
    text, vision = whole.text_config, whole.vision_config
    if kind != family or vision.hidden_size != spec.hidden_size:
        return (
            f"the text tower of {place!r} belongs to another encoder: of type {kind!r} with width "
            f"{vision.hidden_size}, and this one is of type {family!r} with width {spec.hidden_size}."
        )
    if is_local(place) and not has_words(folder := _folder(place)):
        return f"{str(folder)!r} has no tokenizer for its text tower: {_TOKENIZER}."
    if family == "clip":
        text.projection_dim = whole.projection_dim
    return partial(_from_checkpoint, place, family, text, spec, bool(config.norm))


def sizes_of(tower: TextTower) -> dict[str, Any]:
    """Return the options `text_sizes` of a text tower: what its config has beyond transformers' defaults."""
    config: Any = tower.model.config
    apart = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype")
    return {key: value for key, value in config.to_diff_dict().items() if key not in apart}


def _built(family: str, text: Any, spec: Any, norm: bool) -> tuple[nn.Module, nn.Module]:
    """Build text tower and projection with random weights."""
    import transformers
    from transformers.models.siglip import modeling_siglip
    from transformers.models.siglip2 import modeling_siglip2

    name, _, head = MODELS[family]
    if family == "clip":
        project: nn.Module = Linear(spec.hidden_size, text.projection_dim, spec.layer_norm_eps, norm=not norm)
    else:
        of = modeling_siglip if family == "siglip" else modeling_siglip2
        own_norm = None if norm else nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        project = Pooled(getattr(of, head)(spec), own_norm)
    return getattr(transformers, name)(text), project


def _length(family: str, text: Any) -> dict[str, Any]:
    return {"length": int(text.max_position_embeddings), "pad_to_length": family != "clip"}


def _from_sizes(sizes: Mapping[str, Any], family: str, spec: Any, norm: bool) -> TextTower:
    import transformers

    known = getattr(transformers, MODELS[family][0]).config_class
    try:
        text = known(**sizes)
    except (TypeError, ValueError) as error:
        raise ZooError(f"text_sizes do not describe a {known.__name__}: {error}") from error
    model, project = _built(family, text, spec, norm)
    return TextTower(model, project, None, **_length(family, text))


def _from_checkpoint(source: str, family: str, text: Any, spec: Any, norm: bool) -> TextTower:
    """Build a text tower with the weights and the tokenizer of a checkpoint; on the meta device its structure only."""
    import transformers

    if on_meta():
        model, project = _built(family, text, spec, norm)
        return TextTower(model, project, None, **_length(family, text))
    model = load_hf(source, getattr(transformers, MODELS[family][0]), text, "text tower")
    project = _built(family, text, spec, norm)[1]
    names = {name: _stored(name) for name in project.state_dict()}
    found = read_tensors(source, names.values())
    project.load_state_dict({name: found[stored] for name, stored in names.items()})
    words = _words(source, family, text)
    if words is None:
        raise ZooError(f"{source!r} has no tokenizer for its text tower: {_TOKENIZER}.")
    return TextTower(model, project, words, **_length(family, text))


def _stored(name: str) -> str:
    """Name in a checkpoint of a weight of `Linear` or `Pooled`."""
    if name == "weight":
        return "visual_projection.weight"
    return f"vision_model.{name.replace('norm.', 'post_layernorm.', 1) if name.startswith('norm.') else name}"


def _folder(source: str) -> Path:
    """The folder of a local checkpoint, which may be a file of weights."""
    place = Path(source).expanduser()
    return place if place.is_dir() else place.parent


def _words(source: str, family: str, text: Any) -> Words | None:
    if is_local(source):
        folder = _folder(source)
    else:
        files = [path for name in FILES if (path := fetch(source, name, optional=True)) is not None]
        if not files:
            return None
        folder = files[0].parent  # of the commit's files
    words = read_words(folder)
    if words is not None and family == "clip":
        words.pad = words.end[-1] if words.end else words.pad  # CLIP reads at the first end token, or the largest id
    return words
