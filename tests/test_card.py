"""The card of a saved model: facts of its run, its bases and its parts, in metadata that the hub's library reads."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import zoo
from tests.test_export import CLIP, LLAMA, MLP, composed
from tests.train_builders import config, recipe
from zoo.cli.entry import main as command
from zoo.composed.card import MARK
from zoo.composed.card_facts import UNKNOWN, Facts, facts_in, licence_words, strictest
from zoo.training.loop import main

SIZES = ["vision.width=16", "vision.depth=1", "vision.heads=2", "vision.layer=-1", "vision.stem=patch"]


def card(folder):
    """The card as the hub's library reads it, which refuses metadata that it cannot."""
    return ModelCard.load(Path(folder) / "README.md", ignore_metadata_errors=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return main(config(recipe(root, {"a": "steps: 1, batch_size: 4"}), "run.name=drawn"))


def test_a_run_states_its_data_and_its_scores_with_their_errors(trained):
    found = card(trained.model).data
    assert found.library_name == "zoo" and found.pipeline_tag == "image-text-to-text" and found.datasets == ["scenes"]
    assert found.license is None and found.base_model is None, "nothing states them"
    lines = json.loads(trained.scores.read_text())
    assert len(found.eval_results) == len(lines) > 2
    results = {
        (r.dataset_type, r.dataset_config, r.metric_type, r.metric_args.get("held_out", False)): r
        for r in found.eval_results
    }
    for line in lines:
        kind, score = line["kind"] + "_held_out" * line["held_out"], line["score"]
        result = results[line["data"], kind, line["metric"], line["held_out"]]
        assert result.metric_value == score["value"]
        assert result.metric_args["stderr"] == score["stderr"] and result.metric_args["n"] == score["n"]
    text = (trained.model / "README.md").read_text()
    score = lines[0]["score"]
    assert f"| {score['value']:.3f} | {score['stderr']:.3f} | {score['n']} |" in text
    assert str(trained.path.parent) not in text and f'zoo.load("dir:{trained.path.name}")' in text
    assert "| prefill of an image and 64 tokens of text | " in text and "| vision | timm | " in text


def test_an_export_keeps_what_its_weights_were_scored_with(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(["export", str(trained.path), "same", "--format=safetensors", "--license", "MIT"]) == 0
    found = card("same").data
    assert found.license == "mit" and found.datasets == ["scenes"]
    assert [r.metric_value for r in found.eval_results] == [
        r.metric_value for r in card(trained.model).data.eval_results
    ]
    words = ["pruner=[random]", f"scores={trained.scores}"]
    assert command(["export", "same", "pruned", "--format=safetensors", words[0]]) == 0
    found = card("pruned").data
    assert found.eval_results is None and found.license == "mit" and "random" in found.tags
    assert command(["export", "same", "scored", "--format=safetensors", *words]) == 0
    assert card("scored").data.eval_results
    Path("notes.json").write_text("[]")
    assert command(["export", "same", "no", "--format=safetensors", "scores=notes.json"]) == 2
    again, _ = zoo.load("dir:same")
    again.save_pretrained("again")  # its weights may have changed since
    assert card("again").data.eval_results is None and card("again").data.license == "mit"


def test_a_card_of_a_person_stays(tmp_path):
    model, _ = composed([*CLIP, *MLP, *LLAMA])
    model.save_pretrained(tmp_path)
    ours = (tmp_path / "README.md").read_text()
    assert MARK in ours
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == ours
    (tmp_path / "README.md").write_text("# mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine\n"


@pytest.mark.parametrize("plain", [False, True])
def test_bases_are_named_with_their_licences(tmp_path, plain):
    import transformers as t

    from tests import published_builders as build

    clip = tmp_path / "secret" / "clip"
    t.CLIPVisionModel(t.CLIPVisionConfig(**build.VISION)).save_pretrained(clip)
    (clip / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nlanguage: [en]\n---\n# clip\n")
    words = [*MLP, *LLAMA, "tokenizer.chat_template=chatml"]
    model, processor = zoo.compose("vision=hf", f"vision.checkpoint={clip}", *words, texts=build.WORDS)
    out = tmp_path / "out"
    if plain:
        zoo.export(model, processor, out)
    else:
        model.save_pretrained(out)
    text, found = (out / "README.md").read_text(), card(out).data
    assert found.license == "cc-by-nc-4.0" and found.base_model is None, "a folder is not a name of the hub"
    assert "secret" not in text and "| `clip` | cc-by-nc-4.0 |" in text
    assert ("which is read too" in text) == (not plain)
    assert found.library_name == ("transformers" if plain else "zoo")
    assert ("AutoModelForImageTextToText" in text) == plain


@pytest.mark.parametrize(
    "licences, wanted",
    [
        ((), ("", "")),
        (("mit", "apache-2.0", "mit"), ("apache-2.0", "")),
        (("apache-2.0", "llama2"), ("llama2", "")),
        (("llama2", "cc-by-nc-4.0", "mit"), ("other", "llama2-and-cc-by-nc-4.0-and-mit")),
        (("mit", UNKNOWN), ("other", "mit-and-not-stated")),
        ((UNKNOWN,), ("", "")),
    ],
)
def test_the_strictest_licence_applies(licences, wanted):
    assert strictest(licences) == wanted


def test_words_of_packages_are_licences():
    assert licence_words("MIT; DINOv2 itself Apache-2.0") == ("mit", "apache-2.0")
    assert licence_words("Apache-2.0 by its LICENSE file") == ("apache-2.0",)


HOSTILE = {
    "not a mapping": "- a\n- b",
    "not yaml": "license: [",
    "an object": "license: !!python/object/apply:os.system ['true']",
    "other types": "license: {a: b}\ndatasets: [1, {a: b}, '../../x', ok]\nmodel-index: 5",
    "an index without numbers": "model-index: [{name: a, results: [{task: {type: x}, metrics: [{type: a}]}]}]",
    "deep": "license: " + "[" * 400,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_card_from_elsewhere_gives_words_or_nothing(tmp_path, case):
    file = tmp_path / "README.md"
    file.write_text(f"---\n{HOSTILE[case]}\n---\n")
    wanted = Facts(datasets=("ok",)) if case == "other types" else Facts()
    assert facts_in(file) == wanted


def test_a_language_model_with_states_has_a_card(make_model):
    """Its layers are of several kinds, whose products no closed form counts."""
    from tests.conftest import tiny_slots
    from zoo.composed.card import _cost_rows
    from zoo.composed.summary import summary_of

    for family, counted in (("falcon_h1", False), ("llama", True)):
        model, _ = make_model(llm={**tiny_slots()["llm"], "model_type": family})
        assert any("prefill of an image" in row for row in _cost_rows(model, summary_of(model))) == counted


@pytest.mark.parametrize(("adapter", "left_out"), [("lora", ""), ("upcycle", ", without adapter upcycle")])
def test_costs_name_an_adapter_whose_experts_they_leave_out(make_model, adapter, left_out):
    from zoo.composed.card import _cost_rows
    from zoo.composed.summary import summary_of

    model, _ = make_model(adapter={adapter: {"name": adapter}})
    rows = _cost_rows(model, summary_of(model))
    assert any(row.startswith(f"| prefill of an image and 64 tokens of text{left_out} | ") for row in rows)
