"""A published checkpoint: its weights by our names, and the record by which a saved model refers to it.

The record is in a saved model's config: unchanged weights are not written again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.published import family_named, family_of
from zoo.published.contradictions import between
from zoo.published.family import SPARE, parse
from zoo.published.file_names import Held
from zoo.published.folder import read_content
from zoo.registry import ZooError
from zoo.storage.safetensors_file import listing
from zoo.storage.weights import fingerprint, local_folder, weight_files


@dataclass(frozen=True)
class Checkpoint:
    """Weights in a folder, for the parts of a model.

    Attributes:
        tensors: by our names.
        record: reference in a saved model (family, checkpoint, revision, fingerprint); None: a zoo model's own folder.
        unexpected: names in the files without a parameter in any part.
        contradictions: part -> lines with the config's value and that of the files.
        quantised: method that config.json states; empty: none.
    """

    folder: Path
    tensors: Held
    record: dict[str, Any] | None = None
    unexpected: list[str] = field(default_factory=list)
    contradictions: dict[str, list[str]] = field(default_factory=dict)
    quantised: str = ""


def checkpoint_in(folder: Path, checkpoint: str = "", revision: str = "") -> Checkpoint:
    """Find the weights of a published model in its folder."""
    content = read_content(folder)
    known = family_of(content, f"{folder}/config.json")
    tensors: Held = {}
    unexpected: list[str] = []
    twice: dict[str, str] = {}
    for name, stored in listing(weight_files(folder)).items():
        ours = known.ours(name)
        if ours is not None:
            if ours in tensors:
                raise ZooError(f"{folder} holds {ours!r} twice, as {twice[ours]!r} and as {name!r}.")
            tensors[ours], twice[ours] = stored, name
        elif not SPARE.search(name):
            unexpected.append(name)
    record = {
        "family": content["model_type"],
        "checkpoint": str(folder.absolute()) if not checkpoint or Path(checkpoint).is_dir() else checkpoint,
        "revision": (folder.name if folder.parent.name == "snapshots" else revision)
        or None,  # in the hub's cache, a commit
        "fingerprint": fingerprint(folder),
    }
    stated = between(parse(content, f"{folder}/config.json"), tensors)
    return Checkpoint(folder, tensors, record, unexpected, stated, _quantised(content))


def _quantised(content: Mapping[str, Any]) -> str:
    stated = content.get("quantization_config") or (content.get("text_config") or {}).get("quantization_config") or ""
    return str(stated.get("quant_method") or "bitsandbytes") if isinstance(stated, Mapping) else str(stated)


def checkpoint_from(record: Mapping[str, Any]) -> Checkpoint:
    """Find the base weights that a saved model refers to.

    Raises:
        ZooError: they do not exist, or differ from those the model was saved on.
    """
    family_named(str(record.get("family")))
    checkpoint = str(record.get("checkpoint"))
    try:
        folder = local_folder(checkpoint, record.get("revision"))
    except ZooError as error:
        raise ZooError(f"{error} The model was made from it; if it lies elsewhere now: model.base=<folder>.") from error
    found = checkpoint_in(folder, checkpoint, str(record.get("revision") or ""))
    now = (found.record or {})["fingerprint"]
    if record.get("fingerprint") and now != record["fingerprint"]:
        raise ZooError(
            f"The base weights in {checkpoint!r} differ from those the model was saved on (fingerprint {now[:12]}, was "
            f"{record['fingerprint'][:12]})."
        )
    return found


def base_at(saved: Mapping[str, Any] | None, place: str) -> dict[str, Any] | None:
    """Return the bases of a saved config, with the published checkpoint at `place` if it is given.

    Raises:
        ZooError: the model was not made from a published checkpoint.
    """
    if not place:
        return dict(saved) if saved else None
    if not (saved or {}).get("model"):
        raise ZooError(
            f"model.base={place}: the model was made from no published checkpoint. Those of parts have options of "
            f"their own: vision.checkpoint=<folder>, llm.checkpoint=<folder>."
        )
    return {**saved, "model": {**saved["model"], "checkpoint": place, "revision": None}}  # type: ignore[dict-item, index]
