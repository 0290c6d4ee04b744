"""Tiny models and samples that all tests share. Nothing here needs the network."""

import copy
import gc
import logging
import os
import sys
import tracemalloc
from pathlib import Path
from traceback import walk_stack

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Python looks through all objects after every 700 new ones; what torch and transformers import are a million.
gc.set_threshold(50_000, 20, 20)

QUESTIONS = [
    "is there a red circle?",
    "what color is the square?",
    "how many shapes are there?",
    "where is the green cross?",
    "describe the picture.",
]
ANSWERS = ["yes", "no", "blue", "red", "two", "3 7 12 19", "a red circle left of a blue square"]


# Files that take more than half a minute, the longest first. A worker has a whole file: none of these is to begin last.
LONG = (
    "roundtrip", "killed_runs", "export", "checker", "saved", "bench_claims", "check_bench", "published_families",
    "threads", "bench_distill", "bench", "train", "teacher_check", "docs", "two_processes", "cli", "config",
    "bench_fusion", "plugins", "resume", "xray", "teacher", "broken_records", "teacher_store", "llava_mod",
    "pruned_crops", "typos",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Put the long files first; `make test` keeps this order."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
    os.fsync = lambda _: None  # as in tests/killed_runs.py; a run of five steps waits 59 times
    gc.freeze()  # what was imported so far is not looked through again


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Set aside what earlier modules left: every stage of a run begins with a collection, 0.4 s among their objects."""
    gc.collect()
    gc.freeze()


def forget_plugins():
    """Make this process one that has loaded no plugin."""
    from zoo.registry import plugins
    from zoo.registry import table as core

    for word in [word for p in plugins.status() for word in p.adds]:
        kind, _, name = word.partition("/")
        core._entries[kind].pop(name, None)
        core._declared[kind].pop(name, None)
    for module in [name for name in sys.modules if name.startswith("zoo_plugin_")]:
        del sys.modules[module]
    plugins._plugins.clear()


@pytest.fixture(autouse=True)
def _table_as_it_was():
    """Leave no plugin of a test behind: other tests look at all that is registered."""
    from zoo.registry import plugins
    from zoo.registry import table as core

    declared, entries = ({k: dict(v) for k, v in table.items()} for table in (core._declared, core._entries))
    loaded = dict(plugins._plugins)
    yield
    for kind, found in core._entries.items():
        for name in set(found) - set(entries[kind]) - set(declared[kind]):  # those declared were only imported
            del found[name]
        core._declared[kind].clear()
        core._declared[kind].update(declared[kind])
    plugins._plugins.clear()
    plugins._plugins.update(loaded)


@pytest.fixture(autouse=True)
def _nothing_is_traced():
    """Fail a test that leaves tracing or profiling on: later ones of the process would take several times as long."""
    before = tracemalloc.is_tracing(), sys.getprofile()
    yield
    assert (tracemalloc.is_tracing(), sys.getprofile()) == before


@pytest.fixture(autouse=True)
def _one_fix_is_tried(request, monkeypatch):
    """A refusal tries up to 40 fixes, in seconds. Here one, but in tests that look at them: the mark `fixes`."""
    from zoo.checking import checker

    if "fixes" not in request.keywords:
        monkeypatch.setattr(checker, "_MOST_TRIES", 1)


class _Deprecated(logging.Handler):
    """Keeps what a library logs about names and options that go."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "deprecat" not in text.lower():
            return
        callers = {str(frame.f_globals.get("__name__")) for frame, _ in walk_stack(None)}
        ours = any(name.startswith("zoo.") for name in callers)  # a test may call transformers as it likes
        if ours and "transformers.generation.candidate_generator" not in callers:  # which warns of its own calls
            self.found.append(f"{record.name}: {text}")


@pytest.fixture(autouse=True)
def _nothing_deprecated(request):
    """Fail where we use what transformers logs as going; Python's own warnings of that kind are not looked at."""
    told, log = _Deprecated(), logging.getLogger("transformers")
    log.addHandler(told)
    yield
    log.removeHandler(told)
    assert not told.found or request.config.getoption("pythonwarnings"), told.found


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    for place in (os.environ.get("ZOO_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"):
        if place and Path(place).is_dir():
            return Path(place)
    pytest.skip("no real data here: set ZOO_DATA to its folder")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE trained on the questions and answers above."""
    from zoo.text.tokenizer import train_tokenizer

    return train_tokenizer([f"{q} {a}" for q in QUESTIONS for a in ANSWERS] * 3, 360, "plain")


def tiny_slots(**slots) -> dict:
    """Slots of a tiny model with random weights: 32 px, 16 image tokens, width 32; keywords replace a slot."""
    return {
        "vision": {"name": "timm", "image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "depth": 2, "layer": -1},
        "pruner": {},
        "projector": {"name": "mlp"},
        "llm": {
            "name": "hf",
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 64,
            "max_positions": 256,
        },
        "adapter": {},
        **slots,
    }


@pytest.fixture
def make_model(tokenizer):
    """`make_model(seed=0, attention=, positions=, **slots) -> (model, processor)`, in eval mode and float32."""
    import torch

    from zoo.composed.model import ZooModel
    from zoo.loading.build import processor_for
    from zoo.model_config import ZooConfig

    own = copy.deepcopy(tokenizer)  # a test may set its template

    def make(seed: int = 0, attention: str = "sdpa", positions: str = "auto", **slots):
        torch.manual_seed(seed)
        config = ZooConfig(
            slots=tiny_slots(**slots),
            image_token_id=tokenizer.image_token_id,
            text_vocab_size=len(tokenizer),
            attention=attention,
            positions=positions,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = ZooModel(config).eval()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model, processor_for(model, own)

    return make


def picture(seed: int = 0, size: int = 32) -> np.ndarray:
    """A random uint8 image (size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def talk(question: str, answer: str, images: int = 1):
    """A dialog of one question and answer that shows `images` images first."""
    from zoo.registry import Dialog

    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return Dialog(
        [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    )


def sample(*pairs: tuple[str, str], images: int = 1, seed: int = 0, name: str = "s"):
    """A sample with a dialog for each (question, answer)."""
    from zoo.registry import Sample

    return Sample(name, [picture(seed + i) for i in range(images)], [talk(q, a, images) for q, a in pairs])
