"""Samples longer than the LLM's positions or a stage's limit: refused, or cut without loss of an image or an answer."""

import json

import numpy as np
import pytest

from tests.conftest import sample
from tests.test_broken_records import GOOD, png
from tests.train_builders import config, recipe
from zoo.evaluation.evaluate import evaluate
from zoo.registry import IGNORE_INDEX, LengthError, RecordError, ZooError
from zoo.runs.folder import read_metrics
from zoo.runs.lengths import Room, length_of, require_positions, room_of, shorten
from zoo.settings.stage import Stage
from zoo.text.batch import EncodedSample
from zoo.training.loop import Run

IMAGE = 3


def test_length_is_that_of_the_longest_dialog(make_model):
    processor = make_model()[1]
    dialogs = [("is there a red circle?", "yes"), ("what color is the square? " * 4, "blue"), ("how many?", "two " * 9)]
    together = processor.encode(sample(*dialogs))
    alone = [processor.encode(sample(d)) for d in dialogs]
    assert length_of(together) == max(map(len, alone)) < len(together)


def naive(row, limit, images):
    """A loop over tokens: what is left of a row of one dialog or several, or None."""
    positions = np.arange(len(row)) if row.positions is None else row.positions
    blocks = np.zeros(len(row), dtype=int) if row.blocks is None else row.blocks
    kept = [i for i in range(len(row)) if positions[i] < limit]
    if any(row.input_ids[i] in images for i in range(len(row)) if i not in kept):
        return None
    answered = {blocks[i] for i in kept if row.labels[i] != IGNORE_INDEX}
    if not answered:
        return None
    return [i for i in kept if blocks[i] == 0 or blocks[i] in answered]


def test_cutting_is_what_a_loop_over_tokens_says():
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        prefix, several = int(random.integers(1, 6)), bool(random.integers(2))
        lengths = random.integers(1, 9, size=int(random.integers(2, 4)) if several else 1)
        blocks = np.repeat(np.arange(len(lengths) + 1), [prefix, *lengths])
        positions = np.concatenate([np.arange(prefix), *(prefix + np.arange(n) for n in lengths)])
        ids = random.integers(5, 9, size=len(blocks))
        ids[: random.integers(0, prefix + 1)] = IMAGE
        labels = np.where((random.random(len(blocks)) < 0.4) & (blocks > 0), ids, IGNORE_INDEX)
        packed = {"positions": positions, "blocks": blocks} if several else {}
        row, limit = EncodedSample(ids, labels, [], **packed), int(random.integers(1, 14))
        if length_of(row) <= limit:
            assert shorten(row, limit, [IMAGE]) is row
            continue
        wanted = naive(row, limit, [IMAGE])
        outcomes.add((several, wanted is None))
        if wanted is None:
            with pytest.raises(LengthError, match="too many"):
                shorten(row, limit, [IMAGE])
        else:
            found = shorten(row, limit, [IMAGE])
            assert found.input_ids.tolist() == ids[wanted].tolist() and found.labels.tolist() == labels[wanted].tolist()
            assert length_of(found) <= limit and (found.labels != IGNORE_INDEX).any()
    assert len(outcomes) == 4


def test_an_answer_of_a_pair_is_never_lost():
    ids, labels = np.arange(10, 18), np.full(8, IGNORE_INDEX)
    pairs = np.array([-1, -1, -1, 0, 0, -1, 1, 1])
    blocks, positions = np.array([0, 0, 1, 1, 1, 2, 2, 2]), np.array([0, 1, 2, 3, 4, 2, 3, 4])
    row = EncodedSample(ids, labels, [], positions=positions, blocks=blocks, pairs=pairs)
    assert shorten(row, 4, [IMAGE]).input_ids.tolist() == [10, 11, 12, 13, 15, 16]
    with pytest.raises(LengthError, match="an answer of a pair would be lost"):
        shorten(row, 3, [IMAGE])


def test_the_room_of_a_stage(make_model):
    processor = make_model()[1]
    assert room_of(Stage(steps=1), 64, processor).limit == 64
    assert room_of(Stage(steps=1, max_length=30), 64, processor).what == "the stage's max_length"
    assert room_of(Stage(steps=1), None, processor).limit is None
    with pytest.raises(ZooError, match="max_length=65 is more than the 64 positions"):
        room_of(Stage(steps=1, max_length=65), 64, processor)
    with pytest.raises(ZooError, match="max_length=16 has no room for an image of 16 tokens"):
        require_positions(Stage(steps=1, max_length=16), 64, 16)
    with pytest.raises(ZooError, match="too_long=cut would cut the answers of student and teacher differently"):
        Stage(steps=1, too_long="cut", teacher="scenes_tiny")
    long = processor.encode(sample(("what?", "yes " * 60)))
    with pytest.raises(LengthError, match=r"\d+ tokens, images included, are too many: the LLM's positions are 20"):
        Room(20).fit(long)


@pytest.fixture
def place(tmp_path):
    """Eight records, two of them of some 150 tokens."""
    (tmp_path / "a.png").write_bytes(png())
    long = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat " * 60}]
    records = [{"id": f"r{i}", "image": "a.png", **GOOD} for i in range(6)]
    records += [{"id": f"long{i}", "image": "a.png", "conversations": long} for i in range(2)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def run(place, name, stage, *more):
    words = recipe(place, {"tune": f"steps: 4, batch_size: 4, train: [all], {stage}"}, name)
    data = ["data=[chat_json]", f"data.chat_json.file={place / 'd.jsonl'}", "llm.max_positions=96"]
    with Run(config(words, *data, f"run.folder={place / name}", *more)) as made:
        made.train()
    return made


def test_a_run_refuses_leaves_out_or_cuts(place):
    with pytest.raises(
        RecordError, match=r"data 'chat_json', .*d.jsonl:[78], sample 'long\d': \d+ tokens.*positions are"
    ):
        run(place, "refuse", "")
    skipped = run(place, "skip", "skip_broken: true, max_length: 80")
    listed = read_metrics(skipped.folder.skipped)
    assert {(r["id"], r["kind"]) for r in listed} == {("long0", "length"), ("long1", "length")}
    cut = run(place, "cut", "too_long: cut")
    assert not cut.folder.skipped.exists() and len(read_metrics(cut.folder.metrics)) == 4


def test_evaluation_names_what_is_too_long_and_stays_within_the_positions(make_model):
    model, processor = make_model(llm={"name": "hf", "hidden_size": 32, "num_layers": 2, "num_heads": 2,
                                       "intermediate_size": 64, "max_positions": 40})  # fmt: skip

    class Two:
        def __len__(self):
            return 2

        def get(self, index, epoch=0):
            return sample(("what? " * (1, 30)[index], "yes"), name=f"n{index}", seed=index)

    with pytest.raises(RecordError, match=r"data 'two', record 1, sample 'n1': the question has .* has 40 positions"):
        evaluate(model, processor, {"two": Two()}, baselines=False)
    result = evaluate(model, processor, {"two": Two()}, skip_broken=True)
    assert [r["id"] for r in result.predictions] == ["n0"] and [r["id"] for r in result.skipped] == ["n1"]
    assert all(line.blind is not None and line.blind.n == line.score.n for line in result.lines)


def test_teaching_leaves_out_what_it_may(make_model):
    """Samples that cannot be read, and those that the teacher has no positions for."""
    from zoo.runs.left_out import Sieve
    from zoo.training.teach import encoded

    processor = make_model()[1]
    good, long = sample(("what?", "yes"), name="good"), sample(("what?", "yes " * 60), name="long")
    unread = RecordError("no JSON", data="d", where="f:1")
    sieve = Sieve(True, 0.1, "zoo teach")
    batch = [(one.id.encode(), one) for one in sieve.sound([good, unread, long])]
    assert [key for key, _ in encoded(processor, batch, sieve, Stage(steps=1), 60)] == [b"good"]
    assert [line["kind"] for line in sieve.lines] == ["record", "length"] and sieve.seen == 3
    assert sieve.excess() is None
    sieve.seen = 100
    sieve.most = 0.01
    assert "zoo teach had to leave out 2 of 100 records" in str(sieve.excess())
    with pytest.raises(RecordError, match="f:1: no JSON"):
        list(Sieve(False, 0.1, "zoo teach").sound([good, unread]))
