"""Dense supervision of the encoder: predict labels of each grid cell, given by the data set; no teacher model.

One linear layer predicts several labels from each image token: classes, or numbers in bins. Small encoders learn from
it in seconds what takes minutes from answers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

    def __post_init__(self) -> None:
        if not self.classes or min(self.classes) < 2:
            raise ZooError(f"classes must give the number of values of each label, 2 or more, got {self.classes}.")
        if self.weights and len(self.weights) != len(self.classes):
            raise ZooError(f"weights must be as many as classes ({len(self.classes)}), got {len(self.weights)}.")
        if self.weights and min(self.weights) < 0:
            raise ZooError(f"weights must not be negative, got {self.weights}.")


@register("distiller", "dense")
class Dense(Distiller, nn.Module):
    """Cross-entropy per label, averaged over cells that have the label; the loss is called `dense`."""

    grid: tuple[int, int]

    def __init__(self, config: DenseConfig, *, vision_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.classes, self.target, self.grid = list(config.classes), config.target, (grid[0], grid[1])
        self.label_weights = list(config.weights) or [1.0] * len(self.classes)
        self.needs = frozenset({"student.image", f"batch.{config.target}"})
        self.losses = frozenset({"dense"})
        self.head = nn.Linear(vision_dim, sum(self.classes))

    def forward(self, student: Any, teacher: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compare the encoder's tokens with the labels of their cells.

        Args:
            student: its `image.tokens` are (M, N, D), before pruning.
            teacher: not used.
            batch: `targets` holds labels (M, N, number of labels), in the order of tokens; IGNORE_INDEX: no label.

        Raises:
            ZooError: the batch lacks the labels, they are of another grid, or a value is out of range.
        """
        labels = self._labels(batch, student.image.tokens.shape[1])
        logits = self.head(student.image.tokens).float()  # (M, N, sum of classes)
        total = logits.new_zeros(())
        for scores, label, weight in zip(
            logits.split(self.classes, -1), labels.unbind(-1), self.label_weights, strict=True
        ):
            cells = (label != IGNORE_INDEX).sum().clamp(min=1)  # the mean of cross_entropy is NaN without any label
            summed = F.cross_entropy(scores.flatten(0, 1), label.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
            total = total + weight * summed / cells
        return {"dense": total}

    def _labels(self, batch: Mapping[str, Any], num_tokens: int) -> Tensor:
        """Return the checked labels of the batch: (M, N, number of labels) int64."""
        targets = batch.get("targets") or {}
        if self.target not in targets:
            given = ", ".join(sorted(targets)) or "none"
            raise ZooError(f"distiller 'dense' needs the target {self.target!r} of the data; it gives: {given}.")
        labels = targets[self.target].long()
        if labels.shape[1] != num_tokens:
            height, width = self.grid
            raise ZooError(
                f"distiller 'dense' needs labels for the encoder's {height} x {width} = {num_tokens} cells;"
                f" the data gives {labels.shape[1]}. With data=scenes set data.scenes.grid={height}."
            )
        if labels.shape[-1] != len(self.classes):
            raise ZooError(f"classes names {len(self.classes)} labels per cell; the data gives {labels.shape[-1]}.")
        for i, most in enumerate(labels.flatten(0, 1).amax(0).tolist()):
            if most >= self.classes[i]:
                raise ZooError(f"Label {i} of a cell is {most}, but classes allows 0 to {self.classes[i] - 1} there.")
        return labels
