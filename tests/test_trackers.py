"""Trackers beside metrics.jsonl: refused before anything is made; TensorBoard, wandb and trackio really written."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

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
    words = [*recipe(tmp_path, stages), "limit=1", "log_pictures=1"]
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
    assert events.Tags()["images"] == ["answers/0"] and [e.step for e in events.Images("answers/0")][-1] == 4


def test_wandb_and_trackio_hold_losses_and_pictures(tmp_path, monkeypatch):
    """The packages themselves, without a network: wandb's offline folder and trackio's own database."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    wandb, trackio = pytest.importorskip("wandb"), pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")  # for one that was imported before

    from zoo.runs.folder import read_metrics

    words = [*recipe(tmp_path, {"a": "steps: 2, batch_size: 4, eval_every: 2"}), "limit=1", "log_pictures=1"]
    folder = tmp_path / "run"
    main(config(words, "log=[wandb,trackio]", f"run.folder={folder}"))
    wandb.teardown()
    (sent,) = folder.rglob("offline-run-*/files/media/images/answers_2_*.png")
    with closing(sqlite3.connect(next((tmp_path / "trackio").glob("*.db")))) as database:
        rows = [(step, json.loads(held)) for step, held in database.execute("select step, metrics from metrics")]
    drawn = {step: held["loss"] for step, held in rows if "loss" in held}
    assert drawn == {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}
    (shown,) = (held["answers/0"]["file_path"] for _, held in rows if "answers/0" in held)
    one, same = (Image.open(file) for file in (sent, next((tmp_path / "trackio").rglob(Path(shown).name))))
    assert one.size == same.size and one.tobytes() == same.convert(one.mode).tobytes()


def test_a_missing_package_is_said_before_anything_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.setattr("zoo.training.loop.check", lambda plan: pytest.fail("this came first"))
    with pytest.raises(ZooError, match="pip install wandb"):
        main(config(recipe(tmp_path, {"a": "steps: 1"}), "log=[wandb]"))


def asked(number, right):
    about = {"data": "scenes", "id": f"eval-{number}", "prompt": "<image> what " * 30, "answers": ["yes"]}
    return {**about, "prediction": "no\x1b", "scores": {"accuracy": float(right)}}


def test_pictures_of_answers_have_every_image_once():
    from zoo.registry import build
    from zoo.runs.scored import chosen
    from zoo.training.shown_answers import shown_answers

    data = build("dataset", {"name": "scenes", "split": "eval"})
    a, b, c = chosen("scenes", data, 3)
    rows = [asked(number, right) for number in (a, b, b, c) for right in (True, False)]
    made = shown_answers({"scenes": data}, rows, 2)
    assert [picture.width for picture in made] == [320, 320] and made[1].height > made[0].height > 320
    assert len(shown_answers({"scenes": data}, rows, 9)) == 3 and not shown_answers({"scenes": data}, [], 9)


class Tracker:
    def __init__(self, name):
        self.name, self.sent = name, []
        self.writer = self

    def log_images(self, values, step):
        self.sent.append((values, step))

    def add_image(self, name, values, step, dataformats):
        self.sent.append((name, values.shape, step, dataformats))


def test_trackers_that_take_no_pictures_are_named():
    from types import SimpleNamespace

    found = [Tracker(name) for name in ("tensorboard", "wandb", "mlflow")]
    pictures = [Image.new("RGB", (32, 40)), Image.new("RGB", (32, 50))]
    assert trackers.send_pictures(SimpleNamespace(trackers=found), "answers", pictures, 7) == ["mlflow"]
    assert found[0].sent == [("answers/0", (40, 32, 3), 7, "HWC"), ("answers/1", (50, 32, 3), 7, "HWC")]
    assert found[1].sent == [({"answers": pictures}, 7)] and found[2].sent == []
