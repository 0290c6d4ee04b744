"""Tasks that ask for scores and hidden states; that batches and parts change no number; recall and reranking."""

import numpy as np
import pytest
import torch

from tests.conftest import sample
from zoo.data.retrieval import TASKS
from zoo.evaluation.evaluate import evaluate
from zoo.evaluation.predict import Question, answer
from zoo.registry import Dialog, ZooError, build


def recall(**options):
    return build("task", {"name": "recall", **options})


def state(group, shown, vector):
    content = [{"type": "image"}] if shown else [{"type": "text", "text": "t"}]
    dialog = Dialog([{"role": "user", "content": content}], meta={"group": group})
    return recall().score(dialog, vector) | {"_state": vector}


def test_a_turn_may_be_a_text():
    dialog = Dialog([{"role": "user", "content": "one word:"}], meta={"group": 1})
    assert recall().score(dialog, [0.0])["_shown"] == 0


def test_recall_is_that_of_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    n, texts = 23, rng.normal(size=(23, 6))
    pictures = texts + rng.normal(size=(23, 6))
    rows = [state(i, shown, v.tolist()) for shown, some in ((1, pictures), (0, texts)) for i, v in enumerate(some)]
    order = rng.permutation(len(rows))
    scores = recall(at=[1, 3]).summarise([rows[i] for i in order])

    def naive(ours, theirs, k):
        def cos(a, b):
            return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

        hits = [sorted(range(n), key=lambda j, i=i: -cos(ours[i], theirs[j]))[:k].count(i) for i in range(n)]
        return sum(hits) / n

    for name, ours, theirs in (("text", pictures, texts), ("image", texts, pictures)):
        for k in (1, 3):
            assert scores[f"{name}@{k}"].value == pytest.approx(naive(ours, theirs, k)) and scores[f"{name}@{k}"].n == n
    alike = recall().summarise([row | {"_state": [1.0, 2.0]} for row in rows])
    assert all(score.value == 0 for metric, score in alike.items() if metric.endswith("@1"))


def test_reranking_is_by_how_much_likelier_yes_is():
    task = build("task", {"name": "rerank", "at": [1, 2]})

    def row(group, answer, yes, no):
        turns = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return task.score(Dialog(turns, meta={"group": group}), {"yes": yes, "no": no})

    rows = [row("a", "yes", -1.0, -2.0), row("a", "no", -0.5, -0.5), row("a", "no", -3.0, -1.0)]  # the right one leads
    rows += [row("b", "yes", -1.0, -1.0), row("b", "no", -1.0, -1.0)]  # a tie counts as lost
    rows += [row("c", "no", -1.0, -1.0)]  # nothing to find
    scores = task.summarise(rows)
    assert {k: s.value for k, s in scores.items()} == {"recall@1": 0.5, "recall@2": 1.0, "mrr": 0.75}
    assert scores["mrr"].n == 2
    assert task.summarise(rows[:1])["recall@1"].stderr == 0.0


@pytest.mark.parametrize(
    ("task", "dialog", "error"),
    [
        ("recall", Dialog([]), 'needs meta\\["group"\\]'),
        ("rerank", Dialog([]), 'needs meta\\["group"\\]'),
        ("rerank", Dialog([], answers=["perhaps"], meta={"group": 1}), "needs the reference 'yes' or 'no', got"),
    ],
)
def test_data_that_does_not_say_what_is_asked(task, dialog, error):
    with pytest.raises(ZooError, match=error):
        build("task", {"name": task}).score(dialog, {"yes": 0.0, "no": 0.0})


PARTS = [
    {},
    {"pruner": {"fastv": {"name": "fastv", "keep_ratio": 0.3, "layer": 1}}},
    {"pruner": {"prumerge": {"name": "prumerge", "score": "column_mean"}}},
    {"adapter": {"mole": {"name": "mole", "rank": 2}}},
]


@pytest.mark.parametrize("slots", PARTS, ids=["plain", "inside", "before", "adapter"])
def test_numbers_of_a_batch_are_those_of_each_alone(make_model, slots):
    model, processor = make_model(**slots)
    made = [sample(("is there a red circle?", "yes"), ("what color is the square?", "blue"), seed=i) for i in range(2)]
    made.append(sample(("describe the picture.", "red"), images=0))
    dialogs = [(s, d) for s in made for d in s.dialogs]
    for mode, more in (("scores", {"candidates": ("yes", "a red circle")}), ("hidden", {}), ("hidden", {"layer": 1})):
        asked = [Question(s, d, mode, 0, (i,), **more) for i, (s, d) in enumerate(dialogs)]
        together = [said for _, said in answer(model, processor, asked, batch_size=5)]
        alone = [said for q in asked for _, said in answer(model, processor, [q], batch_size=1)]
        for a, b in zip(together, alone, strict=True):
            ours, theirs = (list(x.values()) if mode == "scores" else x for x in (a, b))
            assert len(ours) == (2 if mode == "scores" else 32)
            assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=2e-4)
        assert mode != "hidden" or any(abs(x - y) > 1e-3 for x, y in zip(together[0], together[1], strict=True))
    # They are what the model itself gives.
    row = processor.encode_prompt(*dialogs[0])
    batch = {k: v for k, v in processor.collate([row]).items() if k not in ("labels", "targets")}
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    one = next(said for _, said in answer(model, processor, [Question(*dialogs[0], "hidden", 0)], batch_size=1))
    assert torch.allclose(torch.tensor(one), out.last_hidden_state[0, -1], atol=1e-5)
    with pytest.raises(ZooError, match="layer must be at most 2, the layers of this LLM, got 7"):
        list(answer(model, processor, [Question(*dialogs[0], "hidden", 0, layer=7)], batch_size=1))


@pytest.mark.parametrize(("task", "metric", "n"), [("recall", "text@1", 6), ("rerank", "mrr", 6)])
def test_both_are_scored_on_drawn_pairs(make_model, task, metric, n):
    model, processor = make_model()
    data = build("dataset", {"name": "retrieval", "task": task, "pairs": 6, "others": 2, "size": 32})
    result = evaluate(model, processor, {"pairs": data}, batch_size=4)
    line = next(line for line in result.lines if line.metric == metric)
    assert line.score.n == n and 0 <= line.score.value <= 1 and line.blind is not None and line.majority is None
    assert "state" not in result.predictions[0] and len(result.predictions) == (12 if task == "recall" else 18)
    said = result.predictions[0]["prediction"]
    assert said == "32 numbers" if task == "recall" else set(said) == {"yes", "no"}


def test_a_model_whose_numbers_are_nan_finds_nothing():
    states = [{"_group": i // 2 / 8, "_shown": float(i % 2), "_state": [float("nan")] * 4} for i in range(8)]
    found = build("task", {"name": "recall", "at": [1, 3]}).summarise(states)
    assert {score.value for score in found.values()} == {0.0}
    ranked = [{"_group": i // 4 / 8, "_right": float(i % 4 == 0), "_score": float("nan")} for i in range(8)]
    found = build("task", {"name": "rerank"}).summarise(ranked)
    assert (found["recall@1"].value, found["mrr"].value) == (0.0, 0.25)


def test_captions_that_two_pictures_have_fit_both():
    data = {t: build("dataset", {"name": "retrieval", "task": t, "pairs": 60, "difficulty": 0}) for t in TASKS}
    for some in data.values():  # three captions for all pictures
        some._pair = lambda index, own=some._pair: (own(index)[0], f"caption {index % 3}")
    asked = [d for i in range(60) for d in data["rerank"].get(i).dialogs]
    fits = [d.messages[0]["content"][-1]["text"].endswith(f"caption {i // 5 % 3}") for i, d in enumerate(asked)]
    assert [d.messages[-1]["content"][0]["text"] == "yes" for d in asked] == fits and sum(fits) == 2 * 60
    groups = [data["recall"].get(i).dialogs[0].meta["group"] for i in range(120)]
    assert groups[:6] == groups[6:12] and len(set(groups)) == 3
