"""Folders that an earlier layout of the code wrote: models load and answer; a run within a stage is refused.

`saved_before/model` is a composed model with a pruner and LoRA and random weights, `wanted.json` its answers;
`saved_before/run` is a run that a signal stopped behind the third of four steps, with a pickled optimiser. Written by
zoo 0.1.0 before its modules moved into rooms, with torch 2.14.1.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from zoo import ZooError
from zoo.settings.config import compose
from zoo.training.loop import main

BEFORE = Path(__file__).with_name("saved_before")


def test_a_model_gives_the_same_answers():
    wanted = json.loads((BEFORE / "wanted.json").read_text())
    model, processor = zoo.load(f"dir:{BEFORE / 'model'}", device="cpu")
    inputs = processor(images=[Image.new("RGB", (40, 30), (200, 60, 30))], text=["<image> what color is it?"])
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, : len(wanted["logits"])]
    torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), atol=2e-5, rtol=0)
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist() == wanted["ids"]


def test_a_run_in_the_middle_of_a_stage_is_refused_since_its_optimiser_is_pickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    with pytest.raises(ZooError, match=r"optimizers.pt' is a pickled file of an earlier version, .*zoo.lock names"):
        main(compose("train", ["resume=run"]))
    assert not (tmp_path / "run/model").exists()
