"""What every task promises, over all registered names: the rules of `zoo test`."""

import subprocess
import sys

import pytest

from tests.rules import keep
from zoo import registry
from zoo.contracts.tasks import RULES, TaskCase


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", registry.names("task"))
def test_keeps_the_rule(name, rule):
    keep(rule, TaskCase("task", {"name": name}))


def test_importing_all_tasks_needs_no_torch():
    code = "import sys\nfrom zoo import registry\n[registry.get('task', n) for n in registry.names('task')]\n"
    heavy = ["torch", "transformers", "timm", "open_clip", "datasets", "sacrebleu"]
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
