"""Hugging Face datasets: from the hub, or parquet, arrow and `save_to_disk` folders on disk; whole or streamed.

Needs the extra `datasets`. How a row is read stands in `records.py`. Image columns are kept as they are stored, and
decoded where they are used.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from zoo.data.hub_rows import open_rows, row_image, undecoded
from zoo.data.image_store import ImageStore, open_store
from zoo.data.records import RecordFields, read_record, record_id
from zoo.registry import MISSING, Sample, ZooError, register


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
        self.rows = undecoded(open_rows(config))
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
        return Sample(name, [row_image(image, self.store, where) for image in images], [dialog])


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
