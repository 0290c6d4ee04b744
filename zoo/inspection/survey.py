"""Survey of a data set before a run: broken records, lengths, numbers of labels, duplicates.

Each record is read and its text encoded as in training, with the processor of the model; no weights are loaded.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from zoo.registry import IGNORE_INDEX, LengthError, RecordError, Sample, naming, placed, read_sample
from zoo.runs.lengths import length_of
from zoo.runs.scored import chosen
from zoo.vision.images.decode import open_image
from zoo.vision.images.processors import Picture, has_several
from zoo.vision.images.video import Video

CHUNK = 512  # records that a worker reads at once


@dataclass
class Tally:
    """Counts of a part of a data set; tallies add up."""

    records: int = 0
    images: int = 0  # named by records
    broken: list[dict[str, str]] = field(default_factory=list)
    dialogs: int = 0
    turns: int = 0  # answers with labels
    learnt: int = 0  # labels
    image_tokens: int = 0
    lengths: list[int] = field(default_factory=list)  # positions of the longest dialog of each record
    ids: list[int] = field(default_factory=list)  # hashes, in the order of records
    contents: list[int] = field(default_factory=list)  # hashes of words and images together
    places: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Add the counts of a later part."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value) if isinstance(value, int) else getattr(self, name).extend(
                value
            )

    def kinds(self) -> Counter[str]:
        """Return the number of broken records by kind."""
        return Counter(line["kind"] for line in self.broken)

    def twice(self, what: str) -> list[tuple[str, str]]:
        """Return the places of records with the same `ids` or `contents` as an earlier one, each with the earlier."""
        # On hashes of 8 bytes, since texts of a large data set do not fit into memory.
        hashes = np.array(getattr(self, what), dtype=np.uint64)
        _, first, back = np.unique(hashes, return_index=True, return_inverse=True)
        again = np.flatnonzero(first[back] != np.arange(len(hashes)))
        return [(self.places[first[back[i]]], self.places[i]) for i in again.tolist()]


@dataclass
class Look:
    """Reads and counts records.

    Attributes:
        processor: of the model.
        limit: positions of the LLM; None: no limit.
        open_images: decode every image; else only check that its file exists.
    """

    processor: Any
    limit: int | None
    open_images: bool
    _cuts: dict[Any, Any] = field(default_factory=dict)  # (size, whether of several images) -> image without pixels

    def at(self, sample: Sample | RecordError, tally: Tally) -> None:
        """Count a record."""
        tally.records += 1
        try:
            if isinstance(sample, RecordError):
                raise sample
            with naming(sample.data, sample.where, sample.id, "image"):
                pictures = self._pictures(sample)
            with naming(sample.data, sample.where, sample.id, "text"):
                row = self.processor.encode(sample, pictures)
            tally.images += len(sample.images)
            tally.dialogs += len(sample.dialogs)
            tally.lengths.append(length_of(row))
            tally.learnt += int((row.labels != IGNORE_INDEX).sum())
            tally.turns += sum(_turns(dialog) for dialog in sample.dialogs)
            placeholders = (self.processor.image_token_id, self.processor.video_token_id)
            tally.image_tokens += int(np.isin(row.input_ids, placeholders).sum())
            tally.ids.append(_hash(sample.id.encode("utf-8", "surrogatepass")))
            tally.contents.append(_hash(_content(sample)))
            tally.places.append(f"{sample.where} ({sample.id})")
            if self.limit is not None and tally.lengths[-1] > self.limit:
                why = LengthError(f"{tally.lengths[-1]} tokens, images included; the LLM's positions are {self.limit}.")
                with naming(sample.data, sample.where, sample.id):
                    raise why
        except RecordError as error:
            tally.broken.append(error.line())

    def _pictures(self, sample: Sample) -> list[Any]:
        """Return a placeholder for each image, with its division into crops if the number of tokens depends on it."""
        several = has_several(sample.images)  # as in training: videos do not count
        return [self._picture(source, several) for source in sample.images]

    def _picture(self, source: Any, several: bool) -> Any:
        if isinstance(source, Video):
            return self.processor.prepare([source])[0]
        if isinstance(source, Path) and not source.is_file():
            raise FileNotFoundError(f"there is no file {str(source)!r}")
        if self.processor.layout is None and not self.open_images:
            return None  # every image has the same number of tokens
        size = open_image(source).size
        if self.processor.layout is None:
            return None
        if (size, several) not in self._cuts:
            self._cuts[size, several] = self._cut(size, several)
        return self._cuts[size, several]

    def _cut(self, size: tuple[int, int], several: bool) -> Any:
        from PIL import Image

        blank = Image.new("RGB", size)
        # Crops depend on the size alone, so a blank image is divided instead of resizing each image.
        made = self.processor.prepare([blank, blank] if several else [blank])[0]
        return Picture(made.pixels[:0], made.cut) if isinstance(made, Picture) else made


class _Chunks(Dataset):
    """Maps a part of a data set to its tally."""

    def __init__(self, name: str, dataset: Any, look: Look, which: Sequence[int]) -> None:
        self.name, self.dataset, self.look, self.which = name, dataset, look, which

    def __len__(self) -> int:
        return -(-len(self.which) // CHUNK)

    def __getitem__(self, number: int) -> Tally:
        tally = Tally()
        for index in self.which[number * CHUNK : (number + 1) * CHUNK]:
            self.look.at(read_sample(self.name, self.dataset, index), tally)
        return tally


def survey(name: str, dataset: Any, look: Look, *, limit: int | None = None, workers: int = 0) -> Iterator[Tally]:
    """Read a data set, and yield the tallies of its parts.

    Args:
        name: of the data.
        dataset: indexed, or a stream, which one process reads.
        look: reads and counts records.
        limit: number of records, drawn as for an evaluation (`chosen`), of a stream the first ones; None: all.
        workers: number of processes; 0: this one.
    """
    if dataset.is_stream:
        samples = (
            placed(s, name, f"record {i} of the stream") for i, s in enumerate(islice(dataset.stream(0, 0), limit))
        )
        while part := list(islice(samples, CHUNK)):
            tally = Tally()
            for sample in part:
                look.at(sample, tally)
            yield tally
        return
    # Chunks instead of records: a worker sends one tally for many records.
    chunks = _Chunks(name, dataset, look, chosen(name, dataset, limit))
    yield from DataLoader(chunks, batch_size=None, num_workers=workers)


def _turns(dialog: Any) -> int:
    """Count the answers of a dialog that have labels: in a pair, the last one of the chosen dialog."""
    if dialog.preference:
        return int(dialog.preference == "chosen")
    return sum(message["role"] == "assistant" for message in dialog.messages)


def _content(sample: Sample) -> bytes:
    """Return the messages and image names of a sample, without its id."""
    images = [_shown(source, sample) for source in sample.images]
    text = repr([(d.messages, d.preference) for d in sample.dialogs]).encode("utf-8", "surrogatepass")
    return b"\0".join([text, *images])


def _shown(source: Any, sample: Sample) -> bytes:
    """Return what an image is: its bytes or pixels, else its name; what has a memory address is like no other."""
    if isinstance(source, bytes):
        return source
    array = source.detach().cpu().numpy() if hasattr(source, "detach") else source
    if hasattr(array, "tobytes"):  # a picture of Pillow or an array, whose text is its address or its corners
        about = [getattr(array, name, None) for name in ("mode", "size", "shape")]
        return repr(about).encode() + bytes(array.tobytes())
    name = str(source)
    name += f" of {sample.where}, {sample.id}" if " at 0x" in name else ""
    return name.encode("utf-8", "surrogatepass")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
