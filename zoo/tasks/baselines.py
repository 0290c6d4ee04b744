"""The score of a constant guess: the commonest answer of each kind of question."""

from collections import Counter
from collections.abc import Iterable

from zoo.registry import Dialog, Score, Task
from zoo.tasks.answers import accepted


def majority(train: Iterable[Dialog], evaluate: Iterable[Dialog], task: Task) -> dict[str, dict[str, Score]]:
    """Score the commonest training answer of each kind; the commonest of all for a kind that training lacks.

    In multiple choice the guess is the commonest answer that is among the options, or else the first option.

    Args:
        train: dialogs to count answers in.
        evaluate: dialogs to guess.
        task: what scores the guesses.

    Returns:
        Kind -> metric -> score.
    """
    counts: dict[str, Counter[str]] = {}
    everything: Counter[str] = Counter()
    for dialog in train:
        answer = accepted(dialog)[:1] if not dialog.answers else [Counter(dialog.answers).most_common(1)[0][0]]
        counts.setdefault(dialog.kind, Counter()).update(answer)
        everything.update(answer)
    ranked = {kind: [a for a, _ in some.most_common()] for kind, some in counts.items()}
    overall = [a for a, _ in everything.most_common()]
    rows: dict[str, list[dict[str, float]]] = {}
    for dialog in evaluate:
        guesses = ranked.get(dialog.kind, overall)
        if task.mode == "choice":
            guesses = [g for g in guesses if g in dialog.choices] or list(dialog.choices)
        rows.setdefault(dialog.kind, []).append(task.score(dialog, guesses[0] if guesses else ""))
    return {kind: task.summarise(some) for kind, some in rows.items()}
