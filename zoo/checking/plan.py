"""What a check looks at, as plain values: the slots of a composed config, and how they are to be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.published import is_published
from zoo.published.base import read_content
from zoo.settings import schema as configs
from zoo.settings.overrides import quoted
from zoo.settings.schema import Typed
from zoo.settings.source import slots_of


@dataclass
class Plan:
    """All that a check looks at, as plain values: the slots, and how they are to be used."""

    slots: dict[str, Any]
    vocab_size: int | None = None  # of the tokenizer, where it is there or its size is known
    tokenizer: str | None = None  # hub name or folder of one that is still to be loaded
    template: str = ""  # name of a built-in chat template; empty: the tokenizer's own
    placeholders: int | None = None  # that a saved processor writes for each image; None: it is made anew
    stages: dict[str, Any] = field(default_factory=dict)  # name -> Stage
    data: tuple[str, ...] = ()  # names of the data that stages may mix
    attention: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    made: Any = None  # the tokenizer itself, where it is there
    origin: str = ""  # folder or repository that the weights come from, if from one
    trained: bool = False  # the model comes with trained weights, whatever its parts come with
    splits: Mapping[str, str] | None = None  # of the data, by name; None: not known
    typed: Typed | None = None  # the words that it was composed from; fixes are tried as they would be typed


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
    if cfg.model.repository:
        return True
    return (files("zoo.model_cards") / (cfg.model.name or "_")).joinpath("config.json").is_file()


def plan_of(name: str, *overrides: str) -> Plan:
    """Return the plan of a model by name, for `zoo.check(name, ...)`."""
    return plan_from(configs.compose("load", [f"model={quoted(name)}", *overrides]))
