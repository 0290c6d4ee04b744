"""A teacher's outputs in safetensors shards: the top-k next tokens of every position, and the mass of the others.

A folder holds `store.json` (teacher, data, settings) and `shard-00000.safetensors`, ...; each shard has for its samples

    keys                 (n, 16) uint8, a hash of the sample's id and text
    P.offsets            (n + 1,) int64, where the positions of each sample begin; P is `response`, `visual`, `pairs`
    P.ids, P.log_probs   (S, K) the top-k tokens, most likely first
    P.log_rest           (S,) logarithm of the mass of all others

For `pairs`, the reference of a preference loss, a position is a whole answer with one number: its log-probability.
Samples are looked up by hash, so that order, packing, workers and epochs may change. Changed text is not found; changed
images are detected by the hash of the data set. Of data that shows its images otherwise in each epoch (flips, shifts,
crops; `pictures` of `store.json`) the hash is of the images too, and each epoch is stored. Where there are several
data sets (`by_data`) it is of their names too: `train-7` of one may say what `train-7` of another does.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.registry import IGNORE_INDEX, RecordError, Sample, ZooError, naming, read_sample, refuse_code
from zoo.registry.foreign import read_json
from zoo.settings.source import source_named
from zoo.storage.atomic import write_json
from zoo.storage.shards import Place, Shards, key_of, keys_of, offsets_of, shards_of, write_shard
from zoo.storage.weights import fingerprint
from zoo.text.batch import EncodedSample
from zoo.vision.images.identity import identify
from zoo.vision.images.processors import Picture

INDEX = "store.json"
FORMAT = 2
FILES = "files"  # in `store.json`: the fingerprint of the teacher's files, where they lie on this machine
LATER = ("precision", "weights")  # settings that stores of an earlier version do not state
PROBES = 16  # samples of each data set whose images are part of its hash
STORED = RESPONSE, VISUAL, PAIRS = "response", "visual", "pairs"
WHAT = ("ids", "log_probs", "log_rest")
WHAT_STORE = "a stored teacher"  # for messages


def sample_key(sample: Sample, pictures: bool = False, by_data: bool = False) -> bytes:
    """Hash a sample's id and messages to 16 bytes; also its images, and the name of its data set, if asked for."""
    named = [sample.data] if by_data else []
    text = json.dumps([sample.id, len(sample.images), [d.messages for d in sample.dialogs], *named], default=str)
    whole = hashlib.blake2b(text.encode(), digest_size=16)
    for image in sample.images if pictures else ():
        whole.update(key_of(*identify(image)[0]))
    return whole.digest()


def draws_pictures(dataset: Any) -> bool:
    """Whether a data set shows `PROBES` of its samples otherwise in later epochs; of a stream it is not known."""
    if dataset.is_stream:
        return False
    for index in _probes(dataset):
        made = (read_sample("", dataset, index, epoch) for epoch in range(3))
        keys = {sample_key(replace(s, id="", dialogs=[]), True) for s in made if not isinstance(s, RecordError)}
        if len(keys) > 1:
            return True
    return False


def data_hash(dataset: Any) -> str:
    """Hash a data set: its length, and the text and images of `PROBES` samples at equal distances.

    A streaming data set has no length and no random access: its hash is empty, and only its text is verified, sample by
    sample.
    """
    if dataset.is_stream:
        return ""
    from zoo.vision.images.decode import open_image

    whole = hashlib.sha256(str(len(dataset)).encode())
    for index in _probes(dataset):
        sample = read_sample("", dataset, index)
        if isinstance(sample, RecordError):
            whole.update(b"broken")  # a record that breaks, or is mended, changes the hash too
            continue
        whole.update(sample_key(sample))
        for source in sample.images:
            try:
                with naming(""):
                    pixels = open_image(source() if callable(source) else source, sample.id).tobytes()
            except RecordError:
                pixels = b"broken"
            whole.update(pixels)
    return whole.hexdigest()


def _probes(dataset: Any) -> list[int]:
    return sorted({i * len(dataset) // PROBES for i in range(PROBES)})


class Writer:
    """Writes shards; continues behind the last complete one.

    Args:
        folder: of the store.
        about: settings, which must be the same as those of a store that already exists.
        rank: of this process.
        world: number of processes that write.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], rank: int = 0, world: int = 1) -> None:
        self.folder = folder
        about = json.loads(json.dumps({"format": FORMAT, **about}, default=str))
        if (folder / INDEX).is_file():
            before = read_about(folder)
            for key, value in about.items():
                if key != FILES and before.get(key) != value and (key in before or key not in LATER):
                    what = "state of the teacher's weights" if key == "weights" else key
                    raise ZooError(
                        f"The store {str(folder)!r} was begun with another {what}: {_short(before.get(key))}, now "
                        f"{_short(value)}. Choose another folder, or remove this one."
                    )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / INDEX, about)
        there = shards_of(folder)
        # Rank r writes shards first + r, first + r + world, ...: file names never collide, without communication.
        self.number = (int(there[-1].stem.rpartition("-")[2]) + 1 if there else 0) + rank  # of the next shard
        self.world = world

    def known(self) -> set[bytes]:
        """Return the keys of the samples that are already stored."""
        return {key for file in shards_of(self.folder) for key in keys_of(file, WHAT_STORE)}

    def write(self, samples: Sequence[tuple[bytes, Mapping[str, Mapping[str, torch.Tensor]]]]) -> None:
        """Write the next shard.

        Args:
            samples: for each sample its key, and by kind of position (`response`, ...) the tensors named in `WHAT`.
        """
        tensors: dict[str, torch.Tensor] = {}
        for positions in samples[0][1]:
            parts = [outputs[positions] for _, outputs in samples]
            tensors[f"{positions}.offsets"] = offsets_of([len(p["ids"]) for p in parts])
            tensors |= {f"{positions}.{what}": torch.cat([p[what] for p in parts]).contiguous() for what in WHAT}
        write_shard(self.folder / f"shard-{self.number:05d}.safetensors", [key for key, _ in samples], tensors)
        self.number += self.world


def files_of(node: Mapping[str, Any]) -> str:
    """Return the fingerprint of a teacher's files; empty where they are not on this machine."""
    place = source_named(node["model"], *node["options"]).present
    return "" if place is None else fingerprint(place)


def read_about(folder: Path) -> dict[str, Any]:
    """Return the settings of a store.

    Raises:
        ZooError: the folder holds no store, or one of another version.
    """
    if not (folder / INDEX).is_file():
        raise ZooError(f"There is no stored teacher in {str(folder)!r}: no {INDEX}. `zoo teach` writes one.")
    about = read_json(folder / INDEX)
    if not isinstance(about, dict):
        raise ZooError(f"{str(folder)!r} is not a store: its {INDEX} holds a {type(about).__name__}.")
    refuse_code(about, f"The store {str(folder)!r}")
    if about.get("format") != FORMAT:
        raise ZooError(f"The store {str(folder)!r} has format {about.get('format')}; this version reads {FORMAT}.")
    return about


class TeacherStore:
    """A store, open for training: adds the teacher's outputs to the targets of each row.

    Args:
        folder: of the store.
        needs: capabilities that the distiller asks for, such as `teacher.response`.
    """

    def __init__(self, folder: str | Path, needs: frozenset[str] = frozenset()) -> None:
        self.folder = Path(folder)
        self.about = read_about(self.folder)
        self.vocab_size = int(self.about["vocab_size"])
        self.positions = [p for p in STORED if f"teacher.{p}" in needs]
        if absent := [p for p in self.positions if p not in self.about["positions"]]:
            raise ZooError(
                f"The store {str(self.folder)!r} holds {', '.join(self.about['positions'])} positions; "
                f"the distiller needs {absent[0]}."
            )
        self.shards = Shards(self.folder, WHAT_STORE)

    def outputs_for(self, batch: Any, student: Any) -> None:
        """Return None, unlike a live teacher: the stored outputs are targets of the batch."""

    def add(self, sample: Sample, pieces: Sequence[Sample], rows: list[EncodedSample]) -> list[EncodedSample]:
        """Put the teacher's outputs into the targets of a sample's rows.

        Raises:
            ZooError: the store does not have the sample, or has another number of labels or image tokens for it.
        """
        drawn = sample.data in (self.about.get("pictures") or ())
        found = self.shards.where.get(sample_key(sample, drawn, bool(self.about.get("by_data"))))
        if found is None:
            what = "its text, or its picture, which is drawn anew in each epoch," if drawn else "its text"
            raise ZooError(
                f"Sample {sample.id!r} is not in the store {str(self.folder)!r}: {what} differs, or zoo teach was "
                f"stopped before it. Run zoo teach again with the same data{' and length of the stage' * drawn}."
            )
        stored = {p: self.read(found, p) for p in self.positions}
        # The model shifts labels by one, so the first position has no prediction.
        counts = [int((row.labels[1:] != IGNORE_INDEX).sum()) for row in rows]
        if RESPONSE in stored and len(stored[RESPONSE]["ids"]) != sum(counts):
            raise ZooError(
                f"The store {str(self.folder)!r} has {len(stored[RESPONSE]['ids'])} labels for sample {sample.id!r}, "
                f"the student {sum(counts)}: tokenizer or template differ."
            )
        # The store has a sample's positions in one piece; with pack=none each dialog is a row of its own, so rows take
        # consecutive slices: of labels from `start`, of pairs from `first`. Image tokens are the same for each row.
        start, first = 0, 0
        for row, count in zip(rows, counts, strict=True):
            row.targets = dict(row.targets)
            answers = 0 if row.pairs is None else len(np.unique(row.pairs[row.pairs >= 0]))
            parts = {RESPONSE: slice(start, start + count), PAIRS: slice(first, first + answers)}
            first += answers
            for positions, values in stored.items():
                part = parts.get(positions, slice(None))
                row.targets |= {f"teacher.{positions}.{what}": values[what][part] for what in WHAT}
            if VISUAL in stored:
                tiles = sum(p.cut.rows if isinstance(p, Picture) else 1 for p in row.pixel_values)
                if len(stored[VISUAL]["ids"]) != tiles * self.about["cells"]:
                    raise ZooError(
                        f"The store {str(self.folder)!r} has {len(stored[VISUAL]['ids'])} image tokens for sample "
                        f"{sample.id!r}, and the student cuts its images into {tiles} of {self.about['cells']} each: "
                        "give both one image processor, or set visual_weight: 0."
                    )
                row.targets["teacher.visual.cells"] = np.array([self.about["cells"]])
            start += count
        return rows

    def read(self, place: Place, positions: str) -> dict[str, np.ndarray]:
        """Read what is stored for the positions of a sample, by `WHAT`."""
        names = {what: f"{positions}.{what}" for what in WHAT}
        found = self.shards.read(place, f"{positions}.offsets", list(names.values()))
        return {what: found[name] for what, name in names.items()}

    def teacher_has_changed(self) -> bool:
        """Whether the teacher has other weights than it had for the store, as far as its files are on this machine."""
        try:
            now = files_of(self.about["teacher"])
        except (ZooError, OSError):
            return False  # it is not needed any more
        return bool(now) and now != self.about.get(FILES, now)

    def verify(self, datasets: Mapping[str, Any]) -> None:
        """Refuse data other than the teacher's.

        Raises:
            ZooError: the store has no such data set, or one with another hash.
        """
        for name, dataset in datasets.items():
            known = self.about["data"].get(name)
            if known is None:
                raise ZooError(
                    f"The store {str(self.folder)!r} is of {', '.join(self.about['data'])}, not of {name!r}."
                )
            if (now := data_hash(dataset)) != known:
                raise ZooError(
                    f"data {name!r} is not the data that the store {str(self.folder)!r} was made from: its hash is "
                    f"{now[:12]}, and was {known[:12]}. Run zoo teach again into another folder."
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
