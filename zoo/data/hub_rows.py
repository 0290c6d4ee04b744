"""Rows of Hugging Face datasets, from the hub or from disk, with images as they are stored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from zoo.data.image_store import ImageStore
from zoo.data.records import inline_image
from zoo.registry import ZooError

FILES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


class HubRows(Protocol):
    """Which rows: the fields of a config that `open_rows` reads."""

    path: str  # org/name on the hub, a folder, or a file
    subset: str
    split: str
    revision: str
    streaming: bool


def row_image(image: Any, store: ImageStore | None, where: str) -> Any:
    """Return an image as a row holds it, or as `store` has it under the name that the row gives.

    Raises:
        ZooError: it is neither, or there is no store.
    """
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        return image["bytes"] if image.get("bytes") else StoredImage(image)
    if not isinstance(image, str):
        raise ZooError(f"{where}: the image is a {type(image).__name__}; an image column or a name is needed.")
    data = inline_image(image, where)
    if data is not None:
        return data
    if store is None:
        raise ZooError(f"{where}: the image is the name {image!r}; say with images=... where the files are.")
    return store.find(image, where)


@dataclass(frozen=True)
class StoredImage:
    """An image that the library knows how to open: a local file or one inside a remote archive."""

    value: dict[str, Any]

    def __call__(self) -> Any:
        return _library().Image().decode_example(self.value)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ZooError("Data set 'hf' needs the package `datasets`: pip install 'zoo-vlm[datasets]'.") from None
    return datasets


def open_rows(config: HubRows) -> Any:
    """Open what `path` names, as a Dataset or an IterableDataset of the split.

    Raises:
        ZooError: it does not exist, or has no such split or subset.
    """
    datasets = _library()
    path = Path(config.path)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
            if isinstance(found, dict):
                if config.split not in found:
                    raise ValueError(f"split {config.split!r} is not among {sorted(found)}")
                found = found[config.split]
            return found.to_iterable_dataset() if config.streaming else found
        if path.suffix in FILES:
            files = {config.split: config.path}
            return datasets.load_dataset(
                FILES[path.suffix], data_files=files, split=config.split, streaming=config.streaming
            )
        return datasets.load_dataset(
            config.path,
            config.subset or None,
            split=config.split,
            revision=config.revision or None,
            streaming=config.streaming,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ZooError(f"Data set {config.path!r} cannot be opened: {reason}") from error


def undecoded(rows: Any) -> Any:
    """Leave images as they are stored: decoding belongs to the place that uses them, and may never be needed."""
    datasets = _library()
    if rows.features is None:  # a stream whose columns are not known before its first row
        rows = rows._resolve_features()
    plain = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, plain)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, type(feature)(plain))
    return rows
