"""What is saved: every weight that its base would not give again, whatever changed it, and no other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zoo
from tests import published_builders, vision_builders
from tests.conftest import ANSWERS, QUESTIONS, sample
from zoo.registry import ZooError
from zoo.storage.safetensors_file import same

WHERE = "llm.lm.model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Tiny checkpoints in folders: encoders of three libraries, language models, a published model."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from zoo.text.tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("bases")
    vision_builders.hf_model("clip").save_pretrained(root / "hf")
    (root / "timm").mkdir()
    vision_builders.save_timm(vision_builders.timm_model("vit_tiny_patch16_224"), root / "timm")
    vision_builders.save_open_clip(*vision_builders.open_clip_model(), root / "open_clip")
    tokenizer = train_tokenizer([f"{q} {a}" for q in QUESTIONS for a in ANSWERS] * 3, 360, "plain")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    for name, more in (("llm", {}), ("tied", {"tie_word_embeddings": True}), ("small", {"vocab_size": 300})):
        torch.manual_seed(0)
        config = LlamaConfig(**{"vocab_size": len(tokenizer) + 8, **sizes, **more})
        vision_builders.shake(LlamaForCausalLM(config)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    mixtral = MixtralConfig(**sizes, vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4)
    vision_builders.shake(MixtralForCausalLM(mixtral)).save_pretrained(root / "moe")
    tokenizer.save_pretrained(root / "moe")
    published_builders.llava(root / "llava")
    return root


def composed(places, vision="hf", llm="llm", *words):
    """A model of parts with checkpoints of their own, and a projector without."""
    parts = [f"vision={vision}", f"vision.checkpoint={places / vision}", f"llm.checkpoint={places / llm}"]
    return zoo.compose(*parts, "llm=hf", "projector=linear", "device=cpu", *words)


def published(places, *words, **options):
    return zoo.load(f"dir:{places / 'llava'}", *words, device="cpu", **options)


SOURCES = {"parts": composed, "published": published}


def saved(model, folder, **options):
    """Save, and give back the names that the folder holds."""
    model.save_pretrained(folder, **options)
    return set(load_file(folder / "model.safetensors"))


def answers(model, processor):
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    with torch.no_grad():
        return model(**batch, all_logits=True).logits


def weight(model, name=WHERE):
    return model.state_dict(keep_vars=True)[name]


# ---- a change is what a tensor holds, not who changed it ----------------------------------------------------------


def in_place(model):
    with torch.no_grad():
        weight(model).view(-1)[-1].add_(1e-3)


def by_data(model):
    weight(model).data.mul_(1.001)


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
    assert names == {"llm.lm.model.embed_tokens.weight", "llm.lm.lm_head.weight"}
    processor.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again, _ = zoo.load(f"dir:{tmp_path}", device="cpu")
    assert torch.equal(answers(again, processor), answers(model, processor))


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


# ---- bases that move, change or go ---------------------------------------------------------------------------------


@pytest.fixture
def copied(places, tmp_path):
    for name in ("hf", "llm", "llava"):
        shutil.copytree(places / name, tmp_path / "base" / name)
    return tmp_path / "base"


def other_numbers(folder):
    file = folder / "model.safetensors"
    state = {n: t + 1 for n, t in load_file(file).items()}
    file.unlink()
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("what", [shutil.rmtree, other_numbers])
def test_where_a_published_base_is_gone_everything_is_saved(copied, tmp_path, what):
    model, processor = published(copied)
    wanted = answers(model, processor)
    what(copied / "llava")
    with pytest.warns(UserWarning, match=r"base weights of model in .* cannot be read any more, so all weights"):
        names = saved(model, tmp_path / "after")
    assert names == set(model.state_dict())
    processor.save_pretrained(tmp_path / "after")
    again, _ = zoo.load(f"dir:{tmp_path / 'after'}", device="cpu")
    assert torch.equal(answers(again, processor), wanted)
    assert again.config.base["model"]["family"] == "llava", "its layout is still known"
    assert saved(again, tmp_path / "again") == names


@pytest.mark.parametrize(("gone", "other"), [("llm", "vision"), ("hf", "llm")])
def test_where_a_part_is_gone_all_of_its_weights_are_saved(copied, tmp_path, gone, other):
    model, processor = composed(copied)
    part = "vision" if gone == "hf" else gone
    shutil.rmtree(copied / gone)
    with pytest.warns(UserWarning, match=f"base weights of {part} in"):
        names = saved(model, tmp_path / "after")
    assert {n for n in names if n.startswith(part)} == {n for n in model.state_dict() if n.startswith(part)}
    assert not [n for n in names if n.startswith(other)]
    processor.save_pretrained(tmp_path / "after")
    for again in (zoo.load(f"dir:{tmp_path / 'after'}")[0], zoo.ZooModel.from_pretrained(tmp_path / "after")):
        assert torch.equal(answers(again, processor), answers(model, processor))


@pytest.mark.parametrize("size", [0, 48])
def test_a_whole_model_of_parts_needs_no_checkpoint_any_more(copied, tmp_path, size):
    model, processor = composed(copied, "hf", "llm", *([f"vision.image_size={size}"] if size else []))
    assert saved(model, tmp_path / "whole", include_base=True) == set(model.state_dict())
    processor.save_pretrained(tmp_path / "whole")
    shutil.rmtree(copied)
    for again in (zoo.load(f"dir:{tmp_path / 'whole'}")[0], zoo.ZooModel.from_pretrained(tmp_path / "whole")):
        assert torch.equal(answers(again, processor), answers(model, processor))


def test_what_was_trained_whole_needs_its_base_no_more(copied, tmp_path):
    model, processor = published(copied)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    assert saved(model, tmp_path / "after") == set(dict(model.named_parameters()))
    processor.save_pretrained(tmp_path / "after")
    shutil.rmtree(copied / "llava")
    again, same_processor = zoo.load(f"dir:{tmp_path / 'after'}", device="cpu")
    assert torch.equal(answers(again, processor), answers(model, processor))
    zoo.export(again, same_processor, tmp_path / "out")


def test_what_was_trained_whole_still_says_where_it_came_from(copied, tmp_path):
    model, processor = composed(copied)
    with torch.no_grad():
        for p in model.llm.parameters():
            p.add_(0.01)
    model.save_pretrained(tmp_path / "after")
    processor.save_pretrained(tmp_path / "after")
    content = json.loads((tmp_path / "after/config.json").read_text())
    assert content["base"]["llm"]["whole"] and not content["base"]["vision"].get("whole")
    assert content["base"]["llm"]["checkpoint"] == str(copied / "llm") and "checkpoint" not in content["slots"]["llm"]
    again, _ = zoo.load(f"dir:{tmp_path / 'after'}", device="cpu")
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["base"] == content["base"]
    with pytest.raises(ZooError, match="is where the base weights of llm come from"):
        again.save_pretrained(copied / "llm")


@pytest.mark.parametrize("whole", [False, True])
def test_a_base_is_never_overwritten(copied, whole):
    model, _ = published(copied)
    before = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in (copied / "llava").iterdir())
    with pytest.raises(ZooError, match=r"is where the base weights of model come from"):
        model.save_pretrained(copied / "llava", include_base=whole)
    assert before == sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in (copied / "llava").iterdir())
    parts, _ = composed(copied)
    with pytest.raises(ZooError, match=r"is where the base weights of llm come from"):
        parts.save_pretrained(copied / "llm")


def test_a_model_is_saved_over_the_folder_it_was_loaded_from(places, tmp_path):
    model, processor = published(places)
    in_place(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = zoo.load(f"dir:{tmp_path}", device="cpu")
    by_data(again)
    wanted = answers(again, processor)
    assert saved(again, tmp_path) == {WHERE}
    assert torch.equal(answers(again, processor), wanted)
    assert torch.equal(answers(zoo.load(f"dir:{tmp_path}", device="cpu")[0], processor), wanted)


@pytest.mark.parametrize("source", SOURCES)
def test_a_base_that_was_named_from_here_is_found_from_anywhere(copied, tmp_path, source, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(copied.parent)
    model, processor = SOURCES[source](Path("base"))
    wanted = answers(model, processor)
    model.save_pretrained("after")
    processor.save_pretrained("after")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(answers(zoo.load("dir:../after", device="cpu")[0], processor), wanted)
    assert torch.equal(answers(zoo.ZooModel.from_pretrained("../after"), processor), wanted)


def test_a_base_that_moved_is_named_again(copied, tmp_path):
    model, processor = published(copied)
    in_place(model)
    model.save_pretrained(tmp_path / "after")
    processor.save_pretrained(tmp_path / "after")
    wanted, moved_to = answers(model, processor), tmp_path / "moved"
    shutil.move(copied / "llava", moved_to)
    with pytest.raises(ZooError, match=r"no folder .*llava.* if it lies elsewhere now: model.base=<folder>"):
        zoo.load(f"dir:{tmp_path / 'after'}", device="cpu")
    again, _ = zoo.load(f"dir:{tmp_path / 'after'}", f"model.base={moved_to}", device="cpu")
    for one in (again, zoo.ZooModel.from_pretrained(tmp_path / "after", base=moved_to)):
        assert torch.equal(answers(one, processor), wanted)
        assert one.config.base["model"]["checkpoint"] == str(moved_to)
    other_numbers(moved_to)
    with pytest.raises(ZooError, match="differ from those the model was saved on"):
        zoo.load(f"dir:{tmp_path / 'after'}", f"model.base={moved_to}", device="cpu")


def test_a_part_that_moved_is_named_again(copied, tmp_path):
    model, processor = composed(copied)
    in_place(model)
    model.save_pretrained(tmp_path / "after")
    processor.save_pretrained(tmp_path / "after")
    wanted, moved_to = answers(model, processor), tmp_path / "moved"
    shutil.move(copied / "llm", moved_to)
    again, _ = zoo.load(f"dir:{tmp_path / 'after'}", f"llm.checkpoint={moved_to}", device="cpu")
    assert torch.equal(answers(again, processor), wanted)
    words = [f"llm.checkpoint={moved_to}", f"model.base={moved_to}"]
    with pytest.raises(ZooError, match=r"made from no published checkpoint.*llm.checkpoint=<folder>"):
        zoo.load(f"dir:{tmp_path / 'after'}", *words, device="cpu")
    other_numbers(moved_to)
    with pytest.raises(ZooError, match=r"base weights of llm in .* differ"):
        zoo.load(f"dir:{tmp_path / 'after'}", f"llm.checkpoint={moved_to}", device="cpu")


@pytest.fixture
def hub(places, tmp_path, monkeypatch):
    """A hub cache with an encoder and a language model, each in two commits; nothing else can be reached."""
    root = tmp_path / "hub"
    for name in ("hf", "llm"):
        repository = root / f"models--org--{name}"
        for commit in ("a" * 40, "b" * 40):
            folder = repository / "snapshots" / commit
            shutil.copytree(places / name, folder)
            if name == "hf":
                pixels = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
                (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
        other_numbers(repository / "snapshots" / ("b" * 40))
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return root


def test_a_base_on_the_hub_is_the_commit_that_was_read(hub, tmp_path):
    words = ["vision=hf", "vision.checkpoint=org/hf", "llm=hf", "llm.checkpoint=org/llm", "projector=linear"]
    model, processor = zoo.compose(*words, "device=cpu")
    wanted = answers(model, processor)
    for name in ("hf", "llm"):
        (hub / f"models--org--{name}" / "refs/main").write_text("b" * 40)  # somebody uploads
    by_data(model)
    assert {n for n in saved(model, tmp_path / "saved") if not n.startswith("projector")} == {WHERE}
    processor.save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved/config.json").read_text())
    assert {content["base"][k]["revision"] for k in ("vision", "llm")} == {"a" * 40}
    for again in (zoo.load(f"dir:{tmp_path / 'saved'}")[0], zoo.ZooModel.from_pretrained(tmp_path / "saved")):
        assert torch.equal(answers(again, processor), answers(model, processor))
    assert not torch.equal(answers(model, processor), wanted)


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
