"""The teacher of a stage: a frozen model that runs on the student's samples.

The teacher's processor encodes each sample again, with the teacher's number of image tokens and its own pixels, so that
student and teacher may have different encoders, pruners and adapters; `zoo.distill.matching.positions` aligns their
tokens.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from zoo.composed.outputs import LOSS_ALONE, DistillView, ZooOutput
from zoo.registry import IGNORE_INDEX, Sample, UnlikeRows, ZooError
from zoo.runs.lengths import require_room
from zoo.text.batch import TEACHER_ROWS, EncodedSample
from zoo.vision.images.processors import FEATURES, OWN_VALUES


class Teacher:
    """A model that is never trained and keeps no activations.

    Args:
        model: the composed model.
        needs: capabilities that the distiller asks for, such as `teacher.logits`.
        vocab_size: number of leading token ids that teacher and student share; None: not known.
    """

    def __init__(self, model: Any, needs: frozenset[str] = frozenset(), vocab_size: int | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.vocab_size = vocab_size
        self.options = LOSS_ALONE | forward_options(needs, "teacher")
        # The head is by far the largest product of a small LLM; distillers that compare hidden states go without it.
        if "teacher.logits" not in needs:
            self.options["run_head"] = False
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.same_vision = False

    def share_vision(self, student: Any) -> None:
        """Reuse the student's image features if both have the same frozen encoder, which then runs once per batch."""
        mine, theirs = self.model.vision, student.vision
        # The student's encoder must provide every capability (attention scores, keys) that the teacher's pruner needs.
        if mine is None or theirs is None or not self.model.requested <= student.requested:
            return
        frozen = not any(p.requires_grad for p in theirs.parameters())
        ours, others = mine.state_dict(), theirs.state_dict()
        asked = self.model.requested
        alike = _made_alike(mine, asked) == _made_alike(theirs, asked) and ours.keys() == others.keys()
        # Equal names do not mean equal weights: an earlier stage may have trained the student's encoder.
        self.same_vision = frozen and alike and all(_equal(t, others[name]) for name, t in ours.items())

    @property
    def needs_pixels(self) -> bool:
        """Whether it runs an encoder of its own on the student's pixels."""
        return self.model.vision is not None and not self.same_vision

    @torch.no_grad()
    def outputs_for(self, batch: Mapping[str, Any], student: ZooOutput) -> DistillView:
        """Run the teacher on a batch of the student's.

        Args:
            batch: holds the teacher's own rows under `zoo.text.batch.TEACHER_ROWS`, if they differ from the student's.
            student: output of the student, for image features that both share.
        """
        own = {k: v for k, v in (batch.get(TEACHER_ROWS) or batch).items() if k not in ("targets", FEATURES)}
        # Rows whose pixels are those of the student are collated without them, so that they are copied once. Where the
        # student's features are kept, an encoder that is shared needs none, and pixels may be of some images only.
        kept = FEATURES in batch and self.same_vision
        if "pixel_values" not in own and "pixel_values" in batch and not kept:
            own["pixel_values"] = batch["pixel_values"]
        own = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in own.items()}
        with self._numbers(own):
            # Equal pixels through the same encoder give equal features. A teacher's processor that cuts images
            # differently has pixels of its own in the batch, and features are not shared then.
            if self.same_vision and student.image is not None and "pixel_values" not in batch.get(TEACHER_ROWS, {}):
                own["encoded"] = self.model.encode_features(
                    self._here(student.image), own.get("cuts"), own.pop("pixel_values", None)
                )
            return DistillView(self.model(**own, **self.options), self.model.llm)

    def _here(self, image: Any) -> Any:
        """Return the student's features on the teacher's device and in its dtype, as its own encoder returns them."""
        if isinstance(image, UnlikeRows):
            return image.mapped(self._here)
        tensors = {f.name: getattr(image, f.name) for f in fields(image)}
        moved: dict[str, Any] = {n: t.to(self.device) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
        wide = torch.float32 if self.dtype == torch.float32 else self.dtype
        moved = {n: t.to(wide) if t.dtype in (torch.bfloat16, torch.float16, wide) else t for n, t in moved.items()}
        deep = (x.to(self.device) for x in image.deep)
        moved["deep"] = tuple(x.to(wide) if x.dtype in (torch.bfloat16, torch.float16, wide) else x for x in deep)
        # Without the student's division into crops: the teacher's layout applies its own.
        return replace(image, **moved, rows=None, cuts=None, row_kind="image")

    def _numbers(self, own: dict[str, Any]) -> AbstractContextManager:
        """Compute in the dtype of 16-bit weights; float32 weights follow the autocast of the student's stage."""
        if self.dtype == torch.float32:
            return nullcontext()
        # Under the student's autocast a bfloat16 teacher would compute some operations in float32, and differ from what
        # the same model gives alone.
        if "pixel_values" in own:
            own["pixel_values"] = own["pixel_values"].to(self.dtype)
        return torch.autocast(self.device.type, enabled=False)


def _made_alike(vision: Any, asked: frozenset[str]) -> tuple[Any, ...]:
    """Return what determines an encoder's features beside its weights."""
    joined = [*vision.members], {word: vision.giver(word) for word in asked}, tuple(vision.grid)
    # An encoder with maps that is not cut behind its stage has the same weights for each of them.
    stages = [getattr(getattr(e, "runner", None), "stage", None) for e in (*vision.members.values(), vision)]
    return type(vision), vision.transform, joined if vision.members else None, stages


def _same_pixels(a: Any, b: Any) -> bool:
    """Whether two processors make the same pixels of an image, up to a step of a byte."""
    if _pixels_by(a) != _pixels_by(b):
        return False
    ours, theirs = (p.pictures and p.pictures.config for p in (a, b))
    if (ours is None) == (theirs is None):
        return bool(ours == theirs)
    # Only one is published, whose image processor may do just what the transform of the other does.
    made = [p.image_processor for p in (a, b)]
    plain = OWN_VALUES.isdisjoint(ours or theirs) and None not in made
    return plain and bool(made[0].to_dict() == made[1].to_dict())


def _pixels_by(processor: Any) -> tuple[Any, ...]:
    """Return what determines the pixels of a processor, beside its image processor."""
    return processor.transform, processor.layout_node, processor.videos and processor.videos.config


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    whole = not hasattr(b, "full_tensor")  # comparing a sharded weight would take a gather; features are not shared
    return whole and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class TeacherRows:
    """Adds to each row of the student the row that the teacher's processor encodes from the same sample."""

    def __init__(self, processor: Any, student: Any, positions: int | None = None) -> None:
        self.processor, self.positions = processor, positions
        self.same_pixels = _same_pixels(processor, student)

    def add(self, sample: Sample, pieces: Sequence[Sample], rows: list[EncodedSample]) -> list[EncodedSample]:
        """Add the teacher's rows.

        Raises:
            ZooError: the two chat templates do not lead to the same labels, or the teacher has too few positions.
        """
        for piece, row in zip(pieces, rows, strict=True):
            # Decoding and resizing images is most of the work of a loader worker: equal pixels are passed on.
            twin = self.processor.encode(piece, row.pixel_values if self.same_pixels else None)
            require_room(twin, self.positions, "the teacher's positions")
            twin.targets = {}  # dense targets are the student's; a second copy would only be moved to the device
            # Distillers compare position by position, so both must learn the same tokens in the same order.
            ours, theirs = (r.labels[1:][r.labels[1:] != IGNORE_INDEX] for r in (row, twin))
            if not np.array_equal(ours, theirs):
                raise ZooError(
                    f"Sample {sample.id!r} has other labels for the teacher: its template or tokenizer differs."
                )
            row.twin = twin
        return rows


def forward_options(needs: frozenset[str], who: str) -> dict[str, Any]:
    """Return the options of `ZooModel.forward` that provide what a distiller needs.

    Args:
        needs: capabilities of the distiller.
        who: `teacher` or `student`.
    """
    options: dict[str, Any] = {}
    if f"{who}.logits" in needs:
        options["all_logits"] = True
    if f"{who}.hidden" in needs:
        options["output_hidden_states"] = True
    return options
