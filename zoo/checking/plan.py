"""What a check looks at, as plain values: the slots of a composed config, and how they are to be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zoo.composed.own_checkpoints import require_there
from zoo.settings.config import Typed
from zoo.settings.parallel import ParallelConfig
from zoo.settings.source import Source, source_named, source_of


@dataclass
class Plan:
    """The input of a check, as plain values: the slots, and how they are to be used."""

    slots: dict[str, Any]
    vocab_size: int | None = None  # of the tokenizer, where it is loaded or its size is known
    tokenizer: str | None = None  # hub name or folder of one that is still to be loaded
    template: str = ""  # name of a built-in chat template; empty: the tokenizer's own
    template_options: Mapping[str, Any] = field(default_factory=dict)  # of its variables
    placeholders: int | None = None  # that a saved processor writes for each image; None: it is made anew
    stages: dict[str, Any] = field(default_factory=dict)  # name -> Stage
    data: tuple[str, ...] = ()  # names of the data that stages may mix
    positions: str = "auto"
    attention: str = "auto"
    precision: str = "auto"
    master_weights: str = "fp32"
    device: str = "auto"
    tensor: int = 1  # processes that share each layer of the LLM
    parallel: ParallelConfig | None = None  # how the processes of a run share the model; None: not known
    keep: str = "live"  # what a run keeps of frozen encoders
    made: Any = None  # the tokenizer itself, where it is loaded
    origin: str = ""  # folder or repository that all weights come from, if from one
    trained: bool = False  # the model has trained weights, even if its parts name no checkpoint
    stored: Path | None = None  # folder of the trained weights, where it is on this machine
    unused: str = ""  # the `model=` that starts from trained weights, which this one leaves out; empty: there are none
    fresh: tuple[str, ...] = ("adapter",)  # parts that may start without trained weights
    splits: Mapping[str, str] | None = None  # of the data, by name; None: not known
    typed: Typed | None = None  # the command line that it was composed from; fixes are tried as further words of it


def plan_for(source: Source, tokenizer: Any = None) -> Plan:
    """Return the plan of a source; with the tokenizer, where it is loaded already."""
    if source.kind == "dir" and not source.published:
        require_there(source.slots)
    place = source.tokenizer_source if tokenizer is None else None
    vocab_size = len(tokenizer) if tokenizer is not None else None if place else source.tokenizer["vocab_size"]
    return Plan(
        slots=source.slots,
        vocab_size=vocab_size,
        tokenizer=place,
        template=source.tokenizer["chat_template"],
        template_options=source.tokenizer["template_options"],
        stages=source.stages,
        data=tuple(source.data),
        positions=source.positions,
        attention=source.attention,
        precision=source.precision,
        master_weights=source.master_weights,
        device=source.device,
        made=tokenizer,
        origin="" if source.kind == "preset" else source.name,
        trained=source.is_trained,
        stored=source.present,
        unused=source.unused_weights,
        splits=source.data,
        typed=source.typed,
    )


def plan_from(cfg: Any, tokenizer: Any = None) -> Plan:
    """Return the plan of a composed config; one with stages trains, so a preset in it starts from its parts."""
    run: dict[str, Any] = {"tensor": cfg.parallel.tensor, "parallel": ParallelConfig(**cfg.parallel)}
    return replace(plan_for(source_of(cfg, pretrained=not cfg.stages), tokenizer), **run, keep=cfg.features.keep)


def plan_of(name: str, *overrides: str) -> Plan:
    """Return the plan of a model by name, for `zoo.check(name, ...)`."""
    return plan_for(source_named(name, *overrides))


def device_of(plan: Plan) -> str:
    """Return the device that a plan's model runs on."""
    return plan.device if plan.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
