"""Whole runs from a stream of parquet files with pictures: stopped, resumed, with other workers, on two processes."""

import hashlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import killed_runs
from tests.killed_runs import train
from tests.test_image_kinds import SOUND
from tests.train_builders import RECIPE
from zoo.cli.entry import main

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def server():
    with killed_runs.served():
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Six files of five rows, each with a picture of another kind."""
    root = tmp_path_factory.mktemp("stream")
    pictures = [data for data in SOUND.values() if len(data) < 50_000]
    text = datasets.Value("string")
    kinds = datasets.Features({"image": datasets.Image(), "question": text, "answer": text})
    for shard in range(6):
        images = [{"bytes": pictures[(5 * shard + i) % len(pictures)], "path": None} for i in range(5)]
        rows = {"image": images, "question": [f"What is {i}?" for i in range(5)], "answer": list("abcde")}
        datasets.Dataset.from_dict(rows, kinds).to_parquet(root / f"{shard}.parquet")
    rows = f"{{rows: {{name: hf, path: '{root}/*.parquet', streaming: true, shuffle_buffer: 4}}}}"
    recipe = re.sub(r"data: \{scenes.*", lambda _: f"data: {rows}", RECIPE.replace("[scenes]", "[]"))
    (root / "conf" / "recipe").mkdir(parents=True)
    stages = "  a: {steps: 9, batch_size: 4, checkpoint_every: 2}\n"
    (root / "conf" / "recipe" / "tiny.yaml").write_text(recipe + stages)
    return ["--config-dir", str(root / "conf"), "recipe=tiny", "run.folder=run"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, words):
    place = tmp_path_factory.mktemp("whole")
    ended = train(place, words)
    assert ended.code == 0, ended.said
    return weights(place)


def weights(place):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (place / "run" / "model").glob("*.safetensors")}


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, words, whole):
    ended = train(tmp_path, words, "terminated_at_step", 5, "behind")
    assert ended.code == 143, ended.said
    ended = train(tmp_path, ["resume=run"])
    assert ended.code == 0, ended.said
    assert weights(tmp_path) == whole


def test_workers_change_nothing(tmp_path, words, whole, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words, "stages.a.workers=2"]) == 0
    assert weights(tmp_path) == whole


def test_two_processes_train_what_one_does(tmp_path, words, whole, tmp_path_factory):
    ended = train(tmp_path, words, processes=2)
    assert ended.code == 0, ended.said
    one = load_file(next(tmp_path_factory.getbasetemp().glob("whole*/run/model/model.safetensors")))
    two = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert np.allclose(value, two[name], atol=2e-4), name
