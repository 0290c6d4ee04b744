"""How many files a reader has to follow: traced walks along short spines, whose leaves call nothing but leaves.

A spine is the files that a reader goes through to understand a walk, in reading order. A leaf is a file whose job its
name tells, and which calls nothing but other leaves: a reader who meets it can go on without opening it. What a walk
enters and is in neither list fails here, as does a leaf that calls into a spine.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import picture
from tests.traced import ROOT, Trace, traced
from tests.train_builders import config, recipe
from zoo.runs.batches import Batches
from zoo.settings.config import compose
from zoo.training.loop import Run
from zoo.training.step import Engine

# In reading order, as CONTRIBUTING has them.
SPINES = {
    "a training step": [
        "zoo/training/step.py",
        "zoo/runs/batches.py",
        "zoo/text/processor.py",
        "zoo/text/tokenized_chat.py",
        "zoo/text/batch.py",
        "zoo/composed/forward.py",
        "zoo/composed/image_path.py",
        "vision/encoders/base.py",
        "fusion/llm/hf.py",
        "zoo/composed/answer_loss.py",
    ],
    "a chat answer": [
        "zoo/composed/chat_session.py",
        "zoo/composed/generate.py",
        "zoo/text/processor.py",
        "zoo/text/tokenized_chat.py",
        "zoo/text/batch.py",
        "zoo/composed/image_path.py",
        "vision/encoders/base.py",
        "fusion/llm/hf.py",
    ],
    "an override": [
        "zoo/settings/config.py",
        "zoo/settings/overrides.py",
        "zoo/settings/component_presets.py",
        "zoo/settings/text_options.py",
        "zoo/settings/static_check.py",
        "zoo/settings/model_names.py",
        "zoo/settings/presets.py",
        "registry/table.py",
        "registry/hydra.py",
    ],
}
LONGEST = {"a training step": 10, "a chat answer": 8, "an override": 10}

# Of what sort a leaf is -> files.
LEAVES = {
    "a data set: draws or reads samples": [
        "zoo/data/scenes.py",
        "zoo/data/scene_draw.py",
        "zoo/data/scene_questions.py",
    ],
    "one component, by its protocol": [
        "vision/encoders/conv_stem.py",
        "vision/encoders/runner.py",
        "vision/encoders/vit_runner.py",
        "fusion/projectors/mlp.py",
        "distill/dense.py",
    ],
    "pixels": ["vision/images/processors.py", "vision/images/transform.py"],
    "what a part does where it says nothing": [
        "registry/data_parts.py",
        "registry/hooks.py",
        "registry/llm_parts.py",
        "registry/part.py",
        "registry/parts.py",
    ],
    "what flows, and what differs between versions": [
        "registry/forward_pass.py",
        "registry/versions.py",
        "zoo/composed/inputs.py",
        "zoo/composed/outputs.py",
    ],
    "pruners of a count of their own": ["zoo/composed/behind.py", "zoo/composed/left_out.py"],
    "inside the language model": [
        "fusion/llm/attention.py",
        "fusion/llm/decoder.py",
        "zoo/composed/language_model.py",
    ],
    "which sample comes when, and what becomes of a broken or a long one": [
        "registry/broken.py",
        "zoo/runs/lengths.py",
        "zoo/runs/order.py",
        "zoo/runs/permutation.py",
    ],
    "what a chat template writes": [
        "zoo/text/answer_spans.py",
        "zoo/text/chat_sandbox.py",
        "zoo/text/chat_template.py",
        "zoo/text/placeholders.py",
        "zoo/text/plain_text.py",
        "zoo/text/processor_chat.py",
        "zoo/text/questions.py",
        "zoo/text/stops.py",
        "zoo/text/token_cache.py",
        "zoo/text/tokenizer.py",
    ],
    "optimisers and number formats": ["zoo/runs/optim.py", "zoo/storage/precision.py"],
    "which processes read the same samples": ["zoo/runs/tensor_parallel.py"],
    "threads, and options that are refused": ["zoo/composed/generate_options.py", "zoo/composed/turns.py"],
}
LEAVES["options check themselves"] = [
    "fusion/llm/hf_config.py",
    "fusion/pruners/random.py",
    "fusion/pruners/topk.py",
    "vision/encoders/sizes.py",
    "vision/encoders/timm.py",
    "zoo/settings/parallel.py",
    "zoo/settings/scale.py",
    "zoo/settings/stage.py",
]
LEAVES["how options are read, what is loaded on the way, what is refused"] = [
    "registry/devices.py",
    "registry/errors.py",
    "registry/options.py",
    "registry/conversion.py",
    "registry/source_text.py",
    "registry/plugins.py",
    "zoo/autoclasses.py",
    "zoo/settings/schema.py",
    "zoo/settings/several_encoders.py",
]
LEAF = {file: sort for sort, files in LEAVES.items() for file in files}

STAGE = (
    "steps: 2, batch_size: 4, train: [all], optimizer: muon_adamw, loss_weights: {dense: 0.1}, "
    "distiller: {name: dense, weights: [1, 1, 1, 0.5, 0.5, 0.5, 0.5]}"
)


@pytest.fixture(scope="module")
def walks(tmp_path_factory) -> dict[str, Trace]:
    """What ran in the steps of a stage and in the making of their batches, and in an answer about a picture."""
    place = tmp_path_factory.mktemp("runs")
    step, chat = Trace(), Trace()

    def noted(of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given: list[Any] = []
            traced(lambda: given.append(of(*args, **kwargs)), step)
            return given[0]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", noted(Engine.run))
        patch.setattr(Batches, "__getitem__", noted(Batches.__getitem__))
        with Run(config(recipe(place, {"only": STAGE}))) as run:
            run.train()
    model = run.model.eval()
    model.__dict__["processor"] = run.processor
    traced(lambda: model.chat("what is this?", picture(), max_new_tokens=2), chat)
    words = ["pruner=random", "pruner.random.keep_ratio=0.3"]
    compose("train", words)  # what is imported once, and made once, is there
    return {"a training step": step, "a chat answer": chat, "an override": traced(lambda: compose("train", words))}


def ways_back(trace: Trace) -> dict[tuple[str, str], set[str]]:
    """Calls of leaves into files that are no leaves."""
    return {(a, b): names for (a, b), names in trace.calls.items() if a in LEAF and b not in LEAF}


@pytest.mark.parametrize("walk", SPINES)
def test_a_walk_goes_along_its_spine_and_leaves_alone(walks, walk):
    met = set(walks[walk].functions)
    assert met - set(SPINES[walk]) - set(LEAF) == set(), "files that are neither on the spine nor a leaf"
    assert set(SPINES[walk]) - met == set(), "files on the spine that the walk does not enter"
    assert len(SPINES[walk]) <= LONGEST[walk]


@pytest.mark.parametrize("walk", SPINES)
def test_leaves_call_leaves_alone(walks, walk):
    assert ways_back(walks[walk]) == {}


def test_no_file_is_both_and_each_is_there():
    spines = {file for files in SPINES.values() for file in files}
    assert spines & set(LEAF) == set()
    assert [file for file in {*spines, *LEAF} if not (ROOT / file).is_file()] == []


def test_a_way_back_is_noticed(walks):
    real, planted = walks["a chat answer"], Trace()
    planted.calls = {("zoo/text/stops.py", "zoo/text/processor.py"): {"ZooProcessor.template"}}
    assert ways_back(planted) == planted.calls
    assert ("zoo/composed/chat_session.py", "zoo/text/stops.py") in real.calls, "the trace sees calls between files"
    assert ("zoo/text/stops.py", "zoo/text/chat_template.py") in real.calls


def test_contributing_has_the_same_spines():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("\n## Spines\n") :].split("\n## ")[1]
    parts = section.split("\n**")[1:]  # **A training step**, then its files
    found = {part.partition("**")[0].lower(): re.findall(r"^    (\S+\.py)\b", part, re.MULTILINE) for part in parts}
    assert {walk: found[walk] for walk in SPINES} == SPINES
