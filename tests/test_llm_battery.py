"""What every registered language model must do, with its default options on tiny sizes: the rules of `zoo test`."""

import pytest

from tests.fusion_builders import DENSE, MOE, llm_node
from tests.rules import keep
from zoo import registry
from zoo.contracts.language_models import RULES, LanguageModelCase

NODES = [llm_node(t) for t in (DENSE[0], "qwen3", "gemma", MOE[0])]
NODES += [{"name": n} for n in registry.names("llm") if n != "hf"]
IDS = [f"{n['name']}-{n.get('model_type', '')}" for n in NODES]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("node", NODES, ids=IDS)
def test_keeps_the_rule(node, rule):
    keep(rule, LanguageModelCase("llm", node))
