"""Pairs of answers to the same prompt, one preferred: records with `prompt`, `chosen`, `rejected` and images.

All forms of TRL and of published sets are read: texts (RLAIF-V calls the prompt `question`), lists of chat turns or of
LLaVA's, one such turn, or two whole conversations that begin alike and need no prompt. A sample is two dialogs that
share the images: the chosen one, which may also be learned as any answer, and the rejected one, which never is. In
evaluation the chosen answer is the right one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from zoo.data.hub_rows import open_rows, row_image
from zoo.data.image_store import ImageStore, open_store
from zoo.data.record_file import RecordFile
from zoo.data.records import ROLES, RecordFields, as_rows, images_of, place_images, read_turns, record_id, stated
from zoo.data.unread_images import require_seen
from zoo.registry import MISSING, Dataset, Dialog, Sample, ZooError, register, unknown

PROMPTS = ("prompt", "question", "conversations", "messages")  # looked for where no column is named


@dataclass
class PreferenceConfig:
    # .json, .jsonl (or with .gz; {split} is replaced), or what data set hf opens: org/name on the hub, a folder, a file
    path: str = MISSING
    images: str = ""  # folder, tar archive or pattern of image files; empty: the folder of the file
    split: str = "train"  # part of the file name, or as the hub names it
    subset: str = ""  # configuration of a hub data set
    revision: str = ""  # commit, tag or branch on the hub; empty: the newest
    prompt_field: str = ""  # empty: prompt, question, conversations or messages; where there is none, answers hold it
    chosen_field: str = "chosen"  # a text, a turn, a list of turns
    rejected_field: str = "rejected"  # the same
    image_field: str = ""  # name of an image, or a list of names; empty: image or images
    id_field: str = ""  # empty: id, qid or question_id, else the place in the file
    streaming = False  # pairs are taken by index; no option
    system: str = ""  # system turn put before dialogs that have none
    limit: int = 0  # first records only; 0: all
    check: bool = True  # read the first record when the data set is opened; skip_broken=true turns it off

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ZooError(f"limit must be 0 (all records) or more, got {self.limit}.")
        if self.chosen_field == self.rejected_field:
            raise ZooError(f"chosen_field and rejected_field are the same, {self.chosen_field!r}.")


@register("dataset", "preference")
class Preference(Dataset):
    """One sample per record: the dialogs `chosen` and `rejected`."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config
        self._fields = RecordFields(image_field=config.image_field, id_field=config.id_field)
        path = Path(config.path.replace("{split}", config.split))
        self.in_file = bool({".json", ".jsonl", ".ndjson"} & set(path.suffixes))
        self.rows: Any = RecordFile(path) if self.in_file else open_rows(config)
        images = config.images or (str(path.parent) if self.in_file else "")
        self.store: ImageStore | None = open_store(images) if images else None
        self.number = min(len(self.rows), config.limit or len(self.rows))
        if not self.number:
            raise ZooError(f"{config.path} has no record.")
        if config.check:
            shown = self.get(0).images  # a wrong column is found now
            texts = {*PROMPTS, config.prompt_field, config.chosen_field, config.rejected_field}
            if not (shown or config.image_field):
                require_seen(self.rows[0], texts, self.store, self.place(0))

    def __len__(self) -> int:
        return self.number

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return one pair; the same in every epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self.rows[index]
        name = record_id(record, self._fields)
        where = self.place(index) + (f" (record {name!r})" if name else "")
        images, dialogs = self._dialogs(record, where)
        name = name or f"{Path(self.config.path).name}:{index}"
        return Sample(name, [row_image(image, self.store, where, self.config.path) for image in images], dialogs)

    def place(self, index: int) -> str:
        """Name the place of a pair for a message."""
        return self.rows.where(index) if self.in_file else f"{self.config.path} ({self.config.split}), row {index}"

    def train_split(self) -> "Preference":
        """The training records of the same file or set."""
        if self.config.split == "train" or (self.in_file and "{split}" not in self.config.path):
            return self
        return Preference(replace(self.config, split="train", limit=0))

    def _dialogs(self, record: Mapping[str, Any], where: str) -> tuple[list[Any], list[Dialog]]:
        """Read the pair: the images as the record names them, and the two dialogs."""
        images = images_of(record, self._fields, where)
        answers = {}
        for side, column in (("chosen", self.config.chosen_field), ("rejected", self.config.rejected_field)):
            if record.get(column) is None:
                raise ZooError(f"{where}: {unknown('field', column, map(str, record))}")
            answers[side] = _as_turns(record[column], "assistant")
        prompt = _as_turns(self._prompt(record, where), "user")
        first = answers["chosen"][0] if answers["chosen"] else {}
        if not prompt or ROLES.get(str(stated(first, "role", "from"))) != "assistant":
            # Two whole conversations: the prompt is what they begin with alike, up to the last answer.
            both = zip(answers["chosen"][:-1], answers["rejected"][:-1], strict=False)
            prompt = [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
            answers = {side: turns[len(prompt) :] for side, turns in answers.items()}
        if not prompt:
            raise ZooError(f"{where} has no prompt: none of {', '.join(PROMPTS)}, and the answers begin differently.")
        dialogs = []
        for side, turns in answers.items():
            messages, found = read_turns([*prompt, *turns], images, f"{where}, {side}")
            if self.config.system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.config.system}]})
            place_images(messages, len(found), where)
            if messages[-1]["role"] != "assistant":
                raise ZooError(f"{where}: the last turn of {side!r} must be the assistant's.")
            dialogs.append(Dialog(messages, preference=side))
        return found, dialogs

    def _prompt(self, record: Mapping[str, Any], where: str) -> Any:
        wanted = self.config.prompt_field
        if wanted and wanted not in record:
            raise ZooError(f"{where}: {unknown('field', wanted, map(str, record))}")
        return record[wanted] if wanted else next((record[n] for n in PROMPTS if record.get(n) is not None), [])


def _as_turns(value: Any, speaker: str) -> list[Any]:
    """A text or one turn as a list of turns."""
    if isinstance(value, str):
        return [{"role": speaker, "content": value}]
    value = as_rows(value)
    return [value] if isinstance(value, Mapping) else list(value)
