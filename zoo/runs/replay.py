"""`zoo train lock=RUN`: train a run once more from its folder, on what zoo.lock states that it ran on.

Before the first step, everything is compared that the losses depend on: versions of libraries and the machine, which
are noted, and the weights, the data and the config, without which it would be another run. Behind the last step the
losses of both are compared to the bit.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from zoo.composed.own_checkpoints import own_checkpoints
from zoo.pretrained.origin import origin_of
from zoo.registry import RecordError, ZooError, plugins, read_sample
from zoo.registry.foreign import read_object, read_run_config
from zoo.runs.data import RunData
from zoo.runs.folder import RunFolder, environment, read_metrics
from zoo.runs.resume import read_config
from zoo.storage.shards import key_of
from zoo.storage.weights import fingerprint
from zoo.vision.images.identity import identify

LISTED = 8  # differences that are written out
OF_MACHINE = ("python", "machine", "system", "cpu", "threads", "devices", "processes")


def replayed(given: DictConfig) -> tuple[DictConfig, list[str]]:
    """Return the config of the run that `lock` names, for a new run, and what is different here, for the user.

    Args:
        given: config of this process, with `lock`.

    Raises:
        ZooError: there is no such run, it has no zoo.lock, or weights, data or config are others now.
    """
    folder = RunFolder.open(given.lock, Path(given.run.dir))
    if not folder.lock.is_file():
        raise ZooError(f"The run {str(folder.path)!r} has no zoo.lock: it was stopped before its first step.")
    noted = read_object(folder.lock)
    named = [str(name) for name in read_run_config(folder.config).get("plugins") or []]
    if absent := [name for name in named if not plugins.is_loaded(name)]:
        raise ZooError(f"The run {str(folder.path)!r} had plugins, which are code: add plugins=[{','.join(absent)}].")
    # A run that is replayed once more is compared with this one, not with the one before.
    read = read_config(folder, given, {})
    cfg: Any = OmegaConf.create({key: read[key] for key in read if key not in ("hydra", "defaults")})  # a new run's
    cfg.run, cfg.log, cfg.lock = given.run, list(given.log), str(folder.path.resolve())
    cfg.run.name = given.run.name or f"{folder.path.name}-again"
    if given.device != "auto":
        cfg.device = given.device
    if wrong := [*_config(folder, noted), *_weights(cfg, noted), *_data(RunData(cfg.data, skip_broken=True), noted)]:
        lines = "\n".join(f"  {line}" for line in wrong[:LISTED])
        raise ZooError(f"This would be another run than {str(folder.path)!r}:\n{lines}")
    return cfg, [*_machine(noted), *_plugins(named, noted)]


def data_facts(data: RunData) -> dict[str, Any]:
    """Return what zoo.lock notes of each data set: its length, and a hash of some records at equal distances."""
    return {name: _facts(name, dataset) for name, dataset in data.all.items()}


def adapters_of(cfg: DictConfig) -> dict[str, Any]:
    """Return what zoo.lock notes of adapters that begin on a folder of PEFT's: its name, and its fingerprint."""
    from zoo.fusion.adapters.peft.peft_folder import folder_of

    nodes = {str(name): node for name, node in cfg.adapter.items() if node.name == "peft" and node.checkpoint}
    places = {name: folder_of(node.checkpoint, node.revision) for name, node in nodes.items()}
    return {n: {"checkpoint": nodes[n].checkpoint, "fingerprint": fingerprint(places[n])} for n in nodes}


def plugin_hashes(named: Iterable[str]) -> dict[str, str]:
    """Return what zoo.lock notes of plugins that are files: name -> SHA-256."""
    places = {Path(name).name: place for name, place in plugins.named().items() if place}
    found = {name: Path(places[Path(name).name]) for name in named if Path(name).name in places}
    return {name: hashlib.sha256(place.read_bytes()).hexdigest() for name, place in found.items()}


def changes_since(folder: RunFolder, data: RunData, named: Iterable[str] = ()) -> list[str]:
    """Return what is different from what a run began with, and does not keep it from going on; lines for the user.

    Args:
        folder: of the run.
        data: of the run.
        named: its plugins.
    """
    noted = read_object(folder.lock)
    return [*_config(folder, noted), *_data(data, noted), *_plugins(named, noted)]


def config_hash(folder: RunFolder) -> str:
    """Return the SHA-256 of a run's config.yaml."""
    return hashlib.sha256(folder.config.read_bytes()).hexdigest()


def verdict(before: str | Path, now: RunFolder) -> list[str]:
    """Compare the losses and the model of a finished run with those of the run that it replays; lines for the user."""
    old = RunFolder(before)
    mine, theirs = ({r["step"]: r for r in read_metrics(f.metrics) if "loss" in r} for f in (now, old))
    both = sorted(mine.keys() & theirs.keys())
    unequal = [step for step in both if _losses(mine[step]) != _losses(theirs[step])]
    lines = []
    if not both:
        lines.append(f"No step of {old.path} is left to compare with: {old.metrics.name} has no losses.")
    elif unequal:
        first, most = unequal[0], max(unequal, key=lambda s: abs(mine[s]["loss"] - theirs[s]["loss"]))
        lines.append(
            f"Losses differ from {old.path} from step {first} on: {mine[first]['loss']!r}, there "
            f"{theirs[first]['loss']!r}. The most at step {most}: {mine[most]['loss'] - theirs[most]['loss']:+.2e}."
        )
    else:
        lines.append(f"The losses of all {len(both)} steps are those of {old.path}, to the bit.")
    if only := sorted(mine.keys() ^ theirs.keys()):
        lines.append(f"{len(only)} steps are in one of the two runs only, the first is {only[0]}.")
    hashes = [read_object(f.lock).get("model") for f in (now, old) if f.lock.is_file()]
    if len(hashes) == 2 and all(hashes):
        lines.append(
            "The saved weights are equal to the bit." if hashes[0] == hashes[1] else "The saved weights differ."
        )
    return lines


# ---- what is compared ------------------------------------------------------------------------------------------------


def _config(folder: RunFolder, noted: Mapping[str, Any]) -> Iterator[str]:
    was = noted.get("config")
    if was and was != config_hash(folder):
        now = config_hash(folder)
        yield f"config: {folder.config.name} was changed since the run (hash {now[:12]}, was {str(was)[:12]})"


def _plugins(named: Iterable[str], noted: Mapping[str, Any]) -> Iterator[str]:
    was = noted.get("plugin_files") or {}
    for name, now in plugin_hashes(named).items():
        if was.get(name, now) != now:
            yield f"plugin {name}: its file is another (hash {now[:12]}, was {str(was[name])[:12]})"


def _weights(cfg: DictConfig, noted: Mapping[str, Any]) -> Iterator[str]:
    """Compare fingerprints of base checkpoints in folders and packages, and of the model that the run began on."""
    base = noted.get("base") or {}
    for part, own in own_checkpoints(cfg).items():
        place = str((OmegaConf.select(cfg, own.module) or {}).get(own.option) or "")
        yield from _fingerprint(f"base weights of {part}", place, (base.get(part) or {}).get("fingerprint"))
    begun = noted.get("adapters") or {}
    for name, now in adapters_of(cfg).items():
        if (was := (begun.get(name) or {}).get("fingerprint")) and was != now["fingerprint"]:
            yield _differs(f"weights of adapter {name}", now["checkpoint"], now["fingerprint"], was)
    if started := noted.get("started_from"):
        yield from _fingerprint("weights that it began on", str(cfg.model.name), started.get("fingerprint"))


def _fingerprint(what: str, place: str, was: Any) -> Iterator[str]:
    if not was or not place:
        return
    origin = origin_of(place)
    here = Path(place).expanduser()
    if origin is None and not here.exists():
        return  # of the hub: the commit is pinned, and its weights are compared when they are read
    now = fingerprint(here) if origin is None else origin.sha256
    if now != was:
        yield _differs(what, place, now, was)


def _differs(what: str, place: str, now: str, was: Any) -> str:
    return f"{what} in {place!r}: fingerprint {now[:12]}, was {str(was)[:12]}"


def _data(data: RunData, noted: Mapping[str, Any]) -> Iterator[str]:
    was = noted.get("data") or {}
    for name, now in data_facts(data).items():
        before = was.get(name)
        if before is None:
            continue
        if before.get("records") != now["records"]:
            yield f"data {name}: {now['records']} records, was {before.get('records')}"
        elif (noted_hash := before.get("content")) and noted_hash != now["content"]:
            yield f"data {name}: other records (hash {str(now['content'])[:12]}, was {str(noted_hash)[:12]})"


def _machine(noted: Mapping[str, Any]) -> Iterator[str]:
    """Versions and the machine, which may change the last bits of losses, and what zoo.lock did not note."""
    now = environment() | {"processes": int(os.environ.get("WORLD_SIZE", 1))}
    versions = noted.get("versions") or {}
    for library, version in now["versions"].items():
        if versions.get(library) != version:
            yield f"{library} {version}, was {versions.get(library)}"
    for key in OF_MACHINE:
        if key in noted and noted[key] != now[key]:
            yield f"{key} {now[key]}, was {noted[key]}"
    if not all("content" in facts for facts in (noted.get("data") or {"": {}}).values()):
        yield "zoo.lock has no hash of the data, which was not noted at that time"


# ---- data ------------------------------------------------------------------------------------------------------------

_READ = 16  # records of each data set, at equal distances


def _facts(name: str, dataset: Any) -> dict[str, Any]:
    if dataset.is_stream:  # its records are not read before they are trained on
        return {"records": None, "content": None}
    digest, size = hashlib.sha256(), len(dataset)
    for index in sorted({i * size // _READ for i in range(_READ)} if size else ()):
        sample = read_sample(name, dataset, index)
        if isinstance(sample, RecordError):  # a broken record is one in the replay, too
            digest.update(b"broken")
            continue
        for dialog in sample.dialogs:
            digest.update(json.dumps([dialog.messages, dialog.answers], default=str).encode())
        for image in sample.images:
            digest.update(key_of(*identify(image)[0]))
    return {"records": size, "content": digest.hexdigest()}


def _losses(row: Mapping[str, Any]) -> str:
    return repr((row["loss"], row.get("losses")))  # as text, in which NaN equals NaN
