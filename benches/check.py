"""`zoo bench check`: what the check finds before weights load, what it refuses without need, and how long it takes.

Misfits are typed mistakes, each of which is to be refused with words that name the part and what is wrong. Compositions
are drawn from the registry; one is valid if it is composed, learns from a batch and generates. The check is to let them
all through, and nothing that does not run.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zoo import registry
from zoo.benches.check_folders import write_checkpoints
from zoo.benches.check_misfits import MISFITS, Misfit
from zoo.benches.check_valid import Drawn, draw
from zoo.benches.measure import Value
from zoo.benches.place import torch_threads
from zoo.benches.report import Report, Row, machine
from zoo.checking.checker import RefusedError, check
from zoo.checking.data_check import check_data
from zoo.checking.fixes import AND
from zoo.checking.plan import Plan, plan_from
from zoo.contracts.trial import Trial
from zoo.registry import ZooError
from zoo.settings.config import compose

OWN = "zoo.benches.check_parts"
NAMED = 0.95  # share of misfits that are to be refused with words that name what and where
_LARGE = {  # of a LLaVA-1.5-7B, to time the check with
    "vision": {"name": "hf", "image_size": 336, "patch_size": 14, "width": 1024, "depth": 24, "heads": 16},
    "pruner": {},
    "projector": {"name": "mlp"},
    "layout": None,
    "llm": {"name": "hf", "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 11008}
    | {"max_positions": 4096},
    "adapter": {},
}


@dataclass
class Options:
    misfits: int = 0  # at most this number, evenly spread; 0: all
    valid: int = 300  # compositions that run
    fixes: int = 40  # misfits whose offered fixes are typed, evenly spread
    seed: int = 0  # of the compositions
    threads: int = 1  # of torch on the CPU

    def __post_init__(self) -> None:
        if min(self.misfits, self.valid, self.fixes) < 0 or self.threads < 1:
            raise ZooError("misfits, valid and fixes must be at least 0, and threads at least 1.")


@dataclass
class Findings:
    """What became of the misfits."""

    named: int = 0  # refused, with words that name what and where
    unnamed: list[str] = field(default_factory=list)  # refused with other words
    raw: list[str] = field(default_factory=list)  # ended in an error other than a refusal
    passed: list[str] = field(default_factory=list)
    offered: int = 0  # fixes
    broken: list[str] = field(default_factory=list)  # fixes that are refused when they are typed


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Ask the check about misfits and about compositions that run, and time it."""
    page = Report("zoo bench check", machine=machine(torch.device("cpu"), options.threads))
    with torch_threads(options.threads), tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place)
        misfits = spread(MISFITS, options.misfits or len(MISFITS))
        found = tried(misfits, folder / "checkpoints", options.fixes)
        for line in [*found.passed, *found.raw, *found.unnamed, *found.broken]:
            show(line)
        false, missed, refused, kinds = valid(options.valid, options.seed, folder / "models", show)
        many = len(misfits)
        page.add(
            Row(
                f"of {many} misfits, refused by words that name what and where",
                share(found.named, many),
                "",
                bound=NAMED,
                note=f"{len(found.unnamed)} by other words, {len(found.raw)} raw errors, {len(found.passed)} pass",
            ),
            count(f"of {found.offered} fixes that {options.fixes} of these offer, refused when typed", found.broken),
            count(f"of {options.valid} compositions that run, refused", false),
            count(f"of {options.valid + len(missed)} that the check lets through, fail", missed),
            Row("seconds of the check, scenes_tiny", seconds(plan_from(compose("check"))), " s"),
            Row("seconds of the check, sizes of LLaVA-1.5-7B", seconds(Plan(_LARGE, vocab_size=32064)), " s"),
        )
        page.setting.append(f"compositions drawn from {kinds}; {refused} more were refused, and do not run")
    return page


def tried(misfits: list[Misfit], folder: Path, fixes: int = 0) -> Findings:
    """Type misfits one after the other.

    Args:
        misfits: to type.
        folder: for the checkpoints that they name.
        fixes: misfits whose fixes are typed as well.
    """
    found = Findings()
    folder.mkdir(parents=True)
    write_checkpoints(folder)
    with own_parts():
        for misfit in misfits:
            words = [word.replace("{at}", str(folder)) for word in misfit.words]
            line = " ".join(misfit.words)
            try:
                _typed(words, 0)
            except ZooError as error:
                said = str(error)
                lacks = [part for part in misfit.says if part.lower() not in said.lower()]
                found.named += not lacks
                if lacks:
                    found.unnamed.append(f"no word of {lacks}: {line}: {said}")
            except Exception as error:
                found.raw.append(f"raw {type(error).__name__}: {line}: {error}")
            else:
                found.passed.append(f"passes: {line}")
        for misfit in spread(misfits, fixes) if fixes else []:
            _type_fixes([word.replace("{at}", str(folder)) for word in misfit.words], found)
    return found


def _typed(words: list[str], fixes: int) -> None:
    cfg = compose("check", words)
    walk = check(plan_from(cfg), fixes=fixes)
    check_data(cfg, walk.stages)


def _type_fixes(words: list[str], found: Findings) -> None:
    try:
        _typed(words, 3)
    except RefusedError as error:
        for fix in error.fixes:
            found.offered += 1
            try:
                _typed([*words, *fix.split(AND)], 0)
            except ZooError as still:
                found.broken.append(f"fix {fix} of {' '.join(words)}: {still}")
    except ZooError:
        return  # found while the words were composed: no fix is looked for


@contextmanager
def own_parts() -> Iterator[None]:
    """Let words name a plugin with parts from outside the zoo, and leave the registry as it was."""
    before = {kind: dict(some) for kind, some in registry.table._entries.items()}
    loaded = dict(registry.plugins._plugins)
    sys.modules.pop(OWN, None)  # a second import registers anew
    try:
        yield
    finally:
        for kind, some in registry.table._entries.items():
            for name in set(some) - set(before[kind]):
                if some[name].cls.__module__ == OWN:
                    del some[name]
        registry.plugins._plugins.clear()
        registry.plugins._plugins.update(loaded)


def valid(
    wanted: int, seed: int, folder: Path, show: Callable[[str], None] = print
) -> tuple[list[str], list[str], int, str]:
    """Draw compositions until `wanted` of them run.

    Returns:
        Those that run and are refused, those that fail and are not, the number of those that are refused and fail, and
        what all were drawn from.
    """
    folder.mkdir(parents=True)
    trial, drawn = Trial(folder), draw(seed)
    false: list[str] = []
    missed: list[str] = []
    ran = rightly = 0
    while ran < wanted:
        composition = next(drawn)
        refusal = _refusal(composition, len(trial.tokenizer))
        plan = composition.plan(len(trial.tokenizer), trial.tokenizer)
        failure = trial.failure(plan)
        ran += not failure
        rightly += bool(failure and refusal)
        if refusal and not failure:
            false.append(f"refused, and runs: {composition}: {refusal}")
            show(false[-1])
        if failure and not refusal:
            missed.append(f"passes, and fails: {composition}: {failure}")
            show(missed[-1])
    return false, missed, rightly, Drawn.kinds()


def _refusal(composition: Drawn, vocab_size: int) -> str:
    try:
        check(composition.plan(vocab_size), fixes=0)
    except RefusedError as error:
        return error.reason
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    return ""


def spread(items: tuple[Misfit, ...] | list[Misfit], many: int) -> list[Misfit]:
    """Take `many` of the items, evenly over all."""
    many = min(many, len(items))
    return [items[i * len(items) // many] for i in range(many)]


def share(part: int, whole: int) -> Value:
    return Value.one(part / max(1, whole))


def count(what: str, lines: list[str]) -> Row:
    return Row(what, Value.one(float(len(lines))), "", bound=0.0, at_most=True)


def seconds(plan: Plan, rounds: int = 5) -> Value:
    """CPU seconds of the check of a plan."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        check(plan)
        times.append(time.process_time() - start)
    return Value(statistics.median(times), min(times), max(times))
