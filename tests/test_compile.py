"""The composed model under `torch.compile`: one graph, the same numbers, a mask that says the same."""

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, sample
from zoo.composed import answer_loss

SAMPLES = [sample((QUESTIONS[0], ANSWERS[0]), seed=1), sample((QUESTIONS[4], ANSWERS[6]), seed=2)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ["sdpa", "zoo_eager"])
def test_the_composed_forward_is_one_graph(make_model, attention):
    model, processor = make_model(attention=attention)
    batch = processor.collate([processor.encode(s) for s in SAMPLES])
    del batch["labels"]
    with torch.no_grad():
        expected = model(**batch).logits
        got = torch.compile(model, fullgraph=True, backend="eager")(**batch).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "zoo_eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_mask_made_ahead_changes_nothing(make_model, monkeypatch, attention, side):
    model, processor = make_model(attention=attention)
    batch = processor.collate([processor.encode(s) for s in SAMPLES], padding_side=side)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        expected = model(**batch)
        monkeypatch.setattr(answer_loss, "compiled_sum", lambda: answer_loss.summed_loss)
        made = []
        ours = model._packed_mask
        monkeypatch.setattr(model, "_packed_mask", lambda *args: made.append(1) or ours(*args))
        model.compiled = True
        got = model(**batch)
    assert made
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.last_hidden_state[real], expected.last_hidden_state[real], atol=1e-5, rtol=1e-5)


def test_layers_that_look_through_a_window_make_their_own_mask(make_model):
    llm = {"name": "hf", "model_type": "mistral", "hidden_size": 32, "num_layers": 2, "num_heads": 2,
           "extra": {"sliding_window": 4}}  # fmt: skip
    model, processor = make_model(llm=llm)
    batch = processor.collate([processor.encode(s) for s in SAMPLES])
    assert not model._mask_ahead(batch["attention_mask"], None)
    model.llm.lm.config.sliding_window = None
    assert model._mask_ahead(batch["attention_mask"], None)


def test_compiling_can_be_taken_back(make_model):
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in SAMPLES])
    model.compile_parts()
    assert model.compiled and model.vision._compiled_call_impl is not None
    model.compile_parts(False)
    assert not model.compiled and model.vision._compiled_call_impl is None
    assert model(**batch).loss.isfinite()
