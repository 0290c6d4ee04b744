"""What every data set promises, over all registered names."""

import json
import pickle
import subprocess
import sys

import pytest

from tests.test_classes import NAMES as CLASSES
from tests.test_classes import folder as class_files
from tests.test_nlvr import folder as nlvr_files
from tests.test_table import NAME
from tests.test_table import folder as table_files
from tests.test_webdataset import pack, png, turns
from zoo import registry
from zoo.registry import Dataset, Sample, StreamingDataset, ZooError
from zoo.vision.images.decode import open_image

class_files, nlvr_files, table_files = class_files, nlvr_files, table_files  # fixtures of other files, used below


@pytest.fixture
def nodes(tmp_path, class_files, nlvr_files, table_files):
    """A small node of each data set."""
    record = {"question": "What?", "answer": "that", "kind": "k"}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(record | {"id": f"n{i}"}) for i in range(5)))
    pair = {"prompt": "What?", "chosen": "that", "rejected": "this"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair | {"id": f"p{i}"}) for i in range(5)))
    packed = pack(
        tmp_path / "rows.tar", {f"{i}.{e}": d for i in range(5) for e, d in (("png", png(i)), ("json", turns("What?")))}
    )
    images, labels = (str(tmp_path / "{split}-") + end for end in ("images.gz", "labels"))
    return {
        "chat_json": {"file": str(tmp_path / "rows.jsonl")},
        "classes": {"images": images, "labels": labels, "classes": CLASSES},
        "hf": {"path": str(tmp_path / "rows.jsonl")},
        "nlvr": {"root": str(nlvr_files), "grid": 4},
        "preference": {"path": str(tmp_path / "pairs.jsonl")},
        "scenes": {"scenes": 300, "eval_scenes": 140, "size": 32},
        "table": {
            "file": str(table_files / "table.jsonl"),
            "images": str(table_files / "images"),
            "questions": {"name": NAME, "is": {"ask": ["{claim}?"], "claim": "{name}"}},
        },
        "webdataset": {"shards": str(packed)},
    }


@pytest.fixture(params=registry.names("dataset"))
def name(request):
    if request.param == "hf":
        pytest.importorskip("datasets")
    return request.param


@pytest.fixture
def data(name, nodes):
    assert name in nodes, f"give {name!r} a small node in this file"
    return registry.build("dataset", {"name": name, **nodes[name]})


def show(sample):
    """All of a sample that can be compared."""
    pixels = [open_image(image).tobytes() for image in sample.images]
    return sample.id, pixels, sample.dialogs, {k: v.tolist() for k, v in sample.targets.items()}


def test_keeps_the_contract(data):
    assert isinstance(data, Dataset) and not isinstance(data, StreamingDataset)
    assert len(data) > 1
    with pytest.raises(IndexError):
        data.get(len(data))


def test_samples_are_whole(data):
    ids = set()
    for index in range(min(len(data), 20)):
        sample = data.get(index)
        assert isinstance(sample, Sample) and sample.dialogs
        ids.add(sample.id)
        for image in sample.images:
            assert open_image(image).mode == "RGB"
        for value in sample.targets.values():
            assert len(value) == len(sample.images)
        for dialog in sample.dialogs:
            assert dialog.messages[-1]["role"] == "assistant" and dialog.messages[-1]["content"][0]["text"].strip()
            parts = [part["type"] for message in dialog.messages for part in message["content"]]
            assert set(parts) <= {"text", "image"} and parts.count("image") == len(sample.images)
            assert all(message["role"] in {"system", "user", "assistant"} for message in dialog.messages)
            assert json.loads(json.dumps(dialog.meta)) == dialog.meta
            assert not dialog.task or dialog.task in registry.names("task")
    assert len(ids) == min(len(data), 20)


def test_a_sample_depends_on_seed_epoch_and_index_alone(data, name, nodes):
    again = registry.build("dataset", {"name": name, **nodes[name]})
    order = [1, 0, len(data) - 1]
    for epoch in (0, 3):
        assert [show(data.get(i, epoch)) for i in order] == [show(again.get(i, epoch)) for i in order[::-1]][::-1]


def test_travels_to_another_process(data):
    copy = pickle.loads(pickle.dumps(data))
    assert show(copy.get(1, 2)) == show(data.get(1, 2))


def test_knows_its_training_split(data):
    train = data.train_split()
    assert len(train) == len(data) and show(train.get(0)) == show(data.get(0))


def test_options_are_described_and_misspelt_ones_named(name, nodes):
    for option in registry.get("dataset", name).options:
        assert option.doc, f"{option.name} has no comment"
        with pytest.raises(ZooError, match="Did you mean"):
            registry.build("dataset", {"name": name, **nodes[name], option.name + "x": 1})


def test_importing_all_data_sets_needs_no_torch():
    code = "import sys\nfrom zoo import registry\n[registry.get('dataset', n) for n in registry.names('dataset')]\n"
    heavy = ["torch", "transformers", "timm", "open_clip", "datasets", "PIL"]
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
