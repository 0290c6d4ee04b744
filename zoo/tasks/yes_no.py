"""Yes/no questions with POPE's figures: accuracy, precision, recall, F1 and the share of yes.

Paper: Li et al., Evaluating Object Hallucination in Large Vision-Language Models, arXiv:2305.10355. As in the authors'
script, the first sentence counts, and "no" or "not" anywhere in it means no. Where we differ: their script takes all
else for yes; here "yes" (or "true") must stand in it, and an answer with neither is wrong and counted as `unparsed`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.registry import Dialog, Score, ZooError, register
from zoo.tasks.answers import accepted
from zoo.tasks.estimates import column, mean, ratio
from zoo.tasks.groups import consistency_of, group_of

NO = frozenset({"no", "not", "false"})
YES = frozenset({"yes", "true"})


@dataclass
class YesNoConfig:
    max_new_tokens: int = 16  # longest answer

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ZooError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")


@register("task", "yes_no")
class YesNo:
    """accuracy, precision, recall, f1, yes_rate, unparsed; errors of ratios by the delta method."""

    mode = "generate"

    def __init__(self, config: YesNoConfig) -> None:
        self.max_new_tokens = config.max_new_tokens

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Compare with the truth.

        Raises:
            ZooError: the accepted answer of the dialog is neither yes nor no.
        """
        truth = next((said for answer in accepted(dialog) if (said := yes_or_no(answer)) is not None), None)
        if truth is None:
            raise ZooError(f"Task 'yes_no' needs answers that are yes or no, got {accepted(dialog)}.")
        said = yes_or_no(prediction)
        row = {
            "accuracy": float(said == truth),
            "yes_rate": float(said is True),
            "unparsed": float(said is None),
            "_truth": float(truth),
        }
        return row | group_of(dialog)

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Give POPE's figures, "yes" being the positive class; a ratio with nothing below it is 0."""
        right, said, truth = (column(rows, name) for name in ("accuracy", "yes_rate", "_truth"))
        hit = said * truth
        return {
            "accuracy": mean(right),
            "precision": ratio(hit, said),
            "recall": ratio(hit, truth),
            "f1": ratio(2 * hit, said + truth),
            "yes_rate": mean(said),
            "unparsed": mean(column(rows, "unparsed")),
            **consistency_of(rows),
        }


def yes_or_no(text: str) -> bool | None:
    """Return what the first sentence of a text says, None if neither."""
    words = set(re.findall(r"[a-z]+", re.split(r"[.\n]", text.strip(), maxsplit=1)[0].lower().replace("n't", " not")))
    return False if words & NO else True if words & YES else None
