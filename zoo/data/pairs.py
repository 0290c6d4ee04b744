"""Each dialog twice, with its right answer and with a wrong one: what preference losses compare."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from zoo.registry import Dialog


def in_pairs(dialogs: Sequence[Dialog], wrong: Callable[[Dialog, str], str]) -> list[Dialog]:
    """Put behind each dialog the same question with a wrong answer: chosen, rejected, chosen, ...

    Args:
        dialogs: that end with the right answer.
        wrong: gives another answer to a dialog, of which it gets the right one.
    """
    result: list[Dialog] = []
    for dialog in dialogs:
        said = [{"type": "text", "text": wrong(dialog, dialog.messages[-1]["content"][0]["text"])}]
        messages = [*dialog.messages[:-1], {"role": "assistant", "content": said}]
        result += [replace(dialog, preference="chosen"), replace(dialog, messages=messages, preference="rejected")]
    return result
