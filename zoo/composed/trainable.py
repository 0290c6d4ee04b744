"""Which parameters of a composed model train, which stay float32, and which parts are compiled or detached."""

import re
from collections.abc import Callable, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import Adapter, Encoder, LanguageModel, Projector, ZooError, unknown
from zoo.storage.precision import SHORT, ids_of, kept_wide


def meant(pattern: str, name: str) -> bool:
    """Whether a glob means the parameter `name`: as it is, or as checkpoints have it, without the level of PEFT."""
    plain = re.sub(r"(\.token_adapter)?(\.base_layer)+(?=\.)", "", name)
    return fnmatchcase(name, pattern) or fnmatchcase(plain, pattern)


class PartsMixin(nn.Module):
    """Names the parts that parameters belong to, and sets them up for training."""

    vision: Encoder | None
    projector: Projector | None
    llm: LanguageModel
    adapter: MutableMapping[str, Adapter]
    compiled: bool

    def part_of(self, name: str) -> str:
        """Name the part that the parameter `name` belongs to: vision, projector, llm, pruner.X or adapter.X.

        Of several encoders each is a part of its own, vision.X.
        """
        head, _, rest = name.partition(".")
        if head == "llm":
            inner = rest.removeprefix("lm.")
            owner = next((n for n, a in self.adapter.items() if a.owns(inner)), None)
            return f"adapter.{owner}" if owner else "llm"
        if head == "vision" and self.vision is not None and self.vision.members:
            return f"vision.{rest.removeprefix('encoders.').partition('.')[0]}"
        if head in {"pruner", "adapter"}:
            return f"{head}.{rest.partition('.')[0]}"
        return head

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the model, as `to`, `half`, `dtype=` of loading and every wrapper does.

        Weights that must stay float32 do: new weights of adapters (`keeps_float32`), and those that transformers keeps.
        A part that is cast by itself (`model.adapter["mole"].to(torch.bfloat16)`) is cast.
        """
        parts = [part for part in (self.vision, self.llm) if part is not None]
        # By id, not by name: `_apply` of torch gets tensors, and tied weights have several names.
        wide = {dtype: kept_wide(parts, dtype) | self._kept_by_adapters() for dtype in SHORT}

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype not in SHORT or new.dtype == tensor.dtype or id(tensor) not in wide[new.dtype]:
                return new
            return tensor.to(new.device, torch.float32)  # from the old tensor: `new` has lost bits already

        return super()._apply(moved, recurse)

    def _kept_by_adapters(self) -> set[int]:
        """The ids of weights that adapters keep in float32, and of their gradients."""
        kept: set[int] = set()
        for adapter in self.adapter.values():
            if adapter.keeps_float32:
                kept |= ids_of([*adapter.parameters(), *adapter.buffers()])
                inside = [*self.llm.lm.named_parameters(), *self.llm.lm.named_buffers()]
                kept |= ids_of(t for n, t in inside if adapter.owns(n))
        return kept

    def _idles(self, name: str) -> bool:
        """Whether an adapter replaces the module of this parameter, which then has no effect and no gradient."""
        inner = name.removeprefix("llm.lm.")
        return inner != name and any(a.idles(inner) for a in self.adapter.values())

    def set_trainable(self, train: Sequence[str], freeze: Sequence[str] = ()) -> dict[str, int]:
        """Make exactly the parameters trainable that match `train` and not `freeze`.

        Args:
            train: parts (`vision`, `projector`, `llm`, `adapter`, `adapter.lora`, `all`) or globs over parameter names,
                those that checkpoints have.
            freeze: the same; has precedence over `train`.

        Returns:
            Number of trainable parameters by part.

        Raises:
            ZooError: a pattern matches nothing, or nothing is left to train.
        """
        named = dict(self.named_parameters())
        parts = {name: self.part_of(name) for name in named}

        def matches(pattern: str, name: str) -> bool:
            part = parts[name]
            return pattern == "all" or pattern in {part, part.partition(".")[0]} or meant(pattern, name)

        for pattern in [*train, *freeze]:
            if not any(matches(pattern, name) for name in named):
                raise unknown("part or parameter to train", pattern, {"all", *parts.values()})
        count: dict[str, int] = {}
        for name, parameter in named.items():
            on = any(matches(p, name) for p in train) and not any(matches(p, name) for p in freeze)
            on = on and not self._idles(name)  # DDP would wait for a gradient that never comes
            parameter.requires_grad_(on)
            if on:
                count[parts[name]] = count.get(parts[name], 0) + parameter.numel()
        if not count:
            raise ZooError(f"Nothing trains: train={list(train)} and freeze={list(freeze)} leave no parameter.")
        return count

    def detach_only(self, names: Sequence[str]) -> None:
        """Detach the adapters in `names`, and attach all others.

        Raises:
            ZooError: the model has no such adapter.
        """
        for name in names:
            if name not in self.adapter:
                raise unknown("adapter of this model to detach", name, self.adapter.keys())
        before: frozenset[str] = getattr(self, "_detached", frozenset())
        self._detached = frozenset(names)
        if before == self._detached:
            return
        # All of them, in reverse: each puts back what it found, which is right only if later ones are gone.
        for adapter in reversed(list(self.adapter.values())):
            adapter.detach()
        for name, adapter in self.adapter.items():
            if name not in self._detached:
                adapter.attach()

    def compile_parts(self, on: bool = True) -> None:
        """Compile encoder, projector, decoder and loss with `torch.compile`, or undo it.

        Each is a graph of its own: the placeholder check and the number of labels between them depend on data.
        """
        self.compiled = on
        decoder = self.llm.lm.get_decoder() if hasattr(self.llm.lm, "get_decoder") else self.llm.lm
        rows = self.vision is not None and self.vision.native  # their shapes differ: each would be compiled anew
        for part in (None if rows else self.vision, self.projector, decoder):
            if part is not None and on:
                part.compile()
            elif part is not None:
                part._compiled_call_impl = None  # torch has no public way back from `Module.compile`
