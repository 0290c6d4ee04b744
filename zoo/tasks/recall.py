"""Retrieval by embeddings: is the text of a picture the nearest one to it, and the picture to the text?

The embedding of a dialog is the hidden state behind the last token of its prompt, in a layer to choose, as models that
were made of language models are read (E5-V: Jiang et al., arXiv:2407.12580). Dialogs with an image or a video are
compared with those without by the cosine; two belong together that have the same `meta["group"]`. Of equal cosines the
wrong one comes first, so that embeddings that are all alike score 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from zoo.registry import Dialog, Score, Task, ZooError, register
from zoo.tasks.estimates import column, mean
from zoo.tasks.groups import group_of


@dataclass
class RecallConfig:
    at: list[int] = field(default_factory=lambda: [1, 5])  # among this many nearest
    layer: int = -1  # -1: behind the last norm, as the head reads it; 0: embeddings, k: behind layer k

    def __post_init__(self) -> None:
        if not self.at or min(self.at) < 1:
            raise ZooError(f"at must have numbers from 1 on, got {self.at}.")
        if self.layer < -1:
            raise ZooError(f"layer must be at least -1, got {self.layer}.")


@register("task", "recall")
class Recall(Task):
    """text@k: a picture's text is among its k nearest; image@k: a text's picture is."""

    mode = "hidden"
    max_new_tokens = 0

    def __init__(self, config: RecallConfig) -> None:
        self.at, self.layer = sorted(set(config.at)), config.layer

    def score(self, dialog: Dialog, prediction: Sequence[float]) -> dict[str, float]:
        """Return what pairs the dialogs.

        Raises:
            ZooError: the dialog has no `meta["group"]`.
        """
        if not (group := group_of(dialog)):
            raise ZooError("Task 'recall' needs meta[\"group\"], which a picture and its text have in common.")
        contents = (turn["content"] for turn in dialog.messages)
        shown = any(part["type"] != "text" for parts in contents if not isinstance(parts, str) for part in parts)
        return {**group, "_shown": float(shown)}

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Compare all pictures with all texts."""
        found: dict[str, Score] = {}
        sides = [[row for row in rows if bool(row["_shown"]) is shown] for shown in (True, False)]
        for name, asked, others in (("text", sides[0], sides[1]), ("image", sides[1], sides[0])):
            ranks = _ranks(asked, others)
            found |= {f"{name}@{k}": mean((ranks <= k).astype(np.float64)) for k in self.at}
        return found


def _ranks(asked: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Return the rank of the nearest one that belongs, from 1 on, for each that is asked and has one."""
    if not asked or not others:
        return np.zeros(0)
    ours, theirs = (np.array([row["_state"] for row in some], np.float64) for some in (asked, others))
    ours, theirs = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (ours, theirs))
    near = ours @ theirs.T  # (asked, others)
    same = column(asked, "_group")[:, None] == column(others, "_group")
    best = np.where(same, near, -np.inf).max(1, keepdims=True)
    ranks = 1 + (~(near < best - 1e-9) & ~same).sum(1)  # NaN is not smaller: a broken model finds nothing
    return ranks[same.any(1)]
