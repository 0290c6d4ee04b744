"""Yes/no questions with POPE's figures: accuracy, precision, recall, F1 and the share of yes.

Paper: Li et al., Evaluating Object Hallucination in Large Vision-Language Models, arXiv:2305.10355. As in the authors'
script, the first sentence counts, and "no" or "not" anywhere in it means no. Where we differ:

- their script takes everything else for yes; here the sentence must have "yes" or a similar word, and an answer with
  neither is wrong and counted as `unparsed`;
- other negations mean no too, in any case and with any apostrophe: nope, never, none, cannot, isn't, false;
- marks before the answer are not a sentence: `1. Yes`, `(a) no`, `- **No**`; and `!` ends one, as the full stop does;
- an answer that names both (`yes or no`, `Yes/No`) or states that it is unsure (`I do not know`) is `unparsed`.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.registry import Dialog, Score, Task, ZooError, register
from zoo.tasks.answers import accepted
from zoo.tasks.estimates import column, mean, ratio
from zoo.tasks.groups import consistency_of, group_of

# Anywhere in the sentence; a negation wins. The second line: as typed without an apostrophe.
_NO = """no not nope nah nay never none neither nor cannot unable false
isnt arent wasnt werent dont doesnt didnt cant couldnt wont wouldnt shouldnt hasnt havent hadnt aint"""
NO = frozenset(_NO.split())
YES = frozenset({"yes", "yeah", "yep", "yup", "true"})
# As the first word only: later they may describe the picture, as in "a wrong turn".
FIRST = dict.fromkeys(["correct", "right", "indeed", "certainly", "definitely", "absolutely", "affirmative"], True)
FIRST |= dict.fromkeys(["incorrect", "wrong", "negative"], False)
APOSTROPHES = re.compile("[\u2019\u2018\u02bc`\u00b4\u2032\uff07]")  # all that is typed in the place of one
NUMBERED = re.compile(r"\W*(?:\(?(?:\d+|[a-z])[.):]\s*)?[\W_]*")  # list marks and markup in front of an answer
SENTENCE_END = re.compile(r"\.(?!\d)|[\n!]")
BOTH = re.compile(r"\byes\b\s*(?:/|\||or|and)\s*\bno\b|\bno\b\s*(?:/|\||or|and)\s*\byes\b")
UNSURE = re.compile(r"\b(?:not|cannot|cant|dont|unable)\b(?: \w+){0,2}? (?:know|sure|certain|tell|say|determine)\b")


@dataclass
class YesNoConfig:
    max_new_tokens: int = 16  # longest answer

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ZooError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")


@register("task", "yes_no")
class YesNo(Task):
    """accuracy, precision, recall, f1, yes_rate, unparsed; errors of ratios by the delta method."""

    mode = "generate"

    def __init__(self, config: YesNoConfig) -> None:
        self.max_new_tokens = config.max_new_tokens

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Compare with the truth, the majority of the accepted answers.

        Raises:
            ZooError: an accepted answer is neither yes nor no, or both are equally frequent.
        """
        truth = _truth(accepted(dialog))
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
    """Return `yes` or `no` for the first sentence of a text, None if it is neither."""
    text = APOSTROPHES.sub("'", text.lower())
    text = text[NUMBERED.match(text).end() :]  # type: ignore[union-attr]  # it matches nothing, too
    sentence = SENTENCE_END.split(text, maxsplit=1)[0].replace("can't", "cannot").replace("n't", " not")
    words = re.findall(r"[^\W\d_]+", sentence)
    plain = " ".join(words)
    if not words or BOTH.search(sentence) or UNSURE.search(plain):
        return None
    if not NO.isdisjoint(words):
        return False
    return True if not YES.isdisjoint(words) else FIRST.get(words[0])


def _truth(answers: Sequence[str]) -> bool:
    said = Counter(yes_or_no(answer) for answer in answers)
    if not said or said[None] or said[True] == said[False]:
        raise ZooError(f"Task 'yes_no' needs answers that are yes or no, got {list(answers)}.")
    return said[True] > said[False]
