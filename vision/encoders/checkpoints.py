"""Files of an encoder's checkpoint, from a local folder or the model hub's cache. Safetensors and JSON only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from zoo.registry import ZooError, require_revision
from zoo.registry.foreign import read_model_config, require_plausible

ALLOWED = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    ".safetensors",
    ".safetensors.index.json",
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


def with_revision(checkpoint: str, revision: str) -> str:
    """Join a hub name and its revision to `org/name@revision`, as `fetch` takes it."""
    if not revision:
        return checkpoint
    if not checkpoint or is_local(checkpoint):
        raise ZooError(f"revision {revision!r} needs a hub checkpoint, and checkpoint is {checkpoint!r}.")
    return f"{checkpoint}@{require_revision(revision)}"


def fetch(checkpoint: str, name: str, optional: bool = False) -> Path | None:
    """Return the path of one file of a checkpoint; a hub name (`org/name@revision`) is downloaded on first use.

    If weights are requested, the checkpoint may be the safetensors file itself.

    Raises:
        ZooError: there is no such file (None if `optional`), or the hub cannot be reached.
    """
    if not name.endswith(ALLOWED):
        raise ZooError(f"{checkpoint!r}: only JSON and safetensors files are read, not {name!r}.")
    if is_local(checkpoint):
        place = Path(checkpoint).expanduser()
        path = place if place.suffix == Path(name).suffix == ".safetensors" else place / name
        if path.is_file():
            return path
        if optional:
            return None
        raise ZooError(f"Checkpoint folder {checkpoint!r} has no {name}. It holds: {_listing(place)}.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = checkpoint.partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError, so caught first
        raise ZooError(
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


def read_json(checkpoint: str, name: str = "config.json", optional: bool = False) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; a missing optional file gives an empty dict."""
    path = fetch(checkpoint, name, optional)
    if path is None:
        return {}
    return read_model_config(path)


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
