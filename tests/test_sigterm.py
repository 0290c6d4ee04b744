"""SIGTERM saves and leaves, whenever it comes."""

import os
import signal

import pytest

from tests.train_builders import config, recipe
from zoo.training.loop import TERMINATED, Run
from zoo.training.step import Engine


def test_a_signal_in_the_middle_of_a_step_is_not_lost(tmp_path, monkeypatch):
    words = recipe(tmp_path, {"a": "steps: 9, batch_size: 4, checkpoint_every: 0, train: [projector]"})
    run = Run(config(words, f"run.folder={tmp_path / 'run'}"))
    inner = Engine.run

    def interrupted(self, number, *rest):
        result = inner(self, number, *rest)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # after the processes agreed, before the loop looks
        return result

    monkeypatch.setattr(Engine, "run", interrupted)
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == TERMINATED
    assert [p.name for p in run.folder.list_checkpoints()] == ["step-00000004"]
