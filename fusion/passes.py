"""What a routed adapter knows of the pass that runs in the decoder: which tokens are padding, who went where."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.decoder import decoder_of
from zoo.registry import ZooError

# Of each layer: what it routed by (S, E), chosen experts (S,) or (S, k), which tokens (S,) are no padding (None: all).
Records = list[tuple[Tensor, Tensor, Tensor | None]]


class Passes:
    """Watches the decoder of a language model.

    Args:
        llm: the language model.
        wanted: whether the coming pass is to note its routing.
    """

    def __init__(self, llm: Any, wanted: Callable[[], bool]) -> None:
        self.llm, self.wanted = llm, wanted
        self.rows = 1  # B of the pass
        self.keeps: list[tuple[int, Tensor]] = []  # from which layer on, and (S,) which tokens are no padding there
        self.pictured: Tensor | None = None  # (B,) sequences that take part in a guarded adapter; None: all
        self.base_only = False  # no sequence takes part
        self.records: Records = []  # of the last pass
        self._open: Records | None = None  # while a pass is in the decoder

    def attach(self) -> list[Callable[[], None]]:
        """Hook into the decoder; returns what undoes it."""
        decoder = decoder_of(self.llm.lm)
        begin = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.llm.told_shorter.append(self._shorter)
        return [begin.remove, decoder.register_forward_hook(self._end).remove, self._forget]

    def _forget(self) -> None:  # a method: copies of the model have their own
        self.llm.told_shorter.remove(self._shorter)

    def keep_of(self, layer: int) -> Tensor | None:
        """Which of the tokens (S,) of a layer are no padding; None: all, as far as is known."""
        for first, keep in reversed(self.keeps):
            if first <= layer:
                return keep
        return None

    def note(self, layer: int, scores: Tensor, chosen: Tensor) -> None:
        """Note a layer's routing; not where checkpointing runs the layer again, after the decoder was left."""
        if self._open is not None:
            self._open.append((scores, chosen, self.keep_of(layer)))

    def require_gradient(self, who: str) -> None:
        """Refuse routing that was noted inside of reentrant checkpointing: no loss on it could ever train a router."""
        if not self.records[-1][0].requires_grad:
            raise ZooError(f"{who} cannot balance under reentrant checkpointing: set use_reentrant=False.")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids") if given is None else given
        self.rows, length = (args[0] if given is None else given).shape[:2]
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = getattr(self.llm, "padding_mask", None)
        keep = None if mask is None else mask[:, -length:].flatten().bool()  # (S,)
        self.keeps = [] if keep is None else [(0, keep)]
        self._open = [] if self.wanted() else None

    def _shorter(self, layer: int, seen: Tensor) -> None:
        """Take which tokens (B, L) are no padding from `layer` on: a pruner dropped others."""
        self.keeps.append((layer, seen.flatten()))

    def _end(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.records, self._open = self._open or [], None
        hidden = getattr(out, "last_hidden_state", None)
        if hidden is not None and hidden.requires_grad and not torch.compiler.is_compiling():
            # Checkpointed layers run again in backward, maybe after another pass: they must find what this one had.
            names = ("keeps", "rows", "pictured", "base_only")
            now = {name: getattr(self, name) for name in names}
            hidden.register_hook(lambda grad: self.__dict__.update(now))
