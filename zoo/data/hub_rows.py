"""Rows of Hugging Face datasets, from the hub or from disk, with images as they are stored."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zoo.data.image_store import MAX_BYTES, Folder, ImageStore
from zoo.data.line_files import SUFFIXES, header_of
from zoo.data.records import inline_image
from zoo.registry import ZooError, first_line, one_line
from zoo.registry.foreign import require_file

OF_PLACE = {
    "name",
    "version",
    "data_dir",
    "data_files",
    "description",
}  # of the library's config: no options of reading
GENERATING = "An error occurred while generating the dataset"  # how the library begins
FILES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


class HubRows(Protocol):
    """Which rows: the fields of a config that `open_rows` reads."""

    path: str  # org/name on the hub, a folder, or a file
    subset: str
    split: str
    revision: str
    streaming: bool


def row_image(image: Any, store: ImageStore | None, where: str, path: str) -> Any:
    """Return an image as a row holds it, or as `store` has it under the name that the row gives.

    A row may name a file in place of its bytes. That is looked for in `store`, else in the data set itself: below its
    folder, in its repository, or where the library has unpacked it. A row never leads elsewhere.

    Args:
        image: what the row holds.
        store: of `images=`.
        where: to begin an error with.
        path: of the data set.

    Raises:
        ZooError: it is not an image, or its file does not belong to the data set.
    """
    if isinstance(image, (bytes, bytearray)):  # a column of plain bytes
        return bytes(image)
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        if image.get("bytes"):
            return image["bytes"]
        if not isinstance(image.get("path"), str):
            raise ZooError(f"{where}: the image has neither bytes nor the name of a file.")
        return _named_by_row(image["path"], store, where, path)
    if not isinstance(image, str):
        raise ZooError(f"{where}: the image is a {type(image).__name__}; an image column or a name is needed.")
    data = inline_image(image, where)
    if data is not None:
        return data
    if store is None:
        raise ZooError(f"{where}: the image is the name {image!r}; give the place of the files with images=...")
    return store.find(image, where)


def _named_by_row(name: str, store: ImageStore | None, where: str, path: str) -> Any:
    place = Path(path)
    root = place if place.is_dir() else place.parent if place.suffix in FILES else None
    if root is None and _of_repository(name, path):
        return RemoteImage(name)
    if Path(name).is_absolute() and any(Path(name).resolve().is_relative_to(cache) for cache in _caches()):
        return Path(name)
    if root is not None and Path(name).is_absolute() and Path(name).is_relative_to(root.absolute()):
        name = Path(name).relative_to(root.absolute()).as_posix()
    elif store is None and root is None:
        raise ZooError(
            f"{where}: the image is the file {name!r}, which does not belong to the data set. Only its own files are "
            "read: give the place of others with images=..."
        )
    files = store if store is not None else Folder(root or place)
    return files.find(name, where)


def _of_repository(name: str, path: str) -> bool:
    """Whether an address is of a file of the repository `path`, or of an archive in it."""
    inside = rf"((zip|tar|gzip|bz2|xz|lzma|zstd|lz4)://[^:]*::)*hf://datasets/{re.escape(path)}(@[^/]+)?/[^:]*"
    return re.fullmatch(inside, name) is not None and ".." not in name.split("/")


def _caches() -> list[Path]:
    """Where the library puts what it downloads and unpacks."""
    from huggingface_hub.constants import HF_HUB_CACHE

    config = _library().config
    return [
        Path(place).resolve() for place in (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    ]


@dataclass(frozen=True)
class RemoteImage:
    """The bytes of a file in a repository of the hub, or in an archive there, fetched when called."""

    address: str

    def __call__(self) -> bytes:
        import fsspec

        try:
            with fsspec.open(self.address, "rb") as file:
                data: bytes = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise ZooError(f"Image {self.address!r} cannot be fetched: {error}") from error
        if len(data) > MAX_BYTES:
            raise ZooError(f"Image {self.address!r} has more than {MAX_BYTES:,} bytes.")
        return data


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ZooError("Data set 'hf' needs the package `datasets`: pip install 'zoo-vlm[datasets]'.") from None
    return datasets


def open_rows(config: HubRows) -> Any:
    """Open what `path` names, as a Dataset or an IterableDataset of the split; images are left as they are stored.

    Raises:
        ZooError: it does not exist, or has no such split or subset.
    """
    datasets = _library()
    path = Path(config.path)
    _refuse_pipes(path)
    with _named(config):
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
            if isinstance(found, dict):
                if config.split not in found:
                    raise ValueError(f"split {config.split!r} is not among {sorted(found)}")
                found = found[config.split]
            return _undecoded(found.to_iterable_dataset() if config.streaming else found)
        named, options = _what(config)
        options |= {} if config.streaming else _as_texts(config)
        return _undecoded(datasets.load_dataset(*named, split=config.split, streaming=config.streaming, **options))


def line_files(config: HubRows, split: str = "") -> list[Path]:
    """Return the files of a stream that are .jsonl, .json or .csv on this machine; none: it is of another kind.

    Args:
        config: names the data set.
        split: whose files; empty: that of the config.

    Raises:
        ZooError: they do not exist.
    """
    path = Path(config.path)
    _refuse_pipes(path)
    if not path.is_dir() and path.suffix not in SUFFIXES:
        return []
    with _named(config):
        files, builder = _files(config, split or config.split)
    # A folder's card may name columns, separators and types, which the library knows how to read.
    own = builder.config
    plain, options = type(own)(name=own.name), set(vars(own)) - OF_PLACE
    if any(getattr(plain, name) != getattr(own, name) for name in options) or _makes(builder.info.features):
        return []
    found = [Path(file) for file in files]
    return found if all(f.suffix in SUFFIXES and f.is_file() for f in found) else []


def _as_texts(config: HubRows) -> dict[str, Any]:
    """Return options by which the values of CSV files are their texts, an empty one None, as those of a stream.

    The library guesses: 007 would be 7 or 7.0, and None or n/a no answer.
    """
    path = Path(config.path)
    if path.suffix != ".csv" and not (path.is_dir() and any(path.rglob("*.csv"))):
        return {}
    files = line_files(config, _whole(config.split))
    if not files or any(file.suffix != ".csv" for file in files):
        return {}
    datasets = _library()
    named = [name for name in header_of(files[0]) if name]  # the column of row numbers that pandas writes has none
    texts = datasets.Features(dict.fromkeys(named, datasets.Value("string")))
    return {"features": texts, "keep_default_na": False, "na_values": [""]}


def _makes(feature: Any) -> bool:
    """Whether a type of the library makes images, or numbers of classes, of what a file has."""
    inside = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    datasets = _library()
    return isinstance(feature, (datasets.Image, datasets.ClassLabel)) or any(_makes(f) for f in inside if f is not None)


def _files(config: HubRows, split: str) -> tuple[list[str], Any]:
    """Return the files of a split, and the library's builder for them."""
    named, options = _what(config)
    builder = _library().load_dataset_builder(*named, **options)
    return list(map(str, (builder.config.data_files or {}).get(split, []))), builder


def shard_lengths(config: HubRows, rows: Any) -> list[int] | None:
    """Count the rows of each shard of a stream by the ends of its parquet files; None for other files.

    Raises:
        ZooError: a file cannot be read.
    """
    import fsspec
    import pyarrow.parquet as pq

    if rows.num_shards < 2 or (Path(config.path) / "dataset_dict.json").is_file():
        return None

    def length(file: str) -> int:
        with fsspec.open(file, "rb") as opened:
            count: int = pq.read_metadata(opened).num_rows
            return count

    with _named(config):
        files, _ = _files(config, config.split)
        if len(files) != rows.num_shards or not all(file.endswith(".parquet") for file in files):
            return None
        with ThreadPoolExecutor(16) as pool:  # files of a hub are a request each
            return list(pool.map(length, files))


def _refuse_pipes(path: Path) -> None:
    """Refuse pipes, sockets and devices, on which the library would wait without end."""
    pattern = set(path.name) & set("*?[")
    found = path.parent.glob(path.name) if pattern else path.rglob("*") if path.is_dir() else [path]
    for file in islice(found, 100_000):
        if not file.is_dir() and file.suffix in FILES and file.exists():
            require_file(file)


def _what(config: HubRows) -> tuple[tuple[str, str | None], dict[str, Any]]:
    """Return what the library's functions take to find the data: name and subset, and options."""
    suffix = Path(config.path).suffix
    if suffix in FILES:
        return (FILES[suffix], None), {"data_files": {_whole(config.split): config.path}}
    if Path(config.path).is_file():  # the library would look for a data set of that name on the hub
        raise ZooError(
            f"{config.path} is a file of another kind: allowed are {', '.join(FILES)}, or a folder with such."
        )
    return (config.path, config.subset or None), {"revision": config.revision or None}


def _whole(split: str) -> str:
    """The split that a part of it, such as `train[:90%]`, is taken of."""
    return split.partition("[")[0]


@contextmanager
def _named(config: HubRows, doing: str = "opened") -> Iterator[None]:
    """Add the data set's name to errors of the library and its file formats."""
    try:
        yield
    except ZooError:
        raise
    except (OSError, ValueError, RuntimeError, _library().exceptions.DatasetsError) as error:
        reason = first_line(error)
        if isinstance(error, _library().exceptions.DatasetGenerationError):  # what is wrong is below its first line
            reason = (one_line(error).removeprefix(GENERATING).strip() or one_line(error.__cause__ or error))[:400]
        raise ZooError(f"Data set {config.path!r} cannot be {doing}: {reason}") from error


def read_rows(rows: Any, config: HubRows) -> Iterator[dict[str, Any]]:
    """Iterate over a stream.

    Raises:
        ZooError: a file is truncated or cannot be fetched, with the number of rows read; or this is a loader worker, to
            which the library would give only some of the shards.
    """
    from torch.utils.data import get_worker_info

    if get_worker_info() is not None:
        raise ZooError(f"Data set {config.path!r} is a stream: the process reads it, and not its loader workers.")
    source, number = iter(rows), 0
    while True:
        with _named(config, f"read on behind {number} rows"):
            row = next(source, None)
        if row is None:
            return
        yield row
        number += 1


def classes_of(rows: Any) -> dict[str, list[str]]:
    """Return the names of the classes of each column that holds their numbers, or lists of these."""
    found = {}
    for name, feature in (getattr(rows, "features", None) or {}).items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, _library().ClassLabel):
            found[name] = list(inner.names)
    return found


def short_floats(rows: Any) -> list[str]:
    """Name the columns with floats of 16 or 32 bits, or lists of these."""
    features = getattr(rows, "features", None) or {}
    kinds = {name: getattr(getattr(f, "feature", f), "dtype", None) for name, f in features.items()}
    return [name for name, kind in kinds.items() if kind in ("float16", "float32")]


def rounded(value: Any) -> Any:
    """Return a float of 32 bits as it is written, 0.1 and not 0.10000000149011612; each one of a list."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def image_columns(rows: Any) -> list[str]:
    """Name the columns that hold images or bytes, or lists of them; none where the types of columns are not known."""
    inner = {name: getattr(f, "feature", f) for name, f in (getattr(rows, "features", None) or {}).items()}
    binary, image = ("binary", "large_binary"), _library().Image
    return [name for name, f in inner.items() if isinstance(f, image) or getattr(f, "dtype", None) in binary]


def with_names(row: dict[str, Any], classes: dict[str, list[str]]) -> dict[str, Any]:
    """Return a row with the names of classes in place of their numbers; -1, of a row without a label, is None."""

    def named(value: Any, names: list[str]) -> Any:
        if isinstance(value, list):
            return [named(one, names) for one in value]
        return value if not isinstance(value, int) else names[value] if 0 <= value < len(names) else None

    return row | {name: named(row[name], names) for name, names in classes.items() if name in row}


def _undecoded(rows: Any) -> Any:
    """Decoding belongs to the place that uses them, and may never be needed."""
    datasets = _library()
    if rows.features is None:  # a stream whose columns are not known before its first row
        rows = rows._resolve_features()

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, dict):
            return {name: plain(one) for name, one in feature.items()}
        if isinstance(feature, (datasets.List, datasets.LargeList)):
            return replace(feature, feature=plain(feature.feature))
        return feature

    for name, feature in rows.features.items():
        if (other := plain(feature)) != feature:
            rows = rows.cast_column(name, other)
    return rows
