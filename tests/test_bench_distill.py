"""`zoo bench distill` measures what it says, and its two ways to a loss are the same loss."""

import json

import pytest

from zoo.benches import distill, divergence
from zoo.cli.bench import main
from zoo.registry import ZooError

TINY = ["positions=24", "vocab=80", "width=8", "image_tokens=6", "student=tiny", "batch=2", "length=16", "labels=4"]
TINY += ["k=5", "threads=1", "rounds=1", "steps=1", "device=cpu"]
BOUNDS = {
    "divergence: peak extra memory over naive": 0.2,
    "divergence: time over naive": 1.15,
    "divergence: difference of the loss, relative": 1e-5,
    "divergence: difference of gradients, relative": 1e-4,
    "relation: time over the same with logits held": None,
    "llava_kd step over student step + teacher forward": 1.1,
    "kl step over student step + teacher forward": None,
    "step from a stored teacher over the plain step, answers": 1.15,
    "step from a stored teacher over the plain step, answers and image tokens": None,
    "preference step over four forwards and two backwards, answers sharing their image": 1.1,
    "preference step over four forwards and two backwards, answers in rows of their own": 1.1,
    "upcycled step, 4 experts, 2 run: time over the dense step's, over the ratio of FLOPs": 1.2,
}


def test_the_command_writes_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "peaks", lambda *sizes: {"naive": 10.0, "chunked": 1.0})
    assert main(["distill", *TINY, f"json={tmp_path / 'rows.json'}"]) == 0
    rows = {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert {what: row["bound"] for what, row in rows.items()} == BOUNDS
    assert all(rows[what]["reached"] for what in BOUNDS if "difference" in what)
    note = rows["relation: time over the same with logits held"]["note"]
    assert float(note.rsplit(" ", 1)[1]) < 1e-5


def test_memory_is_that_of_a_fresh_process():
    """64 MB for each array of logits: in full at least three of them, in chunks less than half of that."""
    found = divergence.peaks(4096, 4096, 16)
    assert found["naive"] > 3 * 64 and found["chunked"] < 0.6 * found["naive"]


@pytest.mark.parametrize("words", [["student=tiniy"], ["only=kll"], ["rounds=0"]])
def test_mistakes_are_named(words):
    with pytest.raises(ZooError, match=r"tiny|kl|rounds"):
        main(["distill", *words])
    assert distill.Options().sections == list(distill.SECTIONS)
