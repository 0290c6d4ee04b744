"""A run that was killed goes on to the same losses, bit for bit: no hook, a real SIGKILL, several loader workers."""

import json
import os
import signal
import time

import pytest

from tests.train_builders import config, losses, recipe, start
from zoo.registry import ZooError
from zoo.run_folder import RunFolder
from zoo.train import Run

# 40 samples in batches of 8 are 5 steps an epoch. With dropout, randomness of the model shows; `b` keeps the distiller.
STAGES = {
    "a": "steps: 7, batch_size: 8, checkpoint_every: 3, train: [vision, projector], distiller: dense, workers: 2",
    "b": "steps: 12, batch_size: 8, checkpoint_every: 4, accumulate: 2, optimizer: muon_adamw, distiller: dense",
}
DROPOUT = "llm.extra={attention_dropout: 0.2}"


def words(tmp_path, name):
    return [*recipe(tmp_path, STAGES), DROPOUT, f"run.folder={tmp_path / name}"]


def wait_for(process, folder, step):
    """Wait until the run has logged `step`."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if len(losses(folder)) >= step:
            return
        assert process.poll() is None, process.stdout.read()
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
    process = start(words(tmp_path, "run"))
    try:
        wait_for(process, folder, step)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -9
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
    stop_after = {3, 7, 11}

    class Cut(Exception):
        pass

    def cut(engine, inner=run._save):
        inner(engine)
        if run.progress.global_step in stop_after:
            raise Cut

    run._save = cut
    while True:
        try:
            run.train()
            break
        except Cut:
            stop_after.discard(run.progress.global_step)
            inner = (run := Run(config(recipe(tmp_path, STAGES), "resume=last")))._save
            run._save = lambda engine, inner=inner: cut(engine, inner)
    assert not stop_after
    assert losses(tmp_path / "run") == whole


def test_sigterm_to_a_process_saves_and_the_run_goes_on(tmp_path, whole):
    folder = tmp_path / "run"
    process = start(words(tmp_path, "run"))
    wait_for(process, folder, 9)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert "zoo train resume=" in out
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
