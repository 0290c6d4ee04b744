"""Dense supervision of the encoder: predict labels of each grid cell, given by the data set; no teacher model.

One linear layer predicts several labels from each image token: classes, or numbers in bins. Small encoders learn from
it in seconds what takes minutes from answers alone. A second one predicts labels of whole images from [CLS], which
nothing else trains: pruners choose by its attention in the last block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import IGNORE_INDEX, Distiller, ZooError, register


@dataclass
class DenseConfig:
    # Number of values of each label of a cell, in their order; those of `scenes`: colour, shape, size (each with one
    # more for the ground), then the box's x1, y1, x2, y2.
    classes: list[int] = field(default_factory=lambda: [7, 5, 3, 32, 32, 32, 32])
    weights: list[float] = field(default_factory=list)  # of each label's loss; empty: 1 for each
    target: str = "patch_labels"  # name of the batch's target with the labels
    # Number of values of each label of a whole image, predicted from the first prefix token, [CLS]; empty: none. With
    # `scenes`: 2 for each pair of colour and shape; with signs also 33 words and three digits of 11 values each.
    cls_classes: list[int] = field(default_factory=list)
    cls_target: str = "scene_labels"  # name of the batch's target with these labels

    def __post_init__(self) -> None:
        if not self.classes or min(self.classes) < 2:
            raise ZooError(f"classes must give the number of values of each label, 2 or more, got {self.classes}.")
        if self.weights and len(self.weights) != len(self.classes):
            raise ZooError(f"weights must be as many as classes ({len(self.classes)}), got {len(self.weights)}.")
        if self.weights and min(self.weights) < 0:
            raise ZooError(f"weights must not be negative, got {self.weights}.")
        if self.cls_classes and min(self.cls_classes) < 2:
            raise ZooError(f"cls_classes must give the number of values of each label, 2 or more: {self.cls_classes}.")


@register("distiller", "dense")
class Dense(Distiller, nn.Module):
    """Cross-entropy per label, averaged over what has the label: `dense` of cells, and `cls` of images."""

    grid: tuple[int, int]

    def __init__(self, config: DenseConfig, *, vision_dim: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        if grid is None:
            raise ZooError(
                "labels of cells need an encoder whose tokens are one grid of them. Without a recipe of one's own: "
                "recipe=null"
            )
        self.classes, self.target, self.grid = list(config.classes), config.target, (grid[0], grid[1])
        self.label_weights = list(config.weights) or [1.0] * len(self.classes)
        self.needs = frozenset({"student.image", f"batch.{config.target}"})
        self.losses = frozenset({"dense"})
        self.head = nn.Linear(vision_dim, sum(self.classes))
        self.cls_classes, self.cls_target = list(config.cls_classes), config.cls_target
        if self.cls_classes:
            self.needs |= {"student.prefix", f"batch.{config.cls_target}"}
            self.losses |= {"cls"}
            self.cls_head = nn.Linear(vision_dim, sum(self.cls_classes))

    def forward(self, student: Any, teacher: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compare the encoder's tokens with the labels of their cells, and [CLS] with those of the image.

        Args:
            student: its `image.tokens` are (M, N, D), before pruning; `image.prefix` (M, P, D).
            teacher: not used.
            batch: `targets` holds labels (M, N, number of labels), in the order of tokens, and those of images (M, 1,
                number of labels); IGNORE_INDEX: no label.

        Raises:
            ZooError: the batch lacks the labels, they are of another grid, or a value is out of range.
        """
        if student.image is None:  # a pass of text alone
            return {}
        labels = self._labels(batch, *student.image.tokens.shape[:2])
        losses = {"dense": _cross_entropy(self.head(student.image.tokens), labels, self.classes, self.label_weights)}
        if self.cls_classes:
            labels = self._named(batch, self.cls_target, self.cls_classes, "cls_classes")
            logits = self.cls_head(student.image.prefix[:, :1])  # (M, 1, sum of classes)
            # The mean over labels: there are dozens, and each weighs as one of a cell's.
            losses["cls"] = _cross_entropy(logits, labels, self.cls_classes) / len(self.cls_classes)
        return losses

    def _labels(self, batch: Mapping[str, Any], images: int, num_tokens: int) -> Tensor:
        """Return the checked labels of the batch's cells: (M, N, number of labels) int64."""
        labels = self._named(batch, self.target, self.classes, "classes")
        if labels.shape[1] != num_tokens:
            height, width = self.grid
            raise ZooError(
                f"distiller 'dense' needs labels for the encoder's {height} x {width} = {num_tokens} cells;"
                f" the data gives {labels.shape[1]}. With data=scenes set data.scenes.grid={height}."
            )
        if len(labels) != images:
            raise ZooError(
                f"distiller 'dense' needs labels of each image; the batch has {images} images, and labels of "
                f"{len(labels)}: a stage that mixes data needs them in all that shows images."
            )
        return labels

    def _named(self, batch: Mapping[str, Any], target: str, classes: Sequence[int], option: str) -> Tensor:
        """Return the checked labels of a target: (M, cells, number of labels) int64."""
        targets = batch.get("targets") or {}
        if target not in targets:
            given = ", ".join(sorted(targets)) or "none"
            raise ZooError(f"distiller 'dense' needs the target {target!r} of the data; it gives: {given}.")
        labels = targets[target].long()
        if labels.shape[-1] != len(classes):
            raise ZooError(f"{option} names {len(classes)} labels per cell; the data gives {labels.shape[-1]}.")
        for i, most in enumerate(labels.flatten(0, 1).amax(0).tolist()):
            if most >= classes[i]:
                raise ZooError(f"Label {i} of a cell is {most}, but {option} allows 0 to {classes[i] - 1} there.")
        return labels


def _cross_entropy(
    logits: Tensor, labels: Tensor, classes: Sequence[int], weights: Sequence[float] | None = None
) -> Tensor:
    """Sum over labels of the weighted mean loss: of logits (M, N, sum of classes) and labels (M, N, number)."""
    total = torch.zeros((), device=logits.device)
    split = logits.float().split(list(classes), -1)
    for scores, label, weight in zip(split, labels.unbind(-1), weights or [1.0] * len(classes), strict=True):
        cells = (label != IGNORE_INDEX).sum().clamp(min=1)  # the mean of cross_entropy is NaN without any label
        summed = F.cross_entropy(scores.flatten(0, 1), label.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        total = total + weight * summed / cells
    return total
