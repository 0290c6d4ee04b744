"""Which weights a saved model need not hold: those that its base checkpoints still give, bit for bit.

Weights come from a checkpoint of the encoder, of the language model, or from a published model as a whole. A saved
model names those and holds what differs. What differs is found when it is saved: the bases are loaded once more, and
each weight is compared with what they give. Nothing has to be noticed while weights change, so it does not matter what
changes them (a fused optimiser, `.data`, a merge, another process); and what loading would draw anew, such as rows for
new tokens, differs and is saved.

Files are mapped where their layout and data type allow it: a comparison takes the time of reading them and next to no
memory, and the first difference in a weight ends it.
"""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.registry import ZooError
from zoo.storage.precision import cast_parameters, dtype_of
from zoo.storage.safetensors_file import Joined, Stored, holds, same, value_of
from zoo.storage.weights import fingerprint, names_of, snapshot

OWN = ("vision", "llm")  # parts that may have a checkpoint of their own
WHOLE = "model"  # a published checkpoint that gave all parts their weights


@dataclass
class Bases:
    """The checkpoints that a model's weights came from, each by the part it is for, or `model`.

    Attributes:
        record: what config.json says: checkpoint, revision, fingerprint; `dtype` where the weights are held in another
            than the checkpoint gives; `whole: true` where it is named for people, and for the layout of exports, and
            every weight is in the model's folder.
        given: names of the weights that the checkpoint gave.
        nodes: options of the part, to load it again.
        vocab_size: of the tokenizer that the language model was built for.
        folder: of the published checkpoint.
        stored: where its files have the weights that it gave.
        dtype: that its weights were read as; None: that of the files.
        bits: in which the layers of its language model are held; 0: all.
    """

    record: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: dict[str, frozenset[str]] = field(default_factory=dict)
    nodes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    vocab_size: int | None = None
    folder: Path | None = None
    stored: Mapping[str, Stored | Joined] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    bits: int = 0

    @property
    def names(self) -> frozenset[str]:
        """Weights that need not be in the model's folder."""
        return frozenset().union(*self.given.values())

    def require_same(self, saved: Mapping[str, Any] | None) -> None:
        """Refuse base weights that are not those a folder was saved on.

        Raises:
            ZooError: the checkpoint of a part has another fingerprint now.
        """
        for part, base in (saved or {}).items():
            now = self.record.get(part, {}).get("fingerprint")
            if base.get("fingerprint") and now and now != base["fingerprint"]:
                raise ZooError(
                    f"The base weights of {part} in {base['checkpoint']!r} differ from those the model was saved on "
                    f"(fingerprint {now[:12]}, was {base['fingerprint'][:12]})."
                )

    def require_elsewhere(self, folder: Path) -> None:
        """Refuse to write where weights come from: what would be written names them.

        Raises:
            ZooError: `folder` is that of a base.
        """
        for key, entry in self.record.items():
            place = self.folder if key == WHOLE and self.folder is not None else Path(entry["checkpoint"])
            if place.is_dir() and folder.is_dir() and folder.samefile(place):
                raise ZooError(f"{str(folder)!r} is where the base weights of {key} come from: save to another folder.")

    def require_whole(self, model: Any) -> None:
        """Refuse to write all weights where some have no form of their own.

        Raises:
            ZooError: the language model is held in few bits.
        """
        if self._in_few_bits(model):
            raise ZooError("The model is held in few bits, and saved by the name of its checkpoint: load without bits.")

    def changed(
        self, model: Any, state: Mapping[str, Tensor], slots: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights of `state` that the bases do not give any more, and what a config is to say of the bases.

        Args:
            model: whose weights these are.
            state: whole tensors, each by the first of its names.
            slots: the parts' options as they are saved: one that names no checkpoint any more has all its weights.

        Raises:
            ZooError: a weight that is held in few bits changed.
        """
        aliases, few = names_of(model), self._in_few_bits(model)
        unchanged: set[str] = set()
        record: dict[str, Any] = {}
        for key, entry in self.record.items():
            given = self.given[key] & state.keys()
            if key in OWN and not (slots.get(key) or {}).get("checkpoint"):
                given = frozenset()
            try:
                again = self._again(key) if given else {}
                found = {n for n in given if self._still(state[n], again, aliases[n], few.get(n))}
            except Exception as error:  # each library has its own; what was trained is saved, whatever the reason
                why = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(
                    f"The base weights of {key} in {entry['checkpoint']!r} cannot be read any more, so all weights "
                    f"that came from there are saved: {why}",
                    stacklevel=3,
                )
                again, found = {}, set(given & few.keys())  # they have no form of their own to be saved in
            else:
                if given and (lost := sorted(few.keys() - found)):
                    raise ZooError(
                        f"{lost[0]!r} is held in few bits and is no longer what {entry['checkpoint']!r} gives "
                        f"({len(lost)} such weights), so naming the checkpoint would lose the change. Load the model "
                        f"without bits for what changes its weights."
                    )
            unchanged |= found
            if found:
                record[key] = {**entry, **_other_dtype([state[n] for n in found], again)}
            else:
                record[key] = as_whole(entry)
        return {n: t for n, t in state.items() if n not in unchanged}, record

    def _again(self, key: str) -> Mapping[str, Stored | Joined | Tensor]:
        """What a base gives, read once more from where it was found."""
        if key == WHOLE:
            assert self.folder is not None, "a published checkpoint was read from a folder"
            now = fingerprint(self.folder)
            if now != self.record[key]["fingerprint"]:
                raise ZooError(f"its files are others now, with fingerprint {now[:12]}")
            return self.stored
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), _no_progress():
            torch.default_generator.seed()  # what is drawn shall be another thing than it was
            part = registry.build(key, self.nodes[key], vocab_size=self.vocab_size)
        return {f"{key}.{name}": tensor for name, tensor in part.state_dict().items()}

    def _still(
        self, tensor: Tensor, again: Mapping[str, Stored | Joined | Tensor], names: Sequence[str], few: Any = None
    ) -> bool:
        """Whether a weight, under any of its names, is what its base gives; `few`: the layer that holds it in bits."""
        found = next((again[name] for name in names if name in again), None)
        if found is None:
            return False
        if isinstance(found, Tensor):
            return same(tensor, found)
        if few is None:
            return holds(tensor, found)
        from zoo.published.bits import made_of

        value = value_of(found)
        return made_of(few, value if self.dtype is None else value.to(self.dtype), self.bits)

    def _in_few_bits(self, model: Any) -> dict[str, Any]:
        """Names of the weights that are held in few bits, and the layers that hold them."""
        if not self.bits:
            return {}
        from zoo.published.bits import layers_in

        layers = {id(layer.weight): layer for layer in layers_in(model.llm)}
        return {n: layers[id(t)] for n, t in model.state_dict(keep_vars=True).items() if id(t) in layers}


def as_whole(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a base that gives nothing: it says where a model came from, and no more."""
    return {k: v for k, v in entry.items() if k != "dtype"} | {"whole": True}


def bases_of(model: Any, slots: Mapping[str, Any], published: Any = None) -> Bases:
    """Note where the weights of a model, which have just been read, came from.

    Args:
        model: composed.
        slots: its parts' options.
        published: what read the weights of a published checkpoint, or of a zoo model's own folder; None: nothing.
    """
    bases = Bases(vocab_size=model.config.text_vocab_size)
    for key, before in (model.config.base or {}).items():
        if before.get("whole"):
            bases.record[key], bases.given[key] = dict(before), frozenset()
    if published is not None and published.checkpoint.record:
        found, held = published.checkpoint, published.placement
        bases.record[WHOLE] = found.record
        bases.folder, bases.dtype, bases.bits = found.folder, held.dtype, held.bits
        bases.stored = published.tensors  # by the names of the parts' modules
        read = published.filled.tensors if published.filled is not None else {}
        bases.given[WHOLE] = frozenset(n for n, t in model.state_dict(keep_vars=True).items() if id(t) in read)
    for part in OWN:
        node = slots.get(part) or {}
        if not node.get("checkpoint"):
            continue
        checkpoint, revision = node["checkpoint"], node.get("revision") or None
        entry: dict[str, Any] = {"checkpoint": checkpoint, "revision": revision}
        folder = snapshot(checkpoint, revision)
        if folder is not None and folder == Path(checkpoint):
            entry |= {"checkpoint": str(folder.absolute()), "fingerprint": fingerprint(folder)}
            node = {**node, "checkpoint": entry["checkpoint"]}
        elif folder is not None and "revision" in node:
            entry["revision"] = folder.name  # a commit of the hub, so that nothing newer is taken for it
            node = {**node, "revision": folder.name}
        bases.record[part], bases.nodes[part] = entry, dict(node)
        names = (f"{part}.{name}" for name in getattr(model, part).state_dict())
        bases.given[part] = frozenset(n for n in names if model.part_of(n) == part) - bases.names
        if dtype := dtype_of(((model.config.base or {}).get(part) or {}).get("dtype")):  # as it was saved
            cast_parameters(model, dtype, only=bases.given[part])
    return bases


def _other_dtype(unchanged: Sequence[Tensor], again: Mapping[str, Stored | Joined | Tensor]) -> dict[str, str]:
    """Say the data type that unchanged weights are held in, where it is another one than the base gives them in."""
    held, given = (_usual_dtype(tensors) for tensors in (unchanged, again.values()))
    return {} if held == given or given is None else {"dtype": str(held).removeprefix("torch.")}


def _usual_dtype(tensors: Iterable[Stored | Joined | Tensor]) -> torch.dtype | None:
    """The data type of most floating point numbers; routers and the like may have another."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            numbers[tensor.dtype] += math.prod(tensor.shape)
    return numbers.most_common(1)[0][0] if numbers else None


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """Let transformers draw no bar for what is loaded to be compared."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
