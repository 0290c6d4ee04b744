"""Trackers beside metrics.jsonl: refused before anything is made, and TensorBoard really written."""

import pytest

from tests.train_builders import config, recipe
from zoo.registry import ZooError
from zoo.runs import trackers
from zoo.runs.trackers import PACKAGES, check_trackers
from zoo.training.loop import Run, main


def test_names_are_those_of_accelerate():
    from accelerate.utils import LoggerType

    assert set(PACKAGES) == {str(name) for name in LoggerType} - {"all"}


def test_a_misspelt_tracker_is_named():
    with pytest.raises(ZooError, match=r"'tensorbord'. Did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])


def test_a_missing_package_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ZooError, match="log=tensorboard needs a package that is not installed: pip install tensorboard"
    ):
        Run(config(recipe(tmp_path, {"a": "steps: 1"}), "log=[tensorboard]", f"run.folder={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists(), "nothing was made"


def test_the_folder_that_wandb_leaves_behind_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ZooError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_tensorboard_holds_every_step_once(tmp_path):
    """Through an end in the middle: what the first try drew behind its checkpoint is hidden."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from zoo.runs.folder import read_metrics

    stages = {"a": "steps: 4, batch_size: 4, checkpoint_every: 2, eval_every: 2"}
    words = [*recipe(tmp_path, stages), "limit=1"]
    folder = tmp_path / "run"
    run = Run(config(words, "log=[tensorboard]", f"run.folder={folder}"))
    inner = run._step

    def step(name, number, *rest):
        inner(name, number, *rest)
        if number == 2:
            raise KeyboardInterrupt

    run._step = step
    with pytest.raises(KeyboardInterrupt):
        run.train()
    main(config(words[:3], f"resume={folder}"))
    (place,) = {p.parent for p in (folder / "trackers").rglob("events.*") if p.parent.name == "zoo"}
    events = EventAccumulator(str(place)).Reload()
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    drawn = [(e.step, e.value) for e in events.Scalars("loss")]
    assert drawn == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in rows]
    assert {"answer", "lr", "scenes/exist/accuracy"} <= set(events.Tags()["scalars"])
