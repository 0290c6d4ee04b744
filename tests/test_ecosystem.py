"""Models of the zoo in lmms-eval and VLMEvalKit."""

import importlib
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

import zoo
from tests import published_builders as build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ecosystem") / "llava"
    build.llava(folder)
    return folder


@pytest.fixture
def lmms_eval(monkeypatch):
    """The package itself, or what the adapter uses of it where it is not installed."""
    if find_spec("lmms_eval") is None:
        api, model, models, registry = (ModuleType(f"lmms_eval{n}") for n in ("", ".api.model", ".models", ".reg"))
        model.lmms = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
        registry.ModelManifest = lambda **given: SimpleNamespace(aliases=(), **given)
        stubs = {"lmms_eval": api, "lmms_eval.api": ModuleType("lmms_eval.api"), "lmms_eval.api.model": model}
        stubs |= {"lmms_eval.models": models, "lmms_eval.models.registry_v2": registry}
        for name, module in stubs.items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "zoo.evaluation.lmms_eval_model", raising=False)
    return importlib.import_module("zoo.evaluation.lmms_eval_model")


def asked(questions, photo):
    """Requests as lmms-eval makes them, and its table of documents."""
    docs = [{"image": photo, "question": q} for q in questions]
    options = {"max_new_tokens": 5, "until": ["\n\n"]}
    requests = [
        SimpleNamespace(args=(d["question"], options, lambda doc: [doc["image"]], i, "task", "test"))
        for i, d in enumerate(docs)
    ]
    return requests, {"task": {"test": docs}}


def test_lmms_eval_gets_the_models_answers(lmms_eval, folder):
    adapter = lmms_eval.ZooLmms(model=f"dir:{folder}", batch_size=2, overrides="pruner=[pool]")
    photo = build.photo(40, 60)
    questions = ["is it red?", "describe the picture.", "yes no"]
    requests, adapter.task_dict = asked(questions, photo)
    assert adapter.processor.num_image_tokens == 4
    expected = [adapter.model.chat(q, image=photo, max_new_tokens=5).split("\n\n")[0] for q in questions]
    assert adapter.generate_until(requests) == expected


def test_lmms_eval_opens_what_is_shown_when_it_is_asked_about(lmms_eval, folder, monkeypatch):
    adapter = lmms_eval.ZooLmms(model=f"dir:{folder}")
    requests, adapter.task_dict = asked(["a", "b", "c"], "film.MP4")
    opened, seen = [], []
    for request in requests:
        inner = request.args[2]
        request.args = (*request.args[:2], lambda doc, inner=inner: opened.append(doc) or inner(doc), *request.args[3:])

    def answers(model, processor, questions, batch_size):
        for question in questions:
            seen.append(len(opened))
            assert question.sample.images[0].path == "film.MP4"
            assert [p["type"] for p in question.dialog.messages[0]["content"]] == ["video", "text"]
            yield question, question.sample.id

    monkeypatch.setattr(lmms_eval, "answer", answers)
    assert adapter.generate_until(requests) == ["0", "1", "2"] and seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        ("fastervlm:keep_ratio=0.25", ["pruner=[fastervlm]", "pruner.fastervlm.keep_ratio=0.25"]),
        ("fastervlm:num_keep=5:score=column_mean", ["pruner=[fastervlm]", "pruner.fastervlm.num_keep=5",
                                                    "pruner.fastervlm.score=column_mean"]),
        ("pool", ["pruner=[pool]"]),
        ("null", ["pruner=null"]),
        (None, []),
        ("", []),
        ("fastervlm:llava15_144 + aim", ["pruner=[fastervlm,aim]", "pruner.fastervlm.preset=llava15_144"]),
    ],
)  # fmt: skip
def test_a_pruner_in_one_text_is_the_words_of_load(pruner, words):
    from zoo.evaluation.harness_options import pruner_words

    assert pruner_words(pruner) == words and pruner_words(pruner, "dense") == [*words, "positions=dense"]


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        ("fastrvlm", "Did you mean 'fastervlm'"),
        ("fastervlm:keep_ratio=", "'keep_ratio=' is neither"),
        ("fastervlm::", "'' is neither"),
        ("fastervlm:keep_rato=0.5", "Did you mean 'keep_ratio'"),
        ("fastervlm:llava15_145", "No preset of pruner 'fastervlm' named 'llava15_145'"),
    ],
)
def test_a_pruner_that_cannot_be_read_is_named(lmms_eval, folder, pruner, message):
    with pytest.raises(zoo.ZooError, match=message):
        lmms_eval.ZooLmms(model=f"dir:{folder}", pruner=pruner)


@pytest.mark.parametrize("positions", ["kept", "dense"])
def test_harnesses_prune_as_load_does(lmms_eval, folder, positions, tmp_path):
    """Both harnesses, against the words of `zoo.load`; positions make a difference to the model's logits."""
    from zoo.evaluation.vlmevalkit import ZooVLM

    words = ["pruner=[fastervlm]", "pruner.fastervlm.keep_ratio=0.25", f"positions={positions}"]
    model = zoo.load(f"dir:{folder}", *words)[0]
    photo = build.photo(40, 60)
    options = {"pruner": "fastervlm:keep_ratio=0.25", "positions": positions, "max_new_tokens": 5}
    ours = lmms_eval.ZooLmms(model=f"dir:{folder}", **options)
    kit = ZooVLM(model_path=f"dir:{folder}", **options)
    requests, ours.task_dict = asked(["is it red?"], photo)
    photo.save(tmp_path / "photo.png")
    message = [{"type": "image", "value": str(tmp_path / "photo.png")}, {"type": "text", "value": "is it red?"}]
    expected = model.chat("is it red?", image=photo, max_new_tokens=5)
    assert ours.generate_until(requests) == [expected.split("\n\n")[0]] and kit.generate_inner(message) == expected
    assert ours.processor.num_image_tokens == kit.processor.num_image_tokens == 4
    assert {ours.model.config.positions, kit.model.config.positions, model.config.positions} == {positions}
    with pytest.raises(zoo.ZooError, match="Unknown model_args prunner; there are model, pruner"):
        lmms_eval.ZooLmms(model=f"dir:{folder}", prunner="pool")


def test_lmms_eval_likelihoods_are_those_of_the_labels(lmms_eval, folder):
    adapter = lmms_eval.ZooLmms(model=f"dir:{folder}")
    photo = build.photo(40, 60)
    adapter.task_dict = {"task": {"test": [{"image": photo}]}}
    args = ("is it red?", "yes", lambda doc: [doc["image"]], 0, "task", "test")
    ((loss, greedy),) = adapter.loglikelihood([SimpleNamespace(args=args)])
    from zoo.registry import Sample

    dialog = lmms_eval._dialog("is it red?", [photo], "yes")
    batch = adapter.processor.collate([adapter.processor.encode(Sample("a", [photo], [dialog]))])
    assert loss == pytest.approx(adapter.model(**batch).loss.item(), rel=1e-5) and greedy in (True, False)


def test_the_manifest_is_light_and_names_the_class(lmms_eval):
    code = "import sys, zoo.lmms_eval_plugin; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    from zoo.lmms_eval_plugin import manifest

    assert manifest().model_id == "zoo"
    module, _, name = manifest().simple_class_path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


TASK = """
task: few
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function few.shown
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, until: ["\n\n"]}}
process_results: !function few.scored
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
FEW = """
def shown(doc):
    return [doc["image"].convert("RGB")]

def scored(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", []),
        (",pruner=fastervlm:keep_ratio=0.25:score=column_mean,positions=dense",
         ["pruner=[fastervlm]", "pruner.fastervlm.keep_ratio=0.25", "pruner.fastervlm.score=column_mean",
          "positions=dense"]),
    ],
    ids=["whole", "pruned"],
)  # fmt: skip
def test_lmms_eval_runs_a_local_task(folder, tmp_path, args, words):
    """Found by its entry point, over a data set on disk, scored by lmms-eval: three questions, two of them answered."""
    if find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed: pip install lmms-eval")
    from datasets import Dataset, DatasetDict
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from lmms_eval.tasks import TaskManager

    assert not ModelRegistryV2().load_entrypoint_manifests()
    photos = [build.photo(40, 60, seed=i) for i in range(3)]
    questions = ["is it red?", "yes no", "describe the picture."]
    model = zoo.load(f"dir:{folder}", *words)[0]
    said = [model.chat(q, image=p, max_new_tokens=5).split("\n\n")[0] for q, p in zip(questions, photos, strict=True)]
    rows = {"image": photos, "question": questions, "answer": [*said[:2], "something else"]}
    DatasetDict({"test": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "data")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "few.yaml").write_text(TASK.format(data=tmp_path / "data"))
    (tmp_path / "tasks" / "few.py").write_text(FEW)
    found = simple_evaluate(
        "zoo", model_args=f"model=dir:{folder}{args}", tasks=["few"], batch_size=2, device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )  # fmt: skip
    assert found["results"]["few"]["right,none"] == pytest.approx(2 / 3)
    answers = [row["filtered_resps"][0] for row in sorted(found["samples"]["few"], key=lambda row: row["doc_id"])]
    assert answers == said


def test_vlmevalkit_gets_the_models_answers(folder, tmp_path):
    from zoo.evaluation.vlmevalkit import ZooVLM

    photo = build.photo(40, 60)
    photo.save(tmp_path / "photo.png")
    model = ZooVLM(model_path=f"dir:{folder}", max_new_tokens=5)
    message = [{"type": "image", "value": str(tmp_path / "photo.png")}, {"type": "text", "value": "is it red?"}]
    assert model.generate_inner(message) == model.model.chat("is it red?", image=photo, max_new_tokens=5)
    with pytest.raises(zoo.ZooError, match="part of type 'audio'"):
        model.generate_inner([{"type": "audio", "value": "x"}])
