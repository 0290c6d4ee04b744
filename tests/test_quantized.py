"""A teacher in few bits: how far its weights and answers are from the whole ones, and what it saves."""

import gc
import weakref

import pytest
import torch
from torch import nn

from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.fusion_builders import SMALL
from zoo.composed.quantized import QuantizedLinear, quantize
from zoo.loading.build import load_teacher
from zoo.registry import ZooError
from zoo.settings.stage import TEACHER
from zoo.teaching.teacher import Teacher


@pytest.mark.parametrize(("bits", "steps", "group"), [(8, 127, 130), (4, 7, 64)])
def test_no_weight_is_off_by_more_than_half_a_step(bits, steps, group):
    torch.manual_seed(0)
    linear = nn.Linear(130, 5)
    small = QuantizedLinear(linear, bits)
    for row in range(5):
        for start in range(0, 130, group):
            part = slice(start, start + group)
            step = linear.weight[row, part].abs().max() / steps
            gap = (small.weight_in(torch.float32)[row, part] - linear.weight[row, part]).abs().max()
            assert gap <= step / 2 * 1.001
    x = torch.randn(3, 130)
    torch.testing.assert_close(small(x), x @ small.weight_in(torch.float32).T + linear.bias)


@pytest.mark.parametrize(("bits", "error", "share"), [(8, 0.02, 0.35), (4, 0.3, 0.25)])
def test_a_teacher_in_few_bits_says_nearly_the_same(make_model, bits, error, share):
    llm = {
        "name": "hf",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 128,
        "max_positions": 256,
    }
    model, own = make_model(seed=3, llm=llm)
    batch = own.collate([own.encode(sample(*zip(QUESTIONS, ANSWERS, strict=False)))])
    exact = Teacher(model).outputs_for(batch, None).last_hidden_state
    before = sum(
        p.numel() * p.element_size() for m in model.llm.layers.modules() if type(m) is nn.Linear for p in [m.weight]
    )
    saved = quantize(model.llm.layers, bits)
    assert before - saved < share * before
    mine = Teacher(model).outputs_for(batch, None).last_hidden_state
    assert 0 < (mine - exact).norm() / exact.norm() < error
    assert model.llm.linear_head() is not None, "the vocabulary projection stays whole"


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("name", ["lora", "mole", "vlora"])
def test_what_adapters_add_is_in_a_teacher_of_few_bits_too(make_model, tmp_path, name, bits):
    """Hooked into layers (mole, vlora) or standing around them (lora): lost or cut to bits, it would say nothing."""
    slots = {"projector": None} if name == "vlora" else {}
    model, processor = make_model(seed=3, adapter={name: {"name": name, **SMALL.get(name, {})}}, **slots)
    own = [p for n, p in model.named_parameters() if model.part_of(n) == f"adapter.{name}"]
    with torch.no_grad():
        for parameter in own:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch = processor.collate([processor.encode(sample(*zip(QUESTIONS[:1], ANSWERS[:1], strict=True)))])
    exact = Teacher(model).outputs_for(batch, None).last_hidden_state
    node = TEACHER | {"model": f"dir:{tmp_path}", "bits": bits}
    teacher, _ = load_teacher(node, device=torch.device("cpu"), precision="fp32")
    near = Teacher(teacher).outputs_for(batch, None).last_hidden_state
    teacher.adapter[name].detach()
    without = Teacher(teacher).outputs_for(batch, None).last_hidden_state
    assert (near - exact).norm() < 0.05 * exact.norm() < 0.5 * (without - exact).norm()


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ZooError, match="8 or 4 bits, got bits=3"):
        quantize(nn.Linear(2, 2), 3)


@pytest.mark.parametrize("name", ["lora", "mole"])
def test_no_adapter_holds_the_weights_that_were_replaced(make_model, name):
    model, _ = make_model(adapter={name: {"name": name}})
    owns, named = model.adapter[name].owns, list(model.llm.layers.named_parameters())
    whole = [weakref.ref(p) for n, p in named if n.endswith(("proj.weight", "base_layer.weight"))]
    del named
    quantize(model.llm.layers, 8, lambda inner: owns(f"model.layers.{inner}"))
    gc.collect()
    assert len(whole) == 14 and not any(weight() is not None for weight in whole)
