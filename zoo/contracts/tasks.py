"""Rules for tasks: what they make of right and wrong answers."""

from typing import Any

from zoo.contracts.case import Case, add_options_rule
from zoo.contracts.rules import NotForThisPart, Rules, expect
from zoo.registry import Dialog, Score, Task, ZooError, build

RULES = Rules()
# Answers that tasks can read; the first that a task prefers to nonsense is taken for the right one.
ANSWERS = ("yes", "1 2 30 40", "A", "3", "red")
MODES = ("generate", "choice", "scores", "hidden")
NONSENSE = ("no", "50 50 60 60", "B", "qq")


class TaskCase(Case):
    """A task with its options."""

    def build(self, seed: int = 0, **options: Any) -> Any:
        return build("task", {**self.node, **options})

    def truth(self) -> tuple[Dialog, str, str]:
        """A dialog with an answer that the task can read, that answer, and a wrong one."""
        task, said = self.build(), []
        if task.mode not in ("generate", "choice"):
            raise NotForThisPart("it is given numbers, not answers")
        refused = 0
        for right in ANSWERS:
            dialog = _dialog(right)
            for wrong in NONSENSE:
                try:
                    best, worse = (next(iter(task.score(dialog, text).values())) for text in (right, wrong))
                except ZooError as error:  # such a task cannot parse this reference
                    said.append(str(error))
                    refused += 1
                    break
                said.append(f"{right!r} scores {best:g} and {wrong!r} {worse:g}")
                if best > worse:
                    return dialog, right, wrong
        if refused == len(ANSWERS):
            raise NotForThisPart(f"it reads none of {', '.join(map(repr, ANSWERS))}: {said[-1]}")
        expect(False, "; ".join(said[:3]), "that the first metric of a right answer is above that of a wrong one")
        raise AssertionError


def _dialog(answer: str) -> Dialog:
    turns = [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
             {"role": "assistant", "content": [{"type": "text", "text": answer}]}]  # fmt: skip
    return Dialog(turns, choices=["yes", "no"], meta={"group": "one"})


@RULES.add("mode", "it declares how it wants answers, and the longest")
def mode(case: TaskCase) -> str:
    task = case.build()
    expect(isinstance(task, Task), f"its class is {type(task).__mro__[1].__name__}", "a Task")
    expect(task.mode in MODES, f"mode is {task.mode!r}", ", ".join(MODES))
    right = task.mode != "generate" or task.max_new_tokens > 0
    expect(right, f"max_new_tokens is {task.max_new_tokens}", "a number above 0")
    return task.mode


@RULES.add("order", "a right answer scores above a wrong one, and above none, which scores 0")
def order(case: TaskCase) -> str:
    dialog, right, wrong = case.truth()
    task = case.build()
    scored = {text: task.score(dialog, text) for text in (right, wrong, "")}
    first = next(iter(scored[right]))
    expect(scored[right][first] > scored[""][first] == 0, f"no answer scores {scored[''][first]:g}", "0")
    for text, row in scored.items():
        expect(list(row) == list(scored[right]), f"{text!r} has the metrics {list(row)}", f"{list(scored[right])}")
        for metric, value in row.items():
            where = f"{metric} of {text!r} is {value!r}"
            expect(isinstance(value, float), where, "a float")
            expect(metric.startswith("_") or 0 <= value <= 1, where, "0 to 1")
    return f"{first}: {right!r} {scored[right][first]:g}, {wrong!r} {scored[wrong][first]:g}"


@RULES.add("summary", "summarise gives a Score of plain numbers for each metric, in any order of rows")
def summary(case: TaskCase) -> str:
    dialog, right, wrong = case.truth()
    task = case.build()
    rows = [task.score(dialog, text) for text in [right] * 3 + [wrong] * 2 + [""]]
    scores, turned = task.summarise(rows), task.summarise(rows[::-1])
    expect(scores, "no metric", "one or more")
    for metric, score in scores.items():
        expect(not metric.startswith("_"), f"{metric!r} is reported", "names without an underscore")
        expect(isinstance(score, Score), f"{metric} is {score!r}", "a Score")
        plain = type(score.value) is type(score.stderr) is float and type(score.n) is int
        expect(plain, f"{metric} is {score!r}", "a float, an int and a float")
        inside = 0 <= score.value <= 1 and score.stderr >= 0 and 0 <= score.n <= 6
        expect(inside, f"{metric} of 6 rows is {score!r}", "a value in [0, 1] of at most 6 rows")
        off = abs(turned[metric].value - score.value)
        expect(off < 1e-9, f"{metric} in another order of rows differs by {off:.1e}", "the same")
    one = task.summarise(rows[:1])
    expect(all(score.stderr == 0 for score in one.values()), f"of one row: {one}", "stderr 0.0")
    return ", ".join(f"{metric} {score.value:.2f}" for metric, score in scores.items())


@RULES.add("numbers", "of log-probabilities or hidden states it makes rows of numbers, and a Score of each metric")
def numbers(case: TaskCase) -> str:
    task = case.build()
    if task.mode in ("generate", "choice"):
        raise NotForThisPart("it is given answers")
    rows = []
    for answer, good in (("yes", 1.0), ("no", 0.0)):
        dialog = _dialog(answer)
        if task.mode == "scores":
            prediction: Any = {c: -1.0 - abs(good - (c == "yes")) for c in task.candidates(dialog)}
        else:
            dialog.messages[0]["content"] += [{"type": "image"}] if good else []
            prediction = [good, 1.0, 0.5]
        row = task.score(dialog, prediction)
        numeric = all(isinstance(value, float) for value in row.values())
        expect(numeric, f"a row is {row}", "names and floats")
        rows.append(row | ({"_state": prediction} if task.mode == "hidden" else {}))
    scores = task.summarise(rows)
    expect(scores, "no metric", "one or more")
    for metric, score in scores.items():
        right = isinstance(score, Score) and 0 <= score.value <= 1 and score.stderr >= 0
        expect(right and not metric.startswith("_"), f"{metric} is {score!r}", "a Score in [0, 1]")
    return ", ".join(scores)


add_options_rule(RULES)
