"""Multiple choice by likelihood: the model's likeliest option counts, and no text is generated.

The accepted answer is the text of an option, or its letter (A is the first).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.registry import Dialog, Score, ZooError, register
from zoo.tasks.answers import accepted, plain
from zoo.tasks.estimates import means
from zoo.tasks.groups import consistency_of, group_of


@dataclass
class ChoiceConfig:
    pass


@register("task", "choice")
class Choice:
    """accuracy, and `chance`: what choosing blindly would give."""

    mode = "choice"
    max_new_tokens = 0

    def __init__(self, config: ChoiceConfig) -> None:
        pass

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Return 1 where the chosen option is accepted.

        Raises:
            ZooError: the dialog has fewer than two options, or no option is the accepted answer.
        """
        options = [plain(option) for option in dialog.choices]
        if len(options) < 2:
            raise ZooError(f"Task 'choice' needs two or more choices, got {dialog.choices}.")
        right = {option for answer in accepted(dialog) if (option := _option(answer, options)) is not None}
        if not right:
            raise ZooError(f"None of the answers {accepted(dialog)} is among the choices {dialog.choices}.")
        chance = sum(option in right for option in options) / len(options)
        return {"accuracy": float(plain(prediction) in right), "chance": chance} | group_of(dialog)

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average over the questions."""
        return means(rows) | consistency_of(rows)


def _option(answer: str, options: list[str]) -> str | None:
    text = plain(answer)
    if text in options:
        return text
    letter = text.strip("().")
    place = ord(letter) - ord("a") if len(letter) == 1 and letter.isascii() else -1
    return options[place] if 0 <= place < len(options) else None
