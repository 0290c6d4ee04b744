"""Columns that images do not fill are taken out of the sequence, as though the processor had known their number.

A processor writes as many placeholders as an image may have tokens, before its features are known. Pruners whose count
depends on the image mark the tokens that stay (`ImageFeatures.valid`), and the pass goes on without the columns of the
others: ids, masks, labels and packed samples alike. Rows that lose more columns are padded, on the side where the batch
is padded.

With `positions=kept` the columns that stay have the positions that they had, with `dense` they are counted anew.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_COLUMNS = "zoo_columns"  # attribute of a cache: which columns of its prompt it holds


@dataclass(frozen=True)
class Columns:
    """The columns of a batch that stay; every tensor is (B, K)."""

    index: Tensor  # int64, the column of the whole sequence
    valid: Tensor  # bool, no padding
    whole: int  # T

    @classmethod
    def of(cls, stay: Tensor) -> "Columns":
        """Choose columns.

        Args:
            stay: (B, T) bool; padding columns do not stay.
        """
        longest = int(stay.sum(1).max())
        if bool(stay[:, -1].all()):  # padded on the left: generation reads the last column
            index = stay.byte().argsort(dim=1, stable=True)[:, -longest:]
        else:
            index = stay.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        return cls(index, stay.gather(1, index), stay.shape[1])

    def take(self, values: Tensor, padding: int = 0) -> Tensor:
        """Select the columns of (B, T) or (B, T, C), with `padding` where a row has fewer; what follows T stays."""
        index, valid = self.index, self.valid
        if values.dim() == 3:
            index, valid = index.unsqueeze(-1).expand(-1, -1, values.shape[-1]), valid.unsqueeze(-1)
        first = values[:, : self.whole].gather(1, index).masked_fill(~valid, padding)
        return torch.cat([first, values[:, self.whole :]], 1) if values.shape[1] > self.whole else first

    def take_positions(self, values: Tensor) -> Tensor:
        """Select the columns of positions (B, T), or (A, B, T) of several axes, with 0 where a row has fewer."""
        index = self.index.expand(*values.shape[:-1], -1)
        return values.gather(-1, index).masked_fill(~self.valid, 0)

    def then(self, more: int, new: "Columns") -> "Columns":
        """Join the columns of a cache with those that follow, `more` columns behind its prompt."""
        between = torch.arange(self.whole, self.whole + more, device=self.index.device).expand(len(self.index), -1)
        index = torch.cat([self.index, between, new.index + self.whole + more], 1)
        valid = torch.cat([self.valid, torch.ones_like(between, dtype=torch.bool), new.valid], 1)
        return Columns(index, valid, self.whole + more + new.whole)


def leave_out(
    index: Tensor,
    alive: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    segment_ids: Tensor | None,
    kept: bool,
) -> tuple[Columns, Tensor]:
    """Choose the columns that stay, and the position of each.

    Args:
        index: (B, T) image token of each column, counted over the batch, -1 for text.
        alive: (S,) bool, the image tokens that stay.
        mask: (B, T) 1 for valid columns; None: all.
        positions: (B, T) or (1, T) of the whole sequence; (A, B, T) with several axes.
        segment_ids: (B, T) sample of a packed row.
        kept: keep these positions; else they are counted without the columns left out.

    Returns:
        The columns (B, K), and their positions (B, K), or (A, B, K).
    """
    gone = (index >= 0) & ~alive[index.clamp(min=0)]
    columns = Columns.of(~gone if mask is None else ~gone & mask.bool())
    positions = positions.expand(*positions.shape[:-2], len(index), -1)
    if not kept:
        positions = positions - counted_ahead(gone.long(), segment_ids)
    return columns, columns.take_positions(positions)


def counted_ahead(counts: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """Sum what is ahead of each column, (B, T), from the beginning of its row, or of its sample in a packed row.

    Args:
        counts: (B, T).
        segment_ids: (B, T) sample of each column; None: rows hold one.
    """
    ahead = counts.cumsum(1) - counts
    if segment_ids is None:
        return ahead
    begins = torch.ones_like(counts, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    column = torch.arange(counts.shape[1], device=counts.device)
    return ahead - ahead.gather(1, (column * begins).cummax(1).values)  # what was ahead of the last begin


def text_id(config: Any) -> int:
    """Return an id other than those of placeholders, for padding."""
    return next(i for i in range(3) if i not in (config.image_token_id, config.video_token_id))


def shift_of_columns(columns: Columns, wanted: Tensor, counted: Tensor) -> Tensor:
    """Return what is added to the positions counted over the columns that stay, (B, K), to get those wanted.

    Args:
        columns: that stay.
        wanted: (B, K), or (A, B, K) of several axes.
        counted: (B, K) or (1, K).
    """
    shift = (wanted - counted).masked_fill(~columns.valid, 0)
    # Padding on the right goes on where its row ends: what follows in a cache is shifted as much as its last column.
    column = torch.arange(shift.shape[-1], device=shift.device)
    ends = (columns.valid * (column + 1)).argmax(1, keepdim=True)  # (B, 1)
    return torch.where(column > ends, shift.gather(-1, ends.expand(*shift.shape[:-1], 1)), shift)


def put_columns(cache: Any, columns: Columns | None) -> None:
    """Keep on a cache which columns of its prompt it holds."""
    if columns is not None and cache is not None and hasattr(cache, "__dict__"):
        setattr(cache, _COLUMNS, columns)


def columns_of(cache: Any, rows: int) -> Columns | None:
    """Return which columns of its prompt a cache holds, for `rows` sequences; None: all."""
    columns: Columns | None = getattr(cache, _COLUMNS, None)
    if columns is None or not int(cache.get_seq_length()):
        return None
    copies = rows // len(columns.index)
    if copies == 1:
        return columns
    index, valid = (x.repeat_interleave(copies, 0) for x in (columns.index, columns.valid))
    return Columns(index, valid, columns.whole)
