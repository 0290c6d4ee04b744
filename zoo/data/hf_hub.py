"""Hugging Face datasets: from the hub, or parquet, arrow and `save_to_disk` folders on disk; whole or streamed.

Needs the extra `datasets`. How a row is read stands in `records.py`. Image columns are kept as they are stored, and
decoded where they are used.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo.data.image_store import ImageStore, open_store
from zoo.data.records import RecordFields, inline_image, read_record, record_id
from zoo.registry import MISSING, Sample, ZooError, register

FILES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass
class HubDataConfig(RecordFields):
    path: str = MISSING  # org/name on the hub, a folder, or a .parquet, .arrow, .jsonl or .csv file (patterns allowed)
    subset: str = ""  # configuration of a hub data set, such as 2014_captions; empty: its default
    split: str = "train"  # as the hub names it
    eval_split: str = ""  # split to evaluate on where a run has data for training only; empty: none
    revision: str = ""  # commit, tag or branch on the hub; empty: the newest
    streaming: bool = False  # read row by row, without a download in front
    shuffle_buffer: int = 0  # rows among which a stream draws the next, anew in each epoch; 0: the stored order
    images: str = ""  # folder or tar archive where the image column holds names of files
    seed: int = 0  # of the stream's order, with the epoch
    limit: int = 0  # first rows only; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.shuffle_buffer, self.limit) < 0:
            raise ZooError(f"shuffle_buffer and limit must be 0 or more, got {self.shuffle_buffer} and {self.limit}.")
        if self.shuffle_buffer and not self.streaming:
            raise ZooError("shuffle_buffer orders a stream; without streaming=true the sampler shuffles all rows.")


@register("dataset", "hf")
class HubData:
    """Builds a `MappedHubData`, or with `streaming=true` a `StreamedHubData`."""

    def __new__(cls, config: HubDataConfig) -> "HubData":
        kind = StreamedHubData if config.streaming else MappedHubData
        return object.__new__(kind if cls is HubData else cls)

    def __init__(self, config: HubDataConfig) -> None:
        self.config = config
        self.store: ImageStore | None = open_store(config.images) if config.images else None
        self.rows = _undecoded(_open(config))
        if config.limit:
            self.rows = self.rows.take(config.limit)

    def __getnewargs__(self) -> tuple[HubDataConfig]:
        return (self.config,)

    def train_split(self) -> "HubData":
        """The rows of the split called train: what is common there is what a blind guess knows."""
        return self if self.config.split == "train" else HubData(replace(self.config, split="train", limit=0))

    def eval_split(self) -> "HubData | None":
        """The rows to evaluate on; None where the config names no such split."""
        if not self.config.eval_split:
            return None
        return HubData(replace(self.config, split=self.config.eval_split, shuffle_buffer=0, limit=0))

    def sample(self, row: dict[str, Any], number: int) -> Sample:
        """Turn row `number` into a sample."""
        name = record_id(row, self.config) or str(number)
        where = f"{self.config.path} ({self.config.split}), row {number}"
        images, dialog = read_record(row, self.config, where)
        return Sample(name, [self._image(image, where) for image in images], [dialog])

    def _image(self, image: Any, where: str) -> Any:
        if isinstance(image, dict) and ("bytes" in image or "path" in image):
            return image["bytes"] if image.get("bytes") else StoredImage(image)
        if not isinstance(image, str):
            raise ZooError(f"{where}: the image is a {type(image).__name__}; an image column or a name is needed.")
        data = inline_image(image, where)
        if data is not None:
            return data
        if self.store is None:
            raise ZooError(f"{where}: the image is the name {image!r}; say with images=... where the files are.")
        return self.store.find(image, where)


class MappedHubData(HubData):
    """Rows by index."""

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return row `index`; the same in every epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sample(self.rows[index], index)


class StreamedHubData(HubData):
    """Rows as they come; a stream that was broken off goes on from `start`."""

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Sample]:
        """Yield the samples of an epoch from number `start` on; their order depends on (seed, epoch)."""
        rows = self.rows
        if self.config.shuffle_buffer:
            rows = rows.shuffle(seed=self.config.seed, buffer_size=self.config.shuffle_buffer)
        rows = rows.skip(start)  # a new data set, in epoch 0
        rows.set_epoch(epoch)
        for number, row in enumerate(rows, start):
            yield self.sample(row, number)


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


def _open(config: HubDataConfig) -> Any:
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


def _undecoded(rows: Any) -> Any:
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
