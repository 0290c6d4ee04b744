"""What counts as the right answer of a dialog, and the plainest way to compare two texts."""

from zoo.registry import Dialog


def accepted(dialog: Dialog) -> list[str]:
    """Return all accepted answers: those listed, or else the last assistant turn."""
    if dialog.answers:
        return list(dialog.answers)
    for message in reversed(dialog.messages):
        if message["role"] == "assistant":
            content = message["content"]
            return [content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")]
    return []


def plain(text: str) -> str:
    """Lower case, single spaces, and no quotes or full stop around: what a person would not call a difference."""
    text = " ".join(text.lower().split())
    return text.lstrip("\"' ").rstrip(".!\"' ")
