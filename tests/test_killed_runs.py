"""However a run ends, `resume=` leads to what it would have left: weights, scores, metrics, bit for bit.

`ZOO_ALL_WRITES=1` tries every event of writing, not some of them.
"""

import json
import math
import os
import random
import re
import shutil
import time

import pytest

from tests import killed_runs
from tests.killed_runs import left, train
from tests.train_builders import config, recipe
from zoo.evaluation.evaluate import main as score
from zoo.inspection.run_summary import summarise
from zoo.registry import ZooError
from zoo.runs import checkpoint
from zoo.runs.folder import RunFolder, read_metrics
from zoo.settings.config import compose
from zoo.training.loop import Run

# Dropout shows whether randomness goes on; the distiller, whether it keeps what it learnt; Muon, its state.
STAGES = {
    "a": "steps: 2, batch_size: 4, checkpoint_every: 1, train: [vision, projector], distiller: dense",
    "b": "steps: 3, batch_size: 4, checkpoint_every: 2, eval_every: 2, optimizer: muon_adamw, distiller: dense",
}
QUESTIONS = "data.scenes.questions={exist: 1, color: 1, shape: 0, size: 0, count: 0, relation: 0, box: 0}"
OPTIONS = ["llm.extra={attention_dropout: 0.2}", "data.scenes.eval_scenes=2", QUESTIONS, "run.folder=run"]
STEPS = 5
TRIES = 9


@pytest.fixture(scope="module", autouse=True)
def server():
    with killed_runs.served():
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return [*recipe(tmp_path_factory.mktemp("recipe"), STAGES), *OPTIONS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, words):
    """What a run leaves that was not stopped, and its events of writing."""
    place = tmp_path_factory.mktemp("whole")
    ended = train(place, words, "noting_writes", "writes")
    assert ended.code == 0, ended.said
    assert [r["step"] for r in read_metrics(place / "run" / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4, 5]
    return left(place / "run"), (place / "writes").read_text().splitlines()


def goes_on(place, words, processes=1):
    """Resume the run, or start it once more where it was killed before it was one; returns what it says."""
    resume = ["resume=run"] if (place / "run" / "config.yaml").exists() else words
    ended = train(place, resume, processes=processes)
    assert ended.code == 0, ended.said
    return ended.said


def tries():
    """Numbers of a try, of how many: a random event out of each stretch of the run."""
    return range(400) if os.environ.get("ZOO_ALL_WRITES") else range(TRIES)


@pytest.mark.parametrize("number", tries())
def test_killed_at_a_write(tmp_path, words, whole, number):
    wanted, writes = whole
    if os.environ.get("ZOO_ALL_WRITES"):
        if number >= len(writes):
            pytest.skip("there are fewer")
        event = number + 1
    else:
        width = len(writes) / TRIES
        event = 1 + int((number + random.Random(number).random()) * width)
    ended = train(tmp_path, words, "killed_at_write", event)
    assert ended.code == -9, ended.said
    goes_on(tmp_path, words)
    assert left(tmp_path / "run") == wanted, f"killed before {writes[event - 1]}"


# Bytes: within tokenizer.json, the first optimiser's state, the weights of the second stage, the final model.
@pytest.mark.parametrize("size", [4_000, 50_000, 80_000])
def test_killed_within_a_write(tmp_path, words, whole, size):
    assert train(tmp_path, words, "killed_within_write", size).code == -25, "SIGXFSZ"
    assert any(p.stat().st_size == size for p in tmp_path.rglob("*") if p.is_file()), "half a file is there"
    goes_on(tmp_path, words)
    assert left(tmp_path / "run") == whole[0]


def test_killed_again_and_again(tmp_path, words, whole):
    assert train(tmp_path, words, "killed_at_write", len(whole[1]) // 3).code == -9
    for event in (6, 12, 40):
        assert train(tmp_path, ["resume=run"], "killed_at_write", event).code == -9
    goes_on(tmp_path, words)
    assert left(tmp_path / "run") == whole[0]


@pytest.mark.parametrize(
    ("step", "when"), [(1, "before"), (2, "behind"), (3, "before"), (4, "behind"), (5, "before"), (5, "behind")]
)
def test_sigterm_at_every_step(tmp_path, words, whole, step, when):
    ended = train(tmp_path, words, "terminated_at_step", step, when)
    assert ended.code == 143 and "zoo train resume=run" in ended.said, ended.said
    saved = min(STEPS, step + (when == "behind"))
    assert RunFolder(tmp_path / "run").list_checkpoints()[-1].name == f"step-{saved:08d}"
    assert not (tmp_path / "run" / "model").exists()
    goes_on(tmp_path, words)
    assert left(tmp_path / "run") == whole[0]


@pytest.mark.parametrize("times", [1, 2])
def test_killed_while_scoring(tmp_path, words, whole, times, capsys):
    assert train(tmp_path, words, "killed_while_scoring", times).code == -9
    if times == 2:  # the model is there: it can be scored by itself, too
        score(compose("eval", [f"model='dir:{tmp_path / 'run'}'", f"run.folder='{tmp_path / 'eval'}'", "device=cpu"]))
        capsys.readouterr()
    goes_on(tmp_path, words)
    assert left(tmp_path / "run") == whole[0]
    if times == 2:
        again = (tmp_path / "eval" / "scores.json").read_bytes()
        assert again == (tmp_path / "run" / "scores.json").read_bytes()
    refused = train(tmp_path, ["resume=run"])
    assert refused.code == 2 and "is finished" in refused.said


@pytest.mark.parametrize("size", [50_000, 84_000])
def test_a_full_disk_is_an_error_and_the_last_good_state_stays(tmp_path, words, whole, size):
    ended = train(tmp_path, words, "on_a_full_disk", size)
    assert ended.code == 2
    assert re.search(r"zoo: Cannot write (a checkpoint|the model) to 'run': File too large", ended.said)
    assert "zoo train resume=run" in ended.said and "Traceback" not in ended.said
    assert not [p for p in (tmp_path / "run").rglob(".*") if p.name != ".running"], "half a file holds no room"
    goes_on(tmp_path, words)
    assert left(tmp_path / "run") == whole[0]


def test_a_run_that_is_alive_is_not_resumed_but_may_be_read(tmp_path, words):
    alive = killed_runs.begin(tmp_path, [*words, "stages.b.steps=1000", "stages.b.workers=2"])
    folder, until = RunFolder(tmp_path / "run"), time.monotonic() + killed_runs.PATIENCE
    try:
        while len(folder.list_checkpoints()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        refused = train(tmp_path, ["resume=run"])
        assert refused.code == 2 and f"is alive: process {alive.pid} on " in refused.said, refused.said
        assert summarise(folder.path).state == "running"
        assert alive.is_alive()
    finally:
        alive.kill()
        alive.join()
    Run(compose("train", [f"resume='{folder.path}'"])).close()  # at once, whatever its workers do


# ---- damaged checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, words):
    """A run that was stopped at its fourth step, with two checkpoints."""
    place = tmp_path_factory.mktemp("stopped")
    assert train(place, words, "terminated_at_step", 4, "before").code == 143
    return place


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a bit of the weights": lambda c: flip(c / "weights.safetensors"),
    "half an optimiser": lambda c: os.truncate(c / "optimizers.safetensors", 1000),
    "no weights": lambda c: (c / "weights.safetensors").unlink(),
    "another step": lambda c: (c / "state.json").write_text((c / "state.json").read_text().replace(": 4,", ": 3,")),
    "no hashes": lambda c: (c / "SHA256SUMS").unlink(),
    "an empty state": lambda c: (c / "state.json").write_text(""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_seen(stopped, tmp_path, what):
    newest = RunFolder(stopped / "run").list_checkpoints()[-1]
    copy = shutil.copytree(newest, tmp_path / newest.name)
    assert checkpoint.verify(copy)["global_step"] == 4
    DAMAGE[what](copy)
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.verify(copy)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped, tmp_path, whole, words):
    place = shutil.copytree(stopped, tmp_path / "copy")
    before, newest = RunFolder(place / "run").list_checkpoints()
    flip(newest / "weights.safetensors")
    said = goes_on(place, words)
    assert f"{newest.name} is damaged (weights.safetensors: another hash than when it was written)" in said
    assert f"after step {int(before.name[5:])}" in said
    assert left(place / "run") == whole[0]


def test_where_all_are_damaged_nothing_is_trained(stopped, tmp_path):
    place = shutil.copytree(stopped, tmp_path / "copy")
    for path in RunFolder(place / "run").list_checkpoints():
        flip(path / "weights.safetensors")
    rows = read_metrics(place / "run" / "metrics.jsonl")
    ended = train(place, ["resume=run"])
    assert ended.code == 2 and "Every checkpoint of the run 'run' is damaged (step-00000004: weights" in ended.said
    assert read_metrics(place / "run" / "metrics.jsonl") == rows
    assert len(RunFolder(place / "run").list_checkpoints()) == 2


def test_checkpoints_without_hashes_of_earlier_versions_are_taken(stopped, tmp_path, whole, words):
    place = shutil.copytree(stopped, tmp_path / "copy")
    for path in RunFolder(place / "run").list_checkpoints():
        (path / "SHA256SUMS").unlink()
        state = json.loads((path / "state.json").read_text())
        del state["format"], state["seconds"]
        (path / "state.json").write_text(json.dumps(state))
    goes_on(place, words)
    assert left(place / "run") == whole[0]


# ---- two processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory, words):
    place = tmp_path_factory.mktemp("two")
    ended = train(place, words, processes=2)
    assert ended.code == 0, ended.said
    return left(place / "run")


def test_two_processes_killed_behind_a_checkpoint(tmp_path, words, whole_of_two):
    """As the oldest checkpoint goes. Metrics are written some steps at a time here, but not behind a checkpoint."""
    ended = train(tmp_path, words, "killed_at_write", "os.remove optimizers.safetensors", processes=2)
    assert -9 in ended.codes, ended.said
    assert RunFolder(tmp_path / "run").list_checkpoints()[-1].name == "step-00000004"
    goes_on(tmp_path, words, processes=2)
    assert left(tmp_path / "run") == whole_of_two


@pytest.mark.parametrize("gone", [0, 1])
def test_the_process_that_is_left_leaves(tmp_path, words, whole_of_two, gone):
    """Under a launcher that lets it live, as `srun` does."""
    begin = time.monotonic()
    ended = train(tmp_path, words, "killed_in_step", 4, processes=2, ranks=(gone,), launcher=False)
    assert ended.codes == ([-9, 2] if gone == 0 else [2, -9]), ended.said
    assert time.monotonic() - begin < 60, "within a minute"
    assert "zoo train resume=run" in ended.said and " gone" in ended.said and "Traceback" not in ended.said, ended.said
    goes_on(tmp_path, words, processes=2)
    assert left(tmp_path / "run") == whole_of_two


def test_two_processes_stop_together_on_sigterm_to_one(tmp_path, words, whole_of_two):
    ended = train(tmp_path, words, "terminated_at_step", STEPS, "behind", processes=2, ranks=(1,))
    assert ended.code == 143, ended.said
    goes_on(tmp_path, words, processes=2)
    assert left(tmp_path / "run") == whole_of_two


# ---- losses that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, words, processes):
    ended = train(tmp_path, [*words, "stages.b.lr=1e38", "stages.b.matrix_lr=1e38"], processes=processes)
    assert ended.code == 2, ended.said
    assert re.search(
        r"zoo: The loss 'answer' is nan( and 'dense' is nan)? at step 4 \(stage 'b', its step 2\)", ended.said
    )
    assert "the newest checkpoint, step-00000002, is from before" in ended.said
    assert ended.said.count("zoo: The loss") == 1 and "Traceback" not in ended.said
    folder = RunFolder(tmp_path / "run")
    assert not folder.has_model and [p.name for p in folder.list_checkpoints()][-1] == "step-00000002"
    assert [r["step"] for r in read_metrics(folder.metrics)] == [1, 2, 3, 4]


def test_an_option_goes_on_where_losses_are_not_finite(tmp_path, words):
    ended = train(tmp_path, [*words, "stages.b.lr=1e38", "stages.b.allow_nonfinite=true"])
    assert ended.code == 0, ended.said
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [math.isfinite(loss) for loss in losses] == [True, True, True, False, False]
    assert RunFolder(tmp_path / "run").has_model


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """After the last step no loss is computed that would show them."""
    stages = {"a": "steps: 1, batch_size: 4, lr: 1e39, warmup_ratio: 0"}
    run = Run(config([*recipe(tmp_path, stages), f"run.folder={tmp_path / 'run'}"]))
    with pytest.raises(ZooError, match=r"weights, the first 'model\..*are not finite at step 1.*no checkpoint yet"):
        run.train()
    assert not run.folder.list_checkpoints()
    with Run(config([*recipe(tmp_path, stages), "stages.a.allow_nonfinite=true", "run.name=b"])) as run:
        run.train()
    assert len(run.folder.list_checkpoints()) == 1


def test_killed_among_the_features_that_it_keeps(tmp_path):
    """Killed between two checkpoints, as a shard gets its name: what is there is found, the rest is computed again."""
    frozen = recipe(tmp_path, {"a": "epochs: 2, batch_size: 8, train: [projector], checkpoint_every: 2"})
    words = [*frozen, *OPTIONS[1:], "features.keep=fp32"]
    assert train(tmp_path / "live", [*words, "features.keep=live"]).code == 0
    ended = train(tmp_path, [*words, "features.folder=run.kept"], "killed_at_shard", 2)
    assert ended.code == -9, ended.said
    kept = tmp_path / "run.kept"
    assert len(list(kept.glob("*/.shard*"))) == 1 and len(list(kept.glob("*/shard*"))) == 1
    assert "16 images are there" in goes_on(tmp_path, words)
    assert left(tmp_path / "run") == left(tmp_path / "live" / "run")
    two = train(tmp_path / "two", [*words, f"features.folder={kept}"], processes=2)
    assert two.code == 0 and "40 images are there" in two.said
