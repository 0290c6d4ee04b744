import io
import json
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.data_places import shared
from zoo import registry
from zoo.data.image_store import open_store
from zoo.registry import ZooError
from zoo.settings.config import compose
from zoo.tasks.baselines import Commonest
from zoo.vision.images.decode import open_image

ROWS = [
    {"image": "a/0.png", "name": "red ball", "kinds": ["ball", "toy"], "count": {"dots": 2}, "looks": ["old", "new"]},
    {"image": "a/1.png", "name": "blue cup", "kinds": ["cup"], "count": {}, "looks": ["old"]},
    {"image": "b/2.png", "name": "green hat", "kinds": ["hat", "clothes"], "count": {"dots": 0}, "looks": ["new"]},
    {"image": "b/3.png", "name": "red ball", "kinds": ["ball"], "count": {"dots": 7}, "looks": ["old", "new"]},
]
NAME = {"ask": ["What is this?", "Name it."], "answer": "{name}"}


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (10, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for number, row in enumerate(ROWS):
        path = tmp_path / "images" / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return tmp_path


def load(folder, questions=None, **options):
    rows = {} if "paths" in options else {"file": str(folder / "table.jsonl")}
    node = {"name": "table", "images": str(folder / "images"), **rows, "questions": questions or {"name": NAME}}
    return registry.build("dataset", {**node, **options})


def said(dialog):
    user, assistant = dialog.messages
    return user["content"][-1]["text"], assistant["content"][0]["text"]


def asked(data, epochs=200):
    return [
        (index, d, *said(d)) for index in range(len(data)) for e in range(epochs) for d in data.get(index, e).dialogs
    ]


def test_names_what_the_row_says_in_all_wordings(folder):
    data = load(folder)
    assert len(data) == 4 and data.get(1).id == "train-a/1"
    found = {(index, question, answer) for index, _, question, answer in asked(data, 20)}
    assert found == {(i, q, row["name"]) for i, row in enumerate(ROWS) for q in NAME["ask"]}
    for index in range(4):
        assert (np.array(open_image(data.get(index).images[0])) == np.array(open_image(picture(index)))).all()


def test_half_of_the_claims_are_true_and_the_others_come_as_often_as_rows_give_them(folder):
    data = load(folder, {"is": {"ask": ["Is it a {claim}?"], "claim": "{name}"}})
    told = asked(data, 600)
    for index, dialog, question, answer in told:
        assert (question == f"Is it a {ROWS[index]['name']}?") == (answer == "yes") and dialog.task == "yes_no"
    assert abs(np.mean([a == "yes" for *_, a in told]) - 0.5) < 0.04  # 2,400 draws: 4 standard errors
    wrong = Counter(q for index, _, q, a in told if a == "no" and index == 1)
    assert abs(wrong["Is it a red ball?"] / wrong.total() - 2 / 3) < 0.12  # two of the three other rows


def test_a_list_gives_one_value_and_accepts_all(folder):
    questions = {
        "kind": {"ask": ["What?"], "answer": "{kinds}"},
        "fits": {"ask": ["Does {claim} fit?"], "claim": "{kinds}"},
    }
    for index, dialog, question, answer in asked(load(folder, questions), 50):
        own = ROWS[index]["kinds"]
        if dialog.kind == "kind":
            assert answer in own and dialog.answers == (own if len(own) > 1 else [])
        else:
            assert (question.removeprefix("Does ").removesuffix(" fit?") in own) == (answer == "yes")
    assert {a for i, d, _, a in asked(load(folder, questions), 50) if i == 0 and d.kind == "kind"} == {"ball", "toy"}


def test_options_hold_the_answer_once_and_are_named(folder):
    data = load(folder, {"which": {"ask": ["Is it {options}?"], "answer": "{name}", "options": 3}})
    for index, dialog, question, answer in asked(data, 50):
        assert answer == ROWS[index]["name"] and dialog.task == "choice"
        assert set(dialog.choices) == {"red ball", "blue cup", "green hat"} and len(dialog.choices) == 3
        assert question == f"Is it {', '.join(dialog.choices[:2])} or {dialog.choices[2]}?"
    assert len({said(data.get(0, e).dialogs[0])[0] for e in range(50)}) == 6  # all orders


def test_columns_are_worded_and_missing_ones_have_a_value(folder):
    many = {"ask": ["How many?"], "answer": "{count.dots}", "words": {"count.dots": {"7": "seven"}}}
    data = load(folder, {"many": many}, missing={"count.dots": "0"})
    assert [said(data.get(i).dialogs[0])[1] for i in range(4)] == ["2", "0", "0", "seven"]
    with pytest.raises(ZooError, match=r"table.jsonl:2: No column named 'count.dots'"):
        load(folder, {"many": many})


@pytest.mark.parametrize("words", [{"name": "red"}, {"name": {"red ball": ["a", "b"]}}])
def test_words_that_are_not_texts_of_values_are_refused(folder, words):
    with pytest.raises(ZooError, match=r"^questions.name.words.name.* must"):
        load(folder, {"name": NAME | {"words": words}})
    with pytest.raises(ZooError, match=r"^words.name.* must"):
        load(folder, words=words)


def test_each_where_and_only_choose_rows(folder):
    (folder / "images/old").mkdir()
    data = load(folder, {"name": NAME | {"only": {"kinds": ["ball", "cup"]}}}, each="looks", where={"looks": ["old"]})
    assert [data.rows[i]["image"] for i in data.asked] == ["a/0.png", "a/1.png", "b/3.png"]
    assert data.rows[0]["looks"] == "old"


def test_splits_by_a_column_do_not_overlap(folder):
    data = load(folder, eval_split="dev", eval_where={"count.dots": ["0", "7"]}, missing={"count.dots": "1"})
    dev = data.eval_split()
    names = [[part.rows[i]["image"] for i in part.asked] for part in (data, dev)]
    assert names == [["a/0.png", "a/1.png"], ["b/2.png", "b/3.png"]]
    assert dev.train_split().asked == data.asked
    assert [show(dev, e) for e in range(3)] == [show(dev, 0)] * 3  # the eval split asks the same in every epoch
    task = registry.build("task", {"name": "exact"})
    guess = Commonest(d for i in range(2) for d in data.get(i).dialogs).guess(dev.get(1).dialogs[0], task)
    assert task.score(dev.get(1).dialogs[0], guess)["accuracy"] == 1.0  # red ball is the first of the train answers


def show(data, epoch):
    return [(said(d), d.choices) for i in range(len(data)) for d in data.get(i, epoch).dialogs]


@pytest.mark.parametrize("kind", ["folder", "tar", "stored", "deflated"])
def test_paths_become_columns(folder, kind):
    images = folder / "images"
    if kind != "folder":
        path = folder / ("all.tar" if kind == "tar" else "all.zip")
        packed = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
        with tarfile.open(path, "w") if kind == "tar" else zipfile.ZipFile(path, "w", packed) as archive:
            for row in ROWS:
                add = archive.add if kind == "tar" else archive.write
                add(images / row["image"], row["image"])
        images = path
    assert open_store(str(images)).names() == [row["image"] for row in ROWS]
    question = {"where": {"ask": ["Where?"], "answer": "{place}"}}
    data = load(folder, question, images=str(images), paths="{place}/{number}.png", where={"number": ["1", "2", "3"]})
    assert [said(data.get(i).dialogs[0])[1] for i in range(3)] == ["a", "b", "b"]
    assert (np.array(open_image(data.get(2).images[0])) == np.array(open_image(picture(3)))).all()
    if kind == "deflated":
        member = data.store.find("a/0.png", "here")
        whole, at = images.read_bytes(), member.offset + 30 + len("a/0.png")
        images.write_bytes(whole[:at] + b"\x07" + whole[at + 1 :])  # a kind of block that there is not
        with pytest.raises(ZooError, match=r"cannot be read: .*a/0\.png cannot be unpacked"):
            open_image(member, "here")


def test_training_images_are_cut_and_mirrored_and_those_of_evaluation_are_not(folder):
    data = load(folder, crop=0.5, flip=True, eval_split="train_again", eval_where={"name": ["blue cup"]})
    whole = np.array(open_image(picture(0)))
    sizes, mirrored = set(), 0
    for epoch in range(40):
        part = np.array(open_image(data.get(0, epoch).images[0]))
        h, w, _ = part.shape
        sizes.add((h, w))
        places = [(y, x) for y in range(11 - h) for x in range(9 - w)]
        fits = [any((whole[y : y + h, x : x + w] == one).all() for y, x in places) for one in (part, part[:, ::-1])]
        assert any(fits)
        mirrored += not fits[0]
    assert 8 < mirrored < 32 and len(sizes) > 5 and min(h for h, _ in sizes) >= 5
    assert open_image(data.eval_split().get(0).images[0]).size == (8, 10)
    first, again = (np.array(open_image(data.get(0, 3).images[0])) for _ in range(2))
    assert (first == again).all()


def test_draws_some_questions_in_training_and_asks_all_in_evaluation(folder):
    questions = {k: {"ask": [k], "answer": "{name}"} for k in "abc"}
    data = load(folder, questions, per_image=2, eval_split="dev", eval_where={"name": ["blue cup"]})
    kinds = [tuple(d.kind for d in data.get(0, e).dialogs) for e in range(60)]
    assert set(kinds) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert [d.kind for d in data.eval_split().get(0).dialogs] == ["a", "b", "c"]


BOX = {"ask": ["Where?"], "answer": "{box}", "bins": 32}


@pytest.mark.parametrize(
    ("box", "size", "words"),
    [
        ([0, 0, 640, 480], (640, 480), "0 0 31 31"),
        ([260, 177, 491, 376], (640, 480), "13 11 24 25"),
        ([-3, 1.5, 30, 700], (60, 600), "0 0 16 31"),  # annotated beyond the frame
    ],
)
def test_a_box_is_written_in_shares_of_the_image(folder, box, size, words):
    row = {**ROWS[0], "box": box, "width": size[0], "height": size[1]}
    (folder / "table.jsonl").write_text(json.dumps(row))
    (dialog,) = load(folder, {"q": BOX}).get(0).dialogs
    assert said(dialog) == ("Where?", words) and dialog.task == "boxes"


@pytest.mark.parametrize("box", [[1, 2, 3], [4, 1, 4, 9], ["1", 2, 3, 4], 5, [1, 2, float("nan"), 4]])
def test_a_box_that_is_none_names_its_row(folder, box):
    (folder / "table.jsonl").write_text(json.dumps({**ROWS[0], "box": box, "width": 10, "height": 10}))
    with pytest.raises(ZooError, match=r"table\.jsonl:1, box"):
        load(folder, {"q": BOX})


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        ({"q": BOX}, {"flip": True}, "questions.q asks for a box, which flip and crop would not move"),
        (
            {"q": {**BOX, "answer": "at {box}"}},
            {},
            "questions.q: bins is 2 or more, and goes with an answer that is one",
        ),
        ({"q": {"ask": ["What?"]}}, {}, "questions.q: give either an answer or a claim"),
        ({"q": {"answer": "{name}"}}, {}, "questions.q: ask is empty"),
        ({"q": {"ask": ["Is it?"], "claim": "{name}"}}, {}, r"must have \{claim\}"),
        ({"q": {"ask": ["{options}?"], "answer": "{name}"}}, {}, "names options, and options is 0"),
        ({"q": {"ask": ["?"], "answer": "{name}", "options": 5}}, {}, "options is 5, and the rows give 3 answers"),
        ({"q": {"ask": ["?"], "answer": "{nam}"}}, {}, r"table.jsonl:1: No column named 'nam'. Did you mean 'name'\?"),
        ({"q": {"ask": ["{nam}?"], "answer": "{name}"}}, {}, "No column named 'nam'"),
        ({"q": {"ask": ["?"], "answer": "{name"}}, {}, "cannot be read"),
        ({"q": {"ask": ["?"], "answer": "{kinds} {looks}"}}, {}, "kinds and looks, which both are lists"),
        ({"q": {"ask": ["?"], "answer": "{count}"}}, {}, "table.jsonl:1, count: a text or a number is needed"),
        ({"q": {"ask": ["{claim}?"], "claim": "x"}}, {}, "all rows give the same claim"),
        (None, {"where": {"name": ["nothing"]}}, "has no row that a question applies to"),
        (None, {"crop": 1.0}, r"crop must be in \[0, 1\)"),
        (None, {"file": ""}, "give one of file and paths"),
        (None, {"file": "", "paths": "{a}/{b}/{c}.png"}, "is named as"),
        (None, {"file": "", "paths": "{a}/{a}.png"}, "is there twice"),
    ],
)
def test_mistakes_are_named(folder, questions, options, message):
    with pytest.raises(ZooError, match=message):
        data = load(folder, questions, **options)
        data.get(0)


def test_a_misspelt_template_is_an_error(folder):
    with pytest.raises(ZooError, match="answr"):
        load(folder, {"q": {"ask": ["?"], "answr": "{name}"}})


def test_zip_archives_that_cannot_be_read_are_refused(folder):
    (folder / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ZooError, match="cannot be read as a zip archive"):
        open_store(str(folder / "bad.zip"))
    with zipfile.ZipFile(folder / "odd.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", picture(0))
    with pytest.raises(ZooError, match="packed by another method"):
        open_store(str(folder / "odd.zip"))
    with zipfile.ZipFile(folder / "long.zip", "w") as archive:
        archive.writestr("a.png", picture(0))
    data = bytearray((folder / "long.zip").read_bytes())
    at = data.index(b"PK\x01\x02")  # the entry of the central directory: bytes 20 to 24 state the packed size
    data[at + 20 : at + 24] = (1 << 31).to_bytes(4, "little")
    (folder / "long.zip").write_bytes(data)
    with pytest.raises(ZooError, match="states 2,147,483,648 bytes"):
        open_store(str(folder / "long.zip"))


def test_a_zip_member_that_states_no_size_unpacks_to_nothing(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 16))
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02") + 24  # the unpacked size in the list of members
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    assert open_store(str(path)).find("a.png", "a record")() == b""


PRESETS = {
    "emoji": (2460, 345),
    "emoji_concepts": (183, 183),
    "emoji_style": (687, 0),
    "emoji_both": (96, 96),
    "sign_digits": (1634, 92),
    "bccd": (205, 87),
    "bccd_boxes": (194, 85),
    "omniglot": (2176, 544),
    "mulberry": (2763, 334),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_read_the_public_data(name, monkeypatch):
    folder = {"emoji_concepts": "emoji", "emoji_style": "emoji", "emoji_both": "emoji", "bccd_boxes": "bccd"}.get(
        name, name
    )
    monkeypatch.setenv("ZOO_DATA", str(shared(folder).parent))
    data = registry.build("dataset", compose("train", [f"data=[{name}]"]).data[name])
    dev = data.eval_split()
    assert (len(data), len(dev) if dev else 0) == PRESETS[name]
    for part in filter(None, (data, dev)):
        for index in range(0, len(part), max(1, len(part) // 5)):
            sample = part.get(index)
            assert open_image(sample.images[0]).mode == "RGB" and sample.dialogs
            assert not any(brace in said(d)[0] for d in sample.dialogs for brace in "{}")


def test_no_concept_and_no_writer_is_in_two_splits(monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(shared("emoji").parent))
    train, dev, style = (
        registry.build("dataset", compose("train", [f"data=[{name}]"]).data[name])
        for name in ("emoji", "emoji_concepts", "emoji_style")
    )
    ids = [{row["id"] for row in data.rows} for data in (train, dev, style)]
    assert not ids[0] & ids[1] and ids[2] <= {row["id"] for row in train.rows} | ids[2] and not ids[2] & ids[1]
    assert {row["styles"] for row in train.rows} == {"noto", "blob"} and {r["styles"] for r in style.rows} == {"fx"}


def test_the_check_takes_no_wording_for_a_file(folder):
    from omegaconf import OmegaConf

    from zoo.checking.data_check import check_data

    long = {"ask": ["Which of all things in this picture is it? " * 9], "answer": "{name}"}
    files = {"file": str(folder / "table.jsonl"), "images": str(folder / "images")}
    node = {"name": "table", **files, "questions": {"q": long}, "seed": 0}
    wordy = {"name": "chat_json", "file": files["file"], "prompt": "{name}? " * 60, "question_field": "name"}
    data = {"t": node, "c": {**wordy, "answer_field": "name"}}
    cfg = OmegaConf.create({"data": data, "task": {}, "stages": {}, "skip_broken": False, "limit": None})
    assert check_data(cfg, []) == []


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_image_of_a_zip_with_other_bytes_than_it_states_is_refused(tmp_path, packed):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("a.png", bytes(range(200)))
    assert open_store(str(path)).find("a.png", "here")() == bytes(range(200))
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"x.zip::a.png (has other bytes|cannot be unpacked)"):
        open_store(str(path)).find("a.png", "here")()


def test_a_seed_may_be_negative(folder):
    one, other = (load(folder, flip=True, seed=seed).get(0) for seed in (-1, -1))
    assert one.dialogs == other.dialogs
    scenes = registry.build("dataset", {"name": "scenes", "scenes": 2, "seed": -1})
    assert scenes.get(0).dialogs == scenes.get(0).dialogs
