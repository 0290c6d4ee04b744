"""What is known of each position of a sequence inside the LLM, and which image tokens stay.

Positions keep the number of the column in which they entered the LLM. Who sees whom follows from these numbers alone:
key k is visible to query q iff k's column is not behind q's, both are of one sample, k is neither padding nor hidden,
and it lies in the layer's window, which counts columns as the unshortened sequence has them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from zoo.registry import IGNORE_INDEX

VOTES = ("alive", "text", "last", "all")


@dataclass
class Survivors:
    """The positions of a sequence or what is left of them; every tensor is (B, L)."""

    column: Tensor  # int64, where the position stood when it entered the LLM
    seen: Tensor  # bool, may be a key: no padding, and not hidden
    image: Tensor  # bool, an image token
    segment: Tensor  # int64, which sample of a packed row
    fixed: Tensor  # bool, never dropped: it predicts a label or the next token
    voter: Tensor  # bool, of the prompt: before the first label of its sample
    labels: Tensor | None
    whole: bool = False  # every position is seen
    packed: bool = False  # rows hold several samples

    @classmethod
    def of(
        cls,
        image: Tensor,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        labels: Tensor | None,
        drafts: int = 0,
    ) -> "Survivors":
        """Describe a whole sequence by what the model knows of it; all (B, T).

        Args:
            drafts: columns at the end that are guesses of what comes behind the prompt: no voters.
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
            prompt = image.shape[1] - drafts
            fixed[:, prompt - 1 :] = True
            voter = seen & (column < prompt)
        if labels is not None:
            labelled = (labels != IGNORE_INDEX) & seen
            labelled[:, 0] = False
            # Answers ahead of the sample's last image are not learnt: which tokens stay is told by what follows them.
            last = column.new_full((len(image), int(segment.max()) + 1), -1)
            last = last.scatter_reduce(1, segment, column.masked_fill(~image, -1), "amax")
            labelled &= column > last.gather(1, segment)
            labels = labels.masked_fill(~labelled, IGNORE_INDEX)
            fixed[:, :-1] |= labelled[:, 1:]
            samples = int(segment.max()) + 1
            first = column.new_full((len(image), samples), image.shape[1])
            first = first.scatter_reduce(1, segment, column.masked_fill(~labelled, image.shape[1]), "amin")
            voter = seen & (column < first.gather(1, segment))
        packed = segment_ids is not None and bool(segment.any())
        return cls(column, seen, image & seen, segment, fixed & seen, voter, labels, bool(seen.all()), packed)

    def count(self) -> Tensor:
        """Count the image tokens of each sample: (B, samples)."""
        zeros = self.segment.new_zeros(len(self.segment), int(self.segment.max()) + 1)
        return zeros.scatter_add(1, self.segment, self.image.long())

    def start(self, votes: str) -> Tensor:
        """Share one vote evenly among the voters of each sample: (B, L) float32.

        Args:
            votes: `alive`: every prompt token that is seen; `text`: those that are no image; `last`: the last one;
                `all`: hidden ones too.
        """
        voter = self.voter if votes == "all" else self.voter & self.seen
        voter = voter & ~self.image if votes == "text" else voter
        samples = int(self.segment.max()) + 1
        if votes == "last":
            column = self.column.masked_fill(~voter, -1)
            last = column.new_full((len(column), samples), -1).scatter_reduce(1, self.segment, column, "amax")
            voter = voter & (column == last.gather(1, self.segment))
        count = torch.zeros(len(voter), samples, device=voter.device).scatter_add(1, self.segment, voter.float())
        return voter / count.gather(1, self.segment).clamp(min=1)

    def choose(self, scores: Tensor, budget: Tensor, copies: int = 1) -> Tensor:
        """Say which positions stay: all but the image tokens that score least.

        Args:
            scores: (B, L) finite; of equal scores the first counts more.
            budget: (B, samples) image tokens that each sample keeps.
            copies: rows in a run that are beams of one sample: the first decides for all.

        Returns:
            (B, L) bool.
        """
        candidate = self.image & self.seen
        scores = scores.masked_fill(self.fixed, torch.inf).masked_fill(~candidate, -torch.inf)
        by_score = scores.argsort(dim=1, descending=True, stable=True)
        group = torch.where(candidate, self.segment, budget.shape[1]).gather(1, by_score)
        order = by_score.gather(1, group.argsort(dim=1, stable=True))  # sample by sample, best first
        sizes = group.new_zeros(len(group), budget.shape[1] + 1).scatter_add(1, group, torch.ones_like(group))
        start = sizes.cumsum(1) - sizes  # of each sample in the order
        place = torch.empty_like(order).scatter(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        rank = place - start.gather(1, self.segment)
        keep = self.seen & (~candidate | self.fixed | (rank < budget.gather(1, self.segment)))
        return keep.unflatten(0, (-1, copies))[:, :1].expand(-1, copies, -1).flatten(0, 1) if copies > 1 else keep

    def hide(self, keep: Tensor) -> "Survivors":
        """Keep all positions, and let those outside `keep` be seen by nobody."""
        return self._with(lambda x: x, self.seen & keep, bool((self.seen & keep).all()))

    def gather(self, keep: Tensor) -> tuple["Survivors", Tensor]:
        """Drop the positions outside `keep`; rows that keep fewer are padded on the side that has no last token.

        Returns:
            What is left, and the index (B, K) of each in this sequence.
        """
        longest = int(keep.sum(1).max())
        if bool(self.seen[:, -1].all()):  # padding, if any, is on the left, and generation reads the last column
            index = keep.byte().argsort(dim=1, stable=True)[:, -longest:]
        else:
            index = keep.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        seen = keep.gather(1, index)
        left = self._with(lambda x: x.gather(1, index), seen, bool(seen.all()))
        if left.labels is not None:
            left.labels = left.labels.masked_fill(~seen, IGNORE_INDEX)
        return left, index

    def _with(self, move: Callable[[Tensor], Tensor], seen: Tensor, whole: bool) -> "Survivors":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: move(v) if isinstance(v, Tensor) else v for k, v in moved.items()}
        moved |= {"seen": seen, "whole": whole}
        return Survivors(**moved)

    def without_last(self, count: int) -> "Survivors":
        """Leave out the last `count` positions."""
        seen = self.seen[:, :-count]
        return self._with(lambda x: x[:, :-count], seen, bool(seen.all()))

    def repeat(self, copies: int) -> "Survivors":
        """Repeat every row, as beams do."""
        return self._with(lambda x: x.repeat_interleave(copies, 0), self.seen.repeat_interleave(copies, 0), self.whole)

    def visible(self, rows: Tensor | slice, keys: int, window: int | None) -> Tensor:
        """Say who sees whom: (B, rows, keys) bool."""
        column, segment = self.column[:, rows, None], self.segment[:, rows, None]
        mask = (self.column[:, None, :keys] <= column) & self.seen[:, None, :keys]
        if self.packed:
            mask &= self.segment[:, None, :keys] == segment
        if window is not None:
            mask &= column - self.column[:, None, :keys] < window
        return mask

    def prefill_mask(self, window: int | None) -> Tensor:
        """Say who sees whom in the whole sequence, (B, 1, L, L); who sees nobody sees itself, else it would be NaN."""
        mask = self.visible(slice(None), self.column.shape[1], window)
        alone = ~mask.any(-1)
        mask.diagonal(dim1=1, dim2=2).logical_or_(alone)
        return mask[:, None]

    def decode_mask(self, new: Tensor, past: int, total: int, cached: int, window: int | None) -> Tensor:
        """Say which keys new tokens see: (B, 1, q, cached + q).

        Args:
            new: (B, q) bool, real tokens among those that come now.
            past: tokens that came between this sequence and now.
            total: length of the sequence when it entered the LLM.
            cached: keys that the layer's cache still holds.
        """
        b, q = new.shape
        later = torch.arange(total, total + past + q, device=new.device).expand(b, -1)
        column = torch.cat([self.column, later], 1)[:, -cached - q :]  # (B, cached + q)
        seen = torch.cat([self.seen, new.new_ones(b, past), new], 1)[:, -cached - q :]
        query = later[:, past:, None]  # (B, q, 1)
        mask = (column[:, None] <= query) & seen[:, None]
        if window is not None:
            mask &= query - column[:, None] < window
        mask[:, :, -q:].diagonal(dim1=1, dim2=2).logical_or_(~mask.any(-1))
        return mask[:, None]


@dataclass
class Sight:
    """Who sees whom in a layer, as `attention_walk` asks it: called for rows and a number of keys."""

    tokens: Survivors
    window: int | None  # of the layer; None: it does not bind

    def __call__(self, rows: Tensor | slice, keys: int) -> Tensor:
        return self.tokens.visible(rows, keys, self.window)
