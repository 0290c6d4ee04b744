"""Folders that an earlier layout of the code wrote still load, resume and are scored.

`saved_before/model` is a composed model with a pruner and LoRA and random weights, `wanted.json` its answers;
`saved_before/run` is a run that a signal stopped behind the third of four steps, `final.safetensors` how it would have
ended. Written by zoo 0.1.0 before its modules moved into rooms, with torch 2.14.1, on one thread.
"""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import zoo
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


def test_a_run_goes_on_and_ends_as_it_would_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    main(compose("train", ["resume=run"]))
    found, wanted = load_file(tmp_path / "run/model/model.safetensors"), load_file(BEFORE / "final.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda why, n=name: f"{n}: {why}")
