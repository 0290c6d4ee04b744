"""Every source of weights, trained by every optimiser, saved and loaded: the same numbers.

And the folder holds what changed, and no more. Every source has one optimiser on one process and the other on two, in
turns; `zoo bench roundtrip` runs all of them, and shows the same as a table.
"""

import json
import re

import pytest

from tests.killed_runs import SERVER, served
from zoo.benches.roundtrip_trial import OPTIMIZERS, SOURCES, compare, train, train_in_two, write_checkpoints
from zoo.cli.bench import main

CASES = [(source, OPTIMIZERS[(i + 1) % len(OPTIMIZERS)]) for i, source in enumerate(SOURCES)]
TWO = [(source, OPTIMIZERS[i % len(OPTIMIZERS)], "two") for i, source in enumerate(SOURCES)]
TWO += [("hf tied", "adamw", "sharded"), ("published", "muon_adamw", "sharded")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roundtrip")
    write_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def trained_by_two(root):
    """One group of two processes for all: most of the time would be that of starting them."""
    with served():
        train_in_two(root, TWO, SERVER)
    return root


def right(found, source):
    assert found.loss <= 1e-6 and found.logits <= 1e-6
    assert not found.lost, "trained and not saved"
    assert not found.spare, "saved and not trained"
    assert found.saved < found.weights if SOURCES[source].own != ("",) else found.saved == found.weights
    if source in ("timm", "open_clip", "preset"):
        assert found.refusal, "no published layout has such an encoder"
    else:
        assert found.exported is not None and found.exported <= 1e-5, found.refusal


@pytest.mark.parametrize(("source", "optimizer"), CASES)
def test_one_process(root, source, optimizer):
    train(root, source, optimizer)
    right(compare(root, source, optimizer), source)


@pytest.mark.parametrize(("source", "optimizer", "how"), TWO)
def test_two_processes(trained_by_two, source, optimizer, how):
    right(compare(trained_by_two, source, optimizer, how), source)


def test_the_bench_shows_it_as_a_table(tmp_path, capsys):
    words = ["sources=published", "optimizers=adamw", "processes=one", f"json={tmp_path / 'rows.json'}"]
    assert main(["roundtrip", *words]) == 0
    rows = {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert list(rows) == ["published, adamw, one", "published, adamw, one, exported"]
    assert all(row["reached"] for row in rows.values())
    assert re.fullmatch(r"\d+ of \d+ weights saved", rows["published, adamw, one"]["note"])
    assert "reached" in capsys.readouterr().out
