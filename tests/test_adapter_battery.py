"""What every registered adapter must do, with its default options: the rules of `zoo test`, on families of LLMs."""

import pytest

from tests.fusion_builders import PEFT_METHODS, SMALL, peft_node
from tests.rules import keep
from zoo import registry
from zoo.contracts.adapters import RULES, AdapterCase, base

NAMES = [*registry.names("adapter"), *(f"peft.{method}" for method in PEFT_METHODS)]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "smollm3", "mixtral", "qwen3_moe"]
OF_PEFT = ["llama", "mixtral"]  # families that methods of PEFT are tried on, which all do the same with a linear layer
COMPILED = ("peft.dora", "peft.oft")  # a compiler takes seconds, and products of small matrices are all alike to it


def case(name, model_type=""):
    name, _, method = name.partition(".")
    node = {"name": name, **SMALL.get(name, {}), **(peft_node(method) if method else {})}
    return AdapterCase("adapter", node, model_type)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.name != "base"], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_rule(name, rule):
    if rule.name == "compile" and "." in name and name not in COMPILED:
        pytest.skip("like another")
    keep(rule, case(name))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_one_is_the_base_model_and_detached_it_is_gone(name, model_type):
    if "." in name and model_type not in OF_PEFT:
        pytest.skip("tried on two families")
    keep(next(rule for rule in RULES if rule.run is base), case(name, model_type))
