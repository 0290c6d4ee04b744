"""VLoRA in a composed model: no image token anywhere, text untouched, saved alone; and what it does not go with."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.conftest import ANSWERS, QUESTIONS, picture, sample, talk, tiny_slots
from tests.fusion_builders import SMALL
from zoo import registry
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.composed.model import ZooModel
from zoo.registry import Sample, ZooError
from zoo.settings.stage import Stage

VLORA = {"projector": None, "adapter": {"vlora": {"name": "vlora", **SMALL["vlora"], "max_images": 2}}}


def moved(model, seed=1):
    """Weights of the adapter as training would leave them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


@pytest.fixture
def made(make_model):
    model, processor = make_model(**VLORA)
    return moved(model), processor


def rows_of(processor, *samples, side="right"):
    return processor.collate([processor.encode(s) for s in samples], padding_side=side)


def test_an_image_leaves_no_trace_in_the_sequence(made):
    model, processor = made
    seen, blind = (sample((QUESTIONS[0], ANSWERS[0]), images=n) for n in (1, 0))
    assert model.num_image_tokens == processor.num_image_tokens == 0
    with_image, without = processor.encode(seen), processor.encode(blind)
    assert with_image.input_ids.tolist() == without.input_ids.tolist()
    assert with_image.labels.tolist() == without.labels.tolist()


@torch.no_grad()
def test_text_in_a_mixed_batch_is_the_plain_llm_to_the_bit(made):
    model, processor = made
    samples = [sample((QUESTIONS[i], ANSWERS[i]), images=n, seed=i) for i, n in enumerate((1, 0, 2))]
    batch = rows_of(processor, *samples)
    assert batch["images_per_row"] == [1, 0, 2]
    before = {k: v.clone() for k, v in batch.items() if isinstance(v, torch.Tensor)}
    out = model(**batch, all_logits=True).logits
    assert all(torch.equal(batch[k], v) for k, v in before.items())
    model.adapter["vlora"].detach()
    plain = model(**batch, all_logits=True).logits
    assert torch.equal(out[1], plain[1])
    assert not torch.allclose(out[0], plain[0], atol=1e-4) and not torch.allclose(out[2], plain[2], atol=1e-4)
    model.adapter["vlora"].attach()
    text = rows_of(processor, samples[1])
    answers = model(**text, all_logits=True).logits
    model.adapter["vlora"].detach()
    assert torch.equal(answers, model(**text, all_logits=True).logits)


@torch.no_grad()
def test_dialogs_about_one_image_are_each_alone(made):
    model, processor = made
    pairs = [(QUESTIONS[i], ANSWERS[i]) for i in range(3)]
    several = rows_of(processor, sample(*pairs))
    assert len(several["input_ids"]) == 1 and "block_ids" in several
    alone = [rows_of(processor, sample(pair)) for pair in pairs]
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in alone]
    wanted = sum(model(**b).loss * n for b, n in zip(alone, counts, strict=True)) / sum(counts)
    assert torch.allclose(model(**several).loss, wanted, atol=1e-5)


@torch.no_grad()
def test_generates_for_images_of_a_mixed_batch_with_beams_and_copies(made):
    model, processor = made
    texts = [f"<image>{QUESTIONS[0]}", QUESTIONS[1], f"<image><image>{QUESTIONS[2]}"]
    inputs = processor(images=[picture(i) for i in range(3)], text=texts)
    assert inputs["images_per_row"] == [1, 0, 2]
    fixed = {"max_new_tokens": 5, "do_sample": False}
    tail = inputs["input_ids"].shape[1]
    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        out = model.generate(**inputs, **fixed, **options)[:, tail:]
        copies = options.get("num_return_sequences", 1)
        assert len(out) == 3 * copies
        first = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
        alone = model.generate(**first, pixel_values=inputs["pixel_values"][:1], **fixed, **options)[:, tail:]
        width = min(alone.shape[1], out.shape[1])
        assert torch.equal(alone[:, :width], out[:copies, :width])


@torch.no_grad()
def test_a_sequence_goes_on_with_the_image_it_began_with(made):
    model, processor = made
    inputs = processor(images=[picture()], text=[f"<image>{QUESTIONS[0]}"])
    whole = model(**inputs).logits
    ids = inputs["input_ids"]
    first = model(input_ids=ids[:, :-2], pixel_values=inputs["pixel_values"], use_cache=True)
    second = model(input_ids=ids[:, -2:], cache=first.cache, use_cache=True)
    assert torch.allclose(second.logits, whole[:, -2:], atol=1e-5)
    fresh = model(input_ids=ids)
    model.adapter["vlora"].detach()
    assert torch.equal(fresh.logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_stage_trains_the_adapter_and_nothing_else(made, reentrant):
    model, processor = made
    trains = model.set_trainable(["adapter"])
    assert set(trains) == {"adapter.vlora"}
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    text = sample((QUESTIONS[1], ANSWERS[2]), images=0)
    model(**rows_of(processor, sample((QUESTIONS[0], ANSWERS[0])), text)).loss.backward()
    optimizer.step()
    changed = {model.part_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"adapter.vlora"}
    assert not [n for n, p in model.named_parameters() if p.grad is not None and model.part_of(n) != "adapter.vlora"]


def test_saves_its_own_weights_alone_and_loads_to_the_same_logits(make_model, tmp_path, tokenizer):
    from safetensors import safe_open

    base, processor = make_model(projector=None, adapter=VLORA["adapter"])
    base.adapter["vlora"].detach()
    base.llm.lm.save_pretrained(tmp_path / "llm")
    slots = {"llm": {"name": "hf", "checkpoint": str(tmp_path / "llm")}}
    model, processor = make_model(**VLORA, **slots)
    moved(model)
    with torch.no_grad():
        batch = rows_of(processor, sample((QUESTIONS[0], ANSWERS[0])))
        wanted = model(**batch, all_logits=True).logits
        model.save_pretrained(tmp_path / "model")
        with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as saved:
            parts = {model.part_of(name) for name in saved.keys()}  # noqa: SIM118  a safetensors handle is no mapping
        assert parts == {"vision", "adapter.vlora"}  # the tower has random weights, so they are saved too
        again = ZooModel.from_pretrained(tmp_path / "model")
        assert torch.equal(again(**batch, all_logits=True).logits, wanted)
        model.adapter["vlora"].condition(model.encode_images(batch["pixel_values"])[1], [1])
        model.adapter["vlora"].merge()
        model.adapter["vlora"].unmerge()
        model.save_pretrained(tmp_path / "behind")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("model", "behind")]
    assert sizes[0] == sizes[1]


@torch.no_grad()
@pytest.mark.parametrize("names", [["random"], ["pool"], ["pool", "random"]])
def test_pruned_images_are_read_too(make_model, names):
    pruner = {name: {"name": name} for name in names}
    model, processor = make_model(**VLORA, pruner=pruner)
    batch = rows_of(processor, sample((QUESTIONS[0], ANSWERS[0])))
    adapter = moved(model).adapter["vlora"]
    assert len(adapter.memory.positions) == 16
    assert torch.isfinite(model(**batch).loss)


# ---- what it does not go with ------------------------------------------------------------------------------------


@dataclass
class InsideConfig:
    pass


@pytest.fixture
def inside_pruner():
    @registry.register("pruner", "inside")
    class Inside(nn.Module):
        needs, provides, destroys = frozenset({"image_tokens"}), frozenset(), frozenset()

        def __init__(self, config: InsideConfig) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n

        def forward(self, image):
            return image

        def attach(self, llm) -> None:
            pass

    yield
    del registry.table._entries["pruner"]["inside"]


def refused(reason, stage=None, **slots):
    stages = {"main": stage} if stage else {}
    with pytest.raises(RefusedError, match=reason) as refusal:
        check(Plan(tiny_slots(**{**VLORA, **slots}), vocab_size=360, stages=stages))
    return refusal.value.fixes


@pytest.mark.fixes
def test_beside_a_projector_it_is_refused_and_the_fix_leaves_that_out():
    fixes = refused("adapter 'vlora' excludes image_tokens, but projector 'mlp' gives them", projector={"name": "mlp"})
    assert fixes[0] == "projector=null"


@pytest.mark.fixes
def test_with_a_pruner_inside_the_llm_it_is_refused(inside_pruner):
    why = "pruner 'inside' needs image_tokens, but adapter 'vlora', which takes the image by another way, does not"
    assert "pruner=null" in refused(why, pruner={"inside": {"name": "inside"}})


@pytest.mark.fixes
def test_samples_that_share_a_row_are_refused():
    why = "pack_length=64 puts several samples into a row, and adapter 'vlora' changes the LLM for a whole row"
    fixes = refused(why, stage=Stage(train=["adapter"], steps=1, pack_length=64))
    assert "stages.main.pack_length=null" in fixes


@pytest.mark.fixes
def test_a_skip_beyond_the_layers_is_refused_with_one_that_fits():
    fixes = refused("skip=4 is more than the 2 layers", adapter={"vlora": {**VLORA["adapter"]["vlora"], "skip": 4}})
    assert set(fixes) >= {"adapter.vlora.skip=1", "adapter.vlora.skip=2"}


def test_without_an_encoder_it_is_refused():
    refused("turns image features into weights, but the slot vision is empty", vision=None)


def test_a_text_with_more_images_than_it_reads_is_refused(made):
    model, processor = made
    three = Sample("s", [picture(i) for i in range(3)], [talk(QUESTIONS[0], ANSWERS[0], images=3)])
    with pytest.raises(ZooError, match=r"shows 3 images.*at most 2: set adapter.vlora.max_images=3"):
        model(**rows_of(processor, three))
