"""Start a run in a new folder, or resume one that was stopped.

A run resumes from its newest checkpoint with correct hashes. If it was stopped after the last step, only saving and
scoring are repeated.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.registry import ZooError, plugins, refuse_code
from zoo.registry.foreign import read_json, read_run_config, said_since
from zoo.runs import checkpoint, consent, moved
from zoo.runs.folder import RunFolder
from zoo.runs.lock import RunLock
from zoo.settings.config import typed_of
from zoo.settings.parallel import ParallelConfig
from zoo.storage.atomic import written_beside


@dataclass
class Progress:
    """The progress of a run: what a checkpoint holds beside weights and optimiser states."""

    stage: int = 0  # index of the current stage
    step: int = 0  # finished steps of the stage
    global_step: int = 0  # finished steps of the run
    streams: dict[str, Any] = field(default_factory=dict)  # data name -> state of the stream
    trained: list[str] = field(default_factory=list)  # names of weights that a stage trained or an adapter began with
    seen: int = 0  # samples of the stage, over all processes
    left_out: int = 0  # broken ones of these
    teacher: str = ""  # state of the stage's teacher, or of its store; empty: there is none, or it is not known
    seconds: float = 0.0  # of training, summed over the times that the run was resumed


@dataclass
class Beginning:
    """The start of a run, which the first process determines and sends to the others."""

    path: str
    progress: Progress = field(default_factory=Progress)
    newest: Path | None = None  # checkpoint to start from
    notes: list[str] = field(default_factory=list)  # for the user
    plugins: dict[str, str] = field(default_factory=dict)  # of a run that is resumed: name -> path of its file


def begin(cfg: DictConfig) -> tuple[Beginning, RunLock]:
    """Make a run's folder, or open the one of `resume`, and lock it. Only the first process calls this.

    Raises:
        ZooError: there is no such run, it is finished, another process trains in it, its checkpoints are damaged, or
            its folder cannot be written.
    """
    root = Path(cfg.run.dir)
    if cfg.resume:
        folder = RunFolder.open(cfg.resume, root)
        if folder.is_finished:
            raise ZooError(f"The run {str(folder.path)!r} is finished: its model is in {str(folder.model)!r}.")
        # Before the folder is changed: a refusal leaves it as it is.
        agreed = consent.agreed(folder.path, _plugins_of(read_run_config(folder.config), folder))
        found, lock = _locked(folder, _resume)
        found.plugins = agreed
        return found, lock
    # Reading config.yaml refuses such values, so a run with them could not be resumed.
    refuse_code(OmegaConf.to_container(cfg, resolve=True), "The config of a run")
    name = cfg.run.name or cfg.run.recipe or cfg.model.name
    folder = RunFolder.create(root, name, cfg.run.folder)

    def start(folder: RunFolder) -> Beginning:
        folder.require_empty()  # again, with the lock: another process may have started a run here since
        named = plugins.named()
        mine = {name: named[name] for name in cfg.plugins if name in named}
        cfg.plugins = list(mine)
        with folder.writing("config.yaml"), written_beside(folder.config) as beside:
            OmegaConf.save(cfg, beside, resolve=True)
        with folder.writing("run.id"):
            notes = list(filter(None, [consent.remember(folder.path, mine)]))
        try:
            folder.point_last(root)
        except OSError as error:  # the run itself does not need it
            notes.append(f"{str(root / 'last')!r} does not point to this run: {error.strerror}.")
        return Beginning(str(folder.path), notes=notes)

    return _locked(folder, start)


def _locked(folder: RunFolder, then: Callable[[RunFolder], Beginning]) -> tuple[Beginning, RunLock]:
    lock = RunLock(folder.path)
    try:
        found = then(folder)
    except BaseException:
        lock.release()
        raise
    found.notes += filter(None, [lock.note])
    return found, lock


def _resume(folder: RunFolder) -> Beginning:
    """Find the newest intact checkpoint, and bring the folder to its step."""
    folder.clean()
    found = Beginning(str(folder.path))
    damaged: dict[Path, str] = {}
    # Newest first: the older checkpoint is kept for the case that the newest is damaged.
    for path in reversed(folder.list_checkpoints()):
        try:
            state = checkpoint.verify(path)
        except checkpoint.DamagedError as error:
            damaged[path] = str(error)
            continue
        known = {f.name for f in fields(Progress)}  # checkpoints of other versions may hold more
        found.newest, found.progress = path, Progress(**{k: v for k, v in state.items() if k in known})
        break
    if found.newest is None:
        _require_start(folder, damaged)
    # Only after another checkpoint was found: a run whose checkpoints are all damaged stays as it is.
    for path, reason in damaged.items():
        with folder.writing("the new name of a damaged checkpoint"):
            aside = folder.set_aside(path)
        found.notes.append(f"The checkpoint {path.name} is damaged ({reason}); it is now {aside.name}.")
    if broken := folder.rewind(found.progress.global_step):
        found.notes.append(f"{broken} line(s) of {folder.metrics.name} could not be read, and were removed.")
    found.notes.append(f"Resuming {folder.path} after step {found.progress.global_step}.")
    return found


def _require_start(folder: RunFolder, damaged: dict[Path, str]) -> None:
    """Refuse to train from the start if that would discard checkpoints or a model."""
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise ZooError(
            f"Every checkpoint of the run {str(folder.path)!r} is damaged ({reasons}). Bring one back from a copy, or "
            f"remove {str(folder.checkpoints)!r} to train from the start."
        )
    if folder.has_model:
        raise ZooError(
            f"The run {str(folder.path)!r} has its model but no checkpoint, so it would train from the start. Score "
            f"the model with zoo eval model=dir:{shlex.quote(str(folder.path))}, or remove {str(folder.model)!r} to "
            "train again."
        )


def require_same_start(folder: RunFolder, model: Any, now: Mapping[str, Any]) -> None:
    """Refuse to resume if the weights that the run began on were changed.

    Raises:
        ZooError: their files have another fingerprint than zoo.lock records.
    """
    noted = _noted(folder)
    model.bases.require_same(noted.get("base"))
    for name, found in (now.get("adapters") or {}).items():
        was = ((noted.get("adapters") or {}).get(name) or {}).get("fingerprint")
        if was and was != found["fingerprint"]:
            raise ZooError(
                f"The run {str(folder.path)!r} began on the adapter in {found['checkpoint']!r}, and its weights are "
                f"others now (fingerprint {found['fingerprint'][:12]}, was {str(was)[:12]}): it cannot go on from them."
            )
    before, there = noted.get("started_from"), now.get("started_from")
    if before and there and before["fingerprint"] != there["fingerprint"]:  # its folder may have been moved
        raise ZooError(
            f"The run {str(folder.path)!r} began on the weights of {before['model']!r}, and they are others now "
            f"(fingerprint {there['fingerprint'][:12]}, was {before['fingerprint'][:12]}): it cannot go on from them."
        )


def _noted(folder: RunFolder) -> dict[str, Any]:
    """Read zoo.lock."""
    try:
        noted = read_json(folder.lock)
        if not isinstance(noted, dict):
            raise ZooError("it does not hold an object")
    except ZooError as error:
        raise ZooError(
            f"{str(folder.lock)!r} is damaged ({error}): remove it to resume without comparing weights."
        ) from error
    return noted


def device_and_trackers(cfg: DictConfig) -> tuple[str, list[str]]:
    """Return the device and the trackers of a run: those of this process, else those that it was started with."""
    device, log = cfg.device, list(cfg.log)
    if cfg.resume:
        saved = read_run_config(RunFolder.open(cfg.resume, Path(cfg.run.dir)).config)
        typed = typed_of(cfg)
        own = {word.partition("=")[0] for word in (typed.overrides if typed else ())}  # `log=[]` means none
        device = saved.get("device", device) if device == "auto" and "device" not in own else device
        log = list(saved.get("log") or []) if not log and "log" not in own else log
    return device, log


def parallel_of(cfg: DictConfig) -> ParallelConfig:
    """Return how the processes of a run share the model: as typed beside `resume`, else as the run began.

    Raises:
        ZooError: what is typed contradicts what the run began with.
    """
    given = cfg.parallel
    saved: dict[str, Any] = {}
    if cfg.resume:
        saved = read_run_config(RunFolder.open(cfg.resume, Path(cfg.run.dir)).config).get("parallel") or {}
        typed = typed_of(cfg)
        mine = {name: given[name] for name in (typed.options_of("parallel") if typed else ())}
        given = OmegaConf.merge(OmegaConf.structured(ParallelConfig), saved, mine)
    try:
        found: Any = OmegaConf.to_object(given)
    except ZooError as error:
        if not saved:
            raise
        began = ", ".join(f"parallel.{name}={value}" for name, value in saved.items())
        raise ZooError(f"{error} The run began with {began}; what is typed beside resume replaces it.") from error
    return found


def read_config(folder: RunFolder, given: DictConfig, agreed: Mapping[str, str]) -> DictConfig:
    """Return the config that a run was started with, typed, with the current locations of its weights.

    Args:
        folder: of the run.
        given: config of this process, with `resume`.
        agreed: plugins of the run, name -> path, which are loaded first.
    """
    from zoo.registry import config_of
    from zoo.settings.schema import RunRoot

    path, saved = folder.config, read_run_config(folder.config)
    plugins.require(agreed)
    try:
        then = said_since({"slots": saved, "positions": saved.get("positions")})
        saved = {**then["slots"], "positions": then["positions"]}
        cfg: Any = OmegaConf.merge(OmegaConf.structured(RunRoot), saved)
        OmegaConf.update(cfg, "resume", given.resume)
    except OmegaConfBaseException as error:
        raise ZooError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())[:300]}") from error
    # config.yaml may have been edited: nodes are checked against the components' dataclasses again.
    for node in cfg.data.values():
        config_of("dataset", node)
    moved.locate_weights(cfg, given, _noted(folder) if folder.lock.is_file() else None)
    return cfg


def _plugins_of(saved: Mapping[str, Any], folder: RunFolder) -> list[str]:
    named = saved.get("plugins") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ZooError(f"{str(folder.config)!r}: plugins must be a list of names, got {named!r}.")
    return named
