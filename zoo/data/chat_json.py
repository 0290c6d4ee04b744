"""Questions and dialogs in JSON files: LLaVA's format, chat messages, or columns of question and answer.

Records are read by `records.py`. Images are files below a folder or members of archives. Training can take all
dialogs about the same images as one sample, in which the images are encoded once.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.image_store import ImageStore, open_store
from zoo.data.record_file import RecordFile
from zoo.data.record_groups import Grouping, Groups, kept_groups
from zoo.data.records import RecordFields, inline_image, read_record, record_id, shared_head
from zoo.data.splits import require_split
from zoo.data.unread_images import require_seen
from zoo.registry import MISSING, Dataset, Dialog, RecordError, Sample, ZooError, naming, register
from zoo.vision.images.video import VIDEOS, Video

CHECKED = 1_000_000  # records up to which all are read when a file is opened
SPREAD = 100_000  # that are read of more
GROUPING = 1  # version of how records are grouped, which kept groups depend on
OTHER_SPLIT = ("",)  # in place of a head: the record belongs to another split


@dataclass
class ChatJsonConfig(RecordFields):
    file: str = MISSING  # .json, .jsonl or the same with .gz; {split} in the name is replaced
    images: str = ""  # folder, archive (.tar, .zip) or pattern such as shards/*.tar; empty: the folder of the file
    split: str = "train"  # part of the file name, or the value wanted in split_field
    eval_split: str = ""  # split for evaluation if the run has training data only; empty: none
    split_field: str = ""  # column with the split of a record; empty: all records are taken
    frames: int = 8  # frames of a video (a file named as an image that ends in .mp4, .webm and the like), evenly spaced
    # One sample for all records about the same images, with a dialog for each, whose meta has the record's id
    group_by_image: bool = False
    limit: int = 0  # number of records, the first ones; 0: all
    # Read records when the file is opened, to report broken ones early: all of them up to a million, 100,000 evenly
    # spread of more; skip_broken=true turns it off
    check: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 0:
            raise ZooError(f"limit must be 0 (all records) or more, got {self.limit}.")
        if not self.split_field:
            require_split(self.eval_split, {"file": self.file}, "split_field has to name a column")


@register("dataset", "chat_json")
class ChatJson(Dataset):
    """A file of records, read and checked when it is opened; images are opened when a sample is taken."""

    def __init__(self, config: ChatJsonConfig) -> None:
        self.config = config
        path = Path(config.file.replace("{split}", config.split))
        self.records = RecordFile(path)
        self.store: ImageStore = open_store(config.images or str(path.parent))
        self.groups = self._groups()
        if not self.groups:
            asked = f" with {config.split_field} = {config.split!r}" if config.split_field else ""
            raise ZooError(f"{path} has no record{asked}.")
        if config.check and not config.image_field:
            self._require_seen(self.groups[0][0])

    def __len__(self) -> int:
        return len(self.groups)

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return one sample; the order and the words are the same in every epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        members = self.groups[index]
        dialogs: list[Dialog] = []
        images: list[Any] = []
        for member in members:
            record = self.records[member]
            images, dialog = read_record(record, self.config, self._where(record, member))
            if len(members) > 1 and (own := record_id(record, self.config)):  # the sample has that of the first
                dialog.meta.setdefault("id", own)
            dialogs.append(dialog)
        first = self.records[members[0]]
        name = record_id(first, self.config) or f"{self.records.path.name}:{members[0]}"
        sources = [self._image(image, self._where(first, members[0])) for image in images]
        for dialog in dialogs:
            _name_videos(dialog, sources)
        return Sample(name, sources, dialogs)

    def place(self, index: int) -> str:
        """Name the place of a sample, its first record, for a message."""
        return self.records.where(self.groups[index][0])

    def train_split(self) -> "ChatJson":
        """Return the training records of the same file or set, for baselines of constant answers."""
        config = self.config
        if config.split == "train" or not (config.split_field or "{split}" in config.file):
            return self
        return ChatJson(replace(config, split="train", limit=0))

    def eval_split(self) -> "ChatJson | None":
        """Return the records for evaluation; None without an `eval_split`."""
        if not self.config.eval_split:
            return None
        return ChatJson(replace(self.config, split=self.config.eval_split, limit=0))

    def _groups(self) -> Groups:
        """Return the records of each sample. Records are read once, to report the first broken one.

        Without `check` as few as possible are read, and a broken record raises when its sample is taken.
        """
        config = self.config
        number = len(self.records)
        if not (config.split_field or config.group_by_image):
            number = min(number, config.limit or number)
            if config.check:
                for index in range(number) if number <= CHECKED else np.linspace(0, number - 1, SPREAD, dtype=int):
                    self._checked_head(int(index))
            return Groups(number)
        options = {name: value for name, value in asdict(config).items() if name not in ("images", "frames")}
        return kept_groups(self.records.beside("groups", f"{GROUPING} {options}"), self._grouping)

    def _grouping(self) -> Grouping:
        """Read the records of the split, up to the limit, and what those that belong together share."""
        found, taken = Grouping(), 0
        for index in range(len(self.records)):
            if self.config.limit and taken == self.config.limit:
                break
            head = self._checked_head(index)
            if head != OTHER_SPLIT:
                found.add(index, repr(head) if head else None)
                taken += 1
        return found

    def _checked_head(self, index: int) -> tuple[Any, ...] | None:
        """Return the head of a record; of a broken one, None, or its error where records are checked."""
        try:
            with naming("", self.records.where(index)):
                return self._head(index)
        except RecordError as error:
            if self.config.check:
                raise (error.__cause__ if isinstance(error.__cause__, ZooError) else error) from error.__cause__
            return None

    def _head(self, index: int) -> tuple[Any, ...] | None:
        """Return the head of a record, by which `group_by_image` groups; None: the record is a sample of its own.

        Raises:
            ZooError: the record is broken.
        """
        record = self.records[index]
        where = self._where(record, index)
        if self.config.split_field and self._split_of(record, where) != self.config.split:
            return OTHER_SPLIT
        images, dialog = read_record(record, self.config, where)
        head = shared_head(dialog) if self.config.group_by_image else None
        return None if head is None else (*map(str, images), head)

    def _require_seen(self, index: int) -> None:
        """Refuse a record without an image that names one in a field which is not read."""
        record, config = self.records[index], self.config
        if not read_record(record, config, "")[0]:
            texts = {config.question_field, config.answer_field}
            require_seen(record, texts, self.store, self.records.where(index))

    def _split_of(self, record: dict[str, Any], where: str) -> str:
        if self.config.split_field not in record:
            raise ZooError(f"{where} has no field {self.config.split_field!r} to tell its split.")
        return str(record[self.config.split_field])

    def _where(self, record: dict[str, Any], index: int) -> str:
        name = record_id(record, self.config)
        return self.records.where(index) + (f" (record {name!r})" if name else "")

    def _image(self, image: Any, where: str) -> bytes | Path | Callable[[], bytes] | Video:
        if not isinstance(image, str):
            raise ZooError(f"{where}: an image is named by a text, got {type(image).__name__} {str(image)[:40]!r}.")
        data = inline_image(image, where)
        found = self.store.find(image, where) if data is None else data
        if data is None and Path(image).suffix.lower() in VIDEOS:
            if not isinstance(found, Path):
                raise ZooError(f"{where}: the video {image!r} lies in an archive; videos are read from files.")
            return Video(str(found), frames=self.config.frames)
        return found


def _name_videos(dialog: Dialog, sources: list[Any]) -> None:
    """Set the type of parts that show a video to `video`."""
    parts = [p for m in dialog.messages if not isinstance(m["content"], str) for p in m["content"]]
    for part, source in zip([p for p in parts if p["type"] in ("image", "video")], sources, strict=False):
        if isinstance(source, Video):
            part["type"] = "video"
