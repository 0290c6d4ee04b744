"""Where a run begins: in a folder of its own, or where an earlier process of it was stopped.

Of a run that was stopped, the newest checkpoint whose hashes are right says how far it is. Behind the last step that
may be the saving of the model or its scoring, which are then done again.
"""

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
from zoo.storage.atomic import written_beside


@dataclass
class Progress:
    """How far a run is: all that a checkpoint needs beside weights and optimisers."""

    stage: int = 0  # index of the stage to run next
    step: int = 0  # steps of it that were taken
    global_step: int = 0  # steps of the run that were taken
    streams: dict[str, Any] = field(default_factory=dict)  # of each streaming data set: where it is
    trained: list[str] = field(default_factory=list)  # weights that were ever trained
    seen: int = 0  # samples of the stage, over all processes
    left_out: int = 0  # of them, because they are broken
    seconds: float = 0.0  # that training took, in all processes one after the other that did a part of it


@dataclass
class Beginning:
    """What the first process finds, and tells the others."""

    path: str
    progress: Progress = field(default_factory=Progress)
    newest: Path | None = None  # checkpoint to start from
    notes: list[str] = field(default_factory=list)  # for a person
    plugins: dict[str, str] = field(default_factory=dict)  # of a run that is resumed: name -> where its file lies


def begin(cfg: DictConfig) -> tuple[Beginning, RunLock]:
    """Make a run's folder, or open the one of `resume`; only the first process does, and holds the lock.

    Raises:
        ZooError: there is no such run, it is finished, it is alive, its checkpoints are damaged, or its folder cannot
            be written.
    """
    root = Path(cfg.run.dir)
    if cfg.resume:
        folder = RunFolder.open(cfg.resume, root)
        if folder.is_finished:
            raise ZooError(f"The run {str(folder.path)!r} is finished: its model is in {str(folder.model)!r}.")
        agreed = consent.agreed(folder.path, _plugins_of(read_run_config(folder.config), folder))
        found, lock = _locked(folder, _go_on)
        found.plugins = agreed
        return found, lock
    refuse_code(OmegaConf.to_container(cfg, resolve=True), "The config of a run")  # it could not be resumed
    name = cfg.run.name or cfg.run.recipe or cfg.model.name
    folder = RunFolder.create(root, name, cfg.run.folder)

    def start(folder: RunFolder) -> Beginning:
        folder.require_empty()  # since the lock is ours
        named = plugins.named()
        mine = {name: named[name] for name in cfg.plugins if name in named}
        cfg.plugins = list(mine)
        with folder.writing("config.yaml"), written_beside(folder.config) as beside:
            OmegaConf.save(cfg, beside, resolve=True)
        with folder.writing("run.id"):
            notes = list(filter(None, [consent.remember(folder.path, mine)]))
        try:
            folder.point_last(root)
        except OSError as error:  # a name for it, and no more
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


def _go_on(folder: RunFolder) -> Beginning:
    folder.clean()
    found = Beginning(str(folder.path))
    damaged: dict[Path, str] = {}
    for path in reversed(folder.list_checkpoints()):
        try:
            state = checkpoint.verify(path)
        except checkpoint.DamagedError as error:
            damaged[path] = str(error)
            continue
        known = {f.name for f in fields(Progress)}
        found.newest, found.progress = path, Progress(**{k: v for k, v in state.items() if k in known})
        break
    if found.newest is None:
        _require_start(folder, damaged)
    for path, reason in damaged.items():
        with folder.writing("the new name of a damaged checkpoint"):
            aside = folder.set_aside(path)
        found.notes.append(f"The checkpoint {path.name} is damaged ({reason}); it is now {aside.name}.")
    if broken := folder.rewind(found.progress.global_step):
        found.notes.append(f"{broken} line(s) of {folder.metrics.name} could not be read, and are left out.")
    found.notes.append(f"Resuming {folder.path} after step {found.progress.global_step}.")
    return found


def _require_start(folder: RunFolder, damaged: dict[Path, str]) -> None:
    """Refuse to train all over again where that would lose something."""
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise ZooError(
            f"Every checkpoint of the run {str(folder.path)!r} is damaged ({reasons}). Bring one back from a copy, or "
            f"remove {str(folder.checkpoints)!r} to train from the start."
        )
    if folder.has_model:
        raise ZooError(
            f"The run {str(folder.path)!r} has its model but no checkpoint, so it would train all over again. Score "
            f"the model with zoo eval model=dir:{folder.path}, or remove {str(folder.model)!r} to train again."
        )


def require_same_start(folder: RunFolder, model: Any, now: Mapping[str, Any]) -> None:
    """Refuse to go on where the weights that the run began on were changed since.

    Raises:
        ZooError: what they are read from now has another fingerprint than zoo.lock notes.
    """
    noted = _noted(folder)
    model.bases.require_same(noted.get("base"))
    before, there = noted.get("started_from"), now.get("started_from")
    if before and there and before["fingerprint"] != there["fingerprint"]:  # its folder may have been moved
        raise ZooError(
            f"The run {str(folder.path)!r} began on the weights of {before['model']!r}, and they are others now "
            f"(fingerprint {there['fingerprint'][:12]}, was {before['fingerprint'][:12]}): it cannot go on from them."
        )


def _noted(folder: RunFolder) -> dict[str, Any]:
    """What zoo.lock says."""
    try:
        noted = read_json(folder.lock)
        if not isinstance(noted, dict):
            raise ZooError("it holds no object")
    except ZooError as error:
        raise ZooError(
            f"{str(folder.lock)!r} is damaged ({error}): remove it to go on without what it notes."
        ) from error
    return noted


def device_and_trackers(cfg: DictConfig) -> tuple[str, list[str]]:
    """The device and the trackers of a run: as given, else as it was started with."""
    device, log = cfg.device, list(cfg.log)
    if cfg.resume:
        saved = read_run_config(RunFolder.open(cfg.resume, Path(cfg.run.dir)).config)
        device = saved.get("device", device) if device == "auto" else device
        log = log or list(saved.get("log") or [])
    return device, log


def read_config(folder: RunFolder, given: DictConfig, agreed: Mapping[str, str]) -> DictConfig:
    """Return the config that a run was started with, typed, with the places where its weights lie now.

    The plugins that were agreed to are loaded first.
    """
    from zoo.registry import config_of
    from zoo.settings.schema import RunRoot

    path, saved = folder.config, read_run_config(folder.config)
    plugins.load(agreed)
    try:
        then = said_since({"slots": saved, "positions": saved.get("positions")})
        saved = {**then["slots"], "positions": then["positions"]}
        cfg: Any = OmegaConf.merge(OmegaConf.structured(RunRoot), saved)
        OmegaConf.update(cfg, "resume", given.resume)
    except OmegaConfBaseException as error:
        raise ZooError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())[:300]}") from error
    for node in cfg.data.values():
        config_of("dataset", node)
    moved.settle(cfg, given, _noted(folder) if folder.lock.is_file() else None)
    return cfg


def _plugins_of(saved: Mapping[str, Any], folder: RunFolder) -> list[str]:
    named = saved.get("plugins") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ZooError(f"{str(folder.config)!r}: plugins must be a list of names, got {named!r}.")
    return named
