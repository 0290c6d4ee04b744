"""A composed model back in the layout that its family publishes: a folder that transformers loads by itself.

Everything that transformers' class has no place for must be gone first: adapters are merged where they can be, pruners
and parts of another make are refused. Blocks of the encoder behind the layer that is used, which a composed model does
not keep, are copied from the checkpoint that it came from; without it the exported encoder is as shallow as ours.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.published import FAMILIES, family_named
from zoo.published.base import PARTS, base_from
from zoo.published.family import SPARE
from zoo.registry import ZooError
from zoo.stream import Stored, read
from zoo.weights import write_weights


def export(
    model: Any,
    processor: Any,
    folder: str | Path,
    *,
    family: str = "",
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a model and its processor in a published layout.

    Adapters that can be merged are merged into `model` for good.

    Args:
        model: composed.
        processor: of the model.
        folder: is made; files of the same names are replaced.
        family: `model_type` of the layout; empty: that of the checkpoint that the model came from.
        max_shard_size: of a weights file.

    Returns:
        The folder.

    Raises:
        ZooError: a part has no place in the layout, with the reason.
    """
    record = (model.config.base or {}).get("model")
    name = family or (record or {}).get("family", "")
    if not name:
        raise ZooError(f"The model came from no published checkpoint: name the layout, one of {', '.join(FAMILIES)}.")
    known = family_named(name)
    if any(getattr(model.llm.lm, f"is_loaded_in_{bits}bit", False) for bits in (8, 4)):
        raise ZooError("The language model is held in few bits, which no published layout has: load it without bits.")
    _merge_adapters(model)
    if len(model.pruner):
        raise ZooError(
            f"{known.model} has no pruner, and the model has {', '.join(model.pruner)}. Export it without: "
            f"zoo.load(..., 'pruner=[]')."
        )
    for part, wanted in (("vision", "hf"), ("llm", "hf")):
        if (found := ((model.config.slots or {}).get(part) or {}).get("name")) != wanted:
            raise ZooError(f"{known.model} takes a {part} of transformers; the model's {part} is {found!r}.")
    spare = _spare(record)
    config = known.config(model)
    if not spare and hasattr(config, "vision_config"):
        _as_shallow_as_ours(config, model)
    config.architectures = [known.model]
    config.dtype = next(model.llm.parameters()).dtype
    state = _state(model, known)
    state |= _rest(known, config, state, spare, config.dtype)
    prepares = their_processor(model, processor, known)  # which may be refused: nothing is written before
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    write_weights(state, folder, max_shard_size)
    prepares.save_pretrained(folder)
    return folder


def _merge_adapters(model: Any) -> None:
    for name, adapter in list(model.adapter.items()):
        if not hasattr(adapter, "merge"):
            raise ZooError(
                f"adapter {name!r} cannot be merged into the language model: what it adds depends on the input. "
                f"Save it with `save_pretrained` instead, or export without it."
            )
    for name, adapter in list(model.adapter.items()):
        adapter.merge()
        del model.adapter[name]
        model.config.slots = {**model.config.slots, "adapter": {}}
        model.steps = [s for s in model.steps if (s.kind, s.name) != ("adapter", name)]


def _spare(record: dict[str, Any] | None) -> dict[str, Stored]:
    """What the checkpoint holds beyond what a composed model keeps, by our names; nothing where it is out of reach."""
    if not record:
        return {}
    try:
        return {n: t for n, t in base_from(record).tensors.items() if SPARE.search(n)}
    except (ZooError, OSError):
        return {}


def _as_shallow_as_ours(config: Any, model: Any) -> None:
    """Say an encoder that ends where ours does."""
    config.vision_config.num_hidden_layers = model.vision.runner.tower.config.num_hidden_layers
    if hasattr(config, "vision_feature_layer"):
        config.vision_feature_layer = -1


def _state(model: Any, known: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for part in PARTS:
        if (module := getattr(model, part)) is not None:
            for name, tensor in module.state_dict().items():
                state[known.theirs(f"{part}.{name}")] = tensor
    if model.llm.lm.config.tie_word_embeddings:
        state.pop(known.theirs("llm.lm.lm_head.weight"), None)
    return state


def _rest(
    known: Any, config: Any, state: dict[str, Tensor], spare: dict[str, Stored], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What transformers' class has and we do not: blocks and norms of the encoder that do not matter."""
    import transformers

    with torch.device("meta"):
        theirs = getattr(transformers, known.model)(config)
    have = {known.ours(name) for name in state}
    rest: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        ours = known.ours(name)
        if ours in have or ours is None or (ours == "llm.lm.lm_head.weight" and config.tie_word_embeddings):
            continue
        if not SPARE.search(ours):
            raise ZooError(f"{known.model} needs the weight {name!r}, which the model does not have.")
        if ours in spare:
            value = torch.empty(spare[ours].shape, dtype=spare[ours].dtype)
            read(spare[ours], value)
        else:
            value = torch.full(tensor.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        rest[known.theirs(ours)] = value
    return rest


def their_processor(model: Any, processor: Any, known: Any) -> Any:
    """Say our processor as one of transformers."""
    import transformers

    from zoo.vision.pictures import processor_of

    more = known.processor_options(model, processor)
    if processor.videos is not None and "video_processor" not in more:
        more["video_processor"] = processor_of(processor.videos.config)
    values = dict(processor.pictures.config) if processor.pictures else _as_clip(processor.transform)
    try:
        return getattr(transformers, known.processor)(
            image_processor=processor_of(values),
            tokenizer=processor.tokenizer,
            chat_template=processor.tokenizer.chat_template,
            **more,
        )
    except ImportError as error:
        raise ZooError(f"The layout cannot be written: {' '.join(str(error).split())}") from error


def _as_clip(transform: Any) -> dict[str, Any]:
    """Our transform as values of `CLIPImageProcessor`."""
    from zoo.published.family import RESAMPLES

    if transform.fit == "pad":
        raise ZooError("Images are padded to squares, which transformers' image processors of this family do not do.")
    height, width = transform.size
    crop = transform.fit == "crop"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": min(height, width)} if crop else {"height": height, "width": width},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": crop,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "resample": next(number for number, name in RESAMPLES.items() if name == transform.resample),
    }
