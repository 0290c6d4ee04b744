"""Per-pass state of an adapter: its condition on the images, valid tokens, and routing records for balance losses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.llm.decoder import decoder_of
from zoo.registry import ZooError
from zoo.registry.forward_pass import Pass, begin, current, end, required

# For each layer: router scores (S, E), chosen experts (S,) or (S, k), mask of valid tokens (S,) (None: all).
Records = list[tuple[Tensor, Tensor, Tensor | None]]


def always() -> bool:
    """Whether to record every pass; a lambda could not be pickled with the model."""
    return True


def never() -> bool:
    """Whether to record any."""
    return False


class Passes:
    """Hooks on the decoder of a language model that keep an adapter's state in the current `Pass`.

    Args:
        llm: the language model.
        wanted: called when a pass begins: whether to record its routing.
        name: of the adapter; the key of its state in a pass, so two adapters on one model need different names.
    """

    def __init__(self, llm: Any, wanted: Callable[[], bool], name: str = "") -> None:
        self.llm, self.name, self.wanted = llm, name, wanted
        self.alone = Pass()  # used while layers run without their decoder, and in compiled graphs

    @property
    def now(self) -> Pass:
        """The pass that runs."""
        return current() or self.alone

    @property
    def condition(self) -> Any:
        """The adapter's condition on the images of the current pass; outside of a pass, the last one set."""
        now = current()
        return self.alone.conditions.get(self.name) if now is None else now.conditions.get(self.name)

    @condition.setter
    def condition(self, value: Any) -> None:
        self.now.conditions[self.name] = value

    @property
    def records(self) -> Records:
        """What the pass that runs has noted.

        Raises:
            ZooError: none runs.
        """
        return self.of(required(self.alone))

    def of(self, passed: Pass) -> Records:
        """What a pass noted, which may be over."""
        return passed.records.get(self.name, [])

    @property
    def rows(self) -> int:
        """B of the pass that runs."""
        return self.now.rows

    def attach(self) -> list[Callable[[], None]]:
        """Hook into the decoder; returns the functions that undo it."""
        decoder = decoder_of(self.llm.lm)
        # Of several adapters the one that hooks in last comes first and ends last: it begins a pass where none runs.
        first = decoder.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)
        return [first.remove, decoder.register_forward_hook(self._end, always_call=True).remove]

    def keep_of(self, layer: int) -> Tensor | None:
        """Mask of a layer's valid tokens (S,); None: all, or unknown."""
        return self.now.valid_in(layer)

    def note(self, layer: int, scores: Tensor, chosen: Tensor) -> None:
        """Record a layer's routing. Recomputation in backward, after the decoder returned, records nothing."""
        now = self.now
        if not now.left and self.name in now.records:
            now.records[self.name].append((scores, chosen, now.valid_in(layer)))

    def require_gradient(self, who: str) -> None:
        """Refuse records made under reentrant checkpointing: without a gradient, a loss cannot train the router."""
        if not self.records[-1][0].requires_grad:
            raise ZooError(f"{who} cannot balance under reentrant checkpointing: set use_reentrant=False.")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        now = current()
        if now is None:  # the language model is called directly, not by a composed model
            now = self.alone if torch.compiler.is_compiling() else begin()
        if self.name in self.alone.conditions and self.name not in now.conditions:
            # Copied into the pass: recomputation in backward reads it when `alone` may hold another image's.
            now.conditions[self.name] = self.alone.conditions[self.name]
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids") if given is None else given
        now.rows, length = (args[0] if given is None else given).shape[:2]
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:  # packed rows bring a 4-d mask, which hides padding
            mask = now.padding_mask
        now.valid = [] if mask is None else [(0, mask[:, -length:].flatten().bool())]  # (S,)
        now.left = False
        now.records.pop(self.name, None)
        if self.wanted():
            now.records[self.name] = []

    def _end(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        now = self.now
        now.left = True
        end(now)
