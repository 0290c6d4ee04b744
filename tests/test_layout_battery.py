"""What every registered layout and distiller must do by itself: the rules of `zoo test`."""

import pytest

from tests.rules import keep
from zoo import registry
from zoo.contracts import distillers, layouts

LAYOUTS = {"anyres": {"pinpoints": [[32, 64], [64, 32]]}, "tiles": {}}
DISTILLERS = {"llava_mod": {"objective": "mimic"}}


@pytest.mark.parametrize("rule", layouts.RULES, ids=str)
@pytest.mark.parametrize("name", registry.names("layout"))
def test_keeps_the_rule_of_layouts(name, rule):
    keep(rule, layouts.LayoutCase("layout", {"name": name, **LAYOUTS.get(name, {})}))


@pytest.mark.parametrize("rule", distillers.RULES, ids=str)
@pytest.mark.parametrize("name", registry.names("distiller"))
def test_keeps_the_rule_of_distillers(name, rule):
    keep(rule, distillers.DistillerCase("distiller", {"name": name, **DISTILLERS.get(name, {})}))
