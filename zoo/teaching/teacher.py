"""The teacher of a stage: a frozen model by name, seen through the same samples as the student.

Its processor writes every sample anew, with the teacher's number of image tokens and its own pixels, so that student
and teacher may have different encoders, pruners and adapters; `zoo.distill.matching.positions` finds what belongs
together.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from zoo.composed.outputs import LOSS_ALONE, Seen, ZooOutput
from zoo.registry import IGNORE_INDEX, ImageFeatures, Sample, ZooError
from zoo.runs.lengths import require_room
from zoo.text.batch import TEACHER_ROWS, EncodedSample


class Teacher:
    """A model that is never trained and keeps no activations.

    Args:
        model: the composed model.
        needs: words of the distiller.
        vocab_size: tokens that it shares with the student, the first of both tables; None: not known.
    """

    def __init__(self, model: Any, needs: frozenset[str] = frozenset(), vocab_size: int | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.vocab_size = vocab_size
        self.options = LOSS_ALONE | options_of(needs, "teacher")
        if "teacher.logits" not in needs:
            self.options["run_head"] = False
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.same_vision = False

    def look_with(self, student: Any) -> None:
        """Take the student's image features where both have one encoder, and the student's is frozen: it runs once."""
        mine, theirs = self.model.vision, student.vision
        if mine is None or theirs is None or not self.model.requested <= student.requested:
            return
        frozen = not any(p.requires_grad for p in theirs.parameters())
        ours, others = mine.state_dict(), theirs.state_dict()
        alike = type(mine) is type(theirs) and mine.transform == theirs.transform and ours.keys() == others.keys()
        self.same_vision = frozen and alike and all(_equal(t, others[name]) for name, t in ours.items())

    @torch.no_grad()
    def see(self, batch: Mapping[str, Any], student: ZooOutput) -> Seen:
        """Run the teacher on a batch of the student's.

        Args:
            batch: with the teacher's own rows below `zoo.text.batch.TEACHER_ROWS`; without them, both read the same.
            student: what the student gave, for image features that both share.
        """
        own = {k: v for k, v in (batch.get(TEACHER_ROWS) or batch).items() if k != "targets"}
        if "pixel_values" not in own and "pixel_values" in batch:
            own["pixel_values"] = batch["pixel_values"]
        own = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in own.items()}
        with self._numbers(own):
            # Features of the same encoder are the same where the pixels are; a processor that cuts images in another
            # way leaves pixels of its own in the twin batch.
            if self.same_vision and student.image is not None and "pixel_values" not in batch.get(TEACHER_ROWS, {}):
                own["encoded"] = self.model.encode_features(
                    self._here(student.image), own.get("cuts"), own.pop("pixel_values", None)
                )
            return Seen(self.model(**own, **self.options), self.model.llm)

    def _here(self, image: ImageFeatures) -> ImageFeatures:
        """The student's features on the teacher's device, in its number format, as its encoder would give them."""
        tensors = {f.name: getattr(image, f.name) for f in fields(image)}
        moved: dict[str, Any] = {n: t.to(self.device) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
        wide = torch.float32 if self.dtype == torch.float32 else self.dtype
        moved = {n: t.to(wide) if t.dtype in (torch.bfloat16, torch.float16, wide) else t for n, t in moved.items()}
        return replace(image, **moved, rows=None, cuts=None, row_kind="image")  # how it is cut is the teacher's to say

    def _numbers(self, own: dict[str, Any]) -> AbstractContextManager:
        """Its own number format where its weights have one; else the student's."""
        if self.dtype == torch.float32:
            return nullcontext()
        if "pixel_values" in own:
            own["pixel_values"] = own["pixel_values"].to(self.dtype)
        return torch.autocast(self.device.type, enabled=False)


def _pixels_by(processor: Any) -> tuple[Any, ...]:
    """What a processor makes pixels by."""
    return processor.transform, processor.layout_node, processor.videos and processor.videos.config


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    whole = not hasattr(b, "full_tensor")  # a student that is sharded over processes keeps to itself
    return whole and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class Twins:
    """Adds to each row of the student the same row as the teacher's processor writes it."""

    def __init__(self, processor: Any, student: Any, positions: int | None = None) -> None:
        self.processor, self.positions = processor, positions
        self.same_pixels = _pixels_by(processor) == _pixels_by(student)

    def add(self, sample: Sample, pieces: Sequence[Sample], rows: list[EncodedSample]) -> list[EncodedSample]:
        """Give the rows their twins.

        Raises:
            ZooError: the two chat templates do not lead to the same labels, or the teacher has too few positions.
        """
        for piece, row in zip(pieces, rows, strict=True):
            twin = self.processor.encode(piece, row.pixel_values if self.same_pixels else None)
            require_room(twin, self.positions, "the teacher's positions")
            twin.targets = {}
            ours, theirs = (r.labels[1:][r.labels[1:] != IGNORE_INDEX] for r in (row, twin))
            if not np.array_equal(ours, theirs):
                raise ZooError(
                    f"Sample {sample.id!r} has other labels for the teacher: its template or tokenizer differs."
                )
            row.twin = twin
        return rows


def options_of(needs: frozenset[str], who: str) -> dict[str, Any]:
    """Options of a forward pass that a distiller's words ask for."""
    options: dict[str, Any] = {}
    if f"{who}.logits" in needs:
        options["all_logits"] = True
    if f"{who}.hidden" in needs:
        options["output_hidden_states"] = True
    return options
