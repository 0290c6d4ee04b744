"""What is saved where base checkpoints move, change or go, and where they lie on the hub."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

import zoo
from tests.saved_builders import (
    SOURCES,
    WHERE,
    answers,
    by_data,
    checkpoints,
    composed,
    in_place,
    other_numbers,
    published,
    saved,
)
from zoo.composed import model as composed_model
from zoo.registry import ZooError


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def copied(places, tmp_path):
    for name in ("hf", "llm", "llava"):
        shutil.copytree(places / name, tmp_path / "base" / name)
    return tmp_path / "base"


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


def test_weights_by_a_word_of_the_library_are_those_of_the_commit_that_was_read(tmp_path, monkeypatch):
    """`pretrained` of timm is a repository of the hub, which may change."""
    import timm

    place = tmp_path / "hub" / f"models--{timm.get_pretrained_cfg('test_convnext').hf_hub_id.replace('/', '--')}"
    for commit, factor in (("a" * 40, 1), ("b" * 40, 2)):
        (place / "snapshots" / commit).mkdir(parents=True)
        weights = {name: factor * value for name, value in timm.create_model("test_convnext").state_dict().items()}
        save_file(weights, place / "snapshots" / commit / "model.safetensors")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "pretrained").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name is another thing
    vision = ("vision=timm", "vision.model=test_convnext", "vision.checkpoint=pretrained")
    model, processor = zoo.compose(*vision, "projector=mlp", "llm=hf", "llm.hidden_size=32", texts=["a"])
    model.save_pretrained(tmp_path / "thin")
    processor.save_pretrained(tmp_path / "thin")
    config = json.loads((tmp_path / "thin" / "config.json").read_text())
    assert config["base"]["vision"] == {"checkpoint": "pretrained", "revision": "a" * 40}
    (place / "refs" / "main").write_text("b" * 40)
    again = zoo.ZooModel.from_pretrained(tmp_path / "thin")
    assert torch.equal(again.vision.tower.stem[0].weight, model.vision.tower.stem[0].weight)


def test_a_base_in_a_file_is_known_by_its_content(tmp_path, monkeypatch):
    """Weights of a model that is named may be one file; `~` is written out."""
    import timm

    monkeypatch.setenv("HOME", str(tmp_path))
    weights, file = timm.create_model("test_convnext").state_dict(), tmp_path / "w.safetensors"
    save_file(weights, file)
    vision = ("vision=timm", "vision.model=test_convnext", "vision.checkpoint=~/w.safetensors")
    model, processor = zoo.compose(*vision, "projector=mlp", "llm=hf", "llm.hidden_size=32", texts=["a"])
    with pytest.raises(ZooError, match="is where the base weights of vision come from"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "thin")
    processor.save_pretrained(tmp_path / "thin")
    assert json.loads((tmp_path / "thin" / "config.json").read_text())["base"]["vision"]["checkpoint"] == str(file)
    again = zoo.ZooModel.from_pretrained(tmp_path / "thin")
    assert torch.equal(again.vision.tower.stem[0].weight, model.vision.tower.stem[0].weight)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, file)
    with pytest.raises(ZooError, match=r"base weights of vision .* differ from those the model was saved on"):
        zoo.ZooModel.from_pretrained(tmp_path / "thin")


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


@pytest.mark.parametrize(
    ("vision", "llm"), [("hf", "llm"), ("hf", "tied"), ("hf", "moe"), ("timm", "llm"), ("open_clip", "llm")]
)
def test_a_whole_folder_of_parts_needs_no_other(places, tmp_path, vision, llm):
    copied = shutil.copytree(places, tmp_path / "bases")
    model, processor = composed(copied, vision, llm)
    model.save_pretrained(tmp_path / "whole", include_base=True)
    processor.save_pretrained(tmp_path / "whole")
    wanted = answers(model, processor)
    shutil.rmtree(copied)
    again, processor = zoo.load(f"dir:{tmp_path / 'whole'}", device="cpu")
    assert torch.equal(answers(again, processor), wanted)
    assert torch.equal(answers(zoo.ZooModel.from_pretrained(tmp_path / "whole"), processor), wanted)


def test_a_whole_folder_keeps_what_no_shape_of_an_encoder_shows(places, tmp_path):
    import timm

    copied, own = shutil.copytree(places, tmp_path / "bases"), {"img_size": 32, "act_layer": "relu"}
    tower = timm.create_model("test_vit", **own)
    save_file(tower.state_dict(), copied / "timm" / "model.safetensors")
    known = {**tower.pretrained_cfg, "input_size": [3, 32, 32]}
    content = {"architecture": known.pop("architecture"), "model_args": own, "pretrained_cfg": known}
    (copied / "timm" / "config.json").write_text(json.dumps(content))
    model, processor = composed(copied, "timm")
    model.save_pretrained(tmp_path / "whole", include_base=True)
    processor.save_pretrained(tmp_path / "whole")
    shutil.rmtree(copied)
    again, _ = zoo.load(f"dir:{tmp_path / 'whole'}", device="cpu")
    assert torch.equal(answers(again, processor), answers(model, processor))


def test_a_whole_folder_keeps_the_pixels_of_a_model_that_was_named(tmp_path):
    import timm
    from timm.models._hub import save_for_hf

    model = timm.create_model("test_convnext")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    vision = ("vision=timm", "vision.model=test_convnext", f"vision.checkpoint={tmp_path / 'timm'}")
    model, processor = zoo.compose(*vision, "projector=mlp", "llm=hf", "llm.hidden_size=32", texts=["a"])
    model.save_pretrained(tmp_path / "whole", include_base=True)
    processor.save_pretrained(tmp_path / "whole")
    shutil.rmtree(tmp_path / "timm")
    again, _ = zoo.load(f"dir:{tmp_path / 'whole'}", device="cpu")
    assert again.vision.transform == model.vision.transform and again.vision.transform.mean == (0.1, 0.2, 0.3)
    assert torch.equal(again.vision.tower.stem[0].weight, model.vision.tower.stem[0].weight)


def test_a_whole_folder_says_what_it_still_needs(places, tmp_path, monkeypatch):
    monkeypatch.setattr(composed_model, "without_checkpoint", lambda *given: None)  # a family known from checkpoints
    model, _ = composed(places, "timm")
    with pytest.warns(UserWarning, match=r"vision is described in .*timm' alone.*vision\.checkpoint=<folder>"):
        model.save_pretrained(tmp_path / "whole", include_base=True)


def test_a_thin_folder_whose_parts_moved_says_how_to_name_them(copied, tmp_path):
    model, processor = composed(copied)
    model.save_pretrained(tmp_path / "thin")
    processor.save_pretrained(tmp_path / "thin")
    wanted, moved_to = answers(model, processor), tmp_path / "moved"
    shutil.move(copied, moved_to)
    name, found = f"dir:{tmp_path / 'thin'}", {"vision": moved_to / "hf", "llm": moved_to / "llm"}
    with pytest.raises(ZooError, match=r"vision of this model is from .*/hf', .*: vision\.checkpoint=<folder>, or"):
        zoo.load(name, device="cpu")
    with pytest.raises(ZooError, match=r"llm of this model is from .*/llm', .*: llm\.checkpoint=<folder>, or"):
        zoo.load(name, f"vision.checkpoint={found['vision']}", device="cpu")
    with pytest.raises(ZooError, match=r"base=\{'vision': folder\}"):
        zoo.ZooModel.from_pretrained(tmp_path / "thin")
    again, _ = zoo.load(name, *(f"{part}.checkpoint={folder}" for part, folder in found.items()), device="cpu")
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "thin", base=found)
    for one in (again, zoo.ZooModel.from_pretrained(tmp_path / "thin", base=found), auto):
        assert torch.equal(answers(one, processor), wanted)
    with pytest.raises(ZooError, match="'visoin'"):
        zoo.ZooModel.from_pretrained(tmp_path / "thin", base={"visoin": moved_to})
