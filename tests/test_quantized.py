"""A teacher in few bits: how far its weights and answers are from the whole ones, and what it saves."""

import pytest
import torch
from torch import nn

from tests.conftest import ANSWERS, QUESTIONS, sample
from zoo.quantized import QuantizedLinear, quantize
from zoo.registry import ZooError
from zoo.teacher import Teacher


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
    exact = Teacher(model).see(batch, None).last_hidden_state
    before = sum(
        p.numel() * p.element_size() for m in model.llm.layers.modules() if type(m) is nn.Linear for p in [m.weight]
    )
    saved = quantize(model.llm.layers, bits)
    assert before - saved < share * before
    mine = Teacher(model).see(batch, None).last_hidden_state
    assert 0 < (mine - exact).norm() / exact.norm() < error
    assert model.llm.linear_head() is not None, "the vocabulary projection stays whole"


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ZooError, match="8 or 4 bits, got bits=3"):
        quantize(nn.Linear(2, 2), 3)
