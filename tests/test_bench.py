"""`zoo bench` runs, says in every form what it measured, and tells a missed bound from a reached one."""

import json
import re
import sys
from functools import partial

import pytest

from zoo.benches import llava, measure, mixed, train
from zoo.benches.measure import Clock, Plain, Value, interleave
from zoo.benches.report import Report, Row, short
from zoo.benches.train import Options
from zoo.cli.bench import describe, main, overview, parse
from zoo.registry import ZooError

TINY = [
    "sizes=tiny",
    "compile=false",
    "rounds=2",
    "steps=1",
    "batch=2",
    "length=16",
    "labels=4",
    "large_vocab=96",
    "device=cpu",
]
BOUNDS = {
    "against (a), not compiled": 2.7,
    "against (b)": 1.15,
    "against (c)": 1.15,
    "against (b), vocabulary 96": 1.5,
    "against (c), vocabulary 96": 1.5,
    "mixed lengths: packed rows against random padding": 1.9,
    "mixed lengths: loss of a sample, packed against alone": 1e-5,
    "forward with all logits over transformers' own, fp32": 1.03,
    "waiting for data": 3.0,
}


def test_the_command_writes_every_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "matmul", partial(measure.matmul, size=64))  # the floor takes longest by far without AMX
    monkeypatch.setattr(mixed, "WINDOW", 8)
    files = [f"json={tmp_path / 'rows.json'}", f"markdown={tmp_path / 'rows.md'}"]
    assert main(["train", *TINY, *files]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert BOUNDS.items() <= {what: row["bound"] for what, row in rows.items()}.items()
    assert all(row["value"]["median"] >= 0 for row in rows.values())
    assert rows["our step"]["unit"] == " images/s"
    assert "thread(s)" in found["machine"]["machine"] and found["command"].startswith("zoo bench train sizes=tiny")
    written = (tmp_path / "rows.md").read_text()
    assert all(f"| {what} |" in written for what in rows)
    assert re.search(r"bound 2\.7x: (reached|MISSED)", written)
    assert "zoo bench train" in printed and "bound" in printed
    exact = rows["mixed lengths: loss of a sample, packed against alone"]
    assert exact["reached"], "a packed sample has another loss than alone"
    assert rows["waiting for data"]["unit"] == " %"


def test_only_what_is_asked_for_is_measured(monkeypatch):
    asked = []
    for name in train.SECTIONS:
        monkeypatch.setattr(train, f"_{name}", lambda place, sizes, name=name: asked.append(name) or [])
    train.run(parse("train", Options, ["only=wait,forward", "sizes=tiny", "device=cpu"]))
    assert asked == ["wait", "forward"]


def test_both_models_are_the_same_model():
    import torch

    sizes = llava.SIZES["tiny"]
    theirs, ours = llava.twins(sizes)
    plain = llava.batch(sizes, 2, 16, 4)
    with torch.no_grad():
        expected, got = theirs(**plain), ours(**llava.ours_of(plain), all_logits=True)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_the_check_of_packed_losses_sees_the_packing_trap(monkeypatch):
    """Rows of several samples without a mask between them: the gap must show."""
    import torch

    sizes = llava.SIZES["tiny"]
    samples = mixed._samples(6, sizes.vocab)
    model = llava.composed(sizes, images=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # at their first size, weights hardly let one token feel another
    assert mixed._largest_gap(model, samples) < mixed.TOLERANCE
    monkeypatch.setattr(model, "_packed_mask", lambda attention_mask, *_: attention_mask)
    assert mixed._largest_gap(model, samples) > 100 * mixed.TOLERANCE


def test_the_bounds_are_judged_by_the_median():
    value = Value.of([2.0, 3.0, 2.9, 2.8, 9.0])
    assert value.median == 2.9
    assert Row("x", value, bound=2.7).verdict == "bound 2.7x: reached 2.9x"
    assert Row("x", value, bound=3.6).verdict == "bound 3.6x: MISSED 2.9x"
    assert Row("x", value, bound=3.0, at_most=True).verdict == "bound <= 3x: reached 2.9x"
    assert Row("x", value).reached is None


def test_variants_take_turns():
    import torch

    turns = []
    variants = {name: Plain(lambda name=name: turns.append(name)) for name in "ab"}
    times = interleave(variants, Clock(torch.device("cpu"), 1), rounds=2, steps=1)
    assert turns == ["a", "a", "b", "b"] * 3  # a round to warm up; the first step of a turn is not counted
    assert [len(t.cpu) for t in times.values()] == [2, 2]


def test_cpu_time_counts_only_with_one_thread_on_a_cpu():
    import torch

    assert [Clock(torch.device(d), n).name for d, n in (("cpu", 1), ("cpu", 2), ("cuda", 1))] == ["cpu", "wall", "wall"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No bench named 'trian'. Did you mean 'train'"),
        (["train", "round=3"], "'round'. Did you mean 'rounds'"),
        (["train", "rounds=many"], "many"),
        (["train", "rounds=0"], "rounds must be at least 1, got 0"),
        (["train", "sizes=small"], "No sizes named 'small'"),
        (["train", "only=steps"], "No section named 'steps'. Did you mean 'step'"),
        (["train", "fast"], "takes no 'fast'. Its form: zoo bench train [key=value ...]"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ZooError, match=re.escape(message)):
        main(words)


def test_without_a_checkout_the_command_says_where_benches_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo.benches", None)  # as in an installed package
    monkeypatch.delitem(sys.modules, "zoo.benches.load", raising=False)
    with pytest.raises(ZooError, match="zoo bench load runs from a checkout of the repository"):
        main(["load"])


def test_help_lists_benches_and_options():
    assert "train" in overview()
    text = describe("train", Options)
    assert "rounds=9" in text and "turns of each variant" in text and "--markdown file" in text


def test_a_report_prints_without_a_terminal(capsys):
    report = Report("zoo bench x", rows=[Row("speed", Value(2.0, 1.9, 2.1), bound=2.7)], command="zoo bench x")
    report.print()
    assert "MISSED" in capsys.readouterr().out
    assert short(0.0000123) == "1.2e-05" and short(1234.5) == "1234" and short(2.345) == "2.35"


def test_people_who_chat_at_once_get_what_they_get_alone(capsys, tmp_path):
    rows = tmp_path / "rows.json"
    tiny = ["people=2", "tokens=2", "rounds=1", "threads=1", "layers=1", "width=32", "adapter=mole"]
    assert main(["threads", *tiny, f"json={rows}"]) == 0
    found = {row["what"]: row for row in json.loads(rows.read_text())["rows"]}
    assert found["at once: rounds in which everybody got the answer that they get alone"]["reached"]
    assert {"in turns", "at once", "batch"} == {what.partition(":")[0] for what in found}


def test_frozen_models_and_kept_features_are_measured(tmp_path):
    tiny = ["sizes=tiny", "rounds=1", "steps=1", "batch=2"]
    for name, more, bounds in (
        ("frozen", ["text=8", "compile=false", "only=mixed,memory"], {1.3, 0.8}),
        ("features", ["image_size=16", "side=1"], {0.6}),
    ):
        file = tmp_path / f"{name}.json"
        assert main([name, *tiny, *more, f"json={file}"]) == 0
        rows = json.loads(file.read_text())["rows"]
        assert {row["bound"] for row in rows if row["bound"]} == bounds
        assert all(row["value"]["median"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("word", "said"), [("rounds=abc", r"'rounds' of bench 'train' takes int \(default 9\), got 'abc'")]
)
def test_a_value_of_another_type_is_named_with_its_option(word, said):
    with pytest.raises(ZooError, match=said):
        parse("train", Options, [word])
