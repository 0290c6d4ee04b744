"""What the files of a run hold, finished or not, and in what the options of several runs differ."""

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zoo.evaluation.result import names_of
from zoo.registry import MANY, ZooError
from zoo.registry.foreign import INDEX, read_json, read_text
from zoo.registry.table import SLOT_KINDS, group_of
from zoo.runs.folder import read_metrics, runs
from zoo.runs.lock import alive

# Of one run, or of its process.
OWN = ("run", "resume", "lock", "hydra", "log", "log_pictures", "defaults", "survey", "teach")
GROUPS = {group_of(kind): kind in MANY for kind in SLOT_KINDS} | {"data": True, "task": True}
SHOWN = 4  # changed options in the name of a run; figures for programs have all
Value = dict[str, float]  # value, stderr, n


@dataclass
class Summary:
    """The figures of one run, or of one evaluation."""

    name: str  # of its folder
    path: Path
    state: str  # done | running | failed | stopped | waiting: without a step | scored: of zoo eval
    parameters: int | None
    image_tokens: int | None  # of one image, as the LLM is given them
    steps: int
    planned: int | None  # steps of all stages; None: of one they depend on the data
    seconds: float | None
    ms_per_sample: float | None  # median of the training steps
    loss: float | None
    scores: dict[str, Value]  # data/kind/metric
    curve: list[tuple[int, float]]  # step, loss
    score_curves: dict[str, list[tuple[int, float]]]  # data/kind/metric -> step, score
    options: dict[str, Any]  # flat
    error: str = ""
    changed: dict[str, Any] = field(default_factory=dict)  # options that differ between the runs of a report

    @property
    def label(self) -> str:
        """What was changed, as on a command line; the folder's name without changes."""
        shown = list(self.changed.items())[:SHOWN]
        keys = [key for key, _ in shown]
        words = [f"{_short(key, keys)}={written(value)}" for key, value in shown]
        rest = len(self.changed) - len(shown)
        return " ".join([*words, *([f"and {rest} more"] if rest else [])]) or self.name

    def as_json(self) -> dict[str, Any]:
        """Return the figures, without curves."""
        names = ("parameters", "image_tokens", "steps", "planned", "seconds", "ms_per_sample", "loss", "scores")
        head = {"name": self.name, "path": str(self.path), "state": self.state, "error": self.error or None}
        return {**head, "changed": self.changed, **{name: getattr(self, name) for name in names}}


def summaries(folders: Sequence[Path]) -> list[Summary]:
    """Return a summary of every run in or below the folders, oldest first, and of the evaluations that are named.

    Raises:
        ZooError: a folder does not exist, or there are no runs.
    """
    for folder in folders:
        if not folder.exists():
            raise ZooError(f"There is no folder {str(folder)!r}. Train a model first with `zoo train`.")
    found = list(dict.fromkeys(path for folder in folders for path in _paths(folder.resolve())))
    if not found:
        raise ZooError(f"There is no run in {', '.join(map(repr, map(str, folders)))}: none has a config.yaml.")
    made = [summarise(path) for path in found]
    for run, changed in zip(made, differences([run.options for run in made]), strict=True):
        run.changed = changed
    labels = [run.label for run in made]
    for run in made:  # two that differ in nothing that is shown
        if run.changed and labels.count(run.label) > 1:
            run.changed = {**run.changed, "folder": run.name}
    return made


def _paths(folder: Path) -> list[Path]:
    if (folder / "eval.yaml").is_file():
        return [folder]
    return runs(folder) or sorted(file.parent for file in folder.glob("*/eval.yaml"))


def summarise(path: Path) -> Summary:
    """Read the files of a run, finished or not, or of an evaluation."""
    trained = not (path / "eval.yaml").is_file()
    config = _yaml(path / ("config.yaml" if trained else "eval.yaml"))
    metrics = read_metrics(path / "metrics.jsonl")
    rows = [r for r in metrics if "loss" in r]
    done = _json(path / "summary.json") or {}
    lock = _json(path / "zoo.lock") or {}
    error = (_json(path / "error.json") or {}).get("error", "")
    stages = [stage for stage in (config.get("stages") or {}).values() if isinstance(stage, Mapping) and trained]
    paces = [1000 / r["samples_per_s"] for r in rows if r.get("samples_per_s")]
    lines = _json(path / "scores.json") or []
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in metrics:
        for name, value in (row.get("scores") or {}).items():
            curves.setdefault(str(name), []).append((row["step"], value))
    return Summary(
        name=path.name,
        path=path,
        state=_state(path, done, rows, error, bool(lines)),
        parameters=done.get("parameters", lock.get("parameters")),
        image_tokens=done.get("image_tokens", lock.get("image_tokens")),
        steps=rows[-1]["step"] if rows else 0,
        planned=_planned(stages),
        seconds=done.get("seconds"),
        ms_per_sample=round(statistics.median(paces), 3) if paces else None,
        loss=rows[-1]["loss"] if rows else None,
        scores=dict(zip(names_of([_figure(line) for line in lines]), (line["score"] for line in lines), strict=True)),
        curve=[(r["step"], r["loss"]) for r in rows],
        score_curves=curves,
        options=flat(config),
        error=error,
    )


def _planned(stages: Sequence[Mapping[str, Any]]) -> int | None:
    steps = [int(stage.get("steps") or 0) for stage in stages]
    return sum(steps) if steps and all(steps) else None


def _state(path: Path, done: Mapping[str, Any], rows: Sequence[Any], error: str, scored: bool) -> str:
    if (path / "eval.yaml").is_file():
        return "scored" if scored else "stopped"
    if done:
        return "done"
    if alive(path):
        return "running"
    return "failed" if error else "stopped" if rows else "waiting"


def _figure(line: Mapping[str, Any]) -> tuple[str, str, str, str]:
    kind = f"{line['kind']}_held_out" if line.get("held_out") else line["kind"]
    return line["data"], kind, line.get("task", ""), line["metric"]


def _json(path: Path) -> Any:
    return read_json(path, INDEX) if path.is_file() else None


def _yaml(path: Path) -> dict[str, Any]:
    """Read a config that Hydra wrote; nothing of it is resolved or built."""
    with contextlib.suppress(yaml.YAMLError, ZooError):
        found = yaml.load(read_text(path, INDEX), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return found if isinstance(found, dict) else {}
    return {}


# ---- options -----------------------------------------------------------------------------------------------------


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config by the names that they have on the command line."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in OWN:
            continue
        if key == "model" and isinstance(value, Mapping):
            found["model"] = value.get("name")
        elif key in GROUPS:
            found |= _slot(key, value, several=GROUPS[key])
        elif key == "stages" and isinstance(value, Mapping):
            found["stages"] = list(value)
            found |= _leaves("stages", value)
        else:
            found |= _leaves(key, value)
    return found


def _slot(group: str, value: Any, several: bool) -> dict[str, Any]:
    members = value if several and isinstance(value, Mapping) else {group: value} if value else {}
    names = [node.get("name", key) if isinstance(node, Mapping) else key for key, node in members.items()]
    shown = list(members) if several else names
    found: dict[str, Any] = {group: shown or None}
    for key, node in members.items():
        options = {k: v for k, v in node.items() if k != "name"} if isinstance(node, Mapping) else {}
        found |= _leaves(f"{group}.{key}" if several else group, options)
    return found


def _leaves(path: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {key: leaf for name, item in value.items() for key, leaf in _leaves(f"{path}.{name}", item).items()}
    return {path: value}


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each config, its options that differ from those of another that has them too."""
    keys = dict.fromkeys([*GROUPS, "model", "stages", *(key for config in configs for key in config)])
    values = {key: {json.dumps(c[key], default=str) for c in configs if key in c} for key in keys}
    changed = [key for key in keys if len(values[key]) > 1]
    if "model" in changed:  # the parts of another model differ, too, and say no more
        slots = {group for group, several in GROUPS.items() if not several} | {"tokenizer"}
        changed = [key for key in changed if key.partition(".")[0] not in slots]
    return [{key: config[key] for key in changed if key in config} for config in configs]


def written(value: Any) -> str:
    """Write the value of an option as on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return str(value[0]) if len(value) == 1 else f"[{','.join(map(written, value))}]"
    return str(value)


def _short(key: str, keys: Sequence[str]) -> str:
    """Return the shortest end of an option's name that no other of the keys has."""
    words = key.split(".")
    for count in range(1, len(words)):
        end = ".".join(words[-count:])
        if sum(other == end or other.endswith(f".{end}") for other in keys) == 1:
            return end
    return key
