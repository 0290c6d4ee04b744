"""Where DDP searches for weights without a gradient: in the stages that may have some, and in no other."""

import pytest
import torch
from torch import nn

from tests.test_two_adapters import EXPERTS, NODES
from zoo.composed.assembly import build_distiller
from zoo.settings.stage import Stage
from zoo.training.unused import require_gradients, why_unused


def why(model, distiller=None, train=("all",), detach=(), **runs):
    model.detach_only(list(detach))
    model.set_trainable(list(train))
    return why_unused(model, Stage(steps=1, detach=list(detach)), distiller, **runs)


@pytest.mark.parametrize("names", [[], ["mole"], ["moextend"], ["vlora"], ["upcycle"], ["lora"]])
def test_no_search_where_each_pass_uses_all(make_model, names):
    """Idle experts, rows of text alone and frozen parts need none."""
    slots = {"adapter": {name: NODES[name] for name in names}}
    slots |= {"projector": None} if "vlora" in names else {}
    slots |= {"llm": EXPERTS} if "moextend" in names else {}
    model, _ = make_model(**slots)
    assert why(model) is None and why(model, train=["vision"]) is None
    if names:
        assert why(model, train=["adapter"]) is None


def test_a_search_where_the_stage_leaves_weights_out(make_model):
    model, _ = make_model(adapter={"lora": NODES["lora"]})
    assert "does not run the LLM" in why(model, run_llm=False)
    assert why(model, train=["vision"], run_llm=False) is None
    assert "vocabulary projection" in why(model, run_head=False)
    assert why(model, train=["projector", "adapter"], run_head=False) is None
    assert "distiller" in why(model, build_distiller(model, {"name": "dense"}))
    mole, _ = make_model(adapter={"mole": NODES["mole"]})
    assert "'mole' trains and is detached" in why(mole, detach=["mole"])


def test_experts_that_are_modules_of_their_own(make_model):
    model, _ = make_model()
    model.llm.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert "experts" in why(model)
    assert why(model, train=["projector"]) is None


class Skipping(nn.Linear):
    """A part of a plug-in: whether it leaves weights out is not known."""

    skips_weights: bool | None = None


def test_a_part_declares_that_it_leaves_weights_out(make_model):
    model, _ = make_model()
    model.projector = Skipping(32, 32)
    assert "Skipping" in why(model)
    assert why(model, train=["llm"]) is None
    Skipping.skips_weights = False
    assert why(model) is None


def test_a_weight_without_gradient_is_named():
    step = nn.ModuleDict({"model": nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})})
    step["model"]["a"](torch.ones(1, 1)).sum().backward()
    with pytest.raises(RuntimeError, match=r"b\.weight and 1 more train and have no gradient.* skips_weights = True"):
        require_gradients(step)
