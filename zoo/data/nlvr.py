"""NLVR: is a sentence that a person wrote true of three boxes with coloured shapes?

Paper: Suhr et al., A Corpus of Natural Language for Visual Reasoning, ACL 2017. Reads the official JSON fields
(`identifier`, `sentence`, `label`, `structured_rep`) and draws the images from the structure; no pixels are stored.
Training files are those of our selection of the corpus: official examples, other images of the same presentations, and
sentences paired with further training images. The last two have labels computed by programs, so the score of a model
trained on them needs a note beside published ones.

`boxes`, the default, gives three images of 100 x 100: with patches of 10 pixels the smallest shape is one patch, and
gaps between boxes cost no tokens. `canvas` is the official 400 x 100, `square` a 224 x 224 arrangement of two rows for
encoders that take one square image.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.absent import absent
from zoo.data.nlvr_draw import LAYOUTS, ORDERS, Drawing, Shape, Sprites, cell_labels, drawings, read_box
from zoo.data.nlvr_probes import KINDS as PROBE_KINDS
from zoo.data.nlvr_probes import Probes, is_tower
from zoo.data.record_file import RecordFile
from zoo.registry import Dataset, Dialog, Sample, ZooError, register, unknown

SOURCES = {  # training files, in the order in which a label counts where two files label the same pair
    "official": "train_official.jsonl.gz",
    "same_presentation": "train_same_presentation.jsonl.gz",
    "pairs": "train_pairs.jsonl.gz",
}
SPLITS = ("train", "dev")


@dataclass
class NLVRConfig:
    root: str = ""  # folder with dev.jsonl.gz, train_*.jsonl.gz and sprites.json; empty: nlvr below $ZOO_DATA or data
    split: str = "train"  # train | dev
    # Of train: official, same_presentation, pairs; none: every picture, with probes alone.
    sources: list[str] = field(default_factory=lambda: list(SOURCES))
    layout: str = "boxes"  # boxes: three images 100 x 100 | canvas: one 400 x 100 | square: one 224 x 224
    shuffle_boxes: bool = True  # training shows the boxes in an order drawn anew in each epoch; dev in the official one
    group_by_image: bool = True  # train: one sample for all sentences about an image
    probes: int = 0  # questions about the structure itself, made up for each training picture and epoch
    probe_kinds: list[str] = field(default_factory=lambda: list(PROBE_KINDS))  # point | list | count | statement
    most_sentences: int = 16  # of a training sample; more are drawn from in each epoch
    prompt: str = "True or false: {sentence}"  # text of the user turn
    plain_text: bool = False  # sentences in lower case and without the full stop
    grid: int = 0  # cells per side of dense labels of each image, as in `scenes`; 0: none
    seed: int = 0  # of the order of boxes and the choice of sentences, with the epoch and the index
    limit: int = 0  # first examples only; 0: all

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise unknown("split of nlvr", self.split, SPLITS)
        if self.layout not in LAYOUTS:
            raise unknown("layout of nlvr", self.layout, LAYOUTS)
        for source in self.sources:
            if source not in SOURCES:
                raise unknown("training source of nlvr", source, SOURCES)
        for kind in self.probe_kinds:
            if kind not in PROBE_KINDS:
                raise unknown("kind of probe", kind, PROBE_KINDS)
        if self.probes and not self.probe_kinds:
            raise ZooError("probes are wanted, but probe_kinds is empty.")
        if "{sentence}" not in self.prompt:
            raise ZooError(f"prompt must hold '{{sentence}}', got {self.prompt!r}.")
        if min(self.grid, self.limit, self.probes) < 0 or self.most_sentences < 1:
            raise ZooError("grid, limit and probes must be 0 or more, most_sentences 1 or more.")
        if not self.sources and not self.probes:
            raise ZooError("There is nothing to ask: sources is empty and probes is 0.")


@register("dataset", "nlvr")
class NLVR(Dataset):
    """Samples are pictures with all their sentences (train) or one sentence each (dev)."""

    def __init__(self, config: NLVRConfig) -> None:
        self.config = config
        self.root = Path(config.root or Path(os.environ.get("ZOO_DATA", "data")) / "nlvr")
        if not self.root.is_dir():
            raise absent(self.root, "It holds the files of NLVR; name it with root=...", what="folder")
        self.sprites = Sprites(self.root / "sprites.json")
        self.training = config.split == "train"
        train_sentences = {r["sid"]: r["sentence"] for r in self._records("train_sentences.jsonl.gz")}
        self.seen = frozenset(train_sentences.values())
        self.pictures: dict[str, list[list[Shape]]] = {}
        # (identifier of the picture, sentence, label) of each example
        self.examples = self._train(train_sentences) if self.training else self._dev()
        groups: dict[Any, list[int]] = {}
        if self.training and not config.sources:
            groups = {identifier: [] for identifier in self._limited(list(self.pictures))}
        for number, (identifier, _, _) in enumerate(self.examples):
            groups.setdefault(identifier if self.training and config.group_by_image else number, []).append(number)
        self.groups = list(groups.items())
        self.probes = Probes(self.pictures.values())

    def __len__(self) -> int:
        return len(self.groups)

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return one picture and its sentences."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = np.random.default_rng([self.config.seed & 0xFFFFFFFF, epoch, index])
        identifier, members = self.groups[index]
        if len(members) > self.config.most_sentences:
            members = [members[i] for i in sorted(random.permutation(len(members))[: self.config.most_sentences])]
        if not self.training or not self.config.group_by_image:
            identifier = self.examples[members[0]][0]
        boxes = self.pictures[identifier]
        if self.training and self.config.shuffle_boxes:
            boxes = [boxes[i] for i in ORDERS[random.integers(len(ORDERS))]]
        images = drawings(self.sprites, boxes, self.config.layout)
        targets = {"patch_labels": cell_labels(images, self.config.grid)} if self.config.grid else {}
        dialogs = [self._dialog(*self.examples[member], num_images=len(images)) for member in members]
        if self.training and self.config.probes:
            made = self.probes.draw(random, boxes, self.config.probes, self.config.probe_kinds)
            dialogs += [Dialog(self._turns(*probe, num_images=len(images)), kind="probe") for probe in made]
        return Sample(f"{self.config.split}-{identifier}", list[Drawing | Any](images), dialogs, targets)

    def train_split(self) -> "NLVR":
        """Return the training examples, for baselines of constant answers."""
        return self if self.training else NLVR(replace(self.config, split="train", limit=0))

    def eval_split(self) -> "NLVR | None":
        """The development examples; None for data of probes alone."""
        if not self.config.sources:
            return None
        return NLVR(replace(self.config, split="dev", limit=0)) if self.training else self

    def _dialog(self, identifier: str, sentence: str, label: str, num_images: int) -> Dialog:
        kind = "sentence" if self.training else "sentence_seen" if sentence in self.seen else "sentence_new"
        tower = is_tower(self.pictures[identifier])
        return Dialog(
            self._turns(sentence, label, num_images),
            kind=kind,
            choices=["true", "false"],
            meta={"identifier": identifier, "group": sentence, "picture": "tower" if tower else "scatter"},
        )

    def _turns(self, sentence: str, answer: str, num_images: int) -> list[dict[str, Any]]:
        said = sentence.strip()
        if self.config.plain_text:
            said = said.lower().rstrip(" .")
        question = self.config.prompt.replace("{sentence}", said)
        asked = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": question}]
        return [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]

    def _records(self, name: str) -> RecordFile:
        return RecordFile(self.root / name)

    def _dev(self) -> list[tuple[str, str, str]]:
        examples = []
        for record in self._limited(self._records("dev.jsonl.gz")):
            self._add_picture(record)
            examples.append((record["identifier"], record["sentence"], _label(record)))
        return examples

    def _train(self, sentences: dict[str, str]) -> list[tuple[str, str, str]]:
        for record in self._records("train_images.jsonl.gz"):
            self._add_picture(record)
        labels: dict[tuple[str, str], str] = {}
        for source in SOURCES:
            if source not in self.config.sources:
                continue
            for record in self._records(SOURCES[source]):
                if record["identifier"] not in self.pictures:
                    self._add_picture(record)
                sentence = record["sentence"] if "sentence" in record else sentences[record["sid"]]
                labels.setdefault((record["identifier"], sentence), _label(record))
        return self._limited([(*key, label) for key, label in labels.items()])

    def _limited(self, rows: Any) -> Any:
        return [row for row, _ in zip(rows, range(self.config.limit or len(rows)), strict=False)]

    def _add_picture(self, record: dict[str, Any]) -> None:
        where = f"Example {record.get('identifier')!r} of NLVR"
        structure = record.get("structured_rep")
        if not isinstance(structure, list) or len(structure) != 3:
            raise ZooError(f"{where} needs a structured_rep of three boxes.")
        self.pictures[record["identifier"]] = [read_box(box, where) for box in structure]


def _label(record: dict[str, Any]) -> str:
    label = str(record.get("label")).lower()
    if label not in {"true", "false"}:
        raise ZooError(f"Example {record.get('identifier')!r} of NLVR has label {label!r}, not true or false.")
    return label
