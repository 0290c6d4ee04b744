"""The maximum length of a sample: the LLM's positions, or a stage's `max_length`. Nothing is cut silently.

Length counts positions: dialogs that share images, and samples that share a row, each begin at the position at which
they would begin alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zoo.registry import IGNORE_INDEX, LengthError, ZooError
from zoo.settings.stage import Stage
from zoo.text.batch import EncodedSample


def length_of(row: EncodedSample) -> int:
    """Return the number of positions of a row: the tokens, images included, of its longest dialog."""
    return row.gap + (len(row) if row.positions is None else int(row.positions.max(initial=-1)) + 1)


def require_room(row: EncodedSample, limit: int | None, what: str = "the LLM's positions") -> EncodedSample:
    """Return the row.

    Raises:
        LengthError: it is longer than `limit`.
    """
    if limit is not None and (length := length_of(row)) > limit:
        raise LengthError(_too_long(length, limit, what) + _if_dense(row, length, limit))
    return row


def room_for_answer(prompt: EncodedSample, limit: int | None) -> int:
    """Return the number of positions behind a prompt.

    Raises:
        LengthError: 0.
    """
    if limit is None:
        return 1 << 30
    if (length := length_of(prompt)) >= limit:
        on = f" on {length} positions" if prompt.gap else ""
        raise LengthError(
            f"the question has {len(prompt)} tokens{on}, and the LLM has {limit} positions: no room for an answer."
            + _if_dense(prompt, length + 1, limit)
        )
    return limit - length


def shorten(row: EncodedSample, limit: int, images: Sequence[int], what: str = "the LLM's positions") -> EncodedSample:
    """Cut the text behind position `limit` off a row; dialogs that lose their whole answer are removed.

    Args:
        row: of one sample, as the processor encodes it.
        limit: number of positions to keep.
        images: ids of placeholders.
        what: name of the limit, for messages.

    Raises:
        LengthError: image tokens would be cut, one of a pair of answers would be lost, or no label is left.
    """
    length = length_of(row)
    if length <= limit:
        return row
    positions = np.arange(len(row)) if row.positions is None else row.positions
    kept = positions < limit - row.gap  # (T,)
    if np.isin(row.input_ids[~kept], images).any():
        raise LengthError(f"{_too_long(length, limit, what)} Image tokens come after that, which are never cut.")
    learnt = kept & (row.labels != IGNORE_INDEX)
    if row.pairs is not None:
        # A preference loss compares both answers of a pair; one alone has no loss.
        lost = set(np.unique(row.pairs)) - set(np.unique(row.pairs[kept]))
        if lost:
            raise LengthError(f"{_too_long(length, limit, what)} Cut there, an answer of a pair would be lost.")
        learnt |= kept & (row.pairs >= 0)
    if row.blocks is not None:
        # Block 0 is the prefix of images that all dialogs share.
        answered = np.unique(row.blocks[learnt])
        kept &= (row.blocks == 0) | np.isin(row.blocks, answered)
    if not learnt.any():
        raise LengthError(f"{_too_long(length, limit, what)} Cut there, nothing would be left to learn.")
    arrays = {n: getattr(row, n) for n in ("input_ids", "labels", "positions", "blocks", "segments", "pairs")}
    cut: dict[str, Any] = {name: None if value is None else value[kept] for name, value in arrays.items()}
    return replace(row, **cut)


@dataclass(frozen=True)
class Room:
    """The maximum length of a stage's rows.

    Attributes:
        limit: number of positions; None: no limit.
        what: name of the limit, for messages.
        cut: shorten longer rows; else they are refused.
        images: ids of placeholders, which are never cut.
    """

    limit: int | None = None
    what: str = "the LLM's positions"
    cut: bool = False
    images: tuple[int, ...] = ()

    def fit(self, row: EncodedSample) -> EncodedSample:
        """Return the row, cut if it is too long.

        Raises:
            LengthError: it is too long, and may not or cannot be cut.
        """
        if self.limit is not None and self.cut:
            return shorten(row, self.limit, self.images, self.what)
        return require_room(row, self.limit, self.what)


def room_of(stage: Stage, positions: int | None, processor: Any) -> Room:
    """Return the maximum length of a stage's rows.

    Args:
        stage: with `max_length` and `too_long`.
        positions: of the LLM; None: no limit.
        processor: of the model.

    Raises:
        ZooError: the stage would allow more than the LLM has positions.
    """
    require_positions(stage, positions)
    images = (processor.image_token_id, processor.video_token_id)
    if stage.max_length is None:
        return Room(positions, cut=stage.too_long == "cut", images=images)
    return Room(stage.max_length, "the stage's max_length", stage.too_long == "cut", images)


def require_positions(stage: Stage, positions: int | None, least: int = 0) -> None:
    """Refuse a `max_length` above the LLM's positions, or too small for any sample.

    Args:
        stage: with `max_length`.
        positions: of the LLM; None: no limit.
        least: tokens of an image.
    """
    if stage.max_length is None:
        return
    if positions is not None and stage.max_length > positions:
        raise ZooError(f"max_length={stage.max_length} is more than the {positions} positions of the LLM.")
    if stage.max_length <= least:
        raise ZooError(f"max_length={stage.max_length} has no room for an image of {least} tokens and an answer.")


def _too_long(length: int, limit: int, what: str) -> str:
    verb = "are" if what.endswith("s") else "is"
    return f"{length} tokens, images included, are too many: {what} {verb} {limit}."


def _if_dense(row: EncodedSample, length: int, limit: int) -> str:
    """Advise positions=dense where tokens that a pruner leaves out are what is too much."""
    without = length - row.fewer
    if row.gap < 0 or not row.fewer or without > limit:
        return ""
    return f" A pruner leaves out {row.fewer} of them: with positions=dense they take {without} positions."
