"""From a base language model to one that answers and stops: train, save, load, chat, on the road that a person goes."""

import json

import pytest
from PIL import Image

import zoo
from tests.chat_families import SHAPES, tokenizer
from tests.test_stops import llm_folder
from zoo.cli.entry import main
from zoo.composed.chat_session import Talk
from zoo.text.stops import listed

RECIPE = """# @package _global_
defaults:
  [{{override /vision: timm}}, {{override /projector: linear}}, {{override /llm: hf}}, {{override /data: [chat_json]}}]
vision: {{image_size: 32, patch_size: 16, width: 24, depth: 2, heads: 2}}
llm: {{checkpoint: {folder}/llm}}
data: {{chat_json: {{file: {folder}/train.jsonl}}}}
stages: {{tune: {{train: [all], steps: 60, batch_size: 6, lr: 1e-2, schedule: constant, checkpoint_every: 0}}}}
"""
TALKS = {"red": ("a cat", "on a mat"), "green": ("well", "be kind"), "blue": ("a red picture", "hm")}


@pytest.mark.parametrize("name", ["chatml on a base tokenizer", "text ends"])
def test_a_base_model_that_learns_by_heart_says_it_and_stops(tmp_path, name, capsys):
    made = tokenizer(SHAPES[name])
    ends = [made.eos_token_id, made.convert_tokens_to_ids("~")]  # no answer has the second one
    llm_folder(tmp_path / "llm", made, ends)
    rows = []
    for colour, (first, second) in TALKS.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
        said = [("human", "<image>\nwhat is it?"), ("gpt", first), ("human", "where?"), ("gpt", second)]
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "heart.yaml").write_text(RECIPE.format(folder=tmp_path))
    run = tmp_path / "run"
    words = ["recipe=heart", f"run.folder={run}", "device=cpu", "precision=fp32", "seed=1"]
    assert main(["train", "--config-dir", str(tmp_path / "conf"), *words]) == 0
    capsys.readouterr()

    model, processor = zoo.load(f"dir:{run}")
    assert {*ends} <= {*listed(model.generation_config.eos_token_id)}  # what the base model states
    for colour, (first, second) in TALKS.items():
        talk = Talk(model, processor)
        assert talk.say("what is it?", [tmp_path / f"{colour}.png"], max_new_tokens=64) == first
        assert talk.say("where?", max_new_tokens=64) == second
    assert main(["chat", f"dir:{run}", "--image", str(tmp_path / "blue.png"), "-q", "what is it?"]) == 0
    assert capsys.readouterr().out.strip() == "a red picture"
