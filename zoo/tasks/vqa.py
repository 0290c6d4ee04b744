"""VQA accuracy: with ten human answers, an answer is right to the degree that three of them agree with it.

Paper: Antol et al., arXiv:1505.00468, and the script of visualqa.org. With ten or more answers: min(n / 3, 1), averaged
over leaving each answer out, after the script's normalisation (punctuation, number words, articles, contractions;
accepted answers lose their punctuation only where they differ). With fewer answers, any of them is right in full.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.registry import Dialog, Score, ZooError, register
from zoo.tasks.answers import accepted, plain
from zoo.tasks.estimates import means

NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
# What people write without the apostrophe; other words stay as they are.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'll somebody's
someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'd've they'll
they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd
you'd've you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED.split()}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
HUMANS = 10  # answers to a question of VQA


@dataclass
class VQAConfig:
    max_new_tokens: int = 16  # longest answer
    tolerance: float = 0.0  # numbers are right within this share of the truth (0.05 in ChartQA); 0: must be equal

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ZooError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")
        if not 0 <= self.tolerance < 1:
            raise ZooError(f"tolerance must be in [0, 1), got {self.tolerance}.")


@register("task", "vqa")
class VQA:
    """accuracy, in thirds where ten people answered."""

    mode = "generate"

    def __init__(self, config: VQAConfig) -> None:
        self.max_new_tokens = config.max_new_tokens
        self.tolerance = config.tolerance

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Return the accuracy of one prediction; an empty one is wrong."""
        answers = accepted(dialog)
        if not prediction.strip():
            return {"accuracy": 0.0}
        if len(answers) >= HUMANS:
            return {"accuracy": agreement(prediction, answers)}
        if self.tolerance and any(_close(prediction, answer, self.tolerance) for answer in answers):
            return {"accuracy": 1.0}
        said = {plain(prediction), normalise(prediction)}
        return {"accuracy": float(any(said & {plain(answer), normalise(answer)} for answer in answers))}

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average over the questions."""
        return means(rows)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean over leaving one answer out of min(number of equal answers / 3, 1)."""
    said = normalise(prediction)
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    equal = [answer.lower().strip() == said for answer in answers]
    return sum(min(1.0, (sum(equal) - one) / 3) for one in equal) / len(answers)


def normalise(text: str) -> str:
    """Bring an answer into the form that the script compares."""
    text = strip_punctuation(" ".join(text.split()))
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strip_punctuation(text: str) -> str:
    """Drop marks that have a space beside them, or all marks where a number is like 1,000; put spaces for others."""
    result = text
    number = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", result)


def _close(prediction: str, answer: str, tolerance: float) -> bool:
    given, truth = _number(prediction), _number(answer)
    if given is None or truth is None:
        return False
    return abs(given - truth) <= tolerance * abs(truth)


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "").removeprefix("$")
    percent = text.endswith("%")
    try:
        return float(text.rstrip("%")) / (100 if percent else 1)
    except ValueError:
        return None
