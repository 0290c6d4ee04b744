"""Pairs of answers: how records are read, what scenes make of them, and how a batch holds them."""

import json

import numpy as np
import pytest
import torch

from tests.conftest import sample, talk
from tests.test_chat_json import png, shape
from zoo import registry
from zoo.data.scenes import QUESTIONS
from zoo.registry import IGNORE_INDEX, Dialog, Sample, ZooError
from zoo.text.batch import pack


@pytest.fixture
def read(tmp_path):
    (tmp_path / "a.png").write_bytes(png())

    def read(*records, **options):
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
        return registry.build("dataset", {"name": "preference", "path": str(tmp_path / "pairs.jsonl"), **options})

    return read


def turn(role, text, llava=False):
    return {"from": role, "value": text} if llava else {"role": role, "content": text}


ASKED, RIGHT, WRONG = "Is it a dog?", "yes, a dog", "no, a cat"
FORMS = {
    "texts": {"prompt": ASKED, "chosen": RIGHT, "rejected": WRONG},
    "rlaif-v": {"question": ASKED, "chosen": RIGHT, "rejected": WRONG},
    "turns": {
        "prompt": [turn("user", ASKED)],
        "chosen": [turn("assistant", RIGHT)],
        "rejected": [turn("assistant", WRONG)],
    },
    "no prompt": {
        "chosen": [turn("user", ASKED), turn("assistant", RIGHT)],
        "rejected": [turn("user", ASKED), turn("assistant", WRONG)],
    },
    "prompt said twice": {
        "prompt": ASKED,
        "chosen": [turn("user", ASKED), turn("assistant", RIGHT)],
        "rejected": [turn("user", ASKED), turn("assistant", WRONG)],
    },
    "llava": {
        "conversations": [turn("human", ASKED, True)],
        "chosen": turn("gpt", RIGHT, True),
        "rejected": turn("gpt", WRONG, True),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_reads_all_forms_alike(read, form):
    got = read(FORMS[form] | {"image": "a.png", "id": "r7"}).get(0)
    assert got.id == "r7" and len(got.images) == 1
    assert [d.preference for d in got.dialogs] == ["chosen", "rejected"]
    for dialog, answer in zip(got.dialogs, (RIGHT, WRONG), strict=True):
        assert shape(dialog) == [("user", ["image", ASKED]), ("assistant", [answer])]


def test_a_mark_a_system_turn_and_earlier_turns(read):
    prompt = [turn("user", "<image>\nHello"), turn("assistant", "Hi"), turn("user", ASKED)]
    record = {"prompt": prompt, "chosen": RIGHT, "rejected": WRONG, "images": ["a.png"]}
    first, second = read(record, system="Be true.").get(0).dialogs
    wanted = [("system", ["Be true."]), ("user", ["image", "Hello"]), ("assistant", ["Hi"]), ("user", [ASKED])]
    assert shape(first) == [*wanted, ("assistant", [RIGHT])] and shape(second) == [*wanted, ("assistant", [WRONG])]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejectd": "c"}, r"pairs.jsonl:1: .*'rejected'. Did you mean 'rejectd'"),
        ({"chosen": "b", "rejected": "c"}, "has no prompt: none of prompt, question"),
        ({"prompt": "<image>", "chosen": "b", "rejected": "c"}, "1 <image> for 0 images"),
        ({"prompt": "a", "chosen": [turn("user", "b")], "rejected": [turn("user", "c")]}, "has no prompt"),
    ],
)
def test_a_record_that_is_no_pair_is_named(read, record, message):
    with pytest.raises(ZooError, match=message):
        read(record)


def test_an_image_in_a_field_that_is_not_read_is_not_left_out(read):
    record = {"prompt": ASKED, "chosen": RIGHT, "rejected": WRONG, "img": "a.png"}
    with pytest.raises(ZooError, match=r"pairs.jsonl:1: 'img' names the image 'a.png'.* Set image_field=img"):
        read(record)
    assert len(read(record, image_field="img").get(0).images) == 1


def test_rows_of_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {"question": ASKED, "chosen": RIGHT, "rejected": WRONG, "image": {"bytes": png(), "path": None}}
    datasets.Dataset.from_list([row, row]).to_parquet(tmp_path / "pairs.parquet")
    data = registry.build("dataset", {"name": "preference", "path": str(tmp_path / "pairs.parquet")})
    assert len(data) == 2 and data.get(1).images == [png()]
    assert shape(data.get(1).dialogs[1])[-1] == ("assistant", [WRONG])


def preferred(*pairs, images=1, seed=0, name="s"):
    """A sample with a pair of dialogs for each (question, chosen, rejected)."""
    one = sample(*[(q, a) for q, *both in pairs for a in both], images=images, seed=seed, name=name)
    for number, dialog in enumerate(one.dialogs):
        dialog.preference = "rejected" if number % 2 else "chosen"
    return one


PAIRS = ("is there a red circle?", "yes", "no"), ("what color is the square?", "blue", "red")


def texts(processor, batch):
    """Number -> the text of each answer in a batch, and the text of what is learnt."""
    ids, pairs = batch["input_ids"], batch["pair_ids"]
    decode = processor.tokenizer.decode
    found = {int(n): decode(ids[pairs == n]) for n in pairs.unique() if n >= 0}
    return found, decode(ids[batch["labels"] != IGNORE_INDEX])


def test_both_answers_share_the_image_and_only_the_chosen_one_is_learnt(make_model):
    model, processor = make_model()
    batch = processor.collate([processor.encode(preferred(*PAIRS)), processor.encode(preferred(PAIRS[1], seed=5))])
    eos = processor.tokenizer.eos_token
    found, learnt = texts(processor, batch)
    assert found == {n: f"{a}{eos}" for n, a in enumerate(["yes", "no", "blue", "red", "blue", "red"])}
    assert learnt == f"yes{eos}blue{eos}blue{eos}"
    assert len(batch["pixel_values"]) == 2 and (batch["input_ids"] == model.image_token_id).sum() == 2 * 16
    assert model(**batch).loss.isfinite()


def test_rows_of_their_own_hold_the_same_pairs(make_model):
    _, processor = make_model()
    whole = preferred(*PAIRS)
    rows = [processor.encode(Sample(whole.id, whole.images, [d])) for d in whole.dialogs]
    batch = processor.collate(rows)
    eos = processor.tokenizer.eos_token
    assert texts(processor, batch)[0] == {n: f"{a}{eos}" for n, a in enumerate(["yes", "no", "blue", "red"])}
    assert [sorted(set(row.tolist()) - {-1}) for row in batch["pair_ids"]] == [[0], [1], [2], [3]]
    with pytest.raises(ZooError, match="2 chosen and 1 rejected answers"):
        processor.collate(rows[:3])


def test_packed_samples_and_padding_on_the_left(make_model):
    _, processor = make_model()
    encoded = [processor.encode(preferred(*PAIRS)), processor.encode(sample(("what color is the square?", "blue")))]
    encoded.append(processor.encode(preferred((PAIRS[1][0], "green", "two"))))
    eos = processor.tokenizer.eos_token
    wanted = [f"{a}{eos}" for a in ("yes", "no", "blue", "red", "green", "two")]
    for rows in (pack(encoded, 400), pack(encoded, 90)):
        assert len(rows) < 3
        for side in ("left", "right"):
            found, learnt = texts(processor, processor.collate(rows, padding_side=side))
            assert sorted(found.values()) == sorted(wanted) and learnt.count("blue") == 2 and "red" not in learnt
            halves = {found[n]: found[n + 1] for n in found if n % 2 == 0}
            assert halves == {wanted[0]: wanted[1], wanted[2]: wanted[3], wanted[4]: wanted[5]}


def test_only_the_last_turn_is_compared(make_model):
    _, processor = make_model()
    turns = [
        turn("user", "is there a red circle?"),
        turn("assistant", "yes"),
        turn("user", "what color is the square?"),
    ]
    both = [Dialog([*turns, turn("assistant", a)], preference=p) for a, p in (("blue", "chosen"), ("red", "rejected"))]
    batch = processor.collate([processor.encode(Sample("s", [], both))])
    eos = processor.tokenizer.eos_token
    found, learnt = texts(processor, batch)
    assert found == {0: f"blue{eos}", 1: f"red{eos}"} and learnt == f"blue{eos}"


def test_other_dialogs_may_stand_between_pairs_but_halves_may_not_miss(make_model):
    _, processor = make_model()
    one = preferred(PAIRS[0])
    one.dialogs.insert(0, talk("how many shapes are there?", "two"))
    found, learnt = texts(processor, processor.collate([processor.encode(one)]))
    assert set(found) == {0, 1} and "two" in learnt
    with pytest.raises(ZooError, match="each chosen dialog must have its rejected one behind it"):
        processor.encode(Sample("s", one.images, one.dialogs[:2]))
    one.dialogs[1].preference = "choosen"
    with pytest.raises(ZooError, match=r"'choosen'. Did you mean 'chosen'"):
        processor.encode(one)


def pairs_of(questions=None, **options):
    asked = dict.fromkeys(QUESTIONS, 0) | (questions or {"exist": 4})
    node = {"name": "scenes", "pairs": True, "scenes": 200, "size": 32, "grid": 0, "questions": asked, **options}
    return registry.build("dataset", node)


def said(dialog):
    return dialog.messages[0]["content"][1]["text"], dialog.messages[1]["content"][0]["text"]


def test_scenes_give_pairs_about_absent_objects():
    data, absent = pairs_of(questions={"exist": 3, "caption": 1, "count": 1, "color": 1}), []
    for index in range(60):
        got, objects = data.get(index), data.scene(index)
        there = {f"{o['color']} {o['shape']}" for o in objects}
        for right, wrong in zip(got.dialogs[::2], got.dialogs[1::2], strict=True):
            assert (right.preference, wrong.preference, right.kind) == ("chosen", "rejected", wrong.kind)
            (question, good), (same, bad) = said(right), said(wrong)
            assert question == same and good != bad
            if right.kind == "exist":
                absent.append(question.removeprefix("is there a ").rstrip("?") not in there)
                assert (good, bad) == (("no", "yes") if absent[-1] else ("yes", "no"))
            if right.kind == "caption":
                told = bad.replace(" and ", ", ").split(", ")
                new = [t.split(" ", 2)[2] for t in told if t not in good]
                assert len(told) == len(objects) and len(new) == 1 and new[0] not in there
            if right.kind == "count":
                assert abs(int(good) - int(bad)) == 1
    assert 0.4 < np.mean(absent) < 0.6
    assert [d.preference for d in pairs_of().get(0).dialogs] == ["chosen", "rejected"] * 4


def test_pairs_are_a_function_of_seed_epoch_and_index():
    data, again, other = pairs_of(), pairs_of(), pairs_of(seed=1)
    order = [(3, 0), (150, 2), (0, 1)]
    wanted = [list(map(said, data.get(*at).dialogs)) for at in order]
    assert wanted == [list(map(said, again.get(*at).dialogs)) for at in reversed(order)][::-1]
    assert wanted != [list(map(said, other.get(*at).dialogs)) for at in order]


def test_scenes_have_no_wrong_boxes():
    with pytest.raises(ZooError, match=r"set questions\.box to 0"):
        pairs_of(questions={"box": 1})


def test_evaluation_asks_for_chosen_answers_only(make_model):
    from zoo.evaluation.evaluate import evaluate

    model, processor = make_model()
    data = pairs_of(split="eval", eval_scenes=4)
    torch.manual_seed(0)
    rows = evaluate(model, processor, {"pairs": data}, baselines=True).predictions
    assert len(rows) == 4 * 4 and all(row["answers"][0] in ("yes", "no") for row in rows)
