"""What counts as the right answer of a dialog, and the plainest way to compare two texts."""

from unicodedata import normalize

from zoo.registry import Dialog, ZooError

QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "«": "»", "`": "`"}  # “ ” and single ones


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
        ZooError: there is none, so nothing that a model may say could be right.
    """
    found = [answer for answer in accepted(dialog) if answer.strip()]
    if not found:
        raise ZooError(f"Task {task!r} needs an accepted answer that is not empty, got {accepted(dialog)}.")
    return found


def plain(text: str) -> str:
    """Lower case, single spaces, no full stop behind and no pair of quotes around: what a person would not tell apart.

    Letters with an accent of their own and with one behind them are the same (NFC). A single quote stays, for `5'` and
    `5"` are feet and inches. A text of nothing but marks stays as it is.
    """
    found = text = " ".join(normalize("NFC", text.lower()).split())
    while found:
        shorter = found.rstrip(".! ")
        if len(shorter) > 1 and QUOTES.get(shorter[0]) == shorter[-1]:
            shorter = shorter[1:-1].strip()
        if shorter == found:
            return found
        found = shorter
    return text
