"""Export a composed model in the layout of a published family: a folder that plain transformers loads.

Whatever the layout has no place for is refused before anything is written or merged, with the reason. Blocks of the
encoder behind the layer that is used, which a composed model does not keep, are copied from the published checkpoint
that it came from; without one the exported encoder ends where ours does.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from zoo.published import family_named
from zoo.published.checkpoint import checkpoint_from
from zoo.published.encoders import Encoder, encoder_of
from zoo.published.family import SPARE, Family
from zoo.published.file_names import DecoderNames, Held, as_files, as_modules
from zoo.published.their_processor import their_processor
from zoo.registry import ZooError
from zoo.storage.atomic import made_folder
from zoo.storage.safetensors_file import read
from zoo.storage.weights import replace_weights, write_weights
from zoo.text.stops import keep_stops, require_valid, write_config

# Layouts for models composed from own parts, in the order in which they are tried.
_ORDER = ("llava", "llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl")
_NATIVE = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "glm4v",
    "glm4v_moe",
    "glm46v",
    "paddleocr_vl",
)  # of models whose images keep their shapes
# Encoders that hub repositories keep below a level of their own.
_NESTED = ("clip_vision_model", "siglip_vision_model")
_TOWER = re.compile(r"^(vision_tower|image_tower|video_tower)\.")


def export(
    model: Any,
    processor: Any,
    folder: str | Path,
    *,
    family: str = "",
    max_shard_size: str | int = "5GB",
    card: Any = None,
) -> Path:
    """Write a model and its processor in a published layout.

    Adapters that can be merged are merged into `model` for good.

    Args:
        model: composed.
        processor: of the model.
        folder: is made; files of the same names are replaced.
        family: `model_type` of the layout; empty: that of the checkpoint that the model came from, else the first that
            has a place for all of it.
        max_shard_size: of a weights file.
        card: facts for README.md (`zoo.composed.card_facts.Facts`); None: those of the card that the model came with.

    Returns:
        The folder.

    Raises:
        ZooError: a part has no place in the layout, with the reason.
    """
    record = (model.config.base or {}).get("model")
    refuse_adapters(model)
    require_valid(model.generation_config)
    known, encoder = place_for(model, family or (record or {}).get("family", ""), record)
    theirs = their_processor(model, processor, known)
    merge_adapters(model)
    config = known.config(model, encoder)
    vocabulary = processor.tokenizer.get_vocab()
    for name, token in known.marks.items():
        if token in vocabulary:
            setattr(config, name, vocabulary[token])
    config.architectures = [known.model]
    config.dtype = next(model.llm.parameters()).dtype
    for part in (config.text_config, config.vision_config):
        part._name_or_path = ""  # the folder that it was read from, on this machine
    state = _state(model, encoder, known, config, _spare(record, known, config))
    _note_dtypes(model, config.dtype)
    folder = Path(folder)
    with made_folder(folder), TemporaryDirectory(dir=folder) as beside:  # a failure leaves the folder as it was
        config.save_pretrained(beside)
        keep_stops(model, processor.template)
        write_config(_stops(model), Path(beside))
        theirs.save_pretrained(beside)
        write_weights(state, Path(beside), max_shard_size)
        replace_weights(Path(beside), folder)
    model.write_card(folder, card, layout="transformers", notes=[f"In the layout of {known.model}."])
    return folder


def _note_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Note parts of several data types, which a composed model computes in as they are and transformers does not."""
    parts = {kind: getattr(model, kind) for kind in ("vision", "projector", "layout", "llm")}
    weights = {kind: next(part.parameters(), None) for kind, part in parts.items() if part is not None}
    held = {kind: str(weight.dtype).removeprefix("torch.") for kind, weight in weights.items() if weight is not None}
    if len(set(held.values())) > 1:
        listed = ", ".join(f"{kind} {name}" for kind, name in held.items())
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"The parts have several data types ({listed}), and transformers loads all of them as {name}, so that "
            "answers may differ from this model's. zoo.load(..., dtype=...), or --dtype of zoo export, gives them one.",
            stacklevel=3,
        )


def _stops(model: Any) -> Any:
    """Return the generation config to write: with all end tokens, without end texts.

    transformers' `generate` refuses to run with end texts in its config and without a tokenizer argument.
    """
    config = copy.deepcopy(model.generation_config)
    config._from_model_config = False  # else transformers replaces it by one derived from the model's config
    if config.stop_strings:
        warnings.warn(
            f"Answers of this model end with {config.stop_strings}, which are texts, not tokens: transformers stops "
            f"there by generate(..., stop_strings={config.stop_strings}, tokenizer=processor.tokenizer).",
            stacklevel=3,
        )
        config.stop_strings = None
    return config


# ---- whether there is a place ----------------------------------------------------------------------------------------


def place_for(model: Any, name: str, record: Mapping[str, Any] | None) -> tuple[Family, Encoder]:
    """Find the layout that supports a model, or raise with the reasons.

    Args:
        name: of the layout; empty: the first of `_ORDER`, or `_NATIVE`, that fits.
        record: of the published checkpoint that the model came from.
    """
    reasons = []
    order = _NATIVE if model.vision is not None and model.vision.native else _ORDER
    for kind in [name] if name else order:
        known = family_named(kind)
        try:
            _require_plain(model)
            encoder = encoder_of(model, known.encoders, _depth(model, record))
            wrong = known.misfit(model, encoder) or ("" if kind in _NATIVE else _unknown_llm(model))
            if not wrong:
                return known, encoder
        except ZooError as error:
            wrong = str(error)
        reasons.append((kind, wrong))
    if len({wrong for _, wrong in reasons}) == 1:
        raise ZooError(f"{family_named(reasons[0][0]).model} has no place for the model: {reasons[0][1]}.")
    lines = [f"  {kind}: {wrong}" for kind, wrong in reasons]
    raise ZooError("\n".join(["No published layout has a place for the model:", *lines]))


def _unknown_llm(model: Any) -> str:
    """Return why a class that builds its language model by `AutoModel` cannot; empty if it can."""
    from transformers import MODEL_MAPPING

    config = model.llm.lm.config
    if type(config) in MODEL_MAPPING:
        return ""
    return f"it finds language models by transformers' AutoModel, which has none of type {config.model_type!r}"


def _require_plain(model: Any) -> None:
    """Refuse a model that no layout supports."""
    slots, llm = model.config.slots or {}, model.llm
    if any(getattr(llm.lm, f"is_loaded_in_{bits}bit", False) for bits in (8, 4)):
        raise ZooError("the language model is held in few bits, which no published layout has: load it without bits")
    if len(model.pruner):
        raise ZooError(
            f"it has no pruner, and the model has {', '.join(model.pruner)}. Export it without, by pruner=[]: "
            "zoo.load(..., 'pruner=[]')"
        )
    if (name := (slots.get("llm") or {}).get("name")) != "hf":
        raise ZooError(f"it takes a language model of transformers, and the model's is {name!r}")
    if model.projector is None:
        raise ZooError("it shows images as tokens, and the model has no projector")
    linear = llm.linear_head()
    if linear is None or linear.bias is not None or (linear.scale, linear.cap) != (1.0, None):
        raise ZooError(
            f"its logits are those of one matrix, and {type(llm.lm).__name__} has a bias, a factor or a cap besides"
        )


def refuse_adapters(model: Any) -> None:
    """Refuse a model with adapters that cannot be merged."""
    for name, adapter in model.adapter.items():
        if not adapter.can_merge:
            raise ZooError(
                f"adapter {name!r} cannot be merged into the language model: it has no `merge`, as where what it adds "
                "depends on the input. Save it with `save_pretrained` instead (zoo export --format safetensors), or "
                "export without it."
            )


def merge_adapters(model: Any) -> None:
    """Merge all adapters into the language model, for good.

    Raises:
        ZooError: one cannot be merged. Nothing was, but where it depends on its weights or on other parts: then those
            ahead of it are merged.
    """
    refuse_adapters(model)
    for name, adapter in list(model.adapter.items()):
        adapter.merge()
        del model.adapter[name]
        left = {n: node for n, node in model.config.slots["adapter"].items() if n != name}
        model.config.slots = {**model.config.slots, "adapter": left}
        model.steps = [s for s in model.steps if (s.kind, s.name) != ("adapter", name)]


# ---- weights ---------------------------------------------------------------------------------------------------------


def state_of_layout(model: Any, encoder: Encoder, known: Family, config: Any) -> dict[str, Tensor]:
    """Return a model's weights by the names of published files. Args: see `place_for` and `Family.config`."""
    return _state(model, encoder, known, config, {})


def _state(model: Any, encoder: Encoder, known: Family, config: Any, spare: Held) -> dict[str, Tensor]:
    """Return all weights of transformers' class, by their names in hub repositories.

    Raises:
        ZooError: the class has a weight that the model lacks, or the other way round, or one of another shape.
    """
    import transformers

    with torch.device("meta"):
        theirs = getattr(transformers, known.model)(config)
    names, tied = DecoderNames(model.llm.lm), config.tie_word_embeddings
    ours = _ours(model, encoder, theirs, known)
    state, wrong = {}, []
    for name, like in theirs.state_dict().items():
        key = known.ours(name)
        assert key is not None, f"{known.model} has a weight of an unknown part, {name}"
        key = names.ours(key)
        if tied and key == f"llm.lm.{names.head}.weight":
            ours.pop(key, None)
        elif key in ours:
            state[name] = ours.pop(key).detach()
            if state[name].shape != like.shape:
                wrong.append(f"{key}: {tuple(state[name].shape)} in the model, {tuple(like.shape)} in the layout")
        elif SPARE.search(key):
            state[name] = _filler(key, like, spare, config.dtype)
        else:
            wrong.append(f"{key} is in the layout and not in the model")
    wrong += [f"{key} is in the model and not in the layout" for key in ours]
    if wrong:
        lines = [f"{known.model} has no place for the model's weights:", *(f"  {line}" for line in wrong[:8])]
        raise ZooError("\n".join([*lines, f"  and {len(wrong) - 8} more"] if len(wrong) > 8 else lines))
    nested = config.vision_config.model_type in _NESTED
    files = as_files(theirs, state)
    return {_TOWER.sub(r"\1.vision_model.", name) if nested else name: tensor for name, tensor in files.items()}


def _ours(model: Any, encoder: Encoder, theirs: Any, known: Family) -> dict[str, Tensor]:
    """Return the model's weights by our names; those of a converted encoder by the names of files."""
    state = {f"llm.{n}": t for n, t in model.llm.state_dict().items()}
    for part in ("projector", "layout"):
        if (module := getattr(model, part)) is not None:
            state |= {f"{part}.{n}": t for n, t in module.state_dict().items()}
    return state | dict(_as_towers(encoder.tensors, _towers(theirs, known)))


def _towers(theirs: Any, known: Family) -> dict[str, Any]:
    """Return the encoders inside transformers' model, by our names: `vision.tower` and `vision.frame_tower`."""
    found = {}
    for prefix, ours in known.keys:
        if ours.startswith("vision."):
            path = prefix.rstrip(".")
            found[ours.rstrip(".")] = (
                theirs.get_submodule(path) if path.startswith("model.") else theirs.get_submodule(f"model.{path}")
            )
    return found


def _as_towers(tensors: Mapping[str, Tensor], towers: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Rename weights of encoders from names of files to names of modules."""
    for prefix, tower in towers.items():
        own = dict(tower.state_dict())
        given = {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
        if given.keys() <= own.keys():
            yield from ((f"{prefix}.{n}", t) for n, t in given.items())
            continue
        files = {id(t): n for n, t in own.items()}
        names = {file: files[id(t)] for file, t in as_files(tower, own).items() if id(t) in files}
        yield from ((f"{prefix}.{names.get(n, n)}", t) for n, t in given.items())


def _depth(model: Any, record: Mapping[str, Any] | None) -> int:
    """Return the number of blocks of the checkpoint's encoder; 0 if its files are not available."""
    return int(model.config.slots["vision"].get("depth", 0)) if _files_of(record) else 0


def _spare(record: Mapping[str, Any] | None, known: Family, config: Any) -> Held:
    """Return weights of the checkpoint that a composed model does not keep, by our names of its modules."""
    import transformers

    if not (tensors := _files_of(record)):
        return {}
    with torch.device("meta"):
        towers = _towers(getattr(transformers, known.model)(config), known)
    vision = torch.nn.Module()
    for name, tower in towers.items():
        *above, last = name.split(".")[1:]
        parent = vision
        for part in above:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, tower)
    return {n: t for n, t in as_modules(tensors, {"vision": vision}).items() if SPARE.search(n)}


def _files_of(record: Mapping[str, Any] | None) -> Held:
    """Return the tensors of the published checkpoint that a model came from; none if it is not available."""
    try:
        return checkpoint_from(record).tensors if record else {}
    except (ZooError, OSError):
        return {}


def _filler(key: str, like: Tensor, spare: Held, dtype: torch.dtype) -> Tensor:
    """Return an unused weight: the checkpoint's, else ones for a norm and zeros for the rest."""
    if key in spare and tuple(spare[key].shape) == tuple(like.shape):
        value = torch.empty(spare[key].shape, dtype=spare[key].dtype)
        read(spare[key], value)
        return value
    return torch.full(like.shape, float(key.endswith("norm.weight")), dtype=dtype)
