"""A run that was killed goes on to the same losses, bit for bit: no hook, a real SIGKILL, several loader workers."""

import json
import os
import time

import pytest
import torch

from tests import killed_runs
from tests.train_builders import config, losses, recipe, train_up_to
from zoo.cli.launch import resumes_alone
from zoo.registry import ZooError
from zoo.runs.folder import RunFolder
from zoo.runs.resume import device_and_trackers, parallel_of
from zoo.settings.config import compose
from zoo.training.loop import Run

# 40 samples in batches of 8 are 5 steps an epoch. With dropout, randomness of the model shows; `b` keeps the distiller.
STAGES = {
    "a": "steps: 7, batch_size: 8, checkpoint_every: 3, train: [vision, projector], distiller: dense, workers: 2",
    "b": "steps: 12, batch_size: 8, checkpoint_every: 4, accumulate: 2, optimizer: muon_adamw, distiller: dense",
}
DROPOUT = "llm.extra={attention_dropout: 0.2}"


def words(tmp_path, name):
    return [*recipe(tmp_path, STAGES), DROPOUT, f"run.folder={tmp_path / name}"]


@pytest.fixture(scope="module", autouse=True)
def server():
    with killed_runs.served():
        yield


def wait_for(process, folder, step):
    """Wait until the run has logged `step`."""
    until = time.monotonic() + killed_runs.PATIENCE
    while time.monotonic() < until:
        if len(losses(folder)) >= step:
            return
        assert process.is_alive()
        time.sleep(0.02)
    raise AssertionError("the run is too slow")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of a run that nobody stopped."""
    place = tmp_path_factory.mktemp("whole")
    Run(config(recipe(place, STAGES), DROPOUT, f"run.folder={place / 'run'}")).train()
    found = losses(place / "run")
    assert len(found) == 19
    return found


@pytest.mark.parametrize("step", [13])
def test_killed_and_resumed_is_bit_identical(tmp_path, whole, step):
    folder = tmp_path / "run"
    process = killed_runs.begin(tmp_path, words(tmp_path, "run"))
    try:
        wait_for(process, folder, step)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -9
    before = losses(folder)
    assert before == {s: whole[s] for s in before}
    newest = RunFolder(folder).list_checkpoints()[-1]
    assert json.loads((newest / "state.json").read_text())["global_step"] <= len(before)

    os.chdir(tmp_path)
    again = Run(config(recipe(tmp_path, STAGES), "resume=last"))
    again.train()
    assert losses(folder) == whole


def test_every_checkpoint_of_a_run_resumes_to_the_same(tmp_path, whole):
    """Also those at the end of a stage, in the middle of an epoch, and the very start."""
    run = Run(config(recipe(tmp_path, STAGES), DROPOUT, f"run.folder={tmp_path / 'run'}"))
    for at in (3, 7, 11):
        train_up_to(run, at)
        run = Run(config(recipe(tmp_path, STAGES), "resume=last"))
    run.train()
    assert losses(tmp_path / "run") == whole


def test_sigterm_to_a_process_saves_and_the_run_goes_on(tmp_path, whole):
    folder = tmp_path / "run"
    process = killed_runs.begin(tmp_path, words(tmp_path, "run"))
    try:
        wait_for(process, folder, 9)
        process.terminate()
        process.join(killed_runs.PATIENCE)
    finally:
        process.kill()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 143, said
    assert "zoo train resume=" in said
    done = len(losses(folder))
    assert json.loads((RunFolder(folder).list_checkpoints()[-1] / "state.json").read_text())["global_step"] == done
    Run(config(recipe(tmp_path, STAGES), f"resume={folder}")).train()
    assert losses(folder) == whole


def test_killed_before_the_first_checkpoint_starts_again(tmp_path, whole):
    first = Run(config(recipe(tmp_path, STAGES), DROPOUT, f"run.folder={tmp_path / 'run'}"))
    first.folder.log({"step": 1, "loss": 0.0})
    first.close()
    again = Run(config(recipe(tmp_path, STAGES), "resume=last"))
    again.train()
    assert losses(tmp_path / "run") == whole


def test_a_finished_run_is_not_resumed(tmp_path):
    run = Run(config(recipe(tmp_path, {"a": "steps: 1, batch_size: 4"}), f"run.folder={tmp_path / 'run'}"))
    run.folder.summary.write_text("{}")
    run.close()
    with pytest.raises(ZooError, match="is finished"):
        Run(config(recipe(tmp_path, STAGES), "resume=last"))


def test_a_run_goes_on_with_the_device_and_trackers_that_it_had(tmp_path):
    stages = {"a": "steps: 1, batch_size: 4"}
    path = tmp_path / "run"
    Run(config(recipe(tmp_path, stages), f"run.folder={path}", "device=cpu")).close()
    saved = path / "config.yaml"
    saved.write_text(saved.read_text().replace("log: []", "log: [tensorboard]"))
    for words, wanted in (([], ["tensorboard"]), (["log=[wandb]"], ["wandb"]), (["log=[]"], [])):
        assert device_and_trackers(compose("train", [f"resume={path}", *words])) == ("cpu", wanted)
    for device in ("cuda", "auto"):
        assert device_and_trackers(compose("train", [f"resume={path}", f"device={device}"]))[0] == device


def test_how_processes_share_the_model_is_as_typed_else_as_the_run_began(tmp_path):
    path = tmp_path / "run"
    began = ["parallel.shard=none", "parallel.reduce=bf16"]
    Run(config(recipe(tmp_path, {"a": "steps: 1, batch_size: 4"}), *began, f"run.folder={path}")).close()
    found = {}
    for words in (
        (),
        ("parallel.shard=fsdp2", "parallel.replicate=2", "parallel.reduce=fp32"),
        ("parallel.shard=launcher",),
    ):
        resumes_alone([f"resume={path}", *words])
        it = parallel_of(compose("train", [f"resume={path}", *words]))
        found[len(words)] = (it.shard, it.replicate, it.reduce)
    assert found == {0: ("none", 1, "bf16"), 3: ("fsdp2", 2, "fp32"), 1: ("launcher", 1, "bf16")}
    with pytest.raises(ZooError, match=r"not none. The run began with parallel.shard=none, .*replaces it"):
        parallel_of(compose("train", [f"resume={path}", "parallel.replicate=2"]))
    with pytest.raises(ZooError, match=r"trains once more .* cannot take parallel"):
        resumes_alone([f"lock={path}", "parallel.replicate=2"])


def test_weights_that_changed_since_the_start_are_not_gone_on_from(tmp_path, make_model):
    model, processor = make_model(seed=1)
    source = tmp_path / "source"
    model.save_pretrained(source)
    processor.save_pretrained(source)
    words = [f"model='dir:{source}'", "recipe=scenes_tiny", "data=[scenes]", "data.scenes.scenes=8", "device=cpu"]
    words += [f"run.folder={tmp_path / 'run'}"]
    Run(compose("train", words)).close()
    Run(compose("train", [f"resume={tmp_path / 'run'}"])).close()
    with torch.no_grad():
        model.llm.lm.get_output_embeddings().weight.add_(1.0)
    model.save_pretrained(source)
    with pytest.raises(ZooError, match=rf"began on the weights of '{source}', and they are others now"):
        Run(compose("train", [f"resume={tmp_path / 'run'}"]))


def test_half_a_model_is_not_the_last_one(tmp_path):
    """A kill within the final save leaves a folder that looks like a model."""
    run = Run(config(recipe(tmp_path, {"a": "steps: 1, batch_size: 4"}), f"run.folder={tmp_path / 'run'}"))
    run.close()
    half = run.folder.path / ".model.writing"
    half.mkdir()
    run.model.config.save_pretrained(half)
    with pytest.raises(ZooError, match="no finished run"):
        compose("eval", ["model=last", f"run.dir={tmp_path}"])
    with pytest.raises(ZooError, match=rf"has not saved its model yet.*zoo train resume={run.folder.path}"):
        compose("eval", [f"model=dir:{run.folder.path}"])


def test_a_run_with_a_model_and_no_checkpoint_does_not_train_again(tmp_path):
    run = Run(config(recipe(tmp_path, {"a": "steps: 1, batch_size: 4"}), f"run.folder={tmp_path / 'run'}"))
    run.close()
    run.model.save_pretrained(run.folder.model)
    with pytest.raises(ZooError, match=r"has its model but no checkpoint.*zoo eval model=dir:"):
        Run(compose("train", [f"resume={run.folder.path}"]))


def test_a_config_that_cannot_be_read_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1,\nb: {")
    with pytest.raises(ZooError, match=r"config\.yaml' cannot be read"):
        Run(compose("train", [f"resume={tmp_path}"]))
