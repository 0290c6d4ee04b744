"""New locations of the weights that a run began on, which may be moved before the run is resumed.

A new location is accepted if it holds the same weights: zoo.lock has the fingerprint of those that the run began on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from zoo.composed.own_checkpoints import own_checkpoints
from zoo.pretrained.origin import PYPI, origin_of
from zoo.registry import ZooError
from zoo.storage.weights import fingerprint


def locate_weights(cfg: DictConfig, given: DictConfig, noted: Mapping[str, Any] | None) -> None:
    """Put the locations that were given with `resume` into the config of the run.

    Args:
        cfg: of the run, as it was started; changed in place.
        given: of this process.
        noted: content of zoo.lock; None: the run was stopped before it, and has trained nothing.

    Raises:
        ZooError: the run did not begin on such weights, the new location has others, or the old one has none.
    """
    base = None if noted is None else noted.get("base") or {}
    for part, own in own_checkpoints(cfg).items():
        if own.inside:
            continue
        before, now = (str((OmegaConf.select(c, own.module) or {}).get("checkpoint") or "") for c in (cfg, given))
        option, what = f"{own.module}.checkpoint", f"base weights of {part}"
        if now and not before:
            raise ZooError(f"{option}={now}: the run did not begin on a checkpoint of {part}.")
        record = None if base is None else base.get(part) or {}
        if now and now != before:
            _require_same(option, now, what, record)
            if cfg.tokenizer.checkpoint == before:  # the tokenizer was read from the same folder
                cfg.tokenizer.checkpoint = now
            OmegaConf.update(cfg, option, now)
        elif before and (record or {}).get("fingerprint"):
            _require_there(before, what, f"{option}=<folder>")
    _locate_model(cfg, given, noted)


def _locate_model(cfg: DictConfig, given: DictConfig, noted: Mapping[str, Any] | None) -> None:
    """Do the same for the saved or published model that a run began on, and for the base of that model."""
    if place := given.model.base:
        if cfg.model.source == "preset":
            raise ZooError(f"model.base={place}: the run did not begin on a saved model.")
        cfg.model.base = place  # its fingerprint is compared when it is read
    if given.model.source != "preset" and cfg.model.source != "dir":
        raise ZooError(f"model={given.model.source}:{given.model.name}: the run did not begin on a model in a folder.")
    if given.model.source == "hub":
        raise ZooError(f"model=hub:{given.model.name}: the run began on a folder, {cfg.model.name!r}.")
    if cfg.model.source != "dir":
        return
    if given.model.source == "dir" and given.model.name != cfg.model.name:
        record = None if noted is None else noted.get("started_from") or {}
        _require_same("model", given.model.name, "weights that the run began on", record)
        cfg.model.name = given.model.name
    _require_there(cfg.model.name, "weights that the run began on", "model=dir:<folder>")


def _require_same(option: str, place: str, what: str, record: Mapping[str, Any] | None) -> None:
    origin, folder = origin_of(place), Path(place).expanduser()
    if origin is None and not folder.exists():
        raise ZooError(f"{option}={place}: no such folder.")
    if record is None:
        return
    was, now = str(record.get("fingerprint") or ""), fingerprint(folder) if origin is None else origin.sha256
    if not was:
        raise ZooError(f"{option}={place}: the run noted no fingerprint of its {what}, so they cannot be compared.")
    if was != now:
        raise ZooError(
            f"{option}={place}: these are not the {what} (fingerprint {now[:12]}, was {was[:12]}), so the run cannot "
            "go on from them."
        )


def _require_there(place: str, what: str, option: str) -> None:
    if place.startswith(PYPI):
        origin_of(place)  # it is found, or the error has the line that installs it
    elif not Path(place).expanduser().exists():
        raise ZooError(
            f"The {what} are not in {place!r} any more. If they were moved: zoo train resume=<run> {option}."
        )
