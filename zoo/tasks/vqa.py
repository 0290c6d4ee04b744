"""VQA accuracy: with ten human answers, an answer is right to the degree that three of them agree with it.

Paper: Antol et al., arXiv:1505.00468, and the script of visualqa.org (VQA/PythonEvaluationTools). With ten or more
answers: min(n / 3, 1), averaged over leaving each answer out, after the script's normalisation (punctuation, number
words, articles, contractions; accepted answers lose their punctuation only where they differ). Where we differ:

- a prediction of which the normalisation leaves nothing ("the", "?") equals only the same text, not every other one of
  which nothing is left;
- marks that belong to a number, a grade or a comparison must be the same, which the script drops: `-5`, `<5`, `>=5` and
  `5`; `1,5` and `15`; `1/2` and `1-2`; `B+` and `B-`, `AB+` and `AB-`; `x<y` and `x>y`;
- where all people gave the same answer it also counts as it was typed (`t-shirt`), as in later copies of the script;
- contractions get a straight apostrophe; answers of people are compared in lower case, without spaces at the ends.

The script calls `vitamin a` and `vitamin` equal, and `none` and `0`; there we follow it, for figures to be comparable.

With fewer answers there is no such script, and any of them is right in full. Equal are texts that `answers.plain` makes
equal, or the normalised ones with the same marks; but an article counts as one only in front of another word, and
`none` is text. With `tolerance`, numbers count as in ChartQA's relaxed accuracy (Masry et al., arXiv:2203.10244,
pix2struct's metric): within that share of the truth, per cent as hundredths. Where we differ from that: `1,000` and
`$5` are numbers, numbers must be finite, a truth of 0 is compared as a number.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from zoo.registry import Dialog, Score, Task, ZooError, register
from zoo.tasks.answers import accepted, plain, truths
from zoo.tasks.estimates import means

NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
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
# Marks that keyboards write in two ways: curly quotes, the minus of typographers.
ALIKE = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-"})
# In front of a number: -5, <5, >=5, x=-5. Between two: 1/2, 1-2, 1,5 (but 1,000). Behind one, or behind one or two
# letters: 5", 5', 10+, B+, AB+, Na+. Between words, one of these alone: 5 < 6, a > b; or between letters: x<y.
MARKS = re.compile(
    r"(?:^|(?<=[(\[=<>,:;]))[-<>+=]+(?=[\d.$])"
    r"|(?<=\d)(?:[/-]|,(?!\d{3}(?!\d)))(?=\d)"
    r"|(?:(?<=\d)|(?<=^[a-z])|(?<=^[a-z]{2}))[-+'\"]+$"
    r"|(?:^|(?<=[\w)]))(?:[<>]=?|-+>|<-+)(?=$|[a-z\d(])"
)
NUMBER = re.compile(r"[-+]?(?=\.?\d)(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


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
class VQA(Task):
    """accuracy, in thirds where ten people answered."""

    mode = "generate"

    def __init__(self, config: VQAConfig) -> None:
        self.max_new_tokens = config.max_new_tokens
        self.tolerance = config.tolerance

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Return the accuracy of one prediction; an empty one is wrong.

        Raises:
            ZooError: the dialog has no accepted answer.
        """
        answers, people = truths(dialog, "vqa"), accepted(dialog)
        if not prediction.strip():
            return {"accuracy": 0.0}
        if len(people) >= HUMANS:  # one who wrote nothing counts among them
            return {"accuracy": agreement(prediction, people)}
        if self.tolerance and any(_close(prediction, answer, self.tolerance) for answer in answers):
            return {"accuracy": 1.0}
        return {"accuracy": float(any(alike(prediction, answer) for answer in answers))}

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Average over the questions."""
        return means(rows)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean over leaving one answer out of min(number of equal answers / 3, 1)."""
    said, typed = normalise(prediction), _lower(prediction)
    differ = len(set(answers)) > 1
    equal = []
    for answer in answers:
        form = _lower(strip_punctuation(answer) if differ else answer)
        same = said == form != "" and marks(prediction) == marks(answer)
        equal.append(same or (typed == _lower(answer) and not (said and differ)))
    return sum(min(1.0, (sum(equal) - one) / 3) for one in equal) / len(answers)


def alike(one: str, other: str) -> bool:
    """Whether two answers are equal, for questions with fewer than ten human answers."""
    if plain(one) == plain(other):
        return True
    return _form(one) == _form(other) != "" and marks(one) == marks(other)


def _form(text: str) -> str:
    """The normalised text, with an article that ends it."""
    words = unicodedata.normalize("NFC", text.lower()).translate(ALIKE).split()
    last = strip_punctuation(words[-1]).strip() if words else ""
    return " ".join([normalise(" ".join(words), none="none"), *([last] if last in ARTICLES else [])])


def marks(text: str) -> list[str]:
    """Return the marks of a text that belong to numbers and grades, in order."""
    return [mark for word in text.lower().translate(ALIKE).split() for mark in MARKS.findall(word)]


def normalise(text: str, none: str = "0") -> str:
    """Normalise an answer as the script does; `none` replaces the word none."""
    text = strip_punctuation(" ".join(text.split()))
    words = [NUMBERS.get(word, none if word == "none" else word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strip_punctuation(text: str) -> str:
    """Drop marks that have a space beside them, or all marks where a number is like 1,000; put spaces for others."""
    result = text
    number = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", result)


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _close(prediction: str, answer: str, tolerance: float) -> bool:
    given, truth = _number(prediction), _number(answer)
    if given is None or truth is None:
        return False
    return abs(given - truth) <= tolerance * abs(truth)


def _number(text: str) -> float | None:
    """The number that a text is; None where it is none, or where it is too large for a float."""
    text = text.strip().rstrip(".").translate(ALIKE).removeprefix("$")
    percent = text.endswith("%")
    text = text.rstrip("% ")
    if not NUMBER.fullmatch(text):
        return None
    value = float(text.replace(",", "")) / (100 if percent else 1)
    return value if isfinite(value) else None
