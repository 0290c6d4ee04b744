"""Load a checkpoint into the parts of a model, before adapters and pruners are attached."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from zoo.published.bits import in_bits
from zoo.published.checkpoint import Checkpoint
from zoo.published.contradictions import refuse_untied
from zoo.published.family import SPARE
from zoo.published.file_names import Held, as_modules
from zoo.published.places import Placement
from zoo.registry import SINGLE_SLOTS, ZooError
from zoo.storage.precision import kept_wide
from zoo.storage.safetensors_file import Filled, fill
from zoo.storage.weights import by_part, may_start_fresh


class Reader:
    """Fills the parts of a model from a checkpoint while they are put together (`zoo.composed.assembly.Filler`).

    Args:
        checkpoint: weights to load.
        placement: their devices and dtype.
        partial: a saved zoo model is being loaded: the rest of its weights, in its own folder, is loaded and checked
            later.

    Attributes:
        tensors: those of the checkpoint; after filling, by the names of the parts' modules.
        filled: result of filling; None before.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement, partial: bool = False) -> None:
        self.checkpoint, self.placement, self.partial = checkpoint, placement, partial
        self.tensors: Held = checkpoint.tensors
        self.filled: Filled | None = None

    @property
    def empty(self) -> frozenset[str]:
        """Parts to build on the meta device: all but those that may start fresh."""
        return frozenset(SINGLE_SLOTS) - self.placement.fresh

    @property
    def already_loaded(self) -> dict[int, Any] | None:
        """Tensors loaded from a zoo model's own folder, which need not be read again."""
        return self.filled.tensors if self.checkpoint.record is None and self.filled is not None else None

    def __call__(self, parts: Any) -> None:
        """Load the weights into the parts.

        Raises:
            ZooError: a weight is missing, unknown or of another shape; reported by part.
        """
        found, held = self.checkpoint, self.placement
        modules = {name: part for name in SINGLE_SLOTS if (part := getattr(parts, name)) is not None}
        self.tensors = as_modules(found.tensors, modules)
        if found.record is not None and not may_start_fresh("llm", held.fresh):
            refuse_untied(parts.llm.lm, self.tensors, found.folder)
        wide = kept_wide(modules.values(), held.dtype) if held.dtype is not None else set()
        self.filled = fill(modules, self.tensors, place=held.of, dtype=held.dtype, wide=wide)
        if self.partial:
            _zeros(modules, held.of)
        else:
            self._require_whole(self.filled)
            still = [n for m in modules.values() for n, t in [*m.named_parameters(), *m.named_buffers()] if t.is_meta]
            assert not still, f"left on the meta device: {still[:3]}"
            if len({p.device for p in parts.llm.parameters()}) == 1:
                parts.llm.verify()
        if held.bits:  # quantised weights count as loaded: they are computed from the checkpoint's
            self.filled.tensors.update({id(p): p for p in in_bits(parts.llm, held.bits, held.device)})

    def _require_whole(self, done: Filled) -> None:
        """Refuse a checkpoint with missing, unknown or mismatched weights."""
        found, fresh = self.checkpoint, self.placement.fresh

        def part_of(name: str) -> str:
            return name.partition(".")[0]

        def needed(names: Iterable[str]) -> list[str]:
            return [n for n in names if not may_start_fresh(part_of(n), fresh)]

        unknown = [n for n in self.tensors if n not in done.used and not SPARE.search(n)]
        unknown = needed(n for n in unknown if part_of(n) in SINGLE_SLOTS)
        missing, other = needed(done.missing), needed(done.other_shape)
        stated = [line for part in needed(found.contradictions) for line in found.contradictions[part]]
        if missing or unknown or other or found.unexpected or stated:
            lines = [f"The weights in {found.folder} do not fit the model.", *(f"  {line}" for line in stated)]
            if found.quantised:
                lines.append(
                    f"  config.json states that they are quantised ({found.quantised}), and published models are read "
                    "unquantised: take the repository of the whole weights; bits=4 or bits=8 quantises them on CUDA"
                )
            lines += by_part("missing", missing, part_of) + by_part("unknown", unknown, part_of)
            lines += by_part("unknown", found.unexpected, part_of)
            lines += [f"  other shape: {o}" for o in other[:5]]
            raise ZooError("\n".join(lines))


def _zeros(modules: Mapping[str, Any], place: Any) -> None:
    """Allocate zeros for tensors that no file filled; tied tensors stay tied."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id: the meta tensor (kept alive) and its replacement
    for part, module in modules.items():
        for owner in module.modules():
            for table in (owner._parameters, owner._buffers):
                for key, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        empty = torch.zeros_like(tensor, device=place(part))
                        whole = isinstance(tensor, torch.nn.Parameter)
                        made[id(tensor)] = tensor, torch.nn.Parameter(empty) if whole else empty
                    table[key] = made[id(tensor)][1]
