"""`zoo bench compatibility`: which parts go together, from real runs of tiny models; makes docs/compatibility.md.

Every pair of parts (two pruners, and two adapters, in both orders), and a sample of three at once.
"""

import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zoo.benches.measure import Value
from zoo.benches.place import torch_threads
from zoo.benches.report import Report, Row, machine
from zoo.contracts.trial import KINDS, Part, Trial, Verdict, members
from zoo.registry import MANY, ZooError, plugins, unknown
from zoo.registry.versions import PYTHON, TESTED

_HEAD = """# Which parts go together

Every cell is a model of tiny parts with random weights that was composed, checked and, where the check lets it through,
really run: losses of a batch of one row with an image and one of text alone, gradients for every parameter that trains
(experts that no token chose aside), greedy generation of a padded batch, saving, and loading to the same logits to the
bit. Adapters' weights are moved off their start first. Made by

    {command}

**yes**: all of that passed. **no**: the check refuses it before a weight is read; the number is the reason below.
**BROKEN**: the check let it through and it failed, which is our mistake. In tables of one kind, the row stands ahead of
the column. Other slots: encoder timm, projector mlp, LLM llama, no pruner, adapter or distiller; but no projector where
`vlora` is, and mixtral where `moextend` is. `qwen_vision` has the layout `native`, and as Qwen3-VL's the projector
`identity`. A teacher has the encoder and the projector of its student and no pruner.
`aim`, `dart`, `fastv`, `pyramiddrop` and `sparsevlm` drop tokens inside the LLM;
`llava_mod` runs with its objective `mimic`, `peft` with method=dora, `prumerge` with score=column_mean.
"""

_LIBRARIES = """## Libraries

Versions that the tests ran on which touch libraries: models, published checkpoints, pruners, adapters, encoders,
training; {python}, on a CPU. `make test-oldest` runs the lowest that are allowed, all at once
([the list](../requirements/oldest.txt)), `make test-newest` the newest, and `make test` what `make install` installs
([the list](../requirements/locked.txt)). `zoo doctor` says which installed versions lie outside. What differs between
versions is known to [registry/versions.py](../registry/versions.py).

| library | allowed | lowest run | newest run | newer, in part |
|---|---|---|---|---|
"""

_IN_PART = """
"In part" are torch 2.15.0 and torchvision 0.29.2, the newest on PyPI on 1 December 2026, with triton 3.9 and the other
libraries as they are locked, on a CPU: 43 of the files of tests, those of attention, masks and compiling, packed rows
and kept shapes, precision, optimisers, few bits, mixtures of experts, LoRA and PEFT, LLaVA-KD, the batteries of
pruners, encoders and language models, runs that train, save, end and resume, several processes (DDP, FSDP2, ZeRO,
tensor parallel, by gloo) and exports; `zoo doctor`, and `zoo train` as it is and with `compile` in bf16. They passed
without a change. Not run there: the other tests, this page, and anything on a GPU. `make install` and
`make test-newest` stay with torch 2.14.1. torchvision 0.30 was not out; 0.29.2 goes with torch 2.14 and 2.15. None of
the other libraries asks for an older torch.
"""


@dataclass
class Options:
    triples: int = 80  # sampled compositions of three parts
    pairs: int = 0  # at most this number of pairs, sampled; 0: all
    # kind/name with commas between: only compositions with one of these; empty: those that plugins=[...] adds, else all
    parts: str = ""
    seed: int = 0  # of the samples
    threads: int = 1  # of torch on the CPU

    def __post_init__(self) -> None:
        if min(self.triples, self.pairs) < 0 or self.threads < 1:
            raise ZooError(
                f"triples and pairs must be at least 0 and threads at least 1, got {self.triples}, {self.pairs}, "
                f"{self.threads}."
            )
        self.chosen = [_part(word.strip()) for word in self.parts.split(",") if word.strip()]
        own = [word for word in plugins.added() if word.partition("/")[0] in KINDS]
        self.chosen = self.chosen or [_part(word) for word in own]


@dataclass
class Page(Report):
    """The verdicts, in the order in which they were found."""

    found: dict[tuple[Part, ...], Verdict] = field(default_factory=dict)

    def write_json(self, path: Path) -> None:
        cells = [{"parts": parts, "word": v.word, "reason": v.reason, "fix": v.fix} for parts, v in self.found.items()]
        path.write_text(json.dumps({"command": self.command, "machine": self.machine, "cells": cells}, indent=1) + "\n")

    def markdown(self) -> str:
        """The page; the command without the file that it goes to."""
        reasons = list(dict.fromkeys(v.reason for v in self.found.values() if v.reason))
        lines = [_HEAD.format(command=f"{self.command} markdown=docs/compatibility.md")]
        for first, second in _tables():
            lines += self._table(first, second, reasons)
        triples = [(parts, v) for parts, v in self.found.items() if len(parts) == 3]
        lines += [
            "## Three at once",
            "",
            f"{len(triples)} compositions, sampled from all.",
            "",
            "| parts | |",
            "|---|---|",
        ]
        lines += [f"| {' + '.join(f'{k} {n}' for k, n in p)} | {_cell(v, reasons)} |" for p, v in triples]
        lines += ["", "## Reasons", ""]
        for number, reason in enumerate(reasons, 1):
            parts, verdict = next((p, v) for p, v in self.found.items() if v.reason == reason)
            fix = f" Fix of {' with '.join(n for _, n in parts)}: `{verdict.fix}`." if verdict.fix else ""
            lines.append(f"{number}. {reason}.{fix}")
        return "\n".join([*lines, "", libraries()])

    def _table(self, first: str, second: str, reasons: list[str]) -> list[str]:
        if not any({k for k, _ in p} == {first, second} and len(p) == 2 for p in self.found):
            return []
        columns = members(second)
        head = ["", *columns]
        lines = [f"## {first} and {'another' if first == second else second}", "", f"| {' | '.join(head)} |"]
        lines.append("|---" * len(head) + "|")
        for row in members(first):
            cells = [_cell(self.found.get(((first, row), (second, c))), reasons) for c in columns]
            lines.append(f"| {' | '.join([row, *cells])} |")
        return [*lines, ""]


def libraries() -> str:
    """The section on versions of libraries, from what registry/versions.py says was run."""
    rows = [f"| {name} | `{v.range}` | {v.oldest} | {v.newest} | {v.in_part} |" for name, v in TESTED.items()]
    return _LIBRARIES.format(python=f"Python {PYTHON}") + "\n".join(rows) + "\n" + _IN_PART


def run(options: Options, show: Callable[[str], None] = print) -> Page:
    """Run all pairs, and a sample of triples."""
    chance = random.Random(options.seed)
    asked, more = list(pairs()), list(triples())
    if options.chosen:
        asked, more = ([parts for parts in some if set(parts) & set(options.chosen)] for some in (asked, more))
    if options.pairs:
        asked = chance.sample(asked, min(options.pairs, len(asked)))
    asked += chance.sample(more, min(options.triples, len(more)))
    page = Page("zoo bench compatibility", machine=machine(torch.device("cpu"), options.threads))
    with torch_threads(options.threads), tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        fixes: dict[str, str] = {}  # the search takes longer than a run: once for each reason
        for parts in asked:
            verdict = trial.run(parts)
            if verdict.word == "no" and verdict.reason not in fixes:
                fixes[verdict.reason] = verdict.fix = trial.fix(verdict, parts)
            if verdict.word == "broken" or (verdict.word == "no" and options.chosen):
                fix = f"; fits with {verdict.fix}" if verdict.fix else ""
                show(f"{verdict.word:<7}{' + '.join(n for _, n in parts)}: {verdict.reason}{fix}")
            page.found[parts] = verdict
    words = [v.word for v in page.found.values()]
    for word, what in (("yes", "run"), ("no", "are refused with a reason"), ("broken", "pass the check and fail")):
        value = Value.one(float(words.count(word)))
        bound = 0.0 if word == "broken" else None
        page.add(Row(f"of {len(words)} compositions, {what}", value, "", bound=bound, at_most=True))
    return page


def pairs() -> Iterator[tuple[Part, ...]]:
    """All pairs of parts."""
    for first, second in _tables():
        for a, b in itertools.product(members(first), members(second)):
            if (first, a) != (second, b):
                yield (first, a), (second, b)


def triples() -> Iterator[tuple[Part, ...]]:
    """All compositions of three parts of three kinds."""
    for kinds in itertools.combinations(KINDS, 3):
        for chosen in itertools.product(*map(members, kinds)):
            yield tuple(zip(kinds, chosen, strict=True))


def _part(word: str) -> Part:
    """A part of the bench by `kind/name`.

    Raises:
        ZooError: the bench has no such kind, or no such member of it.
    """
    kind, _, name = word.partition("/")
    if kind not in KINDS:
        raise unknown("kind of the bench", kind, KINDS)
    if name not in members(kind):
        raise unknown(kind, name, members(kind))
    return kind, name


def _tables() -> list[tuple[str, str]]:
    return [*itertools.combinations(KINDS, 2), *((kind, kind) for kind in KINDS if kind in MANY)]


def _cell(verdict: Verdict | None, reasons: Sequence[str]) -> str:
    if verdict is None:
        return ""
    if verdict.word == "yes":
        return "yes"
    return f"{'no' if verdict.word == 'no' else 'BROKEN'} ({reasons.index(verdict.reason) + 1})"
