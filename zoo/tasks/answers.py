"""Accepted answers of a dialog, and a tolerant comparison of two texts."""

from collections.abc import Sequence
from unicodedata import normalize

from zoo.registry import Dialog, ZooError

QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "«": "»", "`": "`"}  # “ ” and single ones

# Full stops and exclamation marks: Latin, Chinese and Japanese, those as wide as these, Hindi, Urdu.
ENDS = ".! \u3002\uff01\uff0e\uff61\u0964\u06d4"
UNSEEN = dict.fromkeys([0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])


def accepted(dialog: Dialog) -> list[str]:
    """Return all accepted answers: those listed, or else the last assistant turn."""
    if dialog.answers:
        return list(dialog.answers)
    for message in reversed(dialog.messages):
        if message["role"] == "assistant":
            content = message["content"]
            return [content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")]
    return []


def truths(dialog: Dialog, task: str) -> list[str]:
    """Return the accepted answers that are not blank.

    Raises:
        ZooError: there is none, so that no prediction could be right.
    """
    found = [answer for answer in accepted(dialog) if answer.strip()]
    if not found:
        raise ZooError(f"Task {task!r} needs an accepted answer that is not empty, got {accepted(dialog)}.")
    return found


def place_of(answer: str, options: Sequence[str]) -> int | None:
    """Return the place of the option that an answer is, or whose letter it is (A is the first); None: of none."""
    if answer in options:
        return options.index(answer)
    letter = answer.strip("(). ").lower()
    place = ord(letter) - ord("a") if len(letter) == 1 and letter.isascii() else -1
    return place if 0 <= place < len(options) else None


def plain(text: str) -> str:
    """Normalise a text: lower case, single spaces, no full stop at the end, no pair of quotes around it.

    Full stops are those of all scripts, and marks of direction and spaces without width count nothing.
    Composed and decomposed accents are the same (NFC). A single quote stays, since `5'` and `5"` are feet and inches. A
    text of punctuation only stays unchanged.
    """
    found = text = " ".join(normalize("NFC", text.lower().translate(UNSEEN)).split()) or text.strip()
    while found:
        shorter = found.rstrip(ENDS)
        if len(shorter) > 1 and QUOTES.get(shorter[0]) == shorter[-1]:
            shorter = shorter[1:-1].strip()
        if shorter == found:
            return found
        found = shorter
    return text
