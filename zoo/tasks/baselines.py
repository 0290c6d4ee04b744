"""The score of a constant guess: the commonest answer of each kind of question."""

from collections import Counter
from collections.abc import Iterable

from zoo.registry import Dialog, Task
from zoo.tasks.answers import accepted, place_of


class Commonest:
    """The commonest training answer of each kind of question.

    Args:
        train: dialogs to count answers in.
    """

    def __init__(self, train: Iterable[Dialog]) -> None:
        self.counts: dict[str, Counter[str]] = {}
        for dialog in train:
            several = Counter(filter(str.strip, dialog.answers)).most_common(1)
            answer = [several[0][0]] if several else accepted(dialog)[:1]
            self.counts.setdefault(dialog.kind, Counter()).update(answer)
        self._ranked: dict[str, list[str]] = {}

    def guess(self, dialog: Dialog, task: Task) -> str:
        """Return the answer to guess for a dialog; empty for a kind that training lacks.

        For a kind of evaluation only, that of the longest kind that its name continues (count_big -> count). In
        multiple choice it is the commonest among the options, or by its letter, or else the first option.
        """
        guesses = self._of(dialog.kind)
        if task.mode == "choice":
            places = (place_of(guess, dialog.choices) for guess in guesses)
            guesses = [dialog.choices[at] for at in places if at is not None] or list(dialog.choices)
        return guesses[0] if guesses else ""

    def _of(self, kind: str) -> list[str]:
        if kind not in self._ranked:
            begun = (k for k in self.counts if k and kind.startswith(k + "_"))
            base = kind if kind in self.counts else max(begun, key=len, default=kind)
            self._ranked[kind] = [answer for answer, _ in self.counts.get(base, Counter()).most_common()]
        return self._ranked[kind]
