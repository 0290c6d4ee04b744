"""Two adapters in one composed model: both learn, generate, save and load; on the same linears they are refused."""

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, picture, sample, tiny_slots
from tests.fusion_builders import SMALL
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.composed.model import ZooModel
from zoo.loading.build import load

NODES = {
    "vlora": {"name": "vlora", **SMALL["vlora"]},
    "mole": {"name": "mole", "rank": 2, "dropout": 0.0},
    "lora": {"name": "lora", "rank": 2, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "moextend": {"name": "moextend", "calibration_width": 4},
    "upcycle": {"name": "upcycle"},
}
EXPERTS = {**tiny_slots()["llm"], "model_type": "mixtral", "num_experts": 4, "top_k": 2}


def slots_of(names, **changes):
    adapter = {name: NODES[name] | changes.get(name, {}) for name in names}
    slots = {"adapter": adapter, **({"projector": None} if "vlora" in names else {})}
    return slots | ({"llm": EXPERTS} if "moextend" in names else {})


def rows(processor, *which):
    samples = [sample((QUESTIONS[i], ANSWERS[i]), images=i % 2, seed=i) for i in which]
    return processor.collate([processor.encode(s) for s in samples])


@pytest.mark.parametrize(
    "names", [["vlora", "mole"], ["mole", "vlora"], ["mole", "lora"], ["lora", "mole"], ["moextend", "vlora"]]
)
def test_both_learn_generate_and_load_again(make_model, tmp_path, names):
    model, processor = make_model(**slots_of(names))
    batch = rows(processor, 0, 1, 2, 3)
    trains = model.train().set_trainable(["adapter"])
    assert set(trains) == {f"adapter.{name}" for name in names}
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    losses = []
    for _ in range(10):
        loss = model(**batch).losses["answer"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    changed = {model.part_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trains)

    model.eval()
    inputs = processor(images=[picture(0)], text=[f"<image>{QUESTIONS[0]}"])
    fixed = {"max_new_tokens": 5, "do_sample": False}
    cached = model.generate(**inputs, **fixed)
    assert torch.equal(cached, model.generate(**inputs, **fixed, use_cache=False))
    model.save_pretrained(tmp_path)
    again = ZooModel.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**batch, all_logits=True).logits
        assert torch.equal(again(**batch, all_logits=True).logits, wanted)
        assert torch.equal(again.generate(**inputs, **fixed), cached)
        for i in range(4):
            alone = model(**rows(processor, i), all_logits=True).logits
            assert torch.allclose(alone, wanted[i : i + 1, : alone.shape[1]], atol=1e-4)


@pytest.mark.parametrize("names", [["upcycle", "mole"], ["lora", "mole"]])
def test_they_stand_in_their_order_again(make_model, tmp_path, names):
    """JSON of transformers sorts keys: `mole` would come ahead of `upcycle`, which then finds no plain layer."""
    pruner = {"visionzip": {"name": "visionzip", "keep_ratio": 0.5}, "divprune": {"name": "divprune"}}
    model, processor = make_model(**slots_of(names), pruner=pruner)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch = rows(processor, 0, 1)
    for again in (ZooModel.from_pretrained(tmp_path), load(f"dir:{tmp_path}")[0]):
        assert list(again.adapter) == names and list(again.pruner) == ["visionzip", "divprune"]
        with torch.no_grad():
            assert torch.equal(again(**batch, all_logits=True).logits, model(**batch, all_logits=True).logits)


@pytest.mark.fixes
@pytest.mark.parametrize("names", [["mole", "lora"], ["lora", "mole"]])
def test_on_the_same_linears_they_are_refused_and_the_fix_parts_them(names):
    slots = tiny_slots(**slots_of(names, lora={"targets": ["all-linear"]}))
    with pytest.raises(RefusedError, match=r"both take \d+ modules of the LLM") as refusal:
        check(Plan(slots, vocab_size=360))
    assert "adapter.lora.targets=[q_proj,k_proj,v_proj,o_proj]" in refusal.value.fixes
