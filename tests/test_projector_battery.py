"""What every registered projector must do, with its default options: the rules of `zoo test`."""

import pytest

from tests.rules import keep
from zoo import registry
from zoo.contracts.projectors import RULES, ProjectorCase


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", registry.names("projector"))
def test_keeps_the_rule(name, rule):
    keep(rule, ProjectorCase("projector", {"name": name}))
