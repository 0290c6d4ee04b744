"""WebDataset shards: tar files whose neighbouring members of one name, 0017.jpg and 0017.json, are a sample.

Needs no package. Read by number, or as a stream in the order of the files, which large shards on a disk that seeks
slowly are meant for. Members are images, JSON and text; nothing pickled is read.
"""

from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from zoo.data.image_store import TarMember
from zoo.data.numbered_stream import NumberedStream
from zoo.data.record_file import parse_value
from zoo.data.records import IMAGE_COLUMNS, RecordFields, inline_image, read_record, record_id
from zoo.data.splits import require_split
from zoo.data.tar_shards import Shards, ShardSample, find_shards
from zoo.data.two_forms import InTwoForms
from zoo.registry import (
    MISSING,
    Dataset,
    ImageError,
    Records,
    Sample,
    ZooError,
    register,
)
from zoo.vision.images.video import VIDEOS

IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2"}
TEXTS = {"txt", "text", "caption", "cls", "question", "answer"}


@dataclass
class WebDatasetConfig(RecordFields):
    # A folder with .tar files, one of them, or several by a pattern or a range: shards/*.tar, shards/{0000..0127}.tar;
    # {split} in the name is replaced
    shards: str = MISSING
    split: str = "train"  # part of the names
    eval_split: str = ""  # split for evaluation if the run has training data only; empty: none
    streaming: bool = False  # in the order of the files instead of any
    shuffle_buffer: int = 0  # samples among which a stream draws the next, anew in each epoch; 0: the stored order
    # Shards of a stream that are read side by side, the buffer shared among them: with as many as there are processes,
    # or a multiple, each process reads shards of its own; 0: 16 of a shuffled stream, 1 of a stored order
    lanes: int = 0
    seed: int = 0  # of the stream's order, with the epoch
    limit: int = 0  # first samples only; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shuffle_buffer", "lanes", "limit"):
            if getattr(self, name) < 0:
                raise ZooError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        require_split(self.eval_split, {"shards": self.shards})
        if (self.shuffle_buffer or self.lanes) and not self.streaming:
            raise ZooError(
                "shuffle_buffer and lanes order a stream; without streaming=true the sampler shuffles all samples."
            )


@register("dataset", "webdataset")
class WebDataset(InTwoForms):
    """Builds a `MappedShards`, or with `streaming=true` a `StreamedShards`."""

    @classmethod
    def form(cls, config: WebDatasetConfig) -> type[Records]:
        """Return the class for a config."""
        return StreamedShards if config.streaming else MappedShards

    def __init__(self, config: WebDatasetConfig) -> None:
        self.config = config
        self.shards = Shards(find_shards(config.shards.replace("{split}", config.split)))
        ends = np.cumsum(self.shards.lengths)
        self.ends = np.minimum(ends, config.limit) if config.limit else ends
        if not self.ends[-1]:
            raise ZooError(f"{config.shards} has no samples: members are named as in 0017.jpg and 0017.json.")

    def train_split(self) -> "WebDataset":
        """Return the samples of the split `train`, for baselines of constant answers."""
        if self.config.split == "train" or "{split}" not in self.config.shards:
            return self
        return WebDataset(replace(self.config, split="train", limit=0))

    def eval_split(self) -> "WebDataset | None":
        """Return the samples for evaluation, by number; None without an `eval_split`."""
        if not self.config.eval_split:
            return None
        split = self.config.eval_split
        return WebDataset(replace(self.config, split=split, streaming=False, shuffle_buffer=0, lanes=0, limit=0))

    def sample(self, row: tuple[int, int], number: Any = None) -> Sample:
        """Make a sample of what is at `row`, (shard, its number there)."""
        stored = self.shards[row]
        record = _record(stored)
        named = [self.config.image_field] if self.config.image_field else IMAGE_COLUMNS
        if all(record.get(name) is None for name in named):
            record[named[0]] = [field for field in stored.members if _suffix(field) in IMAGES]
        images, dialog = read_record(record, self.config, stored.where)
        sources = [_image(image, stored, one=len(images) == 1) for image in images]
        return Sample(record_id(record, self.config) or stored.key, sources, [dialog], where=stored.where)

    def place(self, index: int | str | None) -> str:
        """Name the shard of a sample, and its number there, for a message.

        Args:
            index: of a sample, or `shard:number` as a stream has it.
        """
        shard, row = map(int, index.split(":")) if isinstance(index, str) else self._find(index or 0)
        return f"{self.shards.paths[shard]}, sample {row + 1}"

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - int(self.ends[shard - 1] if shard else 0)


class MappedShards(WebDataset, Dataset):
    """Samples by number, in any order."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return sample `index`; the same in every epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sample(self._find(index))


class StreamedShards(WebDataset, NumberedStream):
    """Samples in the order of the shards, or shuffled within a window; an interrupted stream continues exactly."""

    @property
    def lengths(self) -> list[int]:
        """Samples of each shard."""
        found: list[int] = np.diff(self.ends, prepend=0).tolist()
        return found


def _suffix(field: str) -> str:
    return field.rpartition(".")[2]


def _record(stored: ShardSample) -> dict[str, Any]:
    """Read the JSON of a sample and its texts, each under the name of its field.

    Raises:
        ZooError: one of them cannot be read, a field is there twice, or a member is a video.
    """
    record: dict[str, Any] = {}
    for field, member in stored.members.items():
        if f".{_suffix(field)}" in VIDEOS:
            raise ZooError(f"{member}: the video lies in an archive; videos are read from files.")
        if _suffix(field) == "json":
            values = parse_value(member(), str(member))
            if field == "json" and not isinstance(values, dict):
                raise ZooError(f"{member} holds a {type(values).__name__}; an object with fields is needed.")
            found = values if field == "json" else {field.removesuffix(".json"): values}
        elif _suffix(field) in TEXTS:
            try:
                found = {field: member().decode("utf-8-sig")}
            except UnicodeDecodeError as error:
                raise ZooError(f"{member} is not text in UTF-8: {error}.") from None
        else:
            continue
        if twice := next((name for name in found if name in record), None):
            raise ZooError(f"{stored.where} has the field {twice!r} twice: in its JSON and as a member.")
        record |= found
    return record


def _image(image: Any, stored: ShardSample, one: bool) -> bytes | TarMember:
    """Find the member that a record names; where record and sample have a single image, it may have another name."""
    if not isinstance(image, str):
        raise ZooError(f"{stored.where}: an image is named by a text, got {type(image).__name__} {str(image)[:40]!r}.")
    if (data := inline_image(image, stored.where)) is not None:
        return data
    shown = {field: member for field, member in stored.members.items() if _suffix(field) in IMAGES}
    name = PurePosixPath(image).name
    for field, member in shown.items():
        if image in (field, member.name) or name == PurePosixPath(member.name).name:
            return member
    if one and len(shown) == 1:
        return next(iter(shown.values()))
    there = ", ".join(PurePosixPath(member.name).name for member in shown.values()) or "none"
    raise ImageError(f"{stored.where}: there is no image {image!r}; its members that are images: {there}.")
