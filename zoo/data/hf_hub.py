"""Hugging Face datasets: from the hub, or parquet, arrow and `save_to_disk` folders on disk; whole or streamed.

Needs the extra `datasets`. Rows are read by `records.py`. Image columns are kept as they are stored, and
decoded where they are used.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from zoo.data.hub_rows import (
    classes_of,
    image_columns,
    line_files,
    open_rows,
    read_rows,
    rounded,
    row_image,
    shard_lengths,
    short_floats,
    with_names,
)
from zoo.data.image_store import ImageStore, open_store
from zoo.data.line_files import LineFiles
from zoo.data.numbered_stream import LANES, NumberedStream, Place
from zoo.data.records import RecordFields, read_record, record_id
from zoo.data.stream_order import InOrder, Lanes, StreamOrder, StreamRow
from zoo.data.two_forms import InTwoForms
from zoo.data.unread_images import require_column, require_seen
from zoo.registry import (
    MISSING,
    Dataset,
    RecordError,
    Records,
    Sample,
    StreamingDataset,
    ZooError,
    register,
    sample_or_error,
)


@dataclass
class HubDataConfig(RecordFields):
    path: str = MISSING  # org/name on the hub, a folder, or a .parquet, .arrow, .jsonl or .csv file (patterns allowed)
    subset: str = ""  # configuration of a hub data set, such as 2014_captions; empty: its default
    split: str = "train"  # as the hub names it
    eval_split: str = ""  # split for evaluation if the run has training data only; empty: none
    revision: str = ""  # commit, tag or branch on the hub; empty: the newest
    streaming: bool = False  # read row by row, without a download in front
    shuffle_buffer: int = 0  # rows among which a stream draws the next, anew in each epoch; 0: the stored order
    # Files of a stream that are read side by side, the buffer shared among them: with as many as there are processes,
    # or a multiple, each process reads parquet files of its own (of .jsonl and .csv on a disk each reads its own rows,
    # whatever the lanes); 0: 16 of a shuffled stream, 1 of a stored order
    lanes: int = 0
    images: str = ""  # folder or tar archive where the image column holds names of files
    seed: int = 0  # of the stream's order, with the epoch
    limit: int = 0  # first rows only; 0: all
    check: bool = True  # refuse data whose images are in a column that is not read; skip_broken=true turns it off

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.shuffle_buffer, self.limit) < 0:
            raise ZooError(f"shuffle_buffer and limit must be 0 or more, got {self.shuffle_buffer} and {self.limit}.")
        if self.lanes < 0:
            raise ZooError(f"lanes must be 0 or more, got {self.lanes}.")
        if self.lanes > 1 and (self.limit or not self.streaming):
            raise ZooError("lanes are of a stream, streaming=true, that is read whole, limit=0.")
        if self.shuffle_buffer and not self.streaming:
            raise ZooError("shuffle_buffer orders a stream; without streaming=true the sampler shuffles all rows.")


@register("dataset", "hf")
class HubData(InTwoForms):
    """Builds a `MappedHubData`, or with `streaming=true` a `StreamedHubData` or a `StreamedLines`."""

    @classmethod
    def form(cls, config: HubDataConfig) -> type[Records]:
        """Return the class for a config."""
        if not config.streaming:
            return MappedHubData
        return StreamedLines if line_files(config) else StreamedHubData

    def __init__(self, config: HubDataConfig) -> None:
        self.config = config
        self.store: ImageStore | None = open_store(config.images) if config.images else None
        self.rows = self._opened()
        self.classes, self.short = classes_of(self.rows), short_floats(self.rows)
        if config.check and not config.image_field:
            self._require_seen()

    def _opened(self) -> Any:
        rows = open_rows(self.config)
        limit = self.config.limit
        if limit and not self.config.streaming:
            limit = min(limit, len(rows))  # more raise in older versions of the library
        return rows.take(limit) if limit else rows

    def _require_seen(self) -> None:
        """Refuse images in a column that is not read, as the types of the columns or the first row show them."""
        config = self.config
        if images := image_columns(self.rows):
            require_column(self.rows.features, images, f"{config.path} ({config.split})")
        elif self.store is not None and (row := self._first()) is not None:
            shows: list[Any] = []
            with suppress(ZooError):  # a broken row is named in its turn
                shows = read_record(row, config, "")[0]
            if not shows:
                require_seen(row, {config.question_field, config.answer_field}, self.store, f"{config.path}, first row")

    def _first(self) -> Any:
        """Return the first row, where it takes no reading of a stream."""
        return None

    def train_split(self) -> "HubData":
        """Return the rows of the split `train`, for baselines of constant answers."""
        return self if self.config.split == "train" else HubData(replace(self.config, split="train", limit=0))

    def eval_split(self) -> "HubData | None":
        """Return the rows for evaluation; None without an `eval_split`."""
        if not self.config.eval_split:
            return None
        return HubData(replace(self.config, split=self.config.eval_split, shuffle_buffer=0, lanes=0, limit=0))

    def sample(self, row: Any, number: int | str | None = None) -> Sample:
        """Turn row `number` into a sample."""
        return self._sample_of(row, number, self.place(number))

    def _sample_of(self, row: dict[str, Any], number: int | str | None, where: str) -> Sample:
        row = with_names(row, self.classes)
        row |= {name: rounded(row[name]) for name in self.short if name in row}
        name = record_id(row, self.config) or str(number)
        images, dialog = read_record(row, self.config, where)
        shown = [row_image(image, self.store, where, self.config.path) for image in images]
        return Sample(name, shown, [dialog], where=where)

    def place(self, index: int | str | None) -> str:
        """Name the place of a row for a message."""
        return f"{self.config.path} ({self.config.split}), row {index}"


class MappedHubData(HubData, Dataset):
    """Rows by index."""

    def __len__(self) -> int:
        return len(self.rows)

    def _first(self) -> Any:
        return self.rows[0] if len(self) else None

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return row `index`; the same in every epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sample(self.rows[index], index)


class StreamedLines(HubData, NumberedStream):
    """Rows of .jsonl, .json and .csv files on a disk: each process reads its own, an interrupted stream goes on."""

    rows: LineFiles

    def _opened(self) -> LineFiles:
        return LineFiles(line_files(self.config))

    def _first(self) -> Any:
        shard = next((shard for shard, length in enumerate(self.rows.lengths) if length), None)
        with suppress(ZooError):  # a broken row is named in its turn
            return None if shard is None else self.rows.record((shard, 0))

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each file, those beyond the limit left out."""
        ends = np.cumsum(self.rows.lengths)
        found: list[int] = np.diff(np.minimum(ends, self.config.limit or ends[-1]), prepend=0).tolist()
        return found

    def sample(self, row: Place, number: Any = None) -> Sample:
        """Read the row at a place and turn it into a sample."""
        where = self.rows.where(row)
        return self._sample_of(self.rows.record(row, self.config.named), number, where)

    def place(self, index: int | str | None) -> str:
        """Name the file and line of a row, given as `shard:number`, for a message."""
        shard, _, number = str(index).rpartition(":")
        return self.rows.where((int(shard or 0), int(number)))


class StreamedHubData(HubData, StreamingDataset):
    """Rows in the order of the stream; an interrupted stream continues from its place."""

    @cached_property
    def lengths(self) -> list[int] | None:
        """Rows of each shard, where the order goes over several at once; None: it goes through all one by one.

        Raises:
            ZooError: that is asked for, and the rows of shards are not known.
        """
        config = self.config
        if config.limit or config.lanes == 1 or not (config.lanes or config.shuffle_buffer):
            return None
        lengths = shard_lengths(config, self.rows)
        if lengths is None and config.lanes:
            raise ZooError(
                f"lanes={config.lanes} needs a stream of several parquet files, or of .jsonl or .csv files on a disk; "
                f"{config.path!r} is none."
            )
        return lengths

    @property
    def lanes(self) -> int:
        """Shards that are read at once, at most."""
        return min(self.config.lanes or LANES, len(self.lengths or [0]))

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Sample | RecordError]:
        """Yield the samples of an epoch from number `start` on; their order depends on (seed, epoch)."""
        if self.lengths is None:
            yield from map(self._sample, self._rows(epoch, start))
            return
        order = self.order("", 1, {"epoch": epoch, "drawn": 0, "lanes": []})
        for number in range(sum(self.lengths)):
            if (row := order.next(number, number >= start)) is not None:
                yield self._sample(row)

    def _sample(self, row: StreamRow) -> Sample | RecordError:
        return sample_or_error("", self.place(row.number), lambda: self.sample(row.value, row.number))

    def order(self, name: str, size: int, place: Mapping[str, Any]) -> StreamOrder:
        """Return the order of the rows: as they are stored or shuffled, one shard after the other or side by side.

        Args:
            name: of the data, for errors.
            size: samples of an optimiser step.
            place: where to begin.
        """
        config = self.config
        if self.lengths is not None:
            seed = config.seed if config.shuffle_buffer else None
            return Lanes(name, self.lengths, self._rows_of_shard, size=size, lanes=self.lanes, seed=seed, place=place)
        if config.shuffle_buffer:  # the library loses what is in its buffer: rows are passed over
            return InOrder(name, lambda epoch, read, _: self._rows(epoch, read), place)
        rows = copy(self.rows)  # has a state of its own
        skipped = False

        def begin(epoch: int, read: int, state: Any) -> Iterator[StreamRow]:
            nonlocal skipped
            skipped = bool(read and state is None)
            if skipped:
                return self._rows(epoch, read)
            rows.load_state_dict(state)
            return self._numbered(rows, read)

        return InOrder(name, begin, place, lambda: None if skipped else rows.state_dict())

    def _rows(self, epoch: int, start: int) -> Iterator[StreamRow]:
        rows = self.rows
        if self.config.shuffle_buffer:
            rows = _one_by_one(rows) if rows.num_shards == 1 else rows
            rows = rows.shuffle(seed=self._seed(epoch, 0), buffer_size=self.config.shuffle_buffer)
        return self._numbered(rows.skip(start), start)

    def _rows_of_shard(self, epoch: int, shard: int, start: int) -> Iterator[StreamRow]:
        assert self.lengths is not None
        rows = _one_by_one(self.rows.shard(len(self.lengths), shard))
        if self.config.shuffle_buffer:
            size = max(1, self.config.shuffle_buffer // self.lanes)
            rows = rows.shuffle(seed=self._seed(epoch, shard + 1), buffer_size=size)
        return self._numbered(rows.skip(start), start, f"{shard}:")

    def _numbered(self, rows: Any, start: int, shard: str = "") -> Iterator[StreamRow]:
        for number, row in enumerate(read_rows(rows, self.config), start):
            yield StreamRow(row, f"{shard}{number}")

    def _seed(self, epoch: int, shard: int) -> int:
        return int(np.random.SeedSequence([self.config.seed & 0xFFFFFFFF, epoch, shard]).generate_state(1)[0])


def _one_by_one(rows: Any) -> Any:
    """Fix the order of shards: to mix them, the library starts threads and waits seconds for each to end."""
    return rows.skip(0)
