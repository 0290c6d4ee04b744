"""Exact match after lower case, spaces, the full stop and quotes around are made equal.

This is the string match of GQA's and CLEVR's scripts after the normalisation of `answers.plain`; `strict=true` compares
as they do. Dialogs that share `meta["group"]` (such as the images of one NLVR sentence) also give `consistency`: the
share of groups in which every answer is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.registry import Dialog, Score, Task, ZooError, register
from zoo.tasks.answers import plain, truths
from zoo.tasks.estimates import means
from zoo.tasks.groups import consistency_of, group_of


@dataclass
class ExactConfig:
    max_new_tokens: int = 32  # longest answer
    strict: bool = False  # compare the texts as they are, but for spaces around them

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ZooError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")


@register("task", "exact")
class Exact(Task):
    """accuracy; consistency where dialogs belong to groups."""

    mode = "generate"

    def __init__(self, config: ExactConfig) -> None:
        self.max_new_tokens = config.max_new_tokens
        self.same = str.strip if config.strict else plain

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Return 1 where the prediction is one of the accepted answers.

        Raises:
            ZooError: the dialog has no accepted answer.
        """
        right = {self.same(answer) for answer in truths(dialog, "exact")}
        return {"accuracy": float(self.same(prediction) in right)} | group_of(dialog)

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average, and count the groups that are right throughout."""
        return means(rows) | consistency_of(rows)
