"""Weights of a composed model in a folder: safetensors only, every tensor that differs from the named base weights.

Tensors equal to those of a base checkpoint are not written (see `zoo.composed.bases`): the folder names the checkpoint,
its revision and its fingerprint, and loading reads them from there.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from zoo.registry import ZooError, first_line, one_line, require_revision
from zoo.registry.foreign import INDEX, read_json
from zoo.storage.rows import split
from zoo.storage.safetensors_file import Stored, listing, read

WEIGHTS = "model.safetensors"
_ENDS = 1 << 20  # bytes read from each end of a file for its fingerprint
# Tensors that bitsandbytes keeps beside a quantised weight. They are computed from the base checkpoint, never saved.
_OF_BITS = re.compile(r"\.(SCB|weight_format|weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\..+)$")


def fingerprint(place: Path) -> str:
    """Hash the names, sizes and both ends of the safetensors files in a folder, at a cost independent of their size.

    Of a single file the name does not count.
    """
    digest, alone = hashlib.sha256(), place.is_file()
    for file in [place] if alone else sorted(place.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{'' if alone else file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """Hash a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def named_weights(model: Any) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by their names in saved files.

    Weights of a detached adapter that belong inside the language model are included; state of bitsandbytes is not.
    """
    named = {n: t for n, t in model.state_dict(keep_vars=True).items() if not _OF_BITS.search(n)}
    for adapter in model.adapter.values():
        named = {f"llm.lm.{n}": t for n, t in adapter.adapter_state_dict().items()} | named
    return named


def names_of(model: Any) -> dict[str, list[str]]:
    """Map the first name of each tensor to all of its names (two for tied embeddings)."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in named_weights(model).items():
        plain = tensor.numel() and not tensor.is_meta and not hasattr(tensor, "full_tensor")
        # Equal address and size: one tensor, such as tied embeddings. Meta and sharded tensors have no address.
        key = (tensor.data_ptr(), tensor.numel()) if plain else (id(tensor),)
        groups.setdefault(key, []).append(name)
    return {names[0]: names for names in groups.values()}


def state_of(model: Any, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return a model's unsharded weights, each once, by the first of its names.

    With sharded weights all processes must call this.

    Args:
        model: composed.
        given: unsharded weights to take instead of the model's own.

    Raises:
        ZooError: `given` lacks a weight.
    """
    found = once_each(model, given)
    return {n: whole(t) if hasattr(t, "full_tensor") else t.detach() for n, t in found.items()}


def once_each(model: Any, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return a model's weights as they are, each once, by the first of its names; `given` as in `state_of`."""
    found: dict[str, Tensor] = {}
    source = named_weights(model) if given is None else given
    for name, names in names_of(model).items():
        one = next((source[n] for n in names if n in source), None)
        if one is None:
            raise ZooError(f"state_dict lacks {name!r}: it must hold every weight of the model.")
        found[name] = one
    return found


def write_weights(state: Mapping[str, Tensor], folder: Path, max_shard_size: str | int = "5GB") -> None:
    """Write tensors as safetensors, in shards if they are large; shared tensors are written once.

    Files are replaced, never overwritten in place: parameters of a model loaded from them may be maps of these files.
    Views of a larger tensor are copied, for one file at a time.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    once = {(t.data_ptr(), t.shape, t.stride()) if t.numel() else (n,): n for n, t in reversed(list(state.items()))}
    state = {name: state[name] for name in reversed(once.values())}
    users = Counter(t.untyped_storage().data_ptr() for t in state.values() if t.numel())
    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size)
    with TemporaryDirectory(dir=folder) as beside:
        for file, names in (split.filename_to_tensors or {WEIGHTS: []}).items():  # without tensors a file, too
            shard = {n: _alone(state[n], users[state[n].untyped_storage().data_ptr()] > 1) for n in names}
            save_file(shard, Path(beside) / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (Path(beside) / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        replace_weights(Path(beside), folder)
    if (config := folder / "config.json").is_file():
        for path in folder.glob("*.safetensors"):
            shutil.copymode(config, path)  # safetensors creates files readable by their owner only


def replace_weights(beside: Path, folder: Path) -> None:
    """Move all files of a folder to another, and remove there the weights that an earlier write left."""
    written = {path.name: path.replace(folder / path.name) for path in sorted(beside.iterdir())}
    for old in [*folder.glob("model*.safetensors"), folder / f"{WEIGHTS}.index.json"]:
        if old.name not in written:
            old.unlink(missing_ok=True)


def _alone(tensor: Tensor, shared: bool) -> Tensor:
    """Return the tensor, contiguous and in its own storage."""
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        ZooError: there are none; pickled weights are named.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        try:
            listed = sorted(set(read_json(index, INDEX)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ZooError(f"{index} is not an index of weights: {one_line(error)}") from error
        for name in listed:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ZooError(f"{index} names {name!r}, which is not a safetensors file of its folder.")
        return [folder / name for name in listed]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = sorted(f.name for f in folder.glob("*.bin")) + sorted(f.name for f in folder.glob("*.pt*"))
    hint = f" It has {', '.join(pickled)}, but pickled weights are never read." if pickled else ""
    raise ZooError(f"{folder} holds no {WEIGHTS}.{hint}")


def read_weights(
    model: Any,
    folder: Path,
    *,
    fresh: Iterable[str] = (),
    done: Mapping[int, Tensor] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[str]:
    """Load the tensors of a folder into a model in place.

    Args:
        model: composed, with all of its parts.
        folder: with safetensors files.
        fresh: parts that may start without weights (`projector`, `adapter.lora`), or `all`.
        done: tensors that are already loaded, by their id.
        dtypes: name -> data type, of tensors that are not loaded in that of the file.

    Returns:
        Names of tensors that are neither in the folder nor from a base checkpoint.

    Raises:
        ZooError: a tensor is missing, unknown or of another shape; reported by part.
    """
    done, stored = done or {}, listing(weight_files(folder))
    missing = require_fit(model, folder, stored, fresh=fresh)
    own, shared = named_weights(model), _shared(model)
    for listed, tensor in stored.items():
        name, first = split(listed)
        if name not in shared or not _of_shape(tensor, own[name], first):
            continue  # of a part that starts fresh
        if first:  # the rows ahead are those of its base
            if name in model.bases.names:
                read(tensor, own[name].detach()[first:])
        elif id(own[name]) not in done:
            dtype = (dtypes or {}).get(name, tensor.dtype)
            if own[name].dtype != dtype:  # the model takes the dtype of the file; casting comes later
                own[name].data = torch.empty_like(own[name], dtype=dtype)
            read(tensor, own[name])
    started = {model.part_of(n) for n in missing}
    for name, adapter in getattr(model, "adapter", {}).items():
        if f"adapter.{name}" in started:
            adapter.start()  # it copies weights of the language model, which are loaded only now
    return sorted(missing)


def require_fit(
    model: Any, folder: Path, stored: Mapping[str, Stored], *, fresh: Iterable[str] = (), whole: bool = True
) -> set[str]:
    """Compare the tensors of a folder with a model's, by name and shape; nothing is read, and the model may be empty.

    Args:
        model: composed; tensors on the meta device do.
        folder: for messages.
        stored: what the folder has.
        fresh: parts that may start without weights, or `all`.
        whole: all that is not of `model.bases` is to be in the folder; else some may come from elsewhere.

    Returns:
        Names of tensors that are neither in the folder nor from a base checkpoint.

    Raises:
        ZooError: a tensor is missing, unknown or of another shape; reported by part.
    """
    allowed, own, shared = set(fresh), named_weights(model), _shared(model)
    missing, unexpected, misshapen = set(shared) - model.bases.names, [], []
    for listed, tensor in stored.items():
        name, first = split(listed)
        if name not in shared:
            if not may_start_fresh(name.partition(".")[0], allowed):
                unexpected.append(listed)
        elif not _of_shape(tensor, own[name], first):
            if not may_start_fresh(model.part_of(name), allowed):
                misshapen.append(f"{listed}: {tensor.shape} in the file, {tuple(own[name].shape)} in the model")
        elif not first:
            missing.difference_update(shared[name])
    left = {n for n in missing if whole and not may_start_fresh(model.part_of(n), allowed)}
    if left or unexpected or misshapen:
        lines = [f"The weights in {folder} do not fit the model."]
        lines += by_part("missing", left, model.part_of) + by_part("unknown", unexpected, lambda n: n.partition(".")[0])
        lines += [f"  other shape: {m}" for m in misshapen[:5]]
        raise ZooError("\n".join(lines))
    return missing


def _shared(model: Any) -> dict[str, list[str]]:
    """Map each name of a tensor to all of its names."""
    return {name: names for names in names_of(model).values() for name in names}


def _of_shape(stored: Stored, held: Tensor, first: int) -> bool:
    """Whether a stored tensor is as large as a model's, or as its rows from `first` on."""
    shape = tuple(held.shape)
    return stored.shape == ((shape[0] - first, *shape[1:]) if first else shape)


def may_start_fresh(part: str, allowed: Iterable[str]) -> bool:
    """Whether a part (`projector`, `adapter.lora`) may start without weights."""
    return bool({"all", part, part.partition(".")[0]} & set(allowed))


def by_part(what: str, names: Iterable[str], part_of: Any) -> list[str]:
    """Format the number of tensors of each part that are missing or unknown."""
    parts: dict[str, list[str]] = {}
    for name in sorted(names):
        parts.setdefault(part_of(name), []).append(name)
    return [f"  {what} in {part}: {len(n)} tensors, first {n[0]}" for part, n in parts.items()]


def snapshot(checkpoint: str, revision: str | None = None) -> Path | None:
    """Find a checkpoint on this machine: a folder, or one in the hub's cache, whose name is a commit."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        return None  # a keyword of timm or open_clip, such as `pretrained`
    from huggingface_hub import try_to_load_from_cache

    found = (
        try_to_load_from_cache(checkpoint, name, revision=require_revision(revision))
        for name in ("config.json", "open_clip_config.json", WEIGHTS, "open_clip_model.safetensors")
    )
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def local_folder(name: str | Path, revision: str | None = None, **hub: Any) -> Path:
    """Return the folder of a model: a local one as it is, a hub repository from the cache or downloaded.

    Only configs, tokenizers, templates, cards and safetensors are fetched, or what the option `allow_patterns` names.
    `hub`: options of `snapshot_download`.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or ".." in str(name).split("/") or str(name).count("/") > 1:
        raise ZooError(f"There is no folder {str(name)!r}, and it is not a hub name (org/name) either.")
    from huggingface_hub import snapshot_download

    revision = require_revision(revision)
    hub = {"allow_patterns": ["*.json", "*.safetensors", "*.jinja", "*.md", "*.txt", "*.model"], **hub}
    try:
        return Path(snapshot_download(str(name), revision=revision, **hub))
    except Exception as error:  # offline, not found, no access: each raises its own class
        with suppress(Exception):  # huggingface_hub before 2.0 requests a list of files even if all are in the cache
            hub["local_files_only"] = True
            return Path(snapshot_download(str(name), revision=revision, **hub))
        first = first_line(error)
        raise ZooError(
            f"The hub repository {str(name)!r} is not in the cache and cannot be fetched: {first}"
        ) from error


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a model's numbers may depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "timm", "open_clip_torch", "peft")}


def whole(tensor: Any) -> Any:
    """Return a tensor on the CPU, gathered from its shards."""
    if not isinstance(tensor, Tensor):
        return tensor
    tensor = tensor.detach()
    if not hasattr(tensor, "full_tensor"):
        return tensor.cpu()
    full = tensor.full_tensor().cpu()
    return full.clone() if full.untyped_storage().nbytes() > full.nbytes else full  # uneven shards are padded
