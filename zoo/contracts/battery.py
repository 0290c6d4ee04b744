"""The battery: all rules of a kind, tried on one part, with a verdict on each."""

import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.contracts import (
    adapters,
    composed,
    datasets,
    distillers,
    encoders,
    language_models,
    layouts,
    projectors,
    pruners,
    tasks,
)
from zoo.contracts.case import Case
from zoo.contracts.given import llm_node
from zoo.contracts.rules import BrokenRuleError, NotForThisPart, Rule, Rules
from zoo.contracts.trial import members, node_of
from zoo.registry import get

ALONE: dict[str, tuple[type[Case], Rules]] = {
    "vision": (encoders.EncoderCase, encoders.RULES),
    "pruner": (pruners.PrunerCase, pruners.RULES),
    "projector": (projectors.ProjectorCase, projectors.RULES),
    "layout": (layouts.LayoutCase, layouts.RULES),
    "llm": (language_models.LanguageModelCase, language_models.RULES),
    "adapter": (adapters.AdapterCase, adapters.RULES),
    "distiller": (distillers.DistillerCase, distillers.RULES),
    "dataset": (datasets.DatasetCase, datasets.RULES),
    "task": (tasks.TaskCase, tasks.RULES),
}
NOT_COMPOSED = ("dataset", "task")


@dataclass
class Verdict:
    """What became of a rule."""

    rule: str
    word: str  # ok | broken | none: the rule does not concern the part
    given: str  # what the part gave, or why the rule does not concern it
    expected: str = ""  # where it is broken
    seconds: float = 0.0


def usual_node(kind: str, name: str) -> dict[str, Any]:
    """The options that a part is tried with: its own defaults; of a component of the zoo, of tiny size."""
    if get(kind, name).cls.__module__.partition(".")[0] != "zoo":
        return {"name": name}
    of_family = (member for member in members(kind) if member.partition(" ")[0] == name)  # hf clip, say
    return llm_node() if kind == "llm" else node_of(kind, next(of_family, name))


def battery(kind: str, node: Mapping[str, Any], folder: Path) -> Iterator[Verdict]:
    """Try all rules of a kind on a part, and yield the verdict on each.

    Args:
        kind: of the part.
        node: its name and options.
        folder: takes what models save.
    """
    case_of, rules = ALONE[kind]
    alone = case_of(kind, node)
    for rule in rules:
        yield tried(rule, alone)
    if kind in NOT_COMPOSED:
        return
    whole = composed.ComposedCase(kind, node, folder)
    for rule in [*composed.RULES, *(composed.INSIDE if kind == "pruner" else ())]:
        yield tried(rule, whole)


def tried(rule: Rule, case: Case) -> Verdict:
    """Try one rule; whatever the part raises breaks it."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            verdict = Verdict(rule.name, "ok", rule.run(case) or "")
    except NotForThisPart as why:
        verdict = Verdict(rule.name, "none", str(why))
    except BrokenRuleError as error:
        verdict = Verdict(rule.name, "broken", error.given, f"{error.expected} ({rule.sentence})")
    except Exception as error:  # of the part's own code
        lines = str(error).strip().splitlines() or [""]
        given = f"{type(error).__name__}: {lines[0]}{_place(error, case)}"
        verdict = Verdict(rule.name, "broken", given, rule.sentence)
    verdict.seconds = time.perf_counter() - start
    return verdict


def _place(error: Exception, case: Case) -> str:
    """The last line of the part's own file that was passed on the way to an error."""
    file = get(case.kind, case.name).file
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if lines else ""
