"""The tokens of a sequence inside the LLM as a pruner needs them: position, validity, sample, and which are kept.

A token's position is that of a column of the unshortened sequence, its place: the column in which it entered the LLM,
or, where positions are dense, the column that it has among the tokens left of its sample. Masks follow from places
alone: key k is visible to query q iff k's place is at most q's, both belong to one sample, k is neither padding nor
hidden, and it is within the layer's sliding window, which counts places.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from zoo.registry import IGNORE_INDEX

VOTES = ("alive", "text", "last", "turns", "all")


@dataclass
class TokenSequence:
    """The tokens of a sequence, or those left of them; every tensor is (B, L)."""

    column: Tensor  # int64, in the unshortened sequence
    seen: Tensor  # bool, valid as a key: neither padding nor hidden
    image: Tensor  # bool, an image token
    segment: Tensor  # int64, sample within a packed row
    fixed: Tensor  # bool, never dropped: it predicts a label or the next token
    voter: Tensor  # bool, belongs to the prompt: before the first label of its sample
    labels: Tensor | None
    whole: bool = False  # all tokens are seen
    packed: bool = False  # rows hold several samples
    dense: bool = False  # places count the tokens left
    place: Tensor = None  # type: ignore[assignment]  # int64, column whose position the token has; None: its own
    turn: Tensor = None  # type: ignore[assignment]  # bool, in front of an answer of the dialog; None: without labels

    def __post_init__(self) -> None:
        self.place = self.column if self.place is None else self.place
        self.turn = torch.zeros_like(self.seen) if self.turn is None else self.turn

    @classmethod
    def of(
        cls,
        image: Tensor,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        labels: Tensor | None,
        drafts: int = 0,
        dense: bool = False,
    ) -> "TokenSequence":
        """Describe an unshortened sequence; all tensors are (B, T).

        Args:
            drafts: number of columns at the end that are drafts of assisted decoding: they do not vote.
            dense: places count the tokens left, from the first cut on.
        """
        seen = torch.ones_like(image) if attention_mask is None else attention_mask.bool()
        if segment_ids is not None:
            seen = seen & (segment_ids >= 0)
        segment = torch.zeros_like(image, dtype=torch.long) if segment_ids is None else segment_ids.clamp(min=0)
        column = torch.arange(image.shape[1], device=image.device).expand_as(segment)
        follows = seen[:, 1:] & seen[:, :-1] & (segment[:, 1:] == segment[:, :-1])  # (B, T - 1)
        fixed = torch.ones_like(image)
        fixed[:, :-1] = ~follows  # the last of its sample: what comes next is predicted there
        voter = seen
        if drafts:
            # Each draft is verified by the logits before it, so all of them, and the prompt's last token, are needed.
            prompt = image.shape[1] - drafts
            fixed[:, prompt - 1 :] = True
            voter = seen & (column < prompt)
        turn = None
        if labels is not None:
            labelled = (labels != IGNORE_INDEX) & seen
            labelled[:, 0] = False  # labels are shifted: no token predicts the first one
            # Answers before the sample's last image are not learned: the choice of kept tokens depends on text after
            # them, which would leak into their prediction.
            last = column.new_full((len(image), int(segment.max()) + 1), -1)
            last = last.scatter_reduce(1, segment, column.masked_fill(~image, -1), "amax")
            labelled &= column > last.gather(1, segment)
            labels = labels.masked_fill(~labelled, IGNORE_INDEX)
            fixed[:, :-1] |= labelled[:, 1:]
            turn = torch.zeros_like(image)
            turn[:, :-1] = labelled[:, 1:] & ~labelled[:, :-1] & follows
            # Only the prompt votes: in generation the answer is not there when tokens are dropped.
            samples = int(segment.max()) + 1
            first = column.new_full((len(image), samples), image.shape[1])
            first = first.scatter_reduce(1, segment, column.masked_fill(~labelled, image.shape[1]), "amin")
            voter = seen & (column < first.gather(1, segment))
        packed = segment_ids is not None and bool(segment.any())
        described = (column, seen, image & seen, segment, fixed & seen, voter, labels, bool(seen.all()), packed, dense)
        return cls(*described) if turn is None else cls(*described, turn=turn)

    def count(self) -> Tensor:
        """Count the image tokens of each sample: (B, samples)."""
        zeros = self.segment.new_zeros(len(self.segment), int(self.segment.max()) + 1)
        return zeros.scatter_add(1, self.segment, self.image.long())

    def start(self, votes: str) -> Tensor:
        """Distribute one vote evenly over the voters of each sample: (B, L) float32.

        Args:
            votes: `alive`: all prompt tokens that are seen; `text`: those that are not image tokens; `last`: the last
                prompt token; `turns`: the tokens in front of each answer of the dialog, or without labels the last
                prompt token; `all`: hidden tokens too.
        """
        voter = self.voter if votes == "all" else self.voter & self.seen
        voter = voter & ~self.image if votes == "text" else voter
        samples = int(self.segment.max()) + 1
        if votes in ("last", "turns"):
            column = self.column.masked_fill(~voter, -1)
            last = column.new_full((len(column), samples), -1).scatter_reduce(1, self.segment, column, "amax")
            voter = voter & (column == last.gather(1, self.segment))
        if votes == "turns":  # the last prompt token is in front of the first answer: it is among them
            voter = voter | (self.turn & self.seen)
        count = torch.zeros(len(voter), samples, device=voter.device).scatter_add(1, self.segment, voter.float())
        return voter / count.gather(1, self.segment).clamp(min=1)

    def choose(self, scores: Tensor, budget: Tensor, copies: int = 1) -> Tensor:
        """Choose the tokens to keep: all but the image tokens with the lowest scores.

        Args:
            scores: (B, L) finite; of equal scores the first is kept.
            budget: (B, samples) number of image tokens to keep in each sample.
            copies: consecutive rows that are beams of one sample: the first row decides for all.

        Returns:
            (B, L) bool.
        """
        candidate = self.image & self.seen
        scores = scores.masked_fill(self.fixed, torch.inf).masked_fill(~candidate, -torch.inf)
        by_score = scores.argsort(dim=1, descending=True, stable=True)
        # Two stable sorts rank candidates within their sample; all other tokens form a last group of their own.
        group = torch.where(candidate, self.segment, budget.shape[1]).gather(1, by_score)
        order = by_score.gather(1, group.argsort(dim=1, stable=True))  # sample by sample, best first
        sizes = group.new_zeros(len(group), budget.shape[1] + 1).scatter_add(1, group, torch.ones_like(group))
        start = sizes.cumsum(1) - sizes  # offset of each sample in that order
        place = torch.empty_like(order).scatter(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        rank = place - start.gather(1, self.segment)
        keep = self.seen & (~candidate | self.fixed | (rank < budget.gather(1, self.segment)))
        return of_first(keep, copies)

    def completed(self, keep: Tensor) -> Tensor:
        """Add to a choice of image tokens (B, L) what is never dropped, and take padding out: (B, L) bool."""
        return self.seen & (~self.image | self.fixed | keep)

    def hide(self, keep: Tensor) -> "TokenSequence":
        """Keep all tokens, but mask those outside `keep` as keys."""
        seen = self.seen & keep
        return replace(self, seen=seen, place=self._places(seen), whole=bool(seen.all()))

    def gather(self, keep: Tensor) -> tuple["TokenSequence", Tensor]:
        """Drop the tokens outside `keep`; rows that keep fewer are padded, on the left if the batch is left-padded.

        Returns:
            The tokens left, and the index (B, K) of each in this sequence.
        """
        longest = int(keep.sum(1).max())
        # Sorting the bool mask stably moves kept tokens together in their order; generation reads the last column, so
        # left padding must stay on the left.
        if bool(self.seen[:, -1].all()):
            index = keep.byte().argsort(dim=1, stable=True)[:, -longest:]
        else:
            index = keep.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        seen = keep.gather(1, index)
        moved = replace(self, place=self._places(keep)) if self.dense else self
        left = moved._with(lambda x: x.gather(1, index), seen, bool(seen.all()))
        if left.labels is not None:
            left.labels = left.labels.masked_fill(~seen, IGNORE_INDEX)
        return left, index

    def _places(self, keep: Tensor) -> Tensor:
        """Return the places (B, L) once the tokens outside `keep` are gone."""
        if not self.dense:
            return self.place
        gone = (self.seen & ~keep).long()
        ahead = gone.cumsum(1) - gone
        if self.packed:  # each sample counts its own, from where it begins
            first = ahead.new_full((len(ahead), int(self.segment.max()) + 1), ahead.shape[1])
            ahead = ahead - first.scatter_reduce(1, self.segment, ahead, "amin").gather(1, self.segment)
        # Padding that an earlier cut left behind a row has places of any size, from which nothing is taken.
        return torch.where(self.seen, self.place - ahead, self.place)

    def _with(self, move: Callable[[Tensor], Tensor], seen: Tensor, whole: bool) -> "TokenSequence":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: move(v) if isinstance(v, Tensor) else v for k, v in moved.items()}
        moved |= {"seen": seen, "whole": whole} | ({} if self.dense else {"place": moved["column"]})
        return TokenSequence(**moved)

    def without_last(self, count: int) -> "TokenSequence":
        """Remove the last `count` tokens."""
        seen = self.seen[:, :-count]
        return self._with(lambda x: x[:, :-count], seen, bool(seen.all()))

    def repeat(self, copies: int) -> "TokenSequence":
        """Repeat every row, as beams do."""
        return self._with(lambda x: x.repeat_interleave(copies, 0), self.seen.repeat_interleave(copies, 0), self.whole)

    def visible(self, rows: Tensor | slice, keys: int, window: int | None) -> Tensor:
        """Return the visibility mask (B, rows, keys), True where a row may attend to a key."""
        place, segment = self.place[:, rows, None], self.segment[:, rows, None]
        mask = (self.place[:, None, :keys] <= place) & self.seen[:, None, :keys]
        if self.packed:
            mask &= self.segment[:, None, :keys] == segment
        if window is not None:
            mask &= place - self.place[:, None, :keys] < window
        return mask

    def prefill_mask(self, window: int | None) -> Tensor:
        """Return the mask of the prompt (B, 1, L, L), True where a token may attend to a key.

        Fully masked rows (padding) attend to themselves, so that softmax does not return NaN.
        """
        mask = self.visible(slice(None), self.column.shape[1], window)
        alone = ~mask.any(-1)
        mask.diagonal(dim1=1, dim2=2).logical_or_(alone)
        return mask[:, None]

    def decode_mask(
        self, new: Tensor, past: int, total: int, cached: int, window: int | None, gone: Tensor | None = None
    ) -> Tensor:
        """Return the mask of a decoding step (B, 1, q, cached + q), True where a new token may attend to a key.

        Args:
            new: (B, q) bool, mask of non-padding tokens in this step.
            past: number of tokens decoded before this step.
            total: length of the unshortened prompt.
            cached: number of keys in the layer's cache, which a sliding window may have cut.
            gone: (B,) dropped tokens by which dense places of decoded tokens are lower.
        """
        b, q = new.shape
        # Decoded tokens continue the places of the prompt, as their rotary positions do.
        later = torch.arange(total, total + past + q, device=new.device).expand(b, -1)
        later = later if gone is None else later - gone[:, None]
        place = torch.cat([self.place, later], 1)[:, -cached - q :]  # (B, cached + q)
        seen = torch.cat([self.seen, new.new_ones(b, past), new], 1)[:, -cached - q :]
        query = later[:, past:, None]  # (B, q, 1)
        mask = (place[:, None] <= query) & seen[:, None]
        if window is not None:
            mask &= query - place[:, None] < window
        mask[:, :, -q:].diagonal(dim1=1, dim2=2).logical_or_(~mask.any(-1))
        return mask[:, None]


def of_first(x: Tensor, copies: int) -> Tensor:
    """Give every `copies` consecutive rows of (B, ...) the values of their first: beams of one sample."""
    return x if copies == 1 else x.unflatten(0, (-1, copies))[:, :1].expand(-1, copies, *x.shape[1:]).flatten(0, 1)


@dataclass
class VisibilityMask:
    """Visibility in a layer as `attention_flow` asks for it: a callable of rows and a number of keys."""

    tokens: TokenSequence
    window: int | None  # sliding window of the layer; None if the sequence fits

    def __call__(self, rows: Tensor | slice, keys: int) -> Tensor:
        return self.tokens.visible(rows, keys, self.window)
