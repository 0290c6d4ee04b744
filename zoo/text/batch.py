"""Batch encoded samples: padding, packing of several samples into a row, shared prefixes.

A row may hold several samples (segments), and a sample several dialogs (blocks) behind one shared prefix that holds
the images. Key k is visible to query q iff k <= q, both lie in the same segment, and k's block is 0 (the prefix) or
q's own. The positions of every block go on from the end of the prefix, so a packed dialog computes exactly what it
computes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from zoo.registry import IGNORE_INDEX, Asked, ZooError, unknown
from zoo.vision.images.processors import FEATURES, stack

TEACHER_ROWS = "teacher"  # key of the same rows as encoded by a teacher's processor


@dataclass
class EncodedSample:
    """One row before padding. All arrays have length T; `blocks` and `segments` are None in rows without packing."""

    input_ids: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64, IGNORE_INDEX for tokens that are not learned; not shifted
    pixel_values: list[Any]  # for each image (3, h, w), or a `Picture` of several rows
    positions: np.ndarray | None = None  # (T,) int64; None: 0 .. T-1
    blocks: np.ndarray | None = None  # (T,) int64, 0 for the shared prefix
    segments: np.ndarray | None = None  # (T,) int64
    targets: dict[str, np.ndarray] = field(default_factory=dict)  # dense targets, one row per image
    ids: list[str] = field(default_factory=list)  # of its samples
    pairs: np.ndarray | None = None  # (T,) int64, see `TokenizedDialog`; numbered within the row
    gap: int = 0  # positions that its images take beyond their tokens, see `zoo.composed.positions`
    fewer: int = 0  # placeholders that no token fills: the model leaves their columns out, see `zoo.composed.left_out`
    asked: list[Asked] = field(default_factory=list)  # of each of its samples; empty unless the model's parts need it
    twin: "EncodedSample | None" = None  # the same row as encoded by a teacher's processor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class TokenizedDialog:
    """A dialog as tokens, with all placeholders of its images."""

    input_ids: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64
    prefix: int  # length of the prefix shared with other dialogs about the same images: up to the last placeholder
    images: int  # number of its images
    head: bytes = b""  # tokens of the prefix, for comparison
    # (T,) int64 for an answer of a pair: 2 * pair at the tokens of a chosen one, 2 * pair + 1 at those of a rejected
    # one, -1 elsewhere.
    pairs: np.ndarray | None = None
    asked: Asked | None = None  # what it asks about its images; None unless the model's parts need it

    def __post_init__(self) -> None:
        # A first token has no prediction; in a packed row, the dialog before must not predict it. Answers inside the
        # prefix (a later turn shows another image) are learned once for all dialogs.
        if self.prefix == 0:
            self.labels[:1] = IGNORE_INDEX
        object.__setattr__(self, "head", self.input_ids[: self.prefix].tobytes())


def as_preference(dialog: TokenizedDialog, number: int) -> TokenizedDialog:
    """Mark a dialog as an answer of a pair: `number` is 2p for the chosen one of pair p, 2p + 1 for the rejected one.

    Only the last turn is compared. That of a chosen answer may also be learned, that of a rejected one never is.
    """
    labels = last_turn(dialog.labels)
    pairs = np.where(labels == IGNORE_INDEX, -1, number)
    return replace(dialog, labels=np.full_like(labels, IGNORE_INDEX) if number % 2 else labels, pairs=pairs)


def number_pairs(sample_id: str, sides: list[str], dialogs: list[TokenizedDialog]) -> list[TokenizedDialog]:
    """Number the pairs of answers of a sample; the two answers of a pair may be in different rows."""
    if not any(sides):
        return dialogs
    wrong = next((s for s in sides if s not in ("", "chosen", "rejected")), None)
    if wrong is not None:
        raise unknown("preference of a dialog", wrong, ("chosen", "rejected"))
    if len(sides) > 1 and [s for s in sides if s] != ["chosen", "rejected"] * (len([s for s in sides if s]) // 2):
        raise ZooError(f"Sample {sample_id!r}: each chosen dialog must have its rejected one behind it, got {sides}.")
    result, number = [], int(sides == ["rejected"])
    for side, dialog in zip(sides, dialogs, strict=True):
        result.append(as_preference(dialog, number) if side else dialog)
        number += bool(side)
    return result


def last_turn(labels: np.ndarray) -> np.ndarray:
    """Keep the labels of the last assistant turn only."""
    where = np.flatnonzero(labels != IGNORE_INDEX)
    gaps = np.flatnonzero(np.diff(where) > 1)
    start = where[gaps[-1] + 1] if len(gaps) else where[0]
    result = np.full_like(labels, IGNORE_INDEX)
    result[start:] = labels[start:]
    return result


def one_question(dialogs: Sequence[TokenizedDialog], sample_id: str) -> list[Asked]:
    """Return what the dialogs of a row ask, which is to be the same for all: they share its images.

    Raises:
        ZooError: their questions differ.
    """
    asked = [d.asked for d in dialogs if d.asked is not None]
    if len({a.text for a in asked}) > 1:
        raise ZooError(
            f"Sample {sample_id!r}: a part of the model chooses image tokens by the question, and here several dialogs "
            "of a row share an image. Set pack=none in the stage, and no pack_length."
        )
    return asked[:1]


def share_prefix(dialogs: Sequence[TokenizedDialog], sample_id: str) -> dict[str, np.ndarray]:
    """Join dialogs with the same prefix into one row: the prefix once, then a block per dialog.

    Returns:
        `input_ids`, `labels`, `positions` and `blocks` of the row, and `pairs` if there are any.
    """
    prefix = dialogs[0].prefix
    if any(d.head != dialogs[0].head for d in dialogs):
        raise ZooError(
            f"The dialogs of sample {sample_id!r} do not begin alike, so they cannot share their images. Set pack=none "
            "in the stage, where each has a row of its own, or show the images ahead of the questions."
        )
    firsts = [(d.labels if d.pairs is None else d.pairs)[prefix : prefix + 1] for d in dialogs[1:]]
    if prefix and any((first >= 0).any() for first in firsts):  # the end of the dialog before would predict it
        raise ZooError(
            f"Sample {sample_id!r}: the template writes nothing between an image and an answer, so that several "
            "answers cannot follow one image in a row. Set pack=none in the stage."
        )
    # Labels inside the prefix: those of a plain dialog, since a preference masks all but its last turn.
    learnt = next((d for d in dialogs if d.pairs is None), dialogs[0])
    lengths = np.array([prefix] + [len(d.input_ids) - prefix for d in dialogs])
    blocks = np.repeat(np.arange(len(lengths)), lengths)
    starts = lengths.cumsum() - lengths  # of each block in the row
    pairs = {}
    if any(d.pairs is not None for d in dialogs):
        nowhere = np.full(prefix, -1, dtype=np.int64)
        pairs["pairs"] = np.concatenate([nowhere, *(_pairs_of(d)[prefix:] for d in dialogs)])
    return pairs | {
        "input_ids": np.concatenate([dialogs[0].input_ids[:prefix]] + [d.input_ids[prefix:] for d in dialogs]),
        "labels": np.concatenate([learnt.labels[:prefix]] + [d.labels[prefix:] for d in dialogs]),
        # Every block continues at the end of the prefix, as if the others were not there.
        "positions": np.arange(len(blocks)) - (starts - prefix * (starts > 0))[blocks],
        "blocks": blocks,
    }


def _pairs_of(row: TokenizedDialog | EncodedSample) -> np.ndarray:
    return np.full(len(row.input_ids), -1, dtype=np.int64) if row.pairs is None else row.pairs


def _joined_pairs(rows: Sequence[EncodedSample]) -> list[np.ndarray]:
    """Number the pairs of several rows through: the n-th chosen answer belongs to the n-th rejected one, in any row."""
    result, before = [], np.zeros(2, dtype=np.int64)
    for row in rows:
        own = _pairs_of(row)
        here = own >= 0
        result.append(np.where(here, own + 2 * before[own % 2], -1))
        before += [len(np.unique(own[here & (own % 2 == side)])) for side in (0, 1)]
    if before[0] != before[1]:
        raise ZooError(f"A batch has {before[0]} chosen and {before[1]} rejected answers; they must come in pairs.")
    return result


def pack(samples: Sequence[EncodedSample], length: int) -> list[EncodedSample]:
    """Join samples into rows of at most `length` tokens, longest first, each into the first row that has room.

    A sample longer than `length` gets a row of its own. Losses of each sample are those of the sample alone. Where a
    pruner leaves out placeholders, and their number is known, they do not count.
    """
    rows: list[list[EncodedSample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=_left, reverse=True):
        size = _left(sample)
        row = next((i for i, free in enumerate(room) if free >= size), None)
        if row is None:
            rows.append([sample])
            room.append(max(length, size) - size)
        else:
            rows[row].append(sample)
            room[row] -= size
    return [_join(row) for row in rows]


def _left(sample: EncodedSample) -> int:
    return len(sample) - sample.fewer


def _join(samples: list[EncodedSample]) -> EncodedSample:
    labels = [s.labels.copy() for s in samples]
    for one in labels:
        one[0] = IGNORE_INDEX  # a first token has no prediction; here the sample before must not predict it
    segments = [np.full(len(s), i, dtype=np.int64) for i, s in enumerate(samples)]
    blocks = [np.zeros(len(s), dtype=np.int64) if s.blocks is None else s.blocks for s in samples]
    keys = {key for s in samples for key in s.targets}
    paired = any(s.pairs is not None for s in samples)
    return EncodedSample(
        pairs=np.concatenate(_joined_pairs(samples)) if paired else None,
        input_ids=np.concatenate([s.input_ids for s in samples]),
        labels=np.concatenate(labels),
        pixel_values=[p for s in samples for p in s.pixel_values],
        positions=np.concatenate([np.arange(len(s)) if s.positions is None else s.positions for s in samples]),
        blocks=np.concatenate(blocks),
        segments=np.concatenate(segments),
        targets={key: np.concatenate([s.targets[key] for s in samples if key in s.targets]) for key in keys},
        ids=[i for s in samples for i in s.ids],
        asked=[a for s in samples for a in s.asked],
        twin=_join([s.twin for s in samples if s.twin is not None]) if samples[0].twin is not None else None,
    )


def collate(
    samples: Sequence[EncodedSample], *, pad_id: int, padding_side: str = "right", multiple_of: int = 1
) -> dict[str, Any]:
    """Stack rows into a batch for `ZooModel.forward`.

    Args:
        samples: rows, from `ZooProcessor.encode` or `pack`.
        pad_id: token id of padding.
        padding_side: `right` for training, `left` for generation.
        multiple_of: T is rounded up to a multiple of this (for `torch.compile`).

    Returns:
        input_ids, labels, attention_mask, position_ids (B, T); images_per_row (list); pixel_values (M, 3, h, w) if
        there are images, with `cuts` where an image has rows of its own; segment_ids and block_ids (B, T) if a row is
        packed, -1 at padding; targets if there are any;
        pair_ids (B, T) if there are pairs of answers: 2p at the tokens of the chosen one of pair p, 2p + 1 at those of
        the rejected one, -1 elsewhere;
        questions, what each sample asks about its images, if the model's parts need it;
        features, of images whose features are kept, see `zoo.runs.kept_features`: pixel_values are of the others then;
        `teacher`, the same rows for a teacher, without pixel_values if those are the same.
    """
    longest = -(-max(len(s) for s in samples) // multiple_of) * multiple_of
    size = (len(samples), longest)
    ids = np.full(size, pad_id, dtype=np.int64)
    labels = np.full(size, IGNORE_INDEX, dtype=np.int64)
    mask = np.zeros(size, dtype=np.int64)
    positions = np.zeros(size, dtype=np.int64)
    is_packed = any(s.blocks is not None or s.segments is not None for s in samples)
    blocks, segments = np.full(size, -1, dtype=np.int64), np.full(size, -1, dtype=np.int64)
    for row, s in enumerate(samples):
        span = slice(longest - len(s), longest) if padding_side == "left" else slice(0, len(s))
        ids[row, span], labels[row, span], mask[row, span] = s.input_ids, s.labels, 1
        positions[row, span] = np.arange(len(s)) if s.positions is None else s.positions
        if is_packed:
            blocks[row, span] = 0 if s.blocks is None else s.blocks
            segments[row, span] = 0 if s.segments is None else s.segments
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(positions),
        "images_per_row": [len(s.pixel_values) for s in samples],
    }
    if is_packed:
        batch |= {"segment_ids": torch.from_numpy(segments), "block_ids": torch.from_numpy(blocks)}
    if any(s.pairs is not None for s in samples):
        pairs = np.full(size, -1, dtype=np.int64)
        for row, (s, own) in enumerate(zip(samples, _joined_pairs(samples), strict=True)):
            pairs[row, slice(longest - len(s), longest) if padding_side == "left" else slice(0, len(s))] = own
        batch["pair_ids"] = torch.from_numpy(pairs)
    if pixels := [p for s in samples for p in s.pixel_values]:
        batch |= stack(pixels)  # pixel_values (M, 3, h, w)
    if asked := [a for s in samples for a in s.asked]:
        batch["questions"] = asked
    keys = {key for s in samples for key in s.targets}
    if keys:
        batch["targets"] = {
            key: torch.from_numpy(np.concatenate([s.targets[key] for s in samples if key in s.targets]))
            for key in sorted(keys)
        }
    if twins := [s.twin for s in samples if s.twin is not None]:
        theirs = collate(twins, pad_id=pad_id, padding_side=padding_side)
        both = zip(
            (p for s in samples for p in s.pixel_values), (p for t in twins for p in t.pixel_values), strict=True
        )
        if all(a is b for a, b in both):
            theirs.pop("pixel_values", None)
            theirs.pop(FEATURES, None)
        batch[TEACHER_ROWS] = theirs
    return batch


def to_device(value: Any, device: torch.device) -> Any:
    """Move all tensors of a nested batch to a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value
