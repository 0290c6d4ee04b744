"""What is saved: every weight that its base would not give again, whatever changed it, and no other."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import zoo
from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.saved_builders import (
    SOURCES,
    WHERE,
    answers,
    by_data,
    checkpoints,
    composed,
    in_place,
    published,
    saved,
    weight,
)
from zoo.registry import ZooError
from zoo.storage.safetensors_file import same


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("bases"))


# ---- a change is what a tensor holds, not who changed it ----------------------------------------------------------


def other_data(model):
    weight(model).data = weight(model).data + 1.0


def by_numpy(model):
    weight(model).detach().numpy()[0, 0] += 1


def other_parameter(model):
    layer = model.llm.lm.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def fused(model):
    optimizer = torch.optim.AdamW([weight(model)], lr=1e-2, fused=True)
    before = weight(model)._version
    weight(model).grad = torch.ones_like(weight(model))
    optimizer.step()
    if before != weight(model)._version:
        pytest.skip("this torch notes what a fused optimiser changes")


def sign_of_zero(model):
    with torch.no_grad():
        weight(model)[0, 0] = -0.0


@pytest.mark.parametrize("change", [in_place, by_data, other_data, by_numpy, other_parameter, fused, sign_of_zero])
@pytest.mark.parametrize("source", SOURCES)
def test_what_changed_is_saved_and_no_more(places, tmp_path, source, change):
    model, processor = SOURCES[source](places)
    start = saved(model, tmp_path / "start")
    assert {n.partition(".")[0] for n in start} == ({"projector"} if source == "parts" else set())
    change(model)
    assert saved(model, tmp_path / "after") == start | {WHERE}
    processor.save_pretrained(tmp_path / "after")
    again, _ = zoo.load(f"dir:{tmp_path / 'after'}", device="cpu")
    assert all(same(p, dict(again.named_parameters())[n]) for n, p in model.named_parameters())
    assert saved(again, tmp_path / "again") == start | {WHERE}, "what was saved on a base is saved on it again"


@pytest.mark.parametrize("source", SOURCES)
def test_what_changed_and_came_back_is_not_saved(places, tmp_path, source):
    model, _ = SOURCES[source](places)
    start = saved(model, tmp_path / "start")
    before = weight(model).detach().clone()
    by_data(model)
    with torch.no_grad():
        weight(model).copy_(before)
    assert saved(model, tmp_path / "after") == start


@pytest.mark.parametrize("size", [0, 48])
@pytest.mark.parametrize("vision", ["hf", "timm", "open_clip"])
def test_encoders_of_all_libraries_are_compared_as_they_were_loaded(places, tmp_path, vision, size):
    """With other pixels too, where positions are interpolated on the way in."""
    model, processor = composed(places, vision, "llm", *([f"vision.image_size={size}"] if size else []))
    assert {n.partition(".")[0] for n in saved(model, tmp_path / "start")} == {"projector"}
    name, value = next((n, p) for n, p in model.vision.named_parameters() if n.endswith("weight") and p.ndim > 1)
    value.data.add_(0.5)
    assert {n for n in saved(model, tmp_path / "after") if n.startswith("vision")} == {f"vision.{name}"}
    processor.save_pretrained(tmp_path / "after")
    again, _ = zoo.load(f"dir:{tmp_path / 'after'}", device="cpu")
    assert torch.equal(answers(again, processor), answers(model, processor))


def test_tied_weights_are_one_weight(places, tmp_path):
    model, processor = composed(places, "hf", "tied")
    table = model.llm.lm.model.embed_tokens.weight
    assert model.llm.lm.lm_head.weight is table
    start = saved(model, tmp_path / "start")
    table.data.add_(0.1)
    assert saved(model, tmp_path / "after") == start | {"llm.lm.model.embed_tokens.weight"}
    processor.save_pretrained(tmp_path / "after")
    again, _ = zoo.load(f"dir:{tmp_path / 'after'}", device="cpu")
    assert torch.equal(answers(again, processor), answers(model, processor))
    whole = saved(model, tmp_path / "whole", include_base=True)
    assert "llm.lm.lm_head.weight" not in whole and "llm.lm.model.embed_tokens.weight" in whole


def test_rows_that_were_drawn_for_new_tokens_are_saved(places, tmp_path):
    torch.manual_seed(0)
    model, processor = composed(places, "hf", "small")
    assert model.llm.vocab_size > 300
    torch.manual_seed(0)  # as at the start: what would be drawn now is not what will be drawn
    names = {n for n in saved(model, tmp_path) if n.startswith("llm")}
    assert names == {"llm.lm.model.embed_tokens.weight[300:]", "llm.lm.lm_head.weight[300:]"}  # those rows alone
    processor.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again, _ = zoo.load(f"dir:{tmp_path}", device="cpu")
    assert torch.equal(answers(again, processor), answers(model, processor))


def test_they_are_loaded_by_name_too(places, tmp_path):
    """As transformers' `Trainer` does when it resumes, in a model that is composed anew; PEFT may be around it."""
    model, processor = composed(places, "hf", "small")
    with torch.no_grad():
        model.llm.lm.lm_head.weight[310:] += 1
    saved(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for prefix in ("", "within."):
        other, _ = composed(places, "hf", "small")
        outer = torch.nn.ModuleDict({"within": other}) if prefix else other
        found = outer.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=False)
        assert not found.unexpected_keys and not any("lm_head" in name for name in found.missing_keys)
        assert torch.equal(answers(other, processor), answers(model, processor))
    state["llm.lm.lm_head.weight[301:]"] = state.pop("llm.lm.lm_head.weight[300:]")
    assert composed(places, "hf", "small")[0].load_state_dict(state, strict=False).unexpected_keys


def test_saving_draws_no_random_numbers(places, tmp_path):
    model, _ = composed(places, "hf", "small")
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.rand(1), wanted)


def test_a_state_dict_is_taken_instead_and_must_be_whole(places, tmp_path):
    model, _ = composed(places, "hf", "tied")
    given = {n: t.clone() for n, t in model.state_dict().items()}
    start = saved(model, tmp_path / "own")
    assert saved(model, tmp_path / "given", state_dict=given) == start
    given[WHERE] += 1
    assert saved(model, tmp_path / "given", state_dict=given) == start | {WHERE}
    del given["projector.net.weight" if "projector.net.weight" in given else next(n for n in given if "projector" in n)]
    with pytest.raises(ZooError, match=r"state_dict lacks 'projector\."):
        model.save_pretrained(tmp_path / "given", state_dict=given)


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_data_type_is_what_its_base_gives_in_it(places, tmp_path, source, dtype):
    model, _ = SOURCES[source](places)
    start = saved(model, tmp_path / "start")
    model.to(dtype)
    assert saved(model, tmp_path / "cast") == start
    in_place(model)
    weight(model).data[0].add_(1.0)
    assert saved(model, tmp_path / "after") == start | {WHERE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (7, 5), (64, 3, 8)])
def test_tensors_are_compared_bit_for_bit(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(shape, generator=generator) * 9).to(dtype)
    assert same(a, a.clone())
    assert same(a, a.clone().t().contiguous().t() if a.ndim == 2 else a.clone())
    for at in range(min(a.numel(), 40)):
        b = a.clone()
        raw = b.view(-1).view(torch.uint8).numpy()
        raw[at * a.element_size()] ^= 1
        assert not same(b, a) and not same(a, b)
    wide = torch.zeros(*shape[:-1], shape[-1] + 1, dtype=dtype) if shape else torch.zeros(1, dtype=dtype)
    assert not same(a, wide)
    if a.numel() > 2 and a.ndim == 1:  # a view that starts where eight bytes do not
        assert same(torch.cat([a, a])[1 : 1 + len(a)], torch.cat([a, a])[1 : 1 + len(a)].clone())


def test_not_a_number_is_itself():
    a = torch.tensor([1.0, float("nan"), float("inf")])
    assert same(a, a.clone()) and not same(a, torch.tensor([1.0, 2.0, float("inf")]))
    assert same(a.half(), a) and not same(a.half(), torch.tensor([1.0, 2.0, float("inf")]))
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0])) and not same(torch.tensor([1]), torch.tensor([1.0]))


# ---- models that did not change ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", ["[]", "[fastervlm]", "[aim]", "[pool]"])
def test_a_model_that_did_not_change_saves_to_a_folder_that_loads(places, tmp_path, pruner):
    from transformers import AutoModelForImageTextToText

    model, processor = published(places, f"pruner={pruner}")
    assert saved(model, tmp_path) == set()
    processor.save_pretrained(tmp_path)
    wanted = answers(model, processor)
    for again in (
        zoo.load(f"dir:{tmp_path}", device="cpu")[0],
        zoo.ZooModel.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    ):
        assert torch.equal(answers(again, processor), wanted)


# ---- adapters ------------------------------------------------------------------------------------------------------


def moved(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if model.part_of(name).startswith("adapter"):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("source", SOURCES)
def test_lora_that_was_merged_is_in_the_weights(places, tmp_path, source):
    model, processor = SOURCES[source](places, *(["hf", "llm"] if source == "parts" else []), "adapter=[lora]")
    start = {n for n in saved(model, tmp_path / "start") if "lora_" not in n}
    targets = {f"llm.lm.{name}.weight" for name in moved(model).adapter["lora"].targets}
    model.adapter["lora"].merge()
    assert saved(model, tmp_path / "after") == start | targets
    processor.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "after/config.json").read_text())["slots"]["adapter"] == {}
    for again in (
        zoo.load(f"dir:{tmp_path / 'after'}", device="cpu")[0],
        zoo.ZooModel.from_pretrained(tmp_path / "after"),
    ):
        assert torch.equal(answers(again, processor), answers(model, processor))


def test_lora_that_is_detached_is_saved_all_the_same(places, tmp_path):
    model, processor = published(places, "adapter=[lora]")
    wanted = answers(moved(model), processor)
    names = saved(model, tmp_path / "attached")
    model.adapter["lora"].detach()
    assert saved(model, tmp_path / "detached") == names != set()
    again = zoo.ZooModel.from_pretrained(tmp_path / "detached")
    assert torch.equal(answers(again, processor), wanted)


def test_experts_that_were_merged_in_are_saved_with_their_number(places, tmp_path):
    words = ["adapter=[moextend]", "adapter.moextend.layers=[0,1]", "adapter.moextend.calibration_width=0"]
    model, processor = composed(places, "hf", "moe", *words)
    assert not [n for n in saved(model, tmp_path / "start") if n.startswith("llm")], "files hold one matrix per expert"
    moved(model).adapter["moextend"].merge()
    names = saved(model, tmp_path / "after")
    assert {n for n in names if n.startswith("llm")} == {n for n in model.state_dict() if n.startswith("llm")}
    processor.save_pretrained(tmp_path / "after")
    for again in (zoo.load(f"dir:{tmp_path / 'after'}")[0], zoo.ZooModel.from_pretrained(tmp_path / "after")):
        assert again.llm.num_experts == 5
        assert torch.equal(answers(again, processor), answers(model, processor))


def test_weights_of_one_image_are_not_saved_as_the_language_model(places, tmp_path):
    words = ["adapter=[vlora]", "adapter.vlora.rank=2", "adapter.vlora.skip=1", "adapter.vlora.width=8"]
    words += ["adapter.vlora.depth=1", "adapter.vlora.num_heads=2", "projector=null"]
    model, processor = composed(places, "hf", "llm", *words)
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    model.adapter["vlora"].condition(model.encode_images(batch["pixel_values"])[1], [1])
    model.adapter["vlora"].merge()
    with pytest.raises(ZooError, match=r"'vlora' is merged .* for one image: call unmerge\(\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- number formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("source", SOURCES)
def test_a_model_comes_back_in_the_data_type_that_it_was_saved_in(places, tmp_path, source, dtype):
    """Trained weights and those that its bases give, and adapters: the same numbers and the same answers."""
    words = ["adapter=[lora]"] if source == "published" else ["hf", "tied", "adapter=[lora]"]
    model, processor = SOURCES[source](places, *words)
    model.to(dtype)
    assert not any(n == WHERE for n in saved(model, tmp_path))
    weight(moved(model)).data.add_(1.0)
    assert WHERE in saved(model, tmp_path)
    processor.save_pretrained(tmp_path)
    for again in (zoo.load(f"dir:{tmp_path}", device="cpu")[0], zoo.ZooModel.from_pretrained(tmp_path)):
        own, new = model.state_dict(), again.state_dict()
        assert [n for n in own if own[n].dtype != new[n].dtype or not torch.equal(own[n], new[n])] == []
    asked, _ = zoo.load(f"dir:{tmp_path}", device="cpu", dtype="float32")
    assert {p.dtype for p in asked.parameters()} == {torch.float32}
