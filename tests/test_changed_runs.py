"""What a person changes between two times of a run, and what was left to do when it was stopped."""

import json
import shutil

import pytest
import torch

from tests.train_builders import config, losses, recipe
from zoo.distill.dense import Dense
from zoo.registry import ZooError
from zoo.runs.folder import read_metrics
from zoo.training import finish, loop
from zoo.training.loop import Run
from zoo.training.stage_teachers import StageTeachers
from zoo.training.step import Engine


class Killed(BaseException):
    """Ends a run as a signal that nothing handles."""


def stopped(words, folder, monkeypatch, step):
    """A run that is killed ahead of this optimiser step."""
    inner, calls = Engine.run, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return inner(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Engine, "run", killed)
        Run(config(words, f"run.folder={folder}")).train()
    return folder


def test_rates_and_steps_that_were_changed(tmp_path, monkeypatch, capsys):
    """Of an optimiser, a checkpoint has the states: its settings are those of config.yaml, as is the logged rate."""
    words = recipe(tmp_path, {"a": "steps: 6, batch_size: 4, lr: 0.01, checkpoint_every: 2, schedule: constant"})
    folder = stopped(words, tmp_path / "run", monkeypatch, 5)
    text = (folder / "config.yaml").read_text()
    shutil.copytree(folder, tmp_path / "short")
    (tmp_path / "short" / "config.yaml").write_text(text.replace("steps: 6\n", "steps: 4\n"))
    (folder / "config.yaml").write_text(
        text.replace("lr: 0.01\n", "lr: 0.0001\n").replace("lr_scale: {}", "lr_scale: {vision: 0.5}")
    )

    run = Run(config(words, f"resume={folder}"))
    inner, used = Engine.run, []

    def noting(self, *args):
        found = inner(self, *args)
        used.extend(g["lr"] for o in self.optimizers for g in o.param_groups)
        return found

    monkeypatch.setattr(Engine, "run", noting)
    run.train()
    assert set(used) == {0.0001, 0.00005} and {0.0001} == {row["lr"] for row in read_metrics(run.folder.metrics)[4:]}
    said = capsys.readouterr().err
    assert "Since the run began: config: config.yaml was changed" in said
    with pytest.raises(ZooError, match=r"'a' has 4 steps now, and the run has taken 4 of it: give it more .*, 5 say"):
        Run(config(words, f"resume={tmp_path / 'short'}")).train()


def test_data_that_changed_are_noted(tmp_path, monkeypatch, capsys):
    words = recipe(tmp_path, {"a": "steps: 2, batch_size: 4, checkpoint_every: 1"})
    folder = stopped(words, tmp_path / "run", monkeypatch, 2)
    lock = json.loads((folder / "zoo.lock").read_text())
    lock["data"]["scenes"]["records"] = 41
    (folder / "zoo.lock").write_text(json.dumps(lock))
    Run(config(words, f"resume={folder}")).close()
    said = capsys.readouterr().err
    assert "Since the run began: data scenes: 40 records, was 41." in said and "config.yaml was" not in said


def test_killed_while_it_is_scored_in_between(tmp_path, monkeypatch):
    """The checkpoint is there, and the scores are made when the run goes on: those of a run that was not killed."""
    words = [*recipe(tmp_path, {"a": "steps: 3, batch_size: 4, checkpoint_every: 2, eval_every: 2"}), "pruner=random"]
    Run(config(words, f"run.folder={tmp_path / 'whole'}")).train()

    def killed(*args, **options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "score", killed)
        Run(config(words, f"run.folder={tmp_path / 'run'}")).train()
    run = Run(config(words, f"resume={tmp_path / 'run'}"))
    assert run.progress.step == 2
    run.train()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    metrics = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    rows = [[(r["step"], r.get("scores")) for r in some] for some in metrics]
    assert rows[0] == rows[1] and [step for step, scores in rows[0] if scores] == [2]


def test_a_model_whose_hashes_are_not_noted_is_saved_again(tmp_path, monkeypatch):
    words = recipe(tmp_path, {"a": "steps: 1, batch_size: 4"})
    run = Run(config(words, f"run.folder={tmp_path / 'run'}"))
    run.train()

    def killed(*args, **options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(run.folder), "write_lock", killed)
        finish.save_model(run)
    run.close()
    assert run.folder.has_model and "model" not in json.loads(run.folder.lock.read_text())
    with Run(config(words, f"resume={tmp_path / 'run'}")) as again:
        again.train()
        finish.finish(again)
    assert list(json.loads(run.folder.lock.read_text())["model"]) == ["model.safetensors"]


def test_samples_that_cannot_be_divided_in_a_later_stage_are_refused_ahead_of_the_first(tmp_path, monkeypatch):
    words = recipe(tmp_path, {"a": "steps: 1, batch_size: 6", "b": "steps: 1, batch_size: 4"})
    monkeypatch.setattr(loop, "reader_of", lambda accelerator: (0, 3))
    with pytest.raises(ZooError, match="Stage 'b': batch_size=4 does not split evenly over 3 processes"):
        Run(config(words, f"run.folder={tmp_path / 'run'}"))


def test_buffers_of_a_distiller_go_on(tmp_path, monkeypatch):
    """A running mean of a plug-in's, say, which no gradient makes."""

    def counting(self, step, steps):
        self.seen += 1

    made = StageTeachers.distiller

    def with_buffer(self, stage):
        found = made(self, stage)
        if not hasattr(found, "seen"):
            found.register_buffer("seen", torch.zeros(()))
        return found

    monkeypatch.setattr(Dense, "begin_step", counting)
    monkeypatch.setattr(StageTeachers, "distiller", with_buffer)
    words = recipe(tmp_path, {"a": "steps: 5, batch_size: 4, checkpoint_every: 1, distiller: dense"})
    folder = stopped(words, tmp_path / "run", monkeypatch, 4)
    run = Run(config(words, f"resume={folder}"))
    run.train()
    assert run.teachers._distiller[1].seen == 5
