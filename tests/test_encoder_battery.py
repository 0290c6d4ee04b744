"""What every registered encoder must do by itself, on tiny sizes: the rules of `zoo test`."""

import pytest

from tests.rules import keep
from tests.vision_builders import SIZES
from zoo import registry
from zoo.contracts.encoders import RULES, EncoderCase

NODES = {"timm": SIZES, "open_clip": SIZES, "hf": {**SIZES, "model_type": "siglip"}, "qwen_vision": {}, "fused": {}}
NODES["fused"] = {"encoders": {"a": {"name": "timm", **SIZES}, "b": {"name": "open_clip", **SIZES}}}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", registry.names("vision"))
def test_keeps_the_rule(name, rule):
    keep(rule, EncoderCase("vision", {"name": name, **NODES[name]}))
