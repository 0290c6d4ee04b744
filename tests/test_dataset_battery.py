"""What every data set promises, over all registered names: the rules of `zoo test`."""

import json
import subprocess
import sys

import pytest

from tests.rules import keep
from tests.test_classes import NAMES as CLASSES
from tests.test_classes import folder as class_files
from tests.test_nlvr import folder as nlvr_files
from tests.test_table import NAME
from tests.test_table import folder as table_files
from tests.test_webdataset import pack, png, turns
from zoo import registry
from zoo.contracts.datasets import RULES, DatasetCase

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
        "retrieval": {"pairs": 12, "size": 32},
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


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_keeps_the_rule(name, rule, nodes):
    assert name in nodes, f"give {name!r} a small node in this file"
    keep(rule, DatasetCase("dataset", {"name": name, **nodes[name]}))


def test_importing_all_data_sets_needs_no_torch():
    code = "import sys\nfrom zoo import registry\n[registry.get('dataset', n) for n in registry.names('dataset')]\n"
    heavy = ["torch", "transformers", "timm", "open_clip", "datasets", "PIL"]
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
