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


def test_lmms_eval_runs_a_local_task(folder, tmp_path):
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
    model = zoo.load(f"dir:{folder}")[0]
    said = [model.chat(q, image=p, max_new_tokens=5).split("\n\n")[0] for q, p in zip(questions, photos, strict=True)]
    rows = {"image": photos, "question": questions, "answer": [*said[:2], "something else"]}
    DatasetDict({"test": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "data")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "few.yaml").write_text(TASK.format(data=tmp_path / "data"))
    (tmp_path / "tasks" / "few.py").write_text(FEW)
    found = simple_evaluate(
        "zoo", model_args=f"model=dir:{folder}", tasks=["few"], batch_size=2, device="cpu",
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
