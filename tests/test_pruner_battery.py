"""What every registered pruner must do before the LLM, with its default options: the rules of `zoo test`."""

import pytest

from tests.rules import keep
from zoo import registry
from zoo.contracts.pruners import RULES, PrunerCase


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", registry.names("pruner"))
def test_keeps_the_rule(name, rule):
    keep(rule, PrunerCase("pruner", {"name": name}))
