"""Weights that a run or a saved model began on lie in another folder now."""

import shutil

import pytest
import torch

from tests.train_builders import config, recipe
from zoo.benches.roundtrip_trial import write_checkpoints
from zoo.cli.launch import resumes_alone
from zoo.registry import ZooError
from zoo.settings.config import compose
from zoo.storage.weights import state_of
from zoo.training.loop import Run

STAGES = {"a": "steps: 1, batch_size: 2"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(place)
    return place


def begun(tmp_path, checkpoints, **parts):
    """A run on copies of these checkpoints, which has not taken a step, and its weights."""
    words = []
    for part, name in parts.items():
        shutil.copytree(checkpoints / name, tmp_path / part)
        words += [f"{part}=hf", f"{part}.checkpoint={tmp_path / part}"]
    settings = recipe(tmp_path, STAGES)
    body = (tmp_path / "conf" / "recipe" / "tiny.yaml").read_text().splitlines()
    kept = "\n".join(line for line in body if not line.startswith(("vision:", "llm:", "tokenizer:")))
    (tmp_path / "conf" / "recipe" / "tiny.yaml").write_text(kept + "\n")
    run = Run(config(settings, *words, f"run.folder={tmp_path / 'run'}"))
    run.close()
    return run.folder.path, {n: t.clone() for n, t in state_of(run.model).items()}


def resumed(folder, *words):
    resumes_alone([f"resume={folder}", *words])
    run = Run(compose("train", [f"resume={folder}", *words]))
    run.close()
    return run


def test_checkpoints_of_parts(tmp_path, checkpoints):
    folder, before = begun(tmp_path, checkpoints, llm="llama", vision="clip")
    shutil.move(tmp_path / "llm", tmp_path / "moved")
    with pytest.raises(ZooError, match=r"base weights of llm are not in .*/llm' any more.* llm\.checkpoint=<folder>"):
        resumed(folder)
    run = resumed(folder, f"llm.checkpoint={tmp_path / 'moved'}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(run.model).items())
    assert run.model.config.slots["llm"]["checkpoint"] == str(tmp_path / "moved")  # what a saved model will name
    with pytest.raises(ZooError, match=r"not the base weights of llm \(fingerprint"):
        resumed(folder, f"llm.checkpoint={checkpoints / 'qwen2'}")
    with pytest.raises(ZooError, match=r"llm\.checkpoint=.*nowhere: no such folder"):
        resumed(folder, f"llm.checkpoint={tmp_path / 'nowhere'}")
    with pytest.raises(ZooError, match=r"the run did not begin on a saved model"):
        resumed(folder, "model.base=there", f"llm.checkpoint={tmp_path / 'moved'}")


def test_a_saved_model_and_what_it_was_made_from(tmp_path, checkpoints):
    for name in ("saved", "llava"):
        shutil.copytree(checkpoints / name, tmp_path / name)
    file = tmp_path / "saved" / "config.json"
    file.write_text(file.read_text().replace(str(checkpoints / "llava"), str(tmp_path / "llava")))
    words = ["recipe=scenes_tiny", f"model=dir:{tmp_path / 'saved'}", "data=[scenes]", "data.scenes.scenes=8"]
    folder = tmp_path / "run"
    run = Run(compose("train", [*words, "device=cpu", f"run.folder={folder}"]))
    run.close()
    before = {n: t.clone() for n, t in state_of(run.model).items()}
    for name in ("saved", "llava"):
        shutil.move(tmp_path / name, tmp_path / f"{name}.moved")
    with pytest.raises(ZooError, match=r"weights that the run began on are not in .*/saved' any more.*model=dir:"):
        resumed(folder)
    places = [f"model=dir:{tmp_path / 'saved.moved'}", f"model.base={tmp_path / 'llava.moved'}"]
    with pytest.raises(ZooError, match=r"if it lies elsewhere now: model\.base=<folder>"):
        resumed(folder, places[0])
    run = resumed(folder, *places)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(run.model).items())
    with pytest.raises(ZooError, match=r"not the weights that the run began on"):
        resumed(folder, f"model=dir:{checkpoints / 'llava'}", places[1])


def test_checkpoints_of_several_encoders(tmp_path, checkpoints):
    for name in ("clip", "llama"):
        shutil.copytree(checkpoints / name, tmp_path / name)
    settings = recipe(tmp_path, STAGES)
    body = (tmp_path / "conf" / "recipe" / "tiny.yaml").read_text().splitlines()
    kept = "\n".join(line for line in body if not line.startswith(("vision:", "llm:", "tokenizer:")))
    (tmp_path / "conf" / "recipe" / "tiny.yaml").write_text(kept + "\n")
    words = ["vision=[a:hf,b:timm]", f"vision.encoders.a.checkpoint={tmp_path / 'clip'}", "vision.encoders.b.depth=2"]
    words += ["llm=hf", f"llm.checkpoint={tmp_path / 'llama'}", f"run.folder={tmp_path / 'run'}"]
    run = Run(config(settings, *words))
    run.close()
    before = {n: t.clone() for n, t in state_of(run.model).items()}
    shutil.move(tmp_path / "clip", tmp_path / "moved")
    with pytest.raises(
        ZooError, match=r"base weights of vision\.a are not .* vision\.encoders\.a\.checkpoint=<folder>"
    ):
        resumed(tmp_path / "run")
    again = resumed(tmp_path / "run", f"vision.encoders.a.checkpoint={tmp_path / 'moved'}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(again.model).items())
    assert again.model.config.slots["vision"]["encoders"]["a"]["checkpoint"] == str(tmp_path / "moved")
    with pytest.raises(ZooError, match=r"not the base weights of vision\.a"):
        resumed(tmp_path / "run", f"vision.encoders.a.checkpoint={checkpoints / 'siglip'}")
