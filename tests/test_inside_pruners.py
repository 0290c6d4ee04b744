"""Pruners inside the LLM as parts of a composed model: batches, packing, evaluation, training, saving."""

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from tests.test_evaluate import Choices, Talks
from zoo.composed.model import ZooModel
from zoo.evaluation.evaluate import evaluate
from zoo.registry import IGNORE_INDEX, ZooError

LLM = {**tiny_slots()["llm"], "num_layers": 4}
PRUNERS = {
    "aim": {"name": "aim", "merge_ratio": 0.5, "start": 0, "stop": 3},
    "fastv": {"name": "fastv", "keep_ratio": 0.4, "layer": 1},
    "pyramiddrop": {"name": "pyramiddrop", "keep_ratio": 0.6},
    "dart": {"name": "dart", "keep_ratio": 0.5, "layer": 1},
    "sparsevlm": {"name": "sparsevlm", "keep_ratio": 0.4, "recycle": True},
}
pytestmark = pytest.mark.parametrize("name", list(PRUNERS))


@pytest.fixture
def built(make_model, name):
    """A model that looks and reads, with the pruner."""
    model, processor = make_model(seed=3, pruner={name: PRUNERS[name]}, llm=LLM)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model, processor


def rows(processor):
    return [
        processor.encode(s)
        for s in (
            sample((QUESTIONS[0], ANSWERS[0]), name="one", seed=1),
            sample((QUESTIONS[1], ANSWERS[6]), images=2, name="two", seed=5),
            sample((QUESTIONS[2], ANSWERS[4]), images=0, name="text"),
        )
    ]


def test_losses_of_a_batch_and_of_a_packed_row_are_those_of_each_alone(built, name):
    model, processor = built
    samples = rows(processor)
    sums, count = torch.zeros(()), 0
    for one in samples:
        batch = processor.collate([one])
        n = int((batch["labels"] != IGNORE_INDEX).sum())
        out = model(**batch)
        assert int((out.labels != IGNORE_INDEX).sum()) == n
        assert (out.last_hidden_state.shape[1] < len(one)) == bool(one.pixel_values)
        sums, count = sums + out.loss * n, count + n
    batches = [processor.collate(samples, padding_side=side) for side in ("right", "left")]
    for batch in [*batches, processor.collate(processor.pack(samples, 200))]:
        torch.testing.assert_close(model(**batch).loss, sums / count, atol=1e-5, rtol=1e-5)


def test_several_dialogs_in_a_row_are_refused_with_what_to_do(built, name):
    model, processor = built
    batch = processor.collate([processor.encode(sample(*zip(QUESTIONS[:2], ANSWERS[:2], strict=True)))])
    with pytest.raises(ZooError, match=f"pruner '{name}' chooses image tokens by the question.*pack=none"):
        model(**batch)


def test_evaluation_is_the_same_for_any_batch_size(built, name):
    model, processor = built
    data = {"t": Talks(5), "c": Choices(4)}
    results = [evaluate(model, processor, data, batch_size=b, baselines=False) for b in (1, 7)]
    assert results[0].predictions == results[1].predictions
    assert len({r["prediction"] for r in results[0].predictions}) > 2


def test_training_with_checkpointing_reaches_encoder_and_llm(built, name):
    model, processor = built
    batch = processor.collate(rows(processor))
    grads = []
    for on in (False, True):
        model.train().zero_grad()
        if on:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        assert all(p.grad is not None for p in [*model.vision.parameters(), *model.llm.lm.model.layers.parameters()])
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_a_saved_model_prunes_again_and_detached_it_does_not(built, name, tmp_path):
    model, processor = built
    batch = processor.collate(rows(processor), padding_side="left")
    del batch["labels"]
    with torch.no_grad():
        out = model(**batch)
        model.save_pretrained(tmp_path)
        again = ZooModel.from_pretrained(tmp_path)
        again.set_attention("sdpa")
        assert torch.equal(again(**batch).last_hidden_state, out.last_hidden_state)
        pruner = model.pruner[name]
        kept = pruner.kept(out.passed)
        assert all(k.shape == batch["input_ids"].shape for k in kept)
        per_layer = pruner.tokens_per_layer(model.num_image_tokens, 4)
        assert [int((k & (batch["input_ids"] == model.image_token_id))[0].sum()) for k in kept] == per_layer
        pruner.detach()
        assert model(**batch).last_hidden_state.shape[1] == batch["input_ids"].shape[1]


def test_two_pruners_inside_one_llm_are_refused(make_model, name):
    with pytest.raises(ZooError, match="both drop tokens inside the LLM"):
        make_model(pruner=PRUNERS, llm=LLM)


@pytest.mark.parametrize("words", [1, 30], ids=["pictures_are_longest", "text_is_longest"])
@pytest.mark.parametrize("adapter", ["mole", "moextend", "upcycle"])
def test_experts_count_the_tokens_that_are_left_and_no_padding(make_model, name, adapter, words):
    experts = {**LLM, "model_type": "mixtral", "num_experts": 4, "top_k": 2}
    options = {
        "mole": {"rank": 2, "dropout": 0.0, "official_balance": True},
        "moextend": {"guard": True},
        "upcycle": {"every": 1},
    }
    slots = {"pruner": {name: PRUNERS[name]}, "adapter": {adapter: {"name": adapter, **options[adapter]}}}
    model, processor = make_model(**slots, llm=experts if adapter == "moextend" else LLM)
    model.train().set_trainable(["adapter"])
    for p in model.adapter.parameters():  # no ties: a new expert starts as a copy, and rounding would choose
        p.data += 0.05 * torch.randn_like(p)
    text = processor.encode(sample((QUESTIONS[2] * words, ANSWERS[4]), images=0, name="text"))
    samples, part = [*rows(processor)[:2], text], model.adapter[adapter]

    def run(members):
        model.zero_grad()
        out = model(**processor.collate(members))
        out.loss.backward()
        usage, kept = part.usage(out.passed), model.pruner[name].kept(out.passed)
        return {i: torch.tensor(shares) * kept[i].sum() for i, shares in usage.items()}, kept

    alone = [run([one])[0] for one in samples]
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        choices, kept = run(samples)
        assert kept[-1].sum() < kept[0].sum() and (words == 1) == (len(text) < kept[-1].shape[1])
        for layer, counts in choices.items():  # experts are chosen as often as by each row alone
            torch.testing.assert_close(counts, sum(one[layer] for one in alone), atol=1e-3, rtol=0)
        grads.append([p.grad.clone() for p in model.adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5 * max(1, b.abs().max())) for a, b in zip(*grads, strict=True))
