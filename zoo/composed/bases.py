"""Which weights a saved model need not hold: those that equal its base checkpoints, bit for bit.

Weights come from a checkpoint of the encoder, of the language model, or from a published model as a whole. A saved
model names those and holds what differs. Differences are found when it is saved: the bases are loaded once more, and
each weight is compared with theirs. No bookkeeping is needed while weights change, so any change is found (a fused
optimiser, `.data`, a merge, another process); and weights that loading would initialise at random, such as rows for new
tokens, differ and are saved.

Files are memory-mapped where their layout and data type allow it: a comparison costs the time of reading them and next
to no memory, and stops at the first difference in a weight.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.composed.own_checkpoints import Own, node_at, own_checkpoints
from zoo.composed.slots import hub_name
from zoo.pretrained.origin import origin_of
from zoo.registry import ZooError
from zoo.registry.part import base_of
from zoo.registry.quiet import no_progress_bar
from zoo.storage.precision import cast_parameters, dtype_of
from zoo.storage.rows import rows_behind, rows_in_common
from zoo.storage.safetensors_file import Joined, Stored, holds, same, value_of
from zoo.storage.weights import fingerprint, named_weights, names_of, snapshot

WHOLE = "model"  # key of a published checkpoint that all parts have their weights from


@dataclass
class Bases:
    """The checkpoints that a model's weights came from, each by what it is for: a key of `own_checkpoints`, or `model`.

    Attributes:
        record: the entries of config.json: checkpoint, revision, fingerprint; `dtype` where the weights are held in
            another than the checkpoint's; `whole: true` where every weight is in the model's folder, and the checkpoint
            is named only as a source, and for the layout of exports.
        given: names of the weights that came from the checkpoint.
        nodes: options of the part, to load it again.
        own: what may have a checkpoint of its own.
        requested: capabilities of the encoder that parts need: with `text_tower` it has one.
        vocab_size: of the tokenizer that the language model was built for.
        folder: of the published checkpoint.
        stored: slices of its files that hold those weights.
        dtype: that its weights were read as; None: that of the files.
        bits: of each weight in the layers of its language model; 0: not quantised.
    """

    record: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: dict[str, frozenset[str]] = field(default_factory=dict)
    nodes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    own: dict[str, Own] = field(default_factory=dict)
    requested: frozenset[str] = frozenset()
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
            found = self.record.get(part, {})
            now = found.get("fingerprint")
            if base.get("fingerprint") and now and now != base["fingerprint"]:
                place = found.get("checkpoint", base["checkpoint"])  # where it was read, which may not be where it was
                raise ZooError(
                    f"The base weights of {part} in {place!r} differ from those the model was saved on "
                    f"(fingerprint {now[:12]}, was {base['fingerprint'][:12]})."
                )

    def require_elsewhere(self, folder: Path) -> None:
        """Refuse to write into the folder of a base, whose files the saved config would refer to.

        Raises:
            ZooError: `folder` is the folder of a base.
        """
        for key, entry in self.record.items():
            place = self.folder if key == WHOLE and self.folder is not None else Path(entry["checkpoint"])
            place = place.parent if place.is_file() else place
            if place.is_dir() and folder.is_dir() and folder.samefile(place):
                raise ZooError(f"{str(folder)!r} is where the base weights of {key} come from: save to another folder.")

    def require_whole(self, model: Any) -> None:
        """Refuse to write all weights where some exist only in few bits.

        Raises:
            ZooError: the language model is held in few bits.
        """
        if self._in_few_bits(model):
            raise ZooError("The model is held in few bits, and saved by the name of its checkpoint: load without bits.")

    def changed(
        self, model: Any, state: Mapping[str, Tensor], slots: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights of `state` that differ from the bases, and the record of the bases for the config.

        Args:
            model: whose weights these are.
            state: whole tensors, each by the first of its names.
            slots: the parts' options as they are saved: a part that no longer names a checkpoint has all its weights
                saved.

        Raises:
            ZooError: a weight that exists only in few bits changed.
        """
        aliases, few = names_of(model), self._in_few_bits(model)
        unchanged: set[str] = set()
        rows: dict[str, Tensor] = {}  # of matrices whose first rows are unchanged: the others
        record: dict[str, Any] = {}
        for key, entry in self.record.items():
            given = self.given[key] & state.keys()
            if (own := own_checkpoints(slots).get(key)) and not node_at(slots, own.path).get(own.option):
                given = frozenset()
            try:
                again = self._again(key) if given else {}
                found = {n for n in given if self._still(state[n], again, aliases[n], few.get(n))}
            except Exception as error:  # of any library: a base that is gone must not lose what was trained
                why = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(
                    f"The base weights of {key} in {entry['checkpoint']!r} cannot be read any more, so all weights "
                    f"that came from there are saved: {why}",
                    stacklevel=3,
                )
                again, found = {}, set(given & few.keys())  # weights in few bits cannot be written, only named
            else:  # only where the base was read: without it, equality is not known
                if given and (lost := sorted(few.keys() - found)):
                    raise ZooError(
                        f"{lost[0]!r} is held in few bits and is no longer what {entry['checkpoint']!r} gives "
                        f"({len(lost)} such weights), so naming the checkpoint would lose the change. Load the model "
                        f"without bits for what changes its weights."
                    )
            tables = (n for n in given - found if key == "llm" and state[n].shape[:1] == (model.llm.vocab_size,))
            grown = {n: at for n in tables if (at := self._rows(state[n], again, aliases[n]))}
            rows |= {rows_behind(n, at): state[n][at:].clone() for n, at in grown.items()}
            found |= grown.keys()
            unchanged |= found
            if found:
                record[key] = {**entry, **_other_dtype([state[n] for n in found], again)}
            else:
                record[key] = as_whole(entry)
        return {n: t for n, t in state.items() if n not in unchanged} | rows, record

    @torch.no_grad()
    def restore(self, model: Any, names: Iterable[str]) -> None:
        """Give weights of a model the values of their bases again.

        Raises:
            ZooError: a base cannot be read any more.
        """
        wanted, aliases = set(names), names_of(model)
        own = named_weights(model)
        for key in self.record:
            if not (mine := self.given[key] & wanted):
                continue
            try:
                again = self._again(key)
            except Exception as error:
                place, why = self.record[key]["checkpoint"], " ".join(str(error).split()) or type(error).__name__
                what = f"{len(mine)} weights are those of {key} in {place!r}"
                raise ZooError(f"{what}, which cannot be read any more: {why}") from error
            for name in mine:
                found = next(again[n] for n in aliases[name] if n in again)
                own[name].copy_(found if isinstance(found, Tensor) else value_of(found))

    def _again(self, key: str) -> Mapping[str, Stored | Joined | Tensor]:
        """Read the weights of a base once more, from where they were read first."""
        if key == WHOLE:
            assert self.folder is not None, "a published checkpoint was read from a folder"
            now = fingerprint(self.folder)
            if now != self.record[key]["fingerprint"]:
                raise ZooError(f"its files are others now, with fingerprint {now[:12]}")
            return self.stored
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), no_progress_bar():
            # A random seed: weights that the checkpoint lacks, drawn from the seed of the run, would compare equal.
            torch.default_generator.seed()
            own = self.own[key]
            part = registry.build(own.kind, self.nodes[key], vocab_size=self.vocab_size)
            if own.kind == "vision":
                part.prepare(frozenset(word for word in self.requested if base_of(word) in part.provides))
        return {f"{own.module}.{name}": tensor for name, tensor in part.state_dict().items()}

    def _still(
        self, tensor: Tensor, again: Mapping[str, Stored | Joined | Tensor], names: Sequence[str], few: Any = None
    ) -> bool:
        """Whether a weight, under any of its names, equals its base's; `few`: the layer that holds it in few bits."""
        found = next((again[name] for name in names if name in again), None)
        if found is None:
            return False
        if isinstance(found, Tensor):
            return same(tensor, found)
        if few is None:
            return holds(tensor, found)
        from zoo.published.bits import made_of

        value = value_of(found)  # quantised again, by the same code, and compared in bits
        return made_of(few, value if self.dtype is None else value.to(self.dtype), self.bits)

    def _rows(self, tensor: Tensor, again: Mapping[str, Stored | Joined | Tensor], names: Sequence[str]) -> int:
        """Count the leading rows of a table of tokens that the LLM's checkpoint gives; 0 for less than half."""
        found = next((again[name] for name in names if name in again), None)
        if not isinstance(found, Tensor):
            return 0
        rows = rows_in_common(tensor, found)
        return rows if 2 * rows >= len(tensor) else 0

    def _in_few_bits(self, model: Any) -> dict[str, Any]:
        """Return the names of weights in few bits, each with the layer that holds it."""
        if not self.bits:
            return {}
        from zoo.published.bits import layers_in

        layers = {id(layer.weight): layer for layer in layers_in(model.llm)}
        return {n: layers[id(t)] for n, t in model.state_dict(keep_vars=True).items() if id(t) in layers}


def as_whole(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a base that no weight is read from: it documents the source of the model."""
    return {k: v for k, v in entry.items() if k != "dtype"} | {"whole": True}


def bases_of(model: Any, slots: Mapping[str, Any], published: Any = None) -> Bases:
    """Record where the weights of a model, which have just been read, came from.

    Args:
        model: composed.
        slots: its parts' options.
        published: the reader of a published checkpoint, or of a zoo model's own folder; None: there was none.
    """
    bases = Bases(requested=model.requested, vocab_size=model.config.text_vocab_size)
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
    bases.own = own_checkpoints(slots)
    every = model.state_dict(keep_vars=True)
    for key, own in bases.own.items():
        node, option, at = node_at(slots, own.path), own.option, own.revision
        names = frozenset(name for name in every if name.startswith(f"{own.module}.{own.inside}"))
        if not node.get(option) or not names:
            continue
        checkpoint, revision = node[option], node.get(at) or None
        entry: dict[str, Any] = {"checkpoint": checkpoint, "revision": revision}
        origin = origin_of(checkpoint)
        on_hub, here = hub_name(own, node), Path(checkpoint).expanduser()
        folder = snapshot(on_hub, revision)
        if origin is not None:  # a package or a GGUF file: what it is converted to is made anew where it is not there
            entry |= {"checkpoint": origin.name, "fingerprint": origin.sha256}
            node = {**node, option: origin.name}
        elif on_hub == checkpoint and here.exists():  # a folder, or a file of weights
            entry |= {"checkpoint": str(here.absolute()), "fingerprint": fingerprint(here)}
            node = {**node, option: entry["checkpoint"]}
        elif folder is not None and at in node:
            entry["revision"] = folder.name  # the commit: a branch may have moved on when the model is loaded
            node = {**node, at: folder.name}
        bases.record[key], bases.nodes[key] = entry, dict(node)
        # Adapters may own parameters inside the LLM, and a published checkpoint comes before a part's own.
        bases.given[key] = frozenset(n for n in names if model.part_of(n) == own.part) - bases.names
        if dtype := dtype_of(((model.config.base or {}).get(key) or {}).get("dtype")):  # as it was saved
            cast_parameters(model, dtype, only=bases.given[key])
    return bases


def _other_dtype(unchanged: Sequence[Tensor], again: Mapping[str, Stored | Joined | Tensor]) -> dict[str, str]:
    """Return the data type of unchanged weights for the record, where it differs from the base's."""
    held, given = (_usual_dtype(tensors) for tensors in (unchanged, again.values()))
    return {} if held == given or given is None else {"dtype": str(held).removeprefix("torch.")}


def _usual_dtype(tensors: Iterable[Stored | Joined | Tensor]) -> torch.dtype | None:
    """Return the data type of most floating point numbers; routers and norms may have another."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            numbers[tensor.dtype] += math.prod(tensor.shape)
    return numbers.most_common(1)[0][0] if numbers else None
