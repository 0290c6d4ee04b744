"""Models by name, by folder, from the hub, or composed from parts; each with the processor that fits it.

The order is always the same: compose the config, check it on the meta device, then read weights.
"""

import warnings
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from zoo import config as configs
from zoo.checker import Plan, RefusedError, check
from zoo.model import ZooModel
from zoo.model_types import ZooConfig
from zoo.processor import ZooProcessor
from zoo.published import is_published
from zoo.published.base import base_at, base_for, placed, read_content, require_same
from zoo.published.composed import VIDEO, cut_by, tokens_for
from zoo.published.text import pictures_in, tokenizer_in, video_token_id_in, video_token_in, videos_in
from zoo.registry import ZooError, plugins
from zoo.saved import fetch_config
from zoo.stops import end_tokens, keep_shared, set_stops, stated_config
from zoo.tokenizer import (
    CHAT_TEMPLATES,
    add_special,
    image_separator,
    load_tokenizer,
    set_template_options,
    train_tokenizer,
)
from zoo.weights import local_folder, read_weights, sha256_of, weight_files

_WORDS = " yes no 0 1 2 3 4 5 6 7 8 9"  # what an empty corpus still gives a tokenizer


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
        cfg: from `zoo.config.compose`.
        texts: what a new tokenizer is trained on, where there is none to load; read only then.
        tokenizer_folder: where `tokenizer_for` put the tokenizer of a model that starts from its parts.
        pretrained: load the trained weights of a preset that has some; False starts a preset from its parts. A model
            that was given as a folder or a hub repository always brings its weights.
        device, dtype, device_map, bits, fresh: see `load`.
    """
    folder = weights_folder(cfg) if pretrained or cfg.model.source != "preset" else None
    slots = slots_of(cfg)
    published = folder is not None and is_published(read_content(folder))
    if folder is not None and published:
        require_same(slots, folder, fresh)
    tokenizer = _tokenizer(cfg, slots, folder, texts, tokenizer_folder)
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
        tokenizer=_plain(cfg.tokenizer),
        plugins=sorted({*cfg.plugins, *plugins.loaded()}),
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        text_vocab_size=len(tokenizer),
        attention=cfg.attention,
        **special,
    )
    target = device or (cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    target = device_map if device_map is not None else target
    if folder is not None:
        before = None if published else ZooConfig.from_pretrained(folder)
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
    if folder is None:
        stated: dict[str, Any] = {"pictures": cut_by(slots["layout"], model.vision.transform if model.vision else None)}
    else:
        stated = published_options(folder, tokenizer) if published else saved_options(folder)
    generation = stated_config(model, folder)
    if folder is None:
        keep_shared(generation, tokenizer, slots["llm"] or {}, cfg.tokenizer.checkpoint)
    stated["end_tokens"] = end_tokens(generation, tokenizer)
    processor = processor_for(model, tokenizer, cfg.tokenizer.chat_template, **stated)
    model.__dict__["processor"] = processor  # for `model.chat`
    set_stops(model, processor, generation)
    return model.eval(), processor


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


def weights_folder(cfg: Any) -> Path | None:
    """Return the folder of the trained weights that `cfg.model` names, fetched where it must be; None if it has none.

    Raises:
        ZooError: the weights are not those whose hash the card states.
    """
    source, name = cfg.model.source, cfg.model.name
    if source == "dir":
        folder = Path(name)
    elif cfg.model.repository:
        folder = local_folder(cfg.model.repository, cfg.model.revision or None)
    else:
        folder = Path(str(files("zoo.model_cards"))) / name
        if not (folder / "config.json").is_file():
            return None
    if stated := cfg.model.sha256.split():
        found = {file.name: sha256_of(file) for file in weight_files(folder)}
        if list(found.values()) != stated:
            shown = ", ".join(f"{file} {digest}" for file, digest in found.items())
            raise ZooError(f"The weights of {name!r} in {folder} are {shown}; their card states {', '.join(stated)}.")
    return folder


def tokenizer_of(name: str, template: str = "") -> Any:
    """Load the tokenizer that a model has, with its chat template or the one named.

    Raises:
        ZooError: the model makes its tokenizer when it is trained, and has no trained weights.
    """
    cfg = configs.compose("load", [f"model={quoted(name)}"])
    folder = weights_folder(cfg)
    if folder is not None and is_published(read_content(folder)):
        return tokenizer_in(folder, template)
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder), template, read_content(folder).get("image_token_id"))
    source = cfg.tokenizer.checkpoint or (cfg.llm or {}).get("checkpoint")
    if not source:
        raise ZooError(f"Model {name!r} has no trained weights here, so it has no tokenizer yet.")
    found = load_tokenizer(source, template or cfg.tokenizer.chat_template)
    return set_template_options(found, {} if template else cfg.tokenizer.template_options)


def slots_of(cfg: Any) -> dict[str, Any]:
    """Return the five model slots of a composed config as plain values."""
    return {kind: _plain(cfg.get(kind)) for kind in ("vision", "pruner", "projector", "layout", "llm", "adapter")}


def plan_from(cfg: Any, tokenizer: Any = None) -> Plan:
    """Return what the check looks at in a composed config; with the tokenizer, where it is there already."""
    from omegaconf import OmegaConf

    slots = slots_of(cfg)
    source, vocab_size = None, None if tokenizer is None else len(tokenizer)
    if vocab_size is None:
        folder = Path(cfg.model.name)
        saved = cfg.model.source == "dir" and (folder / "tokenizer_config.json").is_file()
        saved = saved and not is_published(read_content(folder))
        source = cfg.model.name if saved else cfg.tokenizer.checkpoint or slots["llm"].get("checkpoint") or None
        vocab_size = None if source else cfg.tokenizer.vocab_size
    return Plan(
        slots=slots,
        vocab_size=vocab_size,
        tokenizer=source,
        template=cfg.tokenizer.chat_template,
        stages={name: OmegaConf.to_object(stage) for name, stage in cfg.stages.items()},
        data=tuple(cfg.data),
        attention=cfg.attention,
        precision=cfg.precision,
        device=cfg.device,
        made=tokenizer,
        origin="" if cfg.model.source == "preset" else cfg.model.name,
        trained=cfg.model.source != "preset" or (not cfg.stages and _has_card_weights(cfg)),
        typed=configs.typed_of(cfg),
        splits={str(name): str(node.get("split", "train") or "train") for name, node in cfg.data.items()},
    )


def _has_card_weights(cfg: Any) -> bool:
    """Whether a preset comes with trained weights, here or on the hub."""
    return (
        bool(cfg.model.repository)
        or (files("zoo.model_cards") / (cfg.model.name or "_")).joinpath("config.json").is_file()
    )


def plan_of(name: str, *overrides: str) -> Plan:
    """Return the plan of a model by name, for `zoo.check(name, ...)`."""
    return plan_from(configs.compose("load", [f"model={quoted(name)}", *overrides]))


def tokenizer_for(cfg: Any, texts: Iterable[str] = ()) -> Any:
    """Return the tokenizer that `build` would give the model of this config, before there is one."""
    folder = weights_folder(cfg) if cfg.model.source != "preset" else None
    return _tokenizer(cfg, slots_of(cfg), folder, texts)


def _tokenizer(
    cfg: Any, slots: dict[str, Any], folder: Path | None, texts: Iterable[str], made: Path | None = None
) -> Any:
    """The first that there is: the saved model's, the config's, that of the LLM's checkpoint, or a new one."""
    template = cfg.tokenizer.chat_template
    if folder is not None and is_published(read_content(folder)):
        return tokenizer_in(folder, template)
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder), template, read_content(folder).get("image_token_id"))
    if source := made or cfg.tokenizer.checkpoint or slots["llm"].get("checkpoint"):
        return load_tokenizer(str(source), template)
    return train_tokenizer(_or_words(texts), cfg.tokenizer.vocab_size, template or "plain")


def _or_words(texts: Iterable[str]) -> Iterable[str]:
    found = False
    for text in texts:
        found = True
        yield text
    if not found:
        yield _WORDS


def _plain(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def quoted(name: str) -> str:
    """A model name as Hydra's grammar takes it, whatever a path holds."""
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


__all__: Sequence[str] = ["RefusedError", "build", "check", "compose", "load", "plan_from", "plan_of", "processor_for"]
