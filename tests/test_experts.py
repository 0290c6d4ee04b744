"""Mixtures of experts run in every type and width, also those that torch's grouped kernel refuses."""

import pytest
import torch

from tests.fusion_builders import MOE, padded_batch, tiny_llm
from zoo.fusion.adapters.experts import ZOO_GROUPED, takes_grouped

# Rows begin at multiples of 16 bytes, or not: in 16 bit a width of 20 is 40 bytes, in 32 bit it is 80.
WIDTHS = {"aligned": 48, "in 32 bit alone": 20, "in neither": 26}


def experts_of(llm):
    return next(m for m in llm.lm.modules() if hasattr(m, "gate_up_proj") and m.gate_up_proj.dim() == 3)


def answers(llm, dtype):
    """Loss of a batch, and the gradient of every weight."""
    ids, mask = padded_batch(2, 12)
    llm.zero_grad()
    hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state
    assert hidden.dtype == dtype
    llm.head(hidden).float().logsumexp(-1).mean().backward()
    return hidden.detach(), {n: p.grad for n, p in llm.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("model_type", MOE)
def test_every_type_and_width_runs_as_one_expert_after_another(model_type, width, dtype):
    llm = tiny_llm(model_type, intermediate_size=width).to(dtype)
    assert llm.lm.config._experts_implementation == ZOO_GROUPED
    size = torch.finfo(dtype).bits // 8
    assert takes_grouped(experts_of(llm)) == (size < 8 and width * size % 16 == 0)
    hidden, grads = answers(llm, dtype)
    llm.lm.set_experts_implementation("eager")
    wanted, wanted_grads = answers(llm, dtype)
    close = {"atol": 1e-5, "rtol": 1e-4} if size >= 4 else {"atol": 0.05, "rtol": 0.05}
    assert torch.allclose(hidden, wanted, **close)
    for name, grad in wanted_grads.items():
        assert torch.allclose(grads[name], grad, **close), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", MOE)
def test_shapes_are_known_on_the_meta_device_in_every_type(model_type, dtype):
    with torch.device("meta"):
        llm = tiny_llm(model_type, intermediate_size=26).to(dtype)
    embeds = torch.empty(2, 40, llm.hidden_size, device="meta", dtype=dtype)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device="meta")
    assert llm.head(llm.hidden(inputs_embeds=embeds, attention_mask=mask).last_hidden_state).shape[:2] == (2, 40)


def test_the_choice_is_not_written_into_a_config(tmp_path):
    llm = tiny_llm(MOE[0])
    llm.lm.save_pretrained(tmp_path)
    assert "zoo" not in (tmp_path / "config.json").read_text()


def test_dense_models_are_left_as_they_are():
    assert tiny_llm("llama").lm.config._experts_implementation != ZOO_GROUPED
