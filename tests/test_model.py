"""The composed model: what it promises as a transformers model, and the invariants of its batches."""

import copy
import pickle

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from zoo.composed.model import ZooModel
from zoo.model_config import ZooConfig
from zoo.registry import IGNORE_INDEX, ZooError

PAIR = (QUESTIONS[0], ANSWERS[0])


def mixed_samples():
    """Rows of different length: one image, two images, text only."""
    return [
        sample(PAIR, name="one", seed=1),
        sample((QUESTIONS[1], ANSWERS[6]), images=2, name="two", seed=5),
        sample((QUESTIONS[2], ANSWERS[4]), images=0, name="text"),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "zoo_eager"])
def test_a_batch_gives_what_each_sample_gives_alone(make_model, side, attention):
    model, processor = make_model(attention=attention)
    rows = [processor.encode(s) for s in mixed_samples()]
    batch = processor.collate(rows, padding_side=side)
    together = model(**batch, all_logits=True)
    for i, row in enumerate(rows):
        alone = model(**processor.collate([row]), all_logits=True)
        real = batch["attention_mask"][i].bool()
        torch.testing.assert_close(together.logits[i][real], alone.logits[0], atol=1e-5, rtol=1e-5)


def test_packed_dialogs_lose_what_they_lose_alone(make_model):
    model, processor = make_model()
    pairs = [(q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=False)]
    packed = model(**processor.collate([processor.encode(sample(*pairs))]))
    total = tokens = 0
    for pair in pairs:
        batch = processor.collate([processor.encode(sample(pair))])
        n = int((batch["labels"] != IGNORE_INDEX).sum())
        total, tokens = total + model(**batch).loss * n, tokens + n
    torch.testing.assert_close(packed.loss, total / tokens, atol=1e-5, rtol=1e-5)


def test_rows_packed_to_a_length_lose_what_their_samples_lose(make_model):
    model, processor = make_model()
    rows = [processor.encode(s) for s in mixed_samples()]
    packed = processor.pack(rows, 120)
    assert len(packed) < len(rows) and max(map(len, packed)) <= 120
    loss = model(**processor.collate(packed)).loss
    sums = [model(**(b := processor.collate([r]))).loss * (b["labels"] != IGNORE_INDEX).sum() for r in rows]
    tokens = sum(int((r.labels != IGNORE_INDEX).sum()) for r in rows)
    torch.testing.assert_close(loss, sum(sums) / tokens, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_mean_cross_entropy_of_the_labels(make_model):
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed_samples()])
    out = model(**batch, all_logits=True)
    logits, labels = out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    naive = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(out.losses["answer"], naive)


def test_a_loss_in_chunks_is_the_loss_at_once(make_model, monkeypatch):
    import zoo.composed.answer_loss

    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed_samples()])
    model(**batch).loss.backward()
    whole, grads = model(**batch).loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.setattr(zoo.composed.answer_loss, "LOGITS_AT_ONCE", 3 * model.llm.vocab_size)
    chunked = model(**batch).loss
    chunked.backward()
    torch.testing.assert_close(chunked, whole)
    for one, other in zip((p.grad for p in model.parameters() if p.grad is not None), grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_masked_labels_do_not_count(make_model):
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed_samples()])
    before = model(**batch).loss
    batch["labels"][0] = IGNORE_INDEX
    after = model(**batch).loss
    assert not torch.equal(before, after)
    batch["labels"][:] = IGNORE_INDEX
    assert model(**batch).loss == 0


def test_wrong_placeholder_count_says_how_many_are_needed(make_model):
    model, processor = make_model()
    batch = processor.collate([processor.encode(sample(PAIR))])
    where = (batch["input_ids"] == model.image_token_id).nonzero()[0]
    batch["input_ids"][tuple(where)] = 5
    with pytest.raises(ZooError, match=r"15 image placeholders .* for 1 images of 16 tokens; 16 are needed"):
        model(**batch)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_in_a_batch_equals_generation_alone(make_model, options):
    model, processor = make_model()
    prompts = [processor.encode_prompt(s, s.dialogs[0]) for s in mixed_samples()]
    batch = processor.collate(prompts, padding_side="left")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    together = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    copies = options.get("num_return_sequences", 1)
    assert together.shape[0] == 3 * copies
    for i, prompt in enumerate(prompts):
        single = processor.collate([prompt])
        inputs = {k: single[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in single}
        alone = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(alone[:, : len(prompt)], single["input_ids"].expand(copies, -1))
        new, other = together[i * copies, batch["input_ids"].shape[1] :], alone[0, len(prompt) :]
        length = min(len(new), len(other))
        assert torch.equal(new[:length], other[:length])


def test_generate_agrees_with_a_loop_of_forward_passes(make_model):
    model, processor = make_model()
    s = sample(PAIR)
    batch = processor.collate([processor.encode_prompt(s, s.dialogs[0])])
    ids = batch["input_ids"]
    for _ in range(6):
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    out = model.generate(batch["input_ids"], batch["pixel_values"], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, : ids.shape[1]], ids) or processor.tokenizer.eos_token_id in ids[0, -6:]


def test_generate_refuses_padding_on_the_right(make_model):
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed_samples()])
    with pytest.raises(ZooError, match="padding on the left"):
        model.generate(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    with pytest.raises(ZooError, match=r"input_ids \(B, T\), got \(\d+,\); one prompt is input_ids\[None\]"):
        model.generate(batch["input_ids"][0])
    for mask in (batch["attention_mask"][:, 1:], batch["attention_mask"][:1], batch["attention_mask"][0]):
        with pytest.raises(ZooError, match=r"attention_mask .* as many columns as input_ids"):
            model.generate(batch["input_ids"], batch["pixel_values"], mask)


def test_saved_and_loaded_gives_the_same_logits(make_model, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    model, processor = make_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    assert type(AutoConfig.from_pretrained(tmp_path)) is ZooConfig
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, ZooModel) and not again.training
    same = AutoProcessor.from_pretrained(tmp_path)
    assert same.num_image_tokens == processor.num_image_tokens and same.transform == processor.transform
    s = sample(PAIR)
    a, b = processor.collate([processor.encode(s)]), same.collate([same.encode(s)])
    assert all(torch.equal(a[k], b[k]) for k in ("input_ids", "labels", "pixel_values"))
    assert torch.equal(model(**a, all_logits=True).logits, again(**b, all_logits=True).logits)


PARTS = {"lora": {}, "peft": {"method": "lora"}, "vlora": {"skip": 1, "width": 16, "depth": 1}, "upcycle": {}}
PRUNERS = ("aim", "dart", "fastv", "pyramiddrop", "sparsevlm", "vscan")


@pytest.mark.parametrize("name", [*PARTS, *PRUNERS])
def test_copied_or_pickled_it_answers_alike_and_detaches_its_own_parts(make_model, name):
    """Parts hold hooks on the LLM: those of a copy are on the copy."""
    kind = "adapter" if name in PARTS else "pruner"
    llm = {**tiny_slots()["llm"], "num_layers": 4}
    slots = {"projector": None} if name == "vlora" else {}
    model, processor = make_model(**{kind: {name: {"name": name, **PARTS.get(name, {})}}}, llm=llm, **slots)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch = processor.collate([processor.encode(sample(PAIR))])
    wanted = model(**batch, all_logits=True).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(**batch, all_logits=True).logits, wanted)
        getattr(again, kind)[name].detach()
        assert torch.equal(model(**batch, all_logits=True).logits, wanted)
        bare = again(**batch, all_logits=True).logits
        assert bare.shape != wanted.shape or not torch.equal(bare, wanted)


def test_missing_weights_are_reported_by_part(make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = make_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if not k.startswith("projector")} | {"junk.x": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ZooError, match=r"missing in projector: 4 tensors(.|\n)*unknown in junk"):
        ZooModel.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(make_model, tmp_path):
    model, _ = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ZooError, match="pickled weights are never read"):
        ZooModel.from_pretrained(tmp_path)


def test_set_trainable_counts_parts_and_refuses_nonsense(make_model):
    model, _ = make_model()
    assert set(model.set_trainable(["projector"])) == {"projector"}
    assert all(p.requires_grad == n.startswith("projector") for n, p in model.named_parameters())
    assert set(model.set_trainable(["all"], freeze=["vision"])) == {"projector", "llm"}
    with pytest.raises(ZooError, match=r"'projectr'. Did you mean 'projector'"):
        model.set_trainable(["projectr"])
    with pytest.raises(ZooError, match="Nothing trains"):
        model.set_trainable(["projector"], freeze=["all"])


def test_text_only_batches_still_reach_the_encoder_in_training(make_model):
    model, processor = make_model()
    model.train()
    model(**processor.collate([processor.encode(sample(PAIR, images=0))])).loss.backward()
    assert all(p.grad is not None for p in model.vision.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make_model, reentrant, options, name):
    model, processor = make_model()
    model.train()
    batch = processor.collate([processor.encode(s) for s in mixed_samples()])
    model(**batch).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    getattr(model, name)({"use_reentrant": reentrant}, **options)
    model(**batch).loss.backward()
    for name, grad in before.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, atol=1e-6, rtol=1e-5)
