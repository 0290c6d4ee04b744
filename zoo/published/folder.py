"""Read the folder of a published model: its config as slots, and its image processor."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo.published import family_of
from zoo.published.family import parse, plain
from zoo.registry import SINGLE_SLOTS, ZooError, config_of
from zoo.registry.foreign import read_model_config
from zoo.storage.safetensors_file import listing
from zoo.storage.weights import may_start_fresh, weight_files

# Options that change no result if shapes are equal, or that users may change.
_FREE = {("llm", "max_positions"), ("llm", "router_aux_coef"), ("llm", "zero_init_residual"), ("vision", "fit"),
         ("vision", "resample"), ("llm", "revision"), ("vision", "revision"),
         ("vision", "pooling_head"), ("vision", "text_checkpoint"), ("vision", "text_revision"),
         ("vision", "min_pixels"), ("vision", "max_pixels"),
         ("vision", "next_block"), ("vision", "summary"), ("layout", "kept_lines"), ("layout", "after_video"),
         ("layout", "most"),
         ("llm", "tie_embeddings")}  # fmt: skip  # decided by the files, see `refuse_untied`


def read_content(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON file of a model's folder; an empty dict if it does not exist."""
    file = folder / name
    if not file.is_file():
        return {}
    return read_model_config(file)


def processor_values(folder: Path, kind: str, *names: str) -> dict[str, Any]:
    """Return the values of an image or video processor, from the file that transformers takes where there are several.

    Args:
        folder: of a published model.
        kind: its name in processor_config.json, which goes first: version 5 writes it beside older files.
        names: of files of its own, the first one that is there.
    """
    nested = read_content(folder, "processor_config.json").get(kind)
    whole = nested if isinstance(nested, Mapping) else {}
    return dict(whole or next(filter(None, (read_content(folder, name) for name in names)), {}))


def pixels_of(folder: Path) -> dict[str, Any]:
    """Return the values of a published folder's image processor, completed by transformers' defaults."""
    stated = processor_values(folder, "image_processor", "preprocessor_config.json")
    if not stated:
        return {}
    from zoo.vision.images.processors import processor_of

    if not stated.get("image_processor_type"):
        older = str(stated.pop("feature_extractor_type", None) or "").replace("FeatureExtractor", "ImageProcessor")
        stated["image_processor_type"] = older or _usual_type(str(read_content(folder).get("model_type")))
    return json.loads(json.dumps(processor_of(stated).to_dict(), default=list))


def _usual_type(model_type: str) -> str:
    """Return the class of a family's image processor, where no file names one."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    known = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    return str(known.get("torchvision") or known.get("pil") or "CLIPImageProcessor")


def slots_in(folder: Path) -> dict[str, Any]:
    """Translate a published folder's config to slots."""
    content = read_content(folder)
    known = family_of(content, f"{folder}/config.json")
    slots = known.slots(parse(content, f"{folder}/config.json"), pixels_of(folder))
    of_text = (content.get("text_config") or {}).get("tie_word_embeddings")
    if "tie_word_embeddings" not in content and of_text is False and slots["llm"]["tie_embeddings"]:
        # Files of transformers 4 state it of the language model alone, and InternVL's class has another default.
        head = (known.ours(name) == "llm.lm.lm_head.weight" for name in listing(weight_files(folder)))
        slots["llm"]["tie_embeddings"] = not any(head)
    return slots


def require_same(slots: Mapping[str, Any], folder: Path, fresh: Iterable[str] = ()) -> None:
    """Refuse options that change results although every weight fits.

    Raises:
        ZooError: with each option, its value and that of the checkpoint.
    """
    content = read_content(folder)
    hf = parse(content, f"{folder}/config.json")
    stated = family_of(content, str(folder)).slots(hf, pixels_of(folder))
    wrong = []
    allowed = set(fresh)
    for part in SINGLE_SLOTS:
        ours, theirs = slots.get(part) or {}, stated.get(part) or {}
        if may_start_fresh(part, allowed) or (part == "vision" and "projector" in allowed):
            continue
        if ours.get("name") != theirs.get("name"):
            wrong.append(f"{part}={ours.get('name')}, the checkpoint has {theirs.get('name')}")
        # Options can be compared within one component only.
        if not ours or ours.get("name") != theirs.get("name"):
            continue
        flat_ours, flat_theirs = _flat(ours, part), _flat(theirs, part)
        config = getattr(hf, {"vision": "vision_config", "llm": "text_config"}.get(part, ""), None)
        for key in flat_ours.keys() - flat_theirs.keys():  # the checkpoint has the default of its family
            flat_theirs[key] = plain(getattr(config, key.removeprefix("extra."), None))
        for key in sorted(flat_theirs):
            if (part, key.partition(".")[0]) not in _FREE and not _same(flat_ours.get(key), flat_theirs[key]):
                wrong.append(f"{part}.{key} is {flat_ours.get(key)!r}, the checkpoint states {flat_theirs[key]!r}")
    if wrong:
        raise ZooError(
            f"The parts are not those of the checkpoint in {folder}, and would give other numbers without a word:\n"
            + "\n".join(f"  {line}" for line in wrong[:12])
            + "\nName the part in `fresh` where that is meant."
        )


def _flat(node: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Flatten the options of a slot, with defaults; nested ones become `extra.hidden_act`."""
    _, typed = config_of(part, node)
    flat: dict[str, Any] = {}
    for key, value in asdict(typed).items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    return flat


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        try:
            return abs(float(a) - float(b)) <= 1e-6 * max(1.0, abs(float(b)))
        except (TypeError, ValueError):
            return False
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
