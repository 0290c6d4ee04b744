"""One prompt inside the LLM: the tokens of each layer, and what a pruner inside it noted and is given.

It is kept in the current pass (`zoo.registry.forward_pass`) and on the cache that continues it, never on the pruner.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.fusion.pruners.inside.sequence import TokenSequence, of_first
from zoo.registry import ZooError


class Choice(NamedTuple):
    """What a pruner keeps at a cut."""

    keep: Tensor  # (B, L) bool: image tokens to keep; text and tokens that predict stay anyway
    hidden: Tensor | None = None  # (B, L, C) with new rows for image tokens that are kept; None: all as they were


@dataclass
class LayerCut:
    """The place between two layers where tokens are dropped, as `choose` of a pruner is given it.

    Also the LLM's input, for a pruner that chooses its voters there: `layer` is 0, and nothing is scored yet.
    """

    layer: int  # the first layer behind, counted from 0
    hidden: Tensor  # (B, L, C) input of that layer; with gradients in training
    tokens: TokenSequence
    total: Tensor  # (B, samples) image tokens that entered the LLM
    scores: Tensor | None = None  # (B, L) of the pruner's `score`; None: it has none
    budget: Tensor | None = None  # (B, samples) image tokens to keep; None: the pruner has none
    copies: int = 1  # consecutive rows that are beams of one sample; the first decides for all

    def best(self) -> Tensor:
        """Choose the image tokens with the highest scores, `budget` of each sample: (B, L) bool."""
        if self.scores is None or self.budget is None:
            raise ZooError("A pruner inside the LLM without a score or a budget needs `choose`, to say what it keeps.")
        return self.tokens.choose(self.scores, self.budget, self.copies)

    def chosen(self, choose: Callable[["LayerCut"], Tensor | Choice] | None, who: str) -> tuple[Tensor, Tensor]:
        """Return what a pruner keeps, (B, L) bool, and the hidden states (B, L, C) with its new rows.

        Raises:
            ZooError: the choice has another type or shape.
        """
        if choose is None:
            return self.best(), self.hidden
        made = choose(self)
        keep, hidden = made if isinstance(made, tuple) else (made, None)
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != self.tokens.seen.shape:
            what = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ZooError(f"{who} must choose a bool tensor {list(self.tokens.seen.shape)}, not {what}.")
        keep = of_first(self.tokens.completed(keep), self.copies)
        if hidden is None:
            return keep, self.hidden
        if hidden.shape != self.hidden.shape:
            raise ZooError(f"{who} gives states {list(hidden.shape)} in place of {list(self.hidden.shape)}.")
        changed = (keep & self.tokens.image)[..., None]
        return keep, torch.where(changed, of_first(hidden, self.copies).to(self.hidden.dtype), self.hidden)


@dataclass
class PrunedPrompt:
    """One prompt while it passes through the layers, and later the content of its cache."""

    total: int  # length of the unshortened prompt
    layers: list[TokenSequence]  # tokens of each layer
    budget: Tensor  # (B, samples) image tokens that entered the LLM
    copies: int = 1  # consecutive rows that are copies of one prompt (beams)
    drafts: int = 0  # columns after the prompt in this pass
    cut: int = -1  # first layer that is shorter or masked; -1: none so far
    labelled: Any = None  # the sequence whose labels are gathered with the tokens
    past: int = 0  # tokens in the cache before this pass
    new: Tensor | None = None  # (B, q) mask of non-padding tokens in this decoding step; None if there is no padding
    scoring: int | None = None  # layer whose attention is being scored
    reading: bool = False  # a layer runs only as far as its queries and keys
    votes: str | Tensor = "last"  # of the scores: a word of `VOTES`, or (B, T) as the pruner chose them
    scores: dict[int, Tensor] = field(default_factory=dict)  # (B, L), by the layer before the cut
    counts: dict[int, Tensor] = field(default_factory=dict)  # (B, samples) to keep, where scores came with them
    masks: dict[Any, Any] = field(default_factory=dict)
    rotary: list[tuple[Any, TokenSequence, Any]] = field(default_factory=list)

    def settle(self) -> None:
        """Remove the drafts after the prompt's pass: accepted ones are counted as decoded tokens."""
        if self.drafts:
            self.layers = [tokens.without_last(self.drafts) for tokens in self.layers]
        self.drafts, self.scoring = 0, None
        self.masks.clear()
        self.rotary.clear()

    def gone(self, tokens: TokenSequence) -> Tensor:
        """Count the tokens of each row that a layer with `tokens` no longer has: (B,)."""
        return self.layers[0].seen.sum(1) - tokens.seen.sum(1)

    def kept(self) -> list[Tensor]:
        """Say which columns each layer saw of the prompt: (B, T) bool for each layer."""
        self.settle()
        shape = len(self.layers[0].seen), self.total
        seen = [x.column.new_zeros(shape).scatter(1, x.column, x.seen.long()) for x in self.layers]
        return [x.bool() for x in seen]

    def scored(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Say for each layer that was scored which columns (B, L) of the prompt it saw, and their scores (B, L)."""
        self.settle()
        columns = {layer: self.layers[layer].column for layer in self.scores}
        return {layer: (seen, self.scores[layer][:, : seen.shape[1]]) for layer, seen in columns.items()}
