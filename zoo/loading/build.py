"""Models by name, by folder, from the hub, or composed from parts; each with the processor that fits it.

The order is always the same: compose the config, check it on the meta device, then read weights.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.checking.checker import check
from zoo.checking.plan import plan_from
from zoo.composed.assembly import assemble
from zoo.composed.model import ZooModel
from zoo.composed.quantized import quantize
from zoo.model_config import ZooConfig
from zoo.published import is_published
from zoo.published.base import base_at, base_for, placed, read_content, require_same
from zoo.published.composed import VIDEO, cut_by, tokens_for
from zoo.published.text import pictures_in, video_token_id_in, video_token_in, videos_in
from zoo.registry import ZooError, plugins
from zoo.settings import schema as configs
from zoo.settings.model_names import fetch_config
from zoo.settings.overrides import quoted
from zoo.settings.source import plain, slots_of, tokenizer_for, weights_folder
from zoo.storage.weights import read_weights
from zoo.text.processor import ZooProcessor
from zoo.text.stops import end_tokens, keep_shared, set_stops, stated_config
from zoo.text.tokenizer import (
    CHAT_TEMPLATES,
    add_special,
    image_separator,
    set_template_options,
)


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
        device: where it goes; None: CUDA where there is one.
        dtype: of the parameters, a torch dtype or its name; None keeps what was saved.
        device_map: a device, `auto`, or a dict from prefixes of names (`vision`, `llm`, `llm.lm.model.layers.0`) to
            devices; instead of `device`.
        bits: 8 or 4: the layers of a published language model, on CUDA, by bitsandbytes; 0: as they are.
        attention: a name that transformers knows, or `auto`.
        attn_implementation: the same, by the name that it has in transformers.
        fresh: parts that may start without trained weights; adapters that an override adds always may.

    Raises:
        ZooError: the name is unknown or ambiguous, something does not fit, or weights are missing.

    Example:
        >>> model, processor = zoo.load("scenes_tiny")
    """
    fetch_config(name)
    cfg = configs.compose("load", [f"model={quoted(name)}", *overrides])
    if (chosen := attention or attn_implementation) is not None:
        cfg.attention = chosen
    return build(cfg, device=device, dtype=dtype, device_map=device_map, bits=bits, fresh=fresh)


def compose(*overrides: str, texts: Iterable[str] = ()) -> tuple[ZooModel, ZooProcessor]:
    """Compose a model from parts, without trained weights other than those of the parts' own checkpoints.

    Args:
        overrides: options as on the command line: `vision=timm`, `llm=hf`, `projector=mlp`, ...
        texts: what a new tokenizer is trained on, where neither the LLM nor an option names one.

    Example:
        >>> model, processor = zoo.compose("vision=timm", "projector=mlp", "llm=hf", texts=["a red circle"])
    """
    return build(configs.compose("load", list(overrides)), texts=texts, pretrained=False)


def build(
    cfg: Any,
    *,
    texts: Iterable[str] = (),
    tokenizer_folder: Path | None = None,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    bits: int = 0,
    fresh: Iterable[str] = (),
) -> tuple[ZooModel, ZooProcessor]:
    """Build the model and processor of a composed config.

    Args:
        cfg: from `zoo.settings.schema.compose`.
        texts: what a new tokenizer is trained on, where there is none to load; read only then.
        tokenizer_folder: where the tokenizer is of a model that starts from its parts.
        pretrained: load the trained weights of a preset that has some; False starts a preset from its parts. A model
            that was given as a folder or a hub repository always brings its weights.
        device, dtype, device_map, bits, fresh: see `load`.
    """
    folder = weights_folder(cfg) if pretrained or cfg.model.source != "preset" else None
    slots = slots_of(cfg)
    published = folder is not None and is_published(read_content(folder))
    if folder is not None and published:
        require_same(slots, folder, fresh)
    tokenizer = tokenizer_for(cfg, folder, texts, tokenizer_folder)
    set_template_options(tokenizer, cfg.tokenizer.template_options)
    if folder is None:
        add_special(tokenizer, tokens_for(slots["layout"]))
    plan = plan_from(cfg, tokenizer)
    plan.trained = folder is not None
    plan.splits = None if pretrained else plan.splits  # what is only to be scored needs no data to train on
    for note in check(plan).notes:
        warnings.warn(note, stacklevel=2)
    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = ZooConfig(
        slots=slots,
        tokenizer=plain(cfg.tokenizer),
        plugins=sorted({*cfg.plugins, *plugins.loaded()}),
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        text_vocab_size=len(tokenizer),
        attention=cfg.attention,
        **special,
    )
    target = device or (cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    target = device_map if device_map is not None else target
    if folder is not None:
        before = None if published else ZooConfig.read(folder)
        saved = before.base if before else None
        config.video_token_id = before.video_token_id if before else video_token_id_in(folder)
        source = {"checkpoint": cfg.model.repository or cfg.model.name, "revision": cfg.model.revision}
        config.base = {"model": source} if published else base_at(saved, cfg.model.base)
    elif VIDEO in tokens_for(slots["layout"]):
        config.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO)
    base = base_for(config, folder, fresh=fresh, dtype=dtype, device_map=target, bits=bits)
    model = ZooModel(config, base=base)
    if len(tokenizer) > model.llm.vocab_size:
        raise ZooError(f"The tokenizer has {len(tokenizer)} ids, but the LLM's table only {model.llm.vocab_size}.")
    if folder is not None and not published:
        model.bases.require_same(saved)
        started = read_weights(model, folder, fresh={*fresh, "adapter"}, done=base.read_here if base else None)
        model.fresh_parts = sorted({model.part_of(n) for n in started})
    elif base is not None and base.filled is not None:
        model.fresh_parts = sorted({n.partition(".")[0] for n in base.filled.missing})
    model = placed(model, target, None if bits else dtype, base)
    model.set_attention(cfg.attention)
    processor, generation = _processor(cfg, model, tokenizer, folder)
    model.__dict__["processor"] = processor  # for `model.chat`
    set_stops(model, processor, generation)
    return model.eval(), processor


def processor_alone(cfg: Any, texts: Iterable[str] = ()) -> tuple[ZooProcessor, int | None]:
    """Make the processor of a composed config without a weight, and say how many positions its LLM has; None: any.

    Args:
        cfg: from `zoo.settings.schema.compose`.
        texts: what a new tokenizer is trained on, where there is none to load; read only then.
    """
    folder, slots = weights_folder(cfg), slots_of(cfg)
    tokenizer = tokenizer_for(cfg, folder, texts)
    set_template_options(tokenizer, cfg.tokenizer.template_options)
    if folder is None:
        add_special(tokenizer, tokens_for(slots["layout"]))
    with torch.device("meta"):
        model = ZooModel(ZooConfig(slots=slots, attention="eager"), parts=assemble(slots, vocab_size=len(tokenizer)))
    return _processor(cfg, model, tokenizer, folder)[0], model.llm.max_positions


def _processor(cfg: Any, model: ZooModel, tokenizer: Any, folder: Path | None) -> tuple[ZooProcessor, Any]:
    """The processor of a model that starts from `folder` or from its parts, and the generation config stated there."""
    slots = model.config.slots or {}
    if folder is None:
        stated: dict[str, Any] = {"pictures": cut_by(slots["layout"], model.vision.transform if model.vision else None)}
    elif is_published(read_content(folder)):
        stated = published_options(folder, tokenizer)
    else:
        stated = saved_options(folder)
    generation = stated_config(model, folder)
    if folder is None:
        keep_shared(generation, tokenizer, slots["llm"] or {}, cfg.tokenizer.checkpoint)
    stated["end_tokens"] = end_tokens(generation, tokenizer)
    return processor_for(model, tokenizer, cfg.tokenizer.chat_template, **stated), generation


def processor_for(model: ZooModel, tokenizer: Any, template: str = "", **stated: Any) -> ZooProcessor:
    """Make the processor that writes exactly the placeholders that the model's parts make image tokens for.

    Args:
        model: whose parts say how many.
        tokenizer: with a chat template.
        template: name of a built-in chat template, where the tokenizer's is none of them.
        stated: `pictures`, `videos`, `video_token` of a published model, and the `end_tokens` of any.
    """
    known = next((name for name, (text, _) in CHAT_TEMPLATES.items() if text == tokenizer.chat_template), template)
    return ZooProcessor(
        tokenizer,
        transform=model.vision.transform if model.vision is not None else None,
        num_image_tokens=model.num_image_tokens,
        image_separator=image_separator(known),
        layout=layout_for(model),
        **stated,
    )


def layout_for(model: ZooModel) -> dict[str, Any] | None:
    """What the processor needs to count the tokens of an image that was cut: the layout's node and what it knows."""
    if model.layout is None:
        return None
    return {**(model.config.slots or {})["layout"], "given": dict(model.layout.given)}


def published_options(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """How a published folder prepares images and videos."""
    return {
        "pictures": pictures_in(folder),
        "videos": videos_in(folder),
        "video_token": video_token_in(folder, tokenizer),
    }


def saved_options(folder: Path) -> dict[str, Any]:
    """The published image and video processors that a saved model goes on using."""
    content = read_content(folder, "processor_config.json")
    return {key: content.get(key) for key in ("pictures", "videos", "video_token")}


def load_teacher(node: Mapping[str, Any], *, device: torch.device, precision: str) -> tuple[Any, Any]:
    """Load the model and the processor that a stage's teacher names.

    Args:
        node: `Stage.teacher_node`.
        device: of the run, where the teacher names none.
        precision: of the stage: a bf16 stage holds the teacher's weights in bf16, unless it names a dtype.
    """
    dtype = node["dtype"] or ("bfloat16" if precision == "bf16" else None)
    where = torch.device(node["device"]) if node["device"] else device
    if not node["bits"]:
        return load(node["model"], *node["options"], device=where, dtype=dtype, attention=node["attention"])
    model, processor = load(node["model"], *node["options"], device="cpu", dtype=dtype, attention=node["attention"])
    # Where there is room for the whole; what is left of it then moves.
    quantize(model.llm.layers, int(node["bits"]), lambda name: any(a.owns(name) for a in model.adapter.values()))
    torch.nn.Module.to(model, where)
    model.set_attention(node["attention"])
    return model, processor
