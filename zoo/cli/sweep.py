"""`zoo train -m`: run every combination of values, each with the options of the components that it chooses.

An option such as `pruner.random.keep_ratio=0.5` is left out of the jobs that do not choose `random`; jobs that are then
equal run once. All jobs are planned, and their values checked, before the first one starts.
"""

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from zoo.registry import ZooError, source_options, source_presets
from zoo.registry.presets import PRESET
from zoo.registry.table import kind_of
from zoo.runs.launchers import is_first
from zoo.settings import presets
from zoo.settings.config import compose, hydra_of_its_own
from zoo.settings.overrides import SEVERAL, choose, having, load_plugins, parse, prepare, quoted, values
from zoo.settings.schema import CONFIG_NAME
from zoo.settings.text_options import TextOptions
from zoo.storage.atomic import writing


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep, as overrides that Hydra can compose, and their folder."""

    jobs: list[list[str]]
    folder: Path
    for_hydra: list[str]  # overrides such as hydra/launcher=joblib


def plan(command: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> Sweep:
    """Prepare every job of a sweep.

    Raises:
        ZooError: one of the jobs has a mistake.
    """
    parsed = parse(overrides)
    for_hydra = [o.input_line for o in parsed if o.is_hydra_override()]
    if own := next((o.key_or_group for o in parsed if o.key_or_group in ("hydra.sweep.dir", "hydra.run.dir")), None):
        raise ZooError(f"{own} has no effect in a sweep, whose folder is run.dir=<folder>.")
    parsed = [o for o in parsed if not o.is_hydra_override()]
    if several := next((o for o in parsed if o.key_or_group == "run.dir" and o.is_sweep_override()), None):
        raise ZooError(f"{several.input_line}: it is the folder of the whole sweep, so it takes one value.")
    product = _split(parsed)
    load_plugins(command, [values(parse(job)) for job in product], config_dir)

    fitted: dict[tuple[str, ...], None] = {}
    left_out: dict[str, int] = {}
    picks = [choose(command, values(parse(job)), config_dir).chosen for job in product]
    # Whether a value is text depends on the chosen components, which are known only after a first split.
    if (typed := _typed(parsed, picks, config_dir)) is not None:
        product = _split(typed)
        picks = [choose(command, values(parse(job)), config_dir).chosen for job in product]
    for job, chosen in zip(product, picks, strict=True):
        stays = []
        for line in job:
            # An option that fits no job fully stays in those that it fits best, where composing reports the mistake.
            if _fit(line, chosen, config_dir) == max(_fit(line, other, config_dir) for other in picks):
                stays.append(line)
            else:
                left_out[line] = left_out.get(line, 0) + 1
        fitted[tuple(stays)] = None
    folder = _folder(Path(str(values(parsed).get("run.dir", "runs"))).expanduser())
    jobs = [_job(command, job, folder / str(i), config_dir) for i, job in enumerate(fitted)]
    for lines in fitted:
        compose(command, list(lines), config_dir)  # finds wrong values before any job runs
    for line, times in left_out.items():
        print(f"sweep: {line} is left out of {times} of {len(product)} runs that have no such option", file=sys.stderr)
    if len(fitted) < len(product):
        print(f"sweep: {len(fitted)} of {len(product)} runs are different and run once", file=sys.stderr)
    for number, lines in enumerate(fitted):
        print(f"sweep: {folder / str(number)}: {' '.join(lines)}", file=sys.stderr)
    return Sweep(jobs, folder, for_hydra)


def run(sweep: Sweep, task: Callable[[Any], Any], config_dir: str | Path | None = None) -> None:
    """Run all jobs with Hydra's launcher: one after the other, or as set by `hydra/launcher=`.

    Raises:
        ZooError: after all jobs, if some failed; each is printed with its reason. Or before them, if another sweep that
            was planned at the same time has the folder.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    if is_first():
        _claim(sweep.folder)
    # Hydra's launcher without its sweeper: the jobs are planned already.
    with hydra_of_its_own(config_dir) as hydra:
        overrides = [*sweep.for_hydra, f"hydra.sweep.dir={quoted(str(sweep.folder))}"]
        config = hydra.compose_config(CONFIG_NAME, overrides, RunMode.MULTIRUN, with_log_configuration=False)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(context, partial(_letting_go, task), config)
        results = launcher.launch(sweep.jobs, initial_job_idx=0)
    failed = {number: error for number, result in enumerate(results) if (error := _error_of(result)) is not None}
    if failed:
        for number, error in failed.items():
            if not isinstance(error, ZooError):
                traceback.print_exception(error)
            print(f"sweep: {sweep.folder / str(number)} failed: {error or type(error).__name__}", file=sys.stderr)
        raise ZooError(f"{len(failed)} of {len(sweep.jobs)} runs of the sweep failed: {', '.join(map(str, failed))}.")


def _letting_go(task: Callable[[Any], Any], cfg: Any) -> Any:
    """Run a job. The error of one that fails is kept until the end, but not the model that its frames hold."""
    try:
        return task(cfg)
    except Exception as error:
        chain: BaseException | None = error
        while chain is not None:
            traceback.clear_frames(chain.__traceback__)
            chain = chain.__cause__ or chain.__context__
        raise


def _claim(folder: Path) -> None:
    with writing(f"a sweep to {str(folder)!r}"):
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            raise ZooError(f"Another sweep has begun in {str(folder)!r} meanwhile: start this one again.") from error


def _split(parsed: Sequence[Any]) -> list[list[str]]:
    """Return every combination of the values of a sweep, as overrides."""
    return BasicSweeper.split_arguments(list(parsed), None)[0]


def _typed(
    parsed: Sequence[Any], picks: Sequence[Mapping[str, Any]], config_dir: str | Path | None
) -> list[Any] | None:
    """Return the overrides with quotes around values that are text in a run with that option; None without any."""
    runs = [TextOptions(chosen, config_dir) for chosen in picks]
    lines = []
    for override in parsed:
        typed = [line for run in runs if (line := run.typed(override.input_line)) != override.input_line]
        lines.append(typed[0] if typed else override.input_line)
    return parse(lines) if lines != [o.input_line for o in parsed] else None


def _error_of(result: Any) -> Exception | None:
    try:
        _ = result.return_value  # raises the error of the job
    except Exception as error:
        return error
    return None


def _job(command: str, job: Sequence[str], folder: Path, config_dir: str | Path | None) -> list[str]:
    lines = prepare(command, job, config_dir)
    named = any(line.startswith(("run.folder=", "resume=")) for line in job)
    return lines if named else [*lines, f"run.folder={quoted(str(folder))}"]


def _folder(root: Path) -> Path:
    """Return the next unused folder for a sweep."""
    day = root / "sweeps" / date.today().isoformat()
    number = 1
    while (day / str(number)).exists():
        number += 1
    return day / str(number)


def _fit(line: str, chosen: Mapping[str, Any], config_dir: str | Path | None) -> int:
    """Return 2 if a run that picks `chosen` has the option, 1 if it has only its component, else 0."""
    path = line.partition("=")[0].lstrip("+~").split(".")
    group, kind = path[0], kind_of(path[0])
    if len(path) < 2 or kind is None:
        return 2
    if group in SEVERAL and len(path) == 2:
        return 2 if having(".".join(path), chosen, config_dir) else int(bool(chosen.get(group)))
    key, option = (path[1], path[2]) if group in SEVERAL else (chosen.get(group), path[1])
    if key not in presets.as_list(chosen.get(group)) or key not in presets.available(group, config_dir):
        return 0
    component = presets.component_of(group, str(key), config_dir)
    if option == PRESET:
        return 2 if source_presets(kind, component) else 1
    return 2 if option in {o.name for o in source_options(kind, component)} else 1
