"""Multiple choice by likelihood: the model's likeliest option counts, and no text is generated.

The accepted answer is the text of an option, or its letter (A is the first). Options are compared by the sum of the
log-probabilities of their tokens and of the end of the turn, not by the mean: `acc` of the LM evaluation harness, and
not its `acc_norm`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zoo.registry import Dialog, Score, Task, ZooError, register
from zoo.tasks.answers import accepted, place_of, plain
from zoo.tasks.estimates import means
from zoo.tasks.groups import consistency_of, group_of


@dataclass
class ChoiceConfig:
    pass


@register("task", "choice")
class Choice(Task):
    """accuracy, and `chance`: what choosing blindly would give."""

    mode = "choice"
    max_new_tokens = 0

    def __init__(self, config: ChoiceConfig) -> None:
        pass

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Return 1 where the chosen option is accepted.

        Raises:
            ZooError: the dialog has fewer than two different options, or no option is the accepted answer.
        """
        options, same = _comparable(dialog.choices)
        right = {options[at] for answer in accepted(dialog) if (at := place_of(same(answer), options)) is not None}
        if not right:
            raise ZooError(f"None of the answers {accepted(dialog)} is among the choices {dialog.choices}.")
        chance = sum(option in right for option in options) / len(options)
        return {"accuracy": float(same(prediction) in right), "chance": chance} | group_of(dialog)

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average over the questions."""
        return means(rows) | consistency_of(rows)


def _comparable(choices: Sequence[str]) -> tuple[list[str], Callable[[str], str]]:
    """Return the options in the form in which they are compared, and what brings a text into it.

    It is `plain`, or the text as it is where that would make two options the same (mW and MW).
    """
    for same in (plain, str.strip):
        options = [same(choice) for choice in choices]
        if len(options) >= 2 and len(set(options)) == len(options) and all(options):
            return options, same
    raise ZooError(f"Task 'choice' needs two or more choices, none of them empty or there twice, got {list(choices)}.")
