"""Load models by name, from a folder or from the hub, or compose them from parts, with their processors.

The steps are always the same: a source (`zoo.settings.source`), its plan, the check on the meta device, weights
(`zoo.composed.loader`), and the processor for the parts.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zoo.checking.checker import check
from zoo.checking.plan import plan_for
from zoo.composed.assembly import assemble
from zoo.composed.front import frame_share
from zoo.composed.grid_positions import GridPositions
from zoo.composed.loader import load_model
from zoo.composed.model import ZooModel
from zoo.composed.quantized import quantize
from zoo.model_config import ZooConfig
from zoo.published.checkpoint import base_at
from zoo.published.composed import VIDEO, cut_by, tokens_for
from zoo.published.folder import read_content, require_same
from zoo.published.text import pictures_in, video_token_id_in, video_token_in, videos_in
from zoo.registry import ImageTransform, Pruner, ZooError, plugins
from zoo.registry.devices import require_present
from zoo.settings import config as configs
from zoo.settings.source import Source, source_named, source_of
from zoo.storage.precision import dtype_of
from zoo.text.processor import ZooProcessor
from zoo.text.stops import end_tokens, keep_shared, set_stops, stated_config
from zoo.text.tokenizer import TEXTS, image_separator
from zoo.vision.images.processors import statistics


def load(
    name: str,
    *overrides: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    bits: int = 0,
    attention: str | None = None,
    attn_implementation: str | None = None,
    fresh: Iterable[str] = (),
) -> tuple[ZooModel, ZooProcessor]:
    """Load a model by name, with its processor; it is in eval mode.

    Args:
        name: a preset (`scenes_tiny`), a folder (`dir:runs/x`) or a hub repository (`hub:org/name`).
        overrides: options as on the command line: `pruner=random`, `pruner.random.keep_ratio=0.5`.
        device: of the model; None: CUDA if available.
        dtype: of the parameters, a torch dtype or its name; None keeps what was saved, and loads weights that were
            trained in float32 in the data type that they had before; "float32" loads them as trained.
        device_map: a device, `auto`, or a dict from prefixes of names (`vision`, `llm`, `llm.lm.model.layers.0`) to
            devices; instead of `device`.
        bits: 8 or 4: quantize the layers of a published language model with bitsandbytes, on CUDA; 0: do not.
        attention: a kernel's name in transformers, or `auto`.
        attn_implementation: the same; transformers' name of the option.
        fresh: parts that may start without trained weights; adapters added by an override always may.

    Raises:
        ZooError: the name is unknown or ambiguous, something does not fit, or weights are missing.

    Example:
        >>> model, processor = zoo.load("scenes_tiny")
    """
    require_present(device if isinstance(device, str) else None)
    dtype_of(dtype)  # a mistake is named before a repository is fetched, and here
    source = source_named(name, *overrides)
    if (chosen := attention or attn_implementation) is not None:
        source.attention = chosen
    return build(source, device=device, dtype=dtype, device_map=device_map, bits=bits, fresh=fresh)


def compose(*overrides: str, texts: Iterable[str] = ()) -> tuple[ZooModel, ZooProcessor]:
    """Compose a model from parts; the only trained weights are those of the parts' checkpoints.

    Args:
        overrides: options as on the command line: `vision=timm`, `llm=hf`, `projector=mlp`, ...
        texts: to train a new tokenizer on, if neither the LLM nor an option names one.

    Example:
        >>> model, processor = zoo.compose("vision=timm", "projector=mlp", "llm=hf", texts=["a red circle"])
    """
    return build(source_of(configs.compose("load", list(overrides)), pretrained=False), texts=texts)


def build(
    source: Source,
    *,
    texts: Iterable[str] = (),
    tokenizer_folder: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    bits: int = 0,
    fresh: Iterable[str] = (),
    masters: bool = False,
    fixes: int = 3,
) -> tuple[ZooModel, ZooProcessor]:
    """Check a source, and build its model and processor.

    Args:
        source: from `zoo.settings.source`.
        texts: to train a new tokenizer on, if there is none to load; read only then.
        tokenizer_folder: of the tokenizer, for a model that starts from its parts.
        device, dtype, device_map, bits, fresh: see `load`.
        masters: keep master weights of a saved model in float32, to train on.
        fixes: how many to search for where something does not fit, as `check` does.
    """
    folder = source.folder
    if folder is not None and source.published:
        require_same(source.slots, folder, fresh)
    tokenizer = source.make_tokenizer(texts, tokenizer_folder)
    plan = plan_for(source, tokenizer)
    plan.trained, plan.stored = folder is not None, folder
    # A saved model may have a new adapter, added by an override.
    plan.fresh = tuple(fresh) if folder is None or source.published else (*fresh, "adapter")
    plan.splits = None if source.pretrained else plan.splits  # a model that is only scored needs no training data
    report = check(plan, fixes=fixes)
    for note in report.notes:
        warnings.warn(note, stacklevel=2)
    target = device or (source.device if source.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_model(
        ZooModel,
        config_for(source, tokenizer),
        folder,
        fresh=plan.fresh,
        dtype=dtype,
        device_map=target if device_map is None else device_map,
        bits=bits,
        walked=report.parts,
        masters=masters,
    )
    # An id without a row in the embedding would fail as an index error inside the LLM.
    if len(tokenizer) > model.llm.vocab_size:
        raise ZooError(f"The tokenizer has {len(tokenizer)} ids, but the LLM's table only {model.llm.vocab_size}.")
    model.set_attention(source.attention)  # after moving: kernels depend on the device
    processor, generation = processor_from(source, model, tokenizer)
    model.__dict__["processor"] = processor  # for `model.chat`
    model.described = source.card
    set_stops(model, processor.template, generation)
    return model, processor


def config_for(source: Source, tokenizer: Any) -> ZooConfig:
    """Return the config of the model, with its base checkpoint."""
    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = ZooConfig(
        slots=source.slots,
        tokenizer=source.tokenizer,
        plugins=sorted({*source.plugins, *plugins.loaded()}),
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        text_vocab_size=len(tokenizer),
        positions=source.positions,
        attention=source.attention,
        **special,
    )
    if source.folder is None:
        if VIDEO in tokens_for(source.slots["layout"]):
            config.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO)
    elif source.published:
        config.video_token_id = video_token_id_in(source.folder)
        config.base = {"model": {"checkpoint": source.repository or source.name, "revision": source.revision}}
    else:
        before = ZooConfig.read(source.folder)
        config.video_token_id, config.base = before.video_token_id, base_at(before.base, source.base)
        config.masters = before.masters
    return config


def processor_alone(cfg: Any, texts: Iterable[str] = ()) -> tuple[ZooProcessor, int | None]:
    """Make the processor of a composed config without weights, and return the LLM's positions; None: no limit.

    Args:
        cfg: from `zoo.settings.config.compose`.
        texts: to train a new tokenizer on, if there is none to load; read only then.
    """
    source = source_of(cfg)
    tokenizer = source.make_tokenizer(texts)
    with torch.device("meta"):
        parts = assemble(source.slots, vocab_size=len(tokenizer))
        model = ZooModel(ZooConfig(slots=source.slots, positions=source.positions, attention="eager"), parts=parts)
    return processor_from(source, model, tokenizer)[0], model.llm.max_positions


def processor_from(source: Source, model: ZooModel, tokenizer: Any) -> tuple[ZooProcessor, Any]:
    """Return the processor of a model, and the generation config beside its weights."""
    folder, slots = source.folder, source.slots
    if folder is None:
        own = replace(model.vision.transform, size=model.vision.own_size) if model.vision else None
        stated: dict[str, Any] = {"pictures": cut_by(slots["layout"], own)}
    else:
        stated = published_options(folder, tokenizer) if source.published else saved_options(folder)
    generation = stated_config(model, folder)
    if folder is None:
        keep_shared(generation, tokenizer, slots["llm"] or {}, source.tokenizer["checkpoint"])
    stated["end_tokens"] = end_tokens(generation, tokenizer)
    return processor_for(model, tokenizer, source.tokenizer["chat_template"], **stated), generation


def processor_for(model: ZooModel, tokenizer: Any, template: str = "", **stated: Any) -> ZooProcessor:
    """Make the processor of a model: it writes one placeholder per image token of the model's parts.

    Args:
        model: with the parts that set the number of image tokens.
        tokenizer: with a chat template.
        template: name of a built-in chat template, for a tokenizer with another one.
        stated: `pictures`, `videos`, `video_token` of a published model, and `end_tokens`.
    """
    if not stated.get("pictures") and model.vision is not None and model.vision.pictures is not None:
        stated["pictures"] = dict(model.vision.pictures)
    stated |= {key: in_front_of(model, stated[key]) for key in ("pictures", "videos") if stated.get(key)}
    return ZooProcessor(
        tokenizer,
        transform=model.vision.transform if model.vision is not None else None,
        num_image_tokens=model.num_image_tokens,
        image_separator=image_separator(TEXTS.get(str(tokenizer.chat_template), template)),
        layout=layout_for(model),
        unpruned=unpruned_for(model),
        left_out=left_out_for(model),
        asks=model.asks,
        **stated,
    )


def in_front_of(model: ZooModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of an image or video processor, with what pruners change in front of the encoder."""
    values = {key: value for key, value in values.items() if key not in ("sizes", "frame_share", "also")}
    if model.vision is not None and model.vision.pictures is not None and "image_processor_type" in values:
        values["size"] = model.vision.pictures["size"]  # vision.max_pixels may be another than the checkpoint's
    if model.vision is not None and model.vision.own_size != model.vision.transform.size:
        values["sizes"] = [list(model.vision.own_size), list(model.vision.transform.size)]
    if (share := frame_share(model.pruner)) != 1:
        values["frame_share"] = share
    if model.vision is not None and model.vision.transform.also:
        values["also"] = [_also(model.vision.own_size, each) for each in model.vision.transform.also]
    return values


def _also(own: tuple[int, int], transform: ImageTransform) -> dict[str, Any]:
    """Return what is different in an image processor for a further encoder, of images cut as for the size `own`."""
    if own[0] * transform.size[1] != own[1] * transform.size[0]:
        raise ZooError(
            f"Crops of {own[0]} x {own[1]} pixels cannot be those of {transform.size[0]} x {transform.size[1]} for a "
            "further encoder: with a layout, the encoders of one model take images of one shape."
        )
    return {**statistics(transform), "sizes": [list(own), list(transform.size)]}


def layout_for(model: ZooModel) -> dict[str, Any] | None:
    """Return what the processor needs to count the tokens of a cut image: the layout's node and its arguments."""
    if model.layout is None:
        return None
    return {**(model.config.slots or {})["layout"], "given": dict(model.layout.given)}


def unpruned_for(model: ZooModel) -> dict[str, Any] | None:
    """What the processor needs to count the positions of images whose tokens keep their places; None: their tokens."""
    if (unpruned := model.unpruned) is None:
        return None
    if isinstance(unpruned, GridPositions):
        return {"axes": unpruned.axes, "dense": unpruned.dense}
    whole, slots = unpruned.whole, model.config.slots or {}
    layout = None if whole is None else {**slots["layout"], "given": dict(whole.given)}
    return {"num_image_tokens": unpruned.row_tokens, "layout": layout}


def left_out_for(model: ZooModel) -> dict[str, Any] | None:
    """What the processor needs to count the placeholders that a pruner leaves out; None: it does not know them."""
    for step in model.steps:
        part = model.pruner[step.name] if step.kind == "pruner" else None
        if part is not None and part.behind and type(part).tokens_of_image is not Pruner.tokens_of_image:
            node = {**(model.config.slots or {})["pruner"][step.name], "name": step.name}
            grid = list(model.projected_grid) if model.projected_grid else None
            given = {"vision_dim": step.width, "num_tokens": step.tokens, "grid": grid}
            assert model.vision is not None, "a pruner has images"
            given["vision_depth"] = model.vision.depth
            return {"pruner": node, "given": given, "dense": model.config.positions == "dense"}
    return None


def published_options(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the image and video processors of a published folder."""
    return {
        "pictures": pictures_in(folder),
        "videos": videos_in(folder),
        "video_token": video_token_in(folder, tokenizer),
    }


def saved_options(folder: Path) -> dict[str, Any]:
    """Return the published image and video processors that a saved model uses."""
    content = read_content(folder, "processor_config.json")
    return {key: content.get(key) for key in ("pictures", "videos", "video_token")}


def load_teacher(node: Mapping[str, Any], *, device: torch.device, precision: str) -> tuple[Any, Any]:
    """Load the model and the processor of a stage's teacher.

    Args:
        node: `Stage.teacher_node`.
        device: of the run; used if the teacher does not set one.
        precision: of the stage; a bf16 stage holds the teacher's weights in bf16, unless the teacher sets a dtype.
    """
    dtype = node["dtype"] or ("bfloat16" if precision == "bf16" else None)
    where = torch.device(node["device"]) if node["device"] else device
    if not node["bits"]:
        return load(node["model"], *node["options"], device=where, dtype=dtype, attention=node["attention"])
    model, processor = load(node["model"], *node["options"], device="cpu", dtype=dtype, attention=node["attention"])
    # On the CPU, which has room for the whole model in 16 bits; the device then holds only the quantized one.
    path = next(name for name, module in model.llm.lm.named_modules() if module is model.llm.layers)
    own = [adapter.owns for adapter in model.adapter.values()]
    quantize(model.llm.layers, int(node["bits"]), lambda name: any(owns(f"{path}.{name}") for owns in own))
    torch.nn.Module.to(model, where)
    model.set_attention(node["attention"])
    return model, processor
