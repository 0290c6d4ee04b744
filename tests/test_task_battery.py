"""What every task promises, over all registered names."""

import subprocess
import sys

import pytest

from zoo import registry
from zoo.registry import Dialog, Score, Task, ZooError

NAMES = registry.names("task")
TRUTH = {"boxes": "1 2 30 40", "choice": "yes"}  # else: yes
WRONG = {"boxes": "50 50 60 60", "choice": "no", "caption": "qq"}  # else: no


def dialog(name):
    turns = [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
             {"role": "assistant", "content": [{"type": "text", "text": TRUTH.get(name, "yes")}]}]  # fmt: skip
    return Dialog(turns, choices=["yes", "no"])


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def task(name):
    return registry.build("task", {"name": name})


def test_keeps_the_contract(task):
    assert isinstance(task, Task)
    assert task.mode in {"generate", "choice"}
    assert task.max_new_tokens > 0 or task.mode == "choice"


def test_right_beats_wrong_beats_nothing_to_lose(name, task):
    right, wrong, empty = (task.score(dialog(name), p) for p in (TRUTH.get(name, "yes"), WRONG.get(name, "no"), ""))
    first = next(iter(right))
    assert right[first] > wrong[first]
    assert right[first] > empty[first] == 0
    for row in (right, wrong, empty):
        assert list(row) == list(right) and all(isinstance(v, float) for v in row.values())
        assert all(0 <= v <= 1 for k, v in row.items() if not k.startswith("_"))


def test_summaries_are_scores_of_plain_numbers_in_any_order(name, task):
    rows = [task.score(dialog(name), p) for p in [TRUTH.get(name, "yes")] * 3 + [WRONG.get(name, "no")] * 2 + [""]]
    scores = task.summarise(rows)
    assert scores and not any(metric.startswith("_") for metric in scores)
    for score in scores.values():
        assert isinstance(score, Score) and type(score.value) is type(score.stderr) is float and type(score.n) is int
        assert 0 <= score.value <= 1 and score.stderr >= 0 and 0 <= score.n <= 6
    turned = task.summarise(rows[::-1])
    assert {k: s.value for k, s in turned.items()} == pytest.approx({k: s.value for k, s in scores.items()})
    assert all(s.stderr == 0 for s in task.summarise(rows[:1]).values())


def test_a_misspelt_option_names_the_nearest(name):
    options = registry.get("task", name).options
    for option in options:
        with pytest.raises(ZooError, match=f"Did you mean '{option.name}'"):
            registry.build("task", {"name": name, option.name + "x": option.default})
        assert option.doc, f"{option.name} has no comment"


def test_importing_all_tasks_needs_no_torch():
    code = "import sys\nfrom zoo import registry\n[registry.get('task', n) for n in registry.names('task')]\n"
    heavy = ["torch", "transformers", "timm", "open_clip", "datasets", "sacrebleu"]
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
