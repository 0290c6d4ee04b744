"""Copies of frozen weights in 16 bits: the same step to the bit, and a model as it was behind the stage."""

import pytest
import torch

from tests.conftest import sample
from zoo.runs.processes import start_accelerator
from zoo.settings.stage import Stage
from zoo.training.short_weights import ShortWeights, release
from zoo.training.step import Engine

LORA = {"adapter": {"lora": {"name": "lora", "rank": 4}}}


@pytest.mark.parametrize("tied", [False, True])
def test_steps_are_the_same_to_the_bit(make_model, monkeypatch, tied):
    """Also of a weight that changes between two steps."""

    def trained(**options):
        llm = {"name": "hf", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64,
               "max_positions": 256, "tie_embeddings": tied}  # fmt: skip
        model, processor = make_model(llm=llm, **LORA)
        stage = Stage(steps=3, batch_size=2, lr=0.01, train=["projector", "adapter.lora"], **options)
        engine = Engine(start_accelerator("cpu"), model, stage, 3, precision="bf16")
        batch = processor.collate([processor.encode(sample(("what", "red"), seed=i)) for i in range(2)])
        losses = []
        for i in range(3):
            with torch.no_grad():
                model.llm.lm.get_decoder().layers[0].self_attn.q_proj.weight.mul_(1 + i)
            losses.append(engine.run(i, i, [batch], False)[0]["answer"].item())
        short = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and "forward" in m.__dict__]
        exact = model.eval()(**batch).logits
        engine.release()
        assert not any("forward" in m.__dict__ for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert torch.equal(model(**batch).logits, exact), "without autocast the weights are what they were"
        return short, losses, {name: weight.detach() for name, weight in model.named_parameters()}

    short, losses, weights = trained()
    assert len(short) == 2 * 4 + 2 * 7 + 1  # of the encoder, of the LLM and its head; not of what trains
    assert not trained(gradient_checkpointing=True)[0], "memory counts there"
    monkeypatch.setattr(ShortWeights, "ready", lambda _: None)
    plain, wanted, theirs = trained()
    assert not plain and losses == wanted and all(torch.equal(weights[n], theirs[n]) for n in theirs)


def test_a_copy_of_a_model_in_a_stage_computes_from_its_own_weights(make_model):
    """Copied layers are given back by themselves, and what changes in a copy, or trains there, is computed with."""
    import copy

    model, processor = make_model(**LORA)
    engine = Engine(start_accelerator("cpu"), model, Stage(steps=1, train=["projector"]), 1, precision="bf16")
    batch = processor.collate([processor.encode(sample(("what", "red"), seed=0))])
    engine.run(0, 0, [batch], False)
    other = copy.deepcopy(model)
    first = other.llm.lm.get_decoder().layers[0].self_attn.q_proj
    first = getattr(first, "base_layer", first)
    inner = torch.randn(2, first.in_features)

    def by_hand():
        return torch.nn.functional.linear(inner, first.weight, first.bias)

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first(inner), by_hand())
        with torch.no_grad():
            first.weight.mul_(2)
        assert torch.equal(first(inner), by_hand())
        first.weight.requires_grad_(True)
        first.weight.data.copy_(first.weight.data * 2)
        assert torch.equal(first(inner), by_hand())
    release(other)
    assert not any("forward" in m.__dict__ for m in other.modules() if type(m) is torch.nn.Linear)
    assert any("forward" in m.__dict__ for m in model.modules()), "the original keeps its copies"
    engine.release()
    assert not any("forward" in m.__dict__ for m in model.modules() if type(m) is torch.nn.Linear)
