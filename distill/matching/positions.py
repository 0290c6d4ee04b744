"""Match positions of student and teacher by their content, not by their index in the sequence.

Answer tokens are the same in both sequences, in the same order, whatever the number of image tokens before them. An
image token is identified by its image and its cell in the encoder's grid, so that a student that keeps a quarter of
the tokens is compared with a teacher that keeps all, on the tokens kept. Tiles and frames count as images, and so does
each row of images that keep their shapes, whose grids differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.distill.losses.chunked import LiveTeacher, TopKTeacher
from zoo.registry import IGNORE_INDEX, ImageFeatures, UnlikeRows, ZooError

PREFIX = "teacher"  # of the batch's targets that hold a stored teacher: teacher.<positions>.<what>


@dataclass
class Matched:
    """Hidden states of the student at matched positions, and the teacher's target at the same ones."""

    rows: Tensor  # (S, C)
    target: LiveTeacher | TopKTeacher
    labels: Tensor | None = None  # (S,) label of each position
    group: Tensor | None = None  # (S,) index of the answer, or of the image, that a position belongs to


def match_responses(student: Any, teacher: Any, batch: Mapping[str, Any]) -> Matched:
    """Match the positions that predict a label, in the order of labels.

    Args:
        student: its view (`zoo.composed.outputs.Seen`).
        teacher: that of the teacher, or None: its stored predictions are in the batch.
        batch: with `targets`, if the teacher is stored.
    """
    rows, labels, group = _responses(student)
    if teacher is None:
        return Matched(rows, stored(batch, "response", len(rows)), labels, group)
    theirs, same, _ = _responses(teacher)
    if len(theirs) != len(rows):
        raise ZooError(f"The student has {len(rows)} labels and the teacher {len(same)}: their texts differ.")
    return Matched(rows, LiveTeacher(theirs, teacher.llm.head), labels, group)


def match_images(student: Any, teacher: Any, batch: Mapping[str, Any]) -> Matched:
    """Match the positions of image tokens, unshifted: those that the student kept, in its order.

    Raises:
        ZooError: the teacher lacks a token of the student.
    """
    where, ours = _image_tokens(student)  # flat positions, (image, cell)
    hidden = student.last_hidden_state
    rows = hidden.flatten(0, 1)[where]  # (P, C)
    if teacher is None:
        cells = _cells_per_image(batch)
        index = ours[:, 0] * cells + ours[:, 1]
        whole = stored(batch, "visual", None)
        if len(index) and int(index.max()) >= len(whole.ids):
            raise ZooError(f"The stored teacher has {cells} image tokens for each image; the student has more.")
        target: LiveTeacher | TopKTeacher = TopKTeacher(whole.ids[index], whole.log_probs[index], whole.log_rest[index])
    else:
        if _cuts(student) != _cuts(teacher):
            raise ZooError("student and teacher cut images into different tiles: give both the same image processor.")
        theirs, known = _image_tokens(teacher)
        found = _find(ours.to(known.device), known)
        target = LiveTeacher(teacher.last_hidden_state.flatten(0, 1)[theirs[found]], teacher.llm.head)
    return Matched(rows, target, group=ours[:, 0])


def num_shown(seen: Any) -> int:
    """Count the images of a batch, each tile as one."""
    if isinstance(seen.image_kept, UnlikeRows):
        return int(seen.image_kept.num_rows)
    return len(seen.image_tokens if seen.image_kept is None else seen.image_kept.tokens)


def shared_vocab(student: Any, teacher: Any, batch: Mapping[str, Any]) -> int:
    """Size of the shared vocabulary: `vocab_size` of the batch, else the rows of the shorter embedding."""
    tables = [seen.llm.vocab_size for seen in (student, teacher) if seen is not None]
    return min([*tables, int(batch.get("vocab_size") or min(tables))])


def stored(batch: Mapping[str, Any], positions: str, count: int | None) -> TopKTeacher:
    """Take a stored teacher's tokens and log-probabilities from the batch's targets.

    Raises:
        ZooError: there are none, or their number is not that of the positions.
    """
    targets = batch.get("targets") or {}
    key = f"{PREFIX}.{positions}."
    if f"{key}ids" not in targets:
        raise ZooError(f"The stored teacher has no {positions} positions: run zoo teach for this stage.")
    ids, log_probs, log_rest = (targets[key + name] for name in ("ids", "log_probs", "log_rest"))
    if count is not None and len(ids) != count:
        raise ZooError(f"The stored teacher has {len(ids)} {positions} positions for the batch, and it has {count}.")
    return TopKTeacher(ids.long(), log_probs.float(), log_rest.float())


def _responses(seen: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states that predict a label (S, C), the labels (S,), and the answer of each (S,)."""
    hidden, labels = seen.last_hidden_state, seen.labels
    shifted = labels[:, 1:]
    where = shifted != IGNORE_INDEX  # (B, T - 1)
    starts = where & ~torch.nn.functional.pad(where, (1, -1))  # the first label of each answer
    answers = starts.flatten().cumsum(0).view_as(where) - 1
    return hidden[:, :-1][where], shifted[where], answers[where]


def _image_tokens(seen: Any) -> tuple[Tensor, Tensor]:
    """Return flat positions of image tokens (P,), and the image and the encoder's cell of each (P, 2)."""
    index = seen.image_index
    if index is None or seen.image_tokens is None or not seen.image_tokens.numel():
        device = seen.last_hidden_state.device
        return torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, 2, dtype=torch.long, device=device)
    flat = index.flatten()
    where = (flat >= 0).nonzero().squeeze(-1)  # (P,)
    if isinstance(seen.image_kept, UnlikeRows):
        return where, _of_rows(seen.image_kept)[flat[where]]
    count = seen.image_tokens.shape[:-1].numel() // num_shown(seen)  # (M, K, C), or (M * K, C) from a layout
    image, place = flat[where] // count, flat[where] % count
    cells = _cells(seen.image_kept, count)
    return where, torch.stack([image, place if cells is None else cells[image, place]], -1)


def _of_rows(kept: UnlikeRows) -> Tensor:
    """Return the row, and the cell in the grid of that row, of each image token, row by row: (S, 2)."""

    def cells(group: ImageFeatures) -> Tensor:
        m, count = group.tokens.shape[:2]
        found = _cells(group, count)
        return torch.arange(count, device=group.tokens.device).expand(m, -1) if found is None else found

    rows = kept.in_order(cells)
    return torch.cat([torch.stack([torch.full_like(cell, i), cell], -1) for i, cell in enumerate(rows)])


def _cuts(seen: Any) -> list[tuple[Any, ...]]:
    """Number of rows of each image, and their rows and columns; empty if none was cut."""
    cuts = seen.image_kept.cuts if seen.image_kept is not None else None
    return [(cut.rows, cut.grid, cut.patches) for cut in cuts or ()]


def _cells(kept: ImageFeatures | None, count: int) -> Tensor | None:
    """Cell of each image token in the encoder's grid, the first one of a merged token: (M, K); None: all, in order."""
    if kept is None or kept.tokens.shape[1] != count:  # a projector changed the count: tokens are matched by index
        return None
    if kept.groups is None:
        return kept.keep
    m, n = kept.groups.shape
    cell = torch.arange(n, device=kept.groups.device).expand(m, n)
    into = kept.groups.masked_fill(kept.groups < 0, count)  # dropped tokens go into an extra column, cut off below
    return cell.new_full((m, count + 1), n).scatter_reduce(1, into, cell, "amin")[:, :count]


def _find(wanted: Tensor, known: Tensor) -> Tensor:
    """Index into `known` (Q, 2) of each row of `wanted` (P, 2)."""
    if not len(wanted):
        return wanted.new_zeros(0)
    cells = int(torch.cat([wanted, known])[:, 1].max()) + 1
    ours, theirs = wanted[:, 0] * cells + wanted[:, 1], known[:, 0] * cells + known[:, 1]
    order = theirs.argsort()
    at = torch.searchsorted(theirs[order], ours).clamp(max=max(0, len(theirs) - 1))
    if not len(theirs) or bool((theirs[order][at] != ours).any()):
        raise ZooError(
            "The student has image tokens that the teacher dropped: give the teacher no pruner, or the same."
        )
    return order[at]


def _cells_per_image(batch: Mapping[str, Any]) -> int:
    targets = batch.get("targets") or {}
    count = targets.get(f"{PREFIX}.visual.cells")
    return int(count[0]) if count is not None and len(count) else 0
