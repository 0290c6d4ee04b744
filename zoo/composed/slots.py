"""Options of a model's parts for a saved folder: as they are now, after merges and with checkpoints pinned."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from zoo.composed.own_checkpoints import Own, node_at, own_checkpoints, with_node
from zoo.registry import ZooError, build
from zoo.registry.part import base_of
from zoo.vision.encoders.map_runner import MapRunner


def slots_now(model: Any) -> dict[str, Any]:
    """Return the options of a model's parts as they are now.

    Adapters that were merged for good are left out. Folders of checkpoints get absolute paths, repositories of the hub
    the commit that was read.

    Raises:
        ZooError: an adapter is merged into the language model for one image.
    """
    slots = {**(model.config.slots or {})}
    for key, node in model.bases.nodes.items():
        own = model.bases.own[key]
        stated = {k: node[k] for k in (own.option, own.revision) if k in node}
        slots = with_node(slots, own.path, {**node_at(slots, own.path), **stated})
    if model.adapter:
        slots["adapter"] = {n: model.adapter[n].options_now(node) for n, node in slots["adapter"].items()}
    merged = {name: adapter for name, adapter in model.adapter.items() if adapter.merged}
    if lasting := [name for name, adapter in merged.items() if not adapter.merged_for_good]:
        raise ZooError(
            f"adapter {lasting[0]!r} is merged into the language model for one image: call unmerge() before saving."
        )
    if merged:
        slots["adapter"] = {n: node for n, node in slots["adapter"].items() if n not in merged}
    if any(adapter.adds_experts for adapter in merged.values()):
        slots["llm"] = _llm(model)
    return slots


def without_checkpoint(model: Any, key: str, slots: Mapping[str, Any]) -> dict[str, Any] | None:
    """Describe a part by its sizes, so that a folder with all of its weights needs no other checkpoint.

    Args:
        model: composed.
        key: of a base: vision, llm, or text_tower; vision.X for one of several encoders.
        slots: options of its parts, as they are to be saved.

    Returns:
        The part's options. None where options cannot describe it: families of transformers that the zoo knows from
        checkpoints only.
    """
    own = own_checkpoints(slots)[key]
    node = node_at(slots, own.path)
    if own.inside:
        return {k: v for k, v in node.items() if k not in (own.option, own.revision)} | _text_sizes(own.of(model))
    if node["name"] not in ("hf", "timm", "open_clip"):
        return None
    try:
        if key == "llm":
            return _llm(model)
        if node["name"] == "timm":
            found = _timm(own.of(model), node, model.requested)
            return found or _described("timm", own.of(model), node, model.requested)
        if node["name"] == "open_clip":
            return _described("open_clip", own.of(model), node, model.requested)
        return _vision(own.of(model), node, model.requested)
    except ZooError:  # a family that is known from checkpoints only
        return None


def _llm(model: Any) -> dict[str, Any] | None:
    from zoo.fusion.llm.hf_config import HFLanguageModelConfig, transformers_config
    from zoo.published.family import different, llm_slot

    config, text = model.llm.lm.config, model.llm.lm.config.get_text_config()
    node = llm_slot(text, bool(config.tie_word_embeddings)) | {"router_aux_coef": model.llm.router_aux_coef}
    # Built from the options again, the config has to be the same: what options cannot express would be lost.
    again = transformers_config(HFLanguageModelConfig(**_options(node)), text.vocab_size)
    same = type(again) is type(config) and not different(config, again, set())
    return node if same else None


def _text_sizes(encoder: Any) -> dict[str, Any]:
    from zoo.vision.encoders.hf_text import sizes_of

    return {} if encoder.text is None else {"text_sizes": sizes_of(encoder.text)}


def _vision(encoder: Any, given: Mapping[str, Any], requested: frozenset[str]) -> dict[str, Any] | None:
    from zoo.published.family import vision_slot

    tower = encoder.runner.tower
    if isinstance(encoder.runner, MapRunner):
        return _maps(encoder, given, requested)
    if given.get("pooling_head") or given.get("summary"):
        return None  # the head needs blocks behind the chosen layer, which num_hidden_layers no longer counts
    node = vision_slot(tower.config, {}, layer=tower.config.num_hidden_layers, norm=bool(given.get("norm")))
    node |= _pixels(encoder)
    node["frame_tower"] = bool(given.get("frame_tower"))
    if given.get("next_block"):
        node |= {"next_block": True, "depth": tower.config.num_hidden_layers + 1}
    apart = {k: given[k] for k in ("text_checkpoint", "text_revision") if given.get(k)}
    node |= apart or _text_sizes(encoder)
    return node if _builds(node, encoder, requested) else None


def _maps(encoder: Any, given: Mapping[str, Any], requested: frozenset[str]) -> dict[str, Any] | None:
    """Describe an encoder of transformers with feature maps: its whole config is `extra`."""
    config = encoder.runner.tower.config
    follow = {"out_features", "out_indices", "_out_features", "_out_indices", "stage_names"}  # from `stage`
    fields = {
        k: v for k, v in config.to_diff_dict().items() if k in type(config).__dataclass_fields__ and k not in follow
    }
    node = {"name": "hf", "model_type": config.model_type, "extra": fields, "stage": encoder.runner.stage}
    node |= {k: bool(given.get(k)) for k in ("norm", "frame_tower")} | _pixels(encoder)
    return node if _builds(node, encoder, requested) else None


def _timm(encoder: Any, given: Mapping[str, Any], requested: frozenset[str]) -> dict[str, Any] | None:
    """Describe an encoder of timm by the name of its architecture, where that builds the same."""
    if (_stated("timm", given).get("model_args") or {}).keys() - {"img_size"}:  # an activation, which no shape shows
        return None
    known = encoder.runner.tower.pretrained_cfg
    name = ".".join(part for part in (known.get("architecture"), known.get("tag")) if part)
    node = {**given, "model": name, "checkpoint": "", "revision": "", "image_size": encoder.own_size[0]}
    return node if _builds(node, encoder, requested) else None


def _described(
    library: str, encoder: Any, given: Mapping[str, Any], requested: frozenset[str]
) -> dict[str, Any] | None:
    """Describe an encoder of timm or open_clip by the config of its checkpoint."""
    stated = _stated(library, given)
    node = {**given, "model": "", "checkpoint": "", "revision": "", "architecture": stated}
    return node if stated and _builds(node, encoder, requested) else None


def _stated(library: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the config of an encoder's checkpoint; empty: timm knows it by its name."""
    from zoo.vision.encoders import open_clip, timm

    options = {k: v for k, v in _options(given).items() if k != "preset"}
    if library == "timm":
        return timm.description(timm.TimmVisionConfig(**options))
    return open_clip.description(open_clip.OpenClipVisionConfig(**options))


def hub_name(own: Own, node: Mapping[str, Any]) -> str:
    """Return the checkpoint of a part as the hub names it, where a library has a word for it (`pretrained`, a tag)."""
    from zoo.vision.encoders import open_clip, timm

    options, checkpoint = {k: v for k, v in _options(node).items() if k != "preset"}, str(node[own.option])
    if own.kind != "vision" or own.inside:
        return checkpoint
    if node["name"] == "timm":
        return timm.repository(timm.TimmVisionConfig(**options)) or checkpoint
    if node["name"] == "open_clip":
        return open_clip.repository(open_clip.OpenClipVisionConfig(**options)) or checkpoint
    return checkpoint


def _pixels(encoder: Any) -> dict[str, Any]:
    known = encoder.transform
    size = encoder.own_size[0]  # before a pruner in front of the encoder made it smaller
    return {"image_size": size, "fit": known.fit, "mean": list(known.mean), "std": list(known.std),
            "resample": known.resample}  # fmt: skip


def _builds(node: Mapping[str, Any], encoder: Any, requested: frozenset[str]) -> bool:
    """Whether options build an encoder of the same weights, by their names and shapes, for the same pixels."""
    transform = encoder.transform
    own = replace(transform, size=encoder.own_size)
    with torch.device("meta"):
        again = build("vision", node)
        lacks = {"text_tower"} if encoder.text is None else set()
        again.prepare(frozenset(word for word in requested - lacks if base_of(word) in again.provides))
    shapes, wanted = ({n: t.shape for n, t in v.state_dict().items()} for v in (again, encoder))
    return bool(shapes == wanted and again.transform == own and (own != transform or again.grid == encoder.grid))


def _options(node: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in node.items() if k != "name"}
