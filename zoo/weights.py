"""Weights of a composed model in a folder: safetensors only, every tensor that differs from the named base weights.

A part whose weights came from its own checkpoint and did not change is not written again: the folder names the
checkpoint, its revision and its fingerprint, and loading reads it from there. Everything else is in the folder.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from zoo.registry import ZooError, require_revision
from zoo.stream import listing, read

WEIGHTS = "model.safetensors"
_ENDS = 1 << 20  # bytes read from each end of a file for its fingerprint
# What bitsandbytes keeps beside a weight in few bits. It is made from the base checkpoint, and never saved.
_OF_BITS = re.compile(r"\.(SCB|weight_format|weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\..+)$")


def fingerprint(folder: Path) -> str:
    """Hash the names, sizes and both ends of the safetensors files in a folder: cheap for any size, and telling."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """Hash a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remember_base(model: Any, slots: Mapping[str, Any]) -> None:
    """Note which weights have just come from a part's own checkpoint, and where that is.

    An in-place change raises a tensor's version, and a replaced tensor is another object, so nothing has to be told.
    """
    model._base_tensors = {}
    base: dict[str, Any] = {}
    source = model.__dict__.pop("_base", None)
    if source is not None and source.record:  # a published checkpoint gave all parts their weights
        base["model"] = source.record
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in source.filled.tensors:
                model._base_tensors[name] = (id(tensor), tensor._version)
    for part in ("vision", "llm"):
        node = slots.get(part) or {}
        checkpoint = node.get("checkpoint")
        if not checkpoint:
            continue
        folder = Path(checkpoint)
        base[part] = {"checkpoint": checkpoint, "revision": node.get("revision") or None}
        if folder.is_dir():
            base[part]["fingerprint"] = fingerprint(folder)
        fresh = set(getattr(getattr(model, part), "fresh", ()))
        for name, tensor in getattr(model, part).state_dict(keep_vars=True).items():
            full = f"{part}.{name}"
            if model.part_of(full) == part and name not in fresh:
                model._base_tensors[full] = (id(tensor), tensor._version)
    model.config.base = base or None


def require_base(saved: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> None:
    """Refuse base weights that are not those a folder was saved on.

    Raises:
        ZooError: the checkpoint of a part has another fingerprint now.
    """
    for part, base in (saved or {}).items():
        now = (found or {}).get(part, {}).get("fingerprint")
        if base.get("fingerprint") and now and now != base["fingerprint"]:
            raise ZooError(
                f"The base weights of {part} in {base['checkpoint']!r} differ from those the model was saved on "
                f"(fingerprint {now[:12]}, was {base['fingerprint'][:12]})."
            )


def changed_state(model: Any, include_base: bool = False) -> dict[str, Tensor]:
    """Return the tensors that a folder must hold: all but those that still are what the base checkpoints gave."""
    known = {} if include_base else getattr(model, "_base_tensors", {})
    state = model.state_dict(keep_vars=True)
    if include_base and any(_OF_BITS.search(n) for n in state):
        raise ZooError("The model is held in few bits, and saved by the name of its checkpoint: load without bits.")
    state = {n: t for n, t in state.items() if not _OF_BITS.search(n)}
    return {n: t.detach() for n, t in state.items() if known.get(n) != (id(t), t._version)}


def write_weights(state: Mapping[str, Tensor], folder: Path, max_shard_size: str | int = "5GB") -> None:
    """Write tensors as safetensors, in shards where they are large; shared tensors are written once.

    Files are replaced whole, never written over: the parameters of a model that was loaded from them are their pages.
    """
    from huggingface_hub import save_torch_state_dict

    with TemporaryDirectory(dir=folder) as beside:
        save_torch_state_dict(dict(state), beside, max_shard_size=max_shard_size, metadata={"format": "pt"})
        written = {path.name: path.replace(folder / path.name) for path in sorted(Path(beside).iterdir())}
    for old in [*folder.glob("model*.safetensors"), folder / f"{WEIGHTS}.index.json"]:
        if old.name not in written:
            old.unlink(missing_ok=True)
    if (config := folder / "config.json").is_file():
        for path in folder.glob("*.safetensors"):
            shutil.copymode(config, path)  # safetensors leaves them readable by their owner alone


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        ZooError: there are none; a folder of pickled weights says so.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ZooError(f"{index} is no index of weights: {' '.join(str(error).split()) or type(error)}") from error
        for name in listed:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ZooError(f"{index} names {name!r}, which is no safetensors file of its folder.")
        return [folder / name for name in listed]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = sorted(f.name for f in folder.glob("*.bin")) + sorted(f.name for f in folder.glob("*.pt*"))
    hint = f" It has {', '.join(pickled)}, but pickled weights are never read." if pickled else ""
    raise ZooError(f"{folder} holds no {WEIGHTS}.{hint}")


def read_weights(
    model: Any, folder: Path, *, fresh: Iterable[str] = (), done: Mapping[int, Tensor] | None = None
) -> list[str]:
    """Load the tensors of a folder into a model in place.

    Args:
        model: its parts stand.
        folder: with safetensors files.
        fresh: parts that may start without weights (`projector`, `adapter.lora`), or `all`.
        done: tensors that were read already, by their id.

    Returns:
        Names of the tensors that were not in the folder and did not come from a base checkpoint.

    Raises:
        ZooError: a tensor is missing, unknown or of another shape; reported by part.
    """
    allowed, done = set(fresh), done or {}
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if not _OF_BITS.search(n)}
    shared = _shared_names(own)
    missing, unexpected, misshapen = set(own) - set(getattr(model, "_base_tensors", {})), [], []
    for name, stored in listing(weight_files(folder)).items():
        if name not in own:
            if not may_start_fresh(name.partition(".")[0], allowed):
                unexpected.append(name)
            continue
        if stored.shape != tuple(own[name].shape):
            if not may_start_fresh(model.part_of(name), allowed):
                misshapen.append(f"{name}: {stored.shape} in the file, {tuple(own[name].shape)} in the model")
            continue
        if id(own[name]) not in done:
            read(stored, own[name])
            torch.autograd.graph.increment_version(own[name])
        missing -= shared[name]
    left = {n for n in missing if not may_start_fresh(model.part_of(n), allowed)}
    if left or unexpected or misshapen:
        lines = [f"The weights in {folder} do not fit the model."]
        lines += by_part("missing", left, model.part_of) + by_part("unknown", unexpected, lambda n: n.partition(".")[0])
        lines += [f"  other shape: {m}" for m in misshapen[:5]]
        raise ZooError("\n".join(lines))
    started = {model.part_of(n) for n in missing}
    for name, adapter in getattr(model, "adapter", {}).items():
        if f"adapter.{name}" in started and hasattr(adapter, "start"):
            adapter.start()  # what it copies from the language model is there only now
    return sorted(missing)


def may_start_fresh(part: str, allowed: Iterable[str]) -> bool:
    """Whether a part (`projector`, `adapter.lora`) is one of those that may start without weights."""
    return bool({"all", part, part.partition(".")[0]} & set(allowed))


def _shared_names(state: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Name -> all names of the same tensor (tied embeddings): safetensors hold one of them."""
    groups: dict[tuple[int, ...], set[str]] = {}
    keys = {}
    for name, tensor in state.items():
        keys[name] = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor),)
        groups.setdefault(keys[name], set()).add(name)
    return {name: groups[key] for name, key in keys.items()}


def by_part(what: str, names: Iterable[str], part_of: Any) -> list[str]:
    parts: dict[str, list[str]] = {}
    for name in sorted(names):
        parts.setdefault(part_of(name), []).append(name)
    return [f"  {what} in {part}: {len(n)} tensors, first {n[0]}" for part, n in parts.items()]


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model: a local one as it is, a hub repository from the cache or downloaded.

    Only configs, tokenizers, templates, cards and safetensors are fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or ".." in str(name).split("/") or str(name).count("/") > 1:
        raise ZooError(f"There is no folder {str(name)!r}, and it is no hub name (org/name) either.")
    from huggingface_hub import snapshot_download

    revision = require_revision(revision)
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.md", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=wanted))
    except Exception as error:  # offline, not found, no access: the library has a type for each
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ZooError(
            f"The hub repository {str(name)!r} is not in the cache and cannot be fetched: {first}"
        ) from error


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a model's numbers may depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "timm", "open_clip_torch", "peft")}
