"""Names and pieces of weights in files, if they differ from those of transformers' modules.

A mixture of experts is a matrix for each expert in files and one tensor for all of them in memory; some encoders have
older names in files. transformers knows how to write a module back as its files have it, so that way is walked with
structure only, and read backwards.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.storage.safetensors_file import Joined, Stored

Held = dict[str, Stored | Joined]
Index = tuple[int | slice, ...]


def as_modules(tensors: Mapping[str, Stored | Joined], modules: Mapping[str, nn.Module]) -> Held:
    """Rename tensors of files to those of modules, and join pieces; names without a module stay.

    Args:
        tensors: by our name of the part and the file's name inside of it.
        modules: by name of the part.
    """
    held = dict(tensors)
    for prefix, module in _of_transformers(modules):
        if prefix == "llm.lm":
            names = DecoderNames(module)
            held = {names.ours(name): tensor for name, tensor in held.items()}
        own = {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
        held |= _turned(held, own, getattr(module, "config", None))
        absent = [name for name in own if name not in held]
        if not absent or all(name in own for name in held if name.startswith(f"{prefix}.")):
            continue
        for name, places in _pieces(module, prefix, absent).items():
            if whole := _joined([held.get(piece) for piece in places], list(places.values()), own[name].shape):
                for piece in places:
                    del held[piece]
                held[name] = whole
    return held


def _turned(held: Held, own: Mapping[str, Tensor], config: Any) -> Held:
    """Find experts that are stored as (E, in, out) and held as (E, out, in): those of Qwen3-VL's repositories.

    transformers turns them where the shapes differ, and writes what it holds.
    """
    found: Held = {}
    for name, tensor in own.items() if getattr(config, "model_type", "") == "qwen3_vl_moe_text" else ():
        stored = held.get(name)
        if ".experts." in name and isinstance(stored, Stored) and len(stored.shape) == 3:
            e, rows, columns = stored.shape
            if stored.shape != tuple(tensor.shape) == (e, columns, rows):
                found[name] = Joined((e, columns, rows), ((stored, (slice(None),)),), turned=True)
    return found


def as_files(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and split a module's weights as in hub repositories; pieces are views."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        return revert_weight_conversion(module, dict(state))  # type: ignore[arg-type]


def _of_transformers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost transformers models inside parts, with their paths."""
    from transformers import PreTrainedModel

    for part, root in modules.items():
        found = [path for path, module in root.named_modules() if isinstance(module, PreTrainedModel)]
        for path in found:
            if not any(path.startswith(f"{other}.") for other in found):
                yield f"{part}.{path}", root.get_submodule(path)


class DecoderNames:
    """Names of a language model's weights: files of vision-language models call every decoder `model` and its
    projection `lm_head`.
    """

    def __init__(self, lm: Any) -> None:
        head = lm.get_output_embeddings()
        self.head = next(name for name, module in lm.named_modules() if module is head)  # the vocabulary projection
        self._ours = {
            f"llm.lm.{theirs}.": f"llm.lm.{ours}."
            for theirs, ours in (("model", lm.base_model_prefix), ("lm_head", self.head))
            if theirs != ours
        }

    def ours(self, name: str) -> str:
        """Return a name in files as the module has it."""
        for theirs, ours in self._ours.items():
            if name.startswith(theirs):
                return f"{ours}{name.removeprefix(theirs)}"
        return name


def _pieces(module: nn.Module, prefix: str, absent: Iterable[str]) -> dict[str, dict[str, Index]]:
    """Find the pieces of weights in files: our name -> names in files, each with its index in the whole."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = {}
    for full in absent:
        name = full.removeprefix(f"{prefix}.")
        pieces = as_files(module, {name: torch.empty(shapes[name], device="meta")})
        if places := _places(shapes[name], {f"{prefix}.{n}": t.shape for n, t in pieces.items()}):
            found[full] = places
    return found


def _places(whole: torch.Size, pieces: Mapping[str, torch.Size]) -> dict[str, Index]:
    """Return the index of each piece in the whole; empty if the pieces are of an unsupported form.

    Known are another name for all of it, and a matrix (or one for the gate and one for what is gated) for each expert.
    """
    if list(pieces.values()) == [whole]:
        return dict.fromkeys(pieces, ())
    kinds: dict[str, list[str]] = {}
    for name in pieces:
        kinds.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", name), []).append(name)
    rows = whole[1] // len(kinds) if len(whole) > 1 else 0
    cut = all(len(names) == whole[0] for names in kinds.values())
    if not cut or any(tuple(shape) != (rows, *whole[2:]) for shape in pieces.values()):
        return {}
    return {
        name: (number, slice(kind * rows, (kind + 1) * rows))
        for kind, names in enumerate(kinds.values())
        for number, name in enumerate(names)
    }


def _joined(
    found: Sequence[Stored | Joined | None], places: Sequence[Index], shape: torch.Size
) -> Stored | Joined | None:
    """Join stored pieces; None if one is missing, or differs from the others in shape or dtype."""
    stored = [piece for piece in found if isinstance(piece, Stored)]
    if len(stored) != len(places) or len({piece.dtype for piece in stored}) != 1:
        return None
    if places == [()]:
        return stored[0]
    if len({piece.shape for piece in stored}) != 1 or math.prod(shape) != sum(math.prod(p.shape) for p in stored):
        return None
    return Joined(tuple(shape), tuple(zip(stored, places, strict=True)))
