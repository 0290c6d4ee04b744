import base64
import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.data_places import shared
from zoo import registry
from zoo.registry import ImageError, ZooError


def png(color=(200, 10, 10)):
    data = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png())
    return tmp_path


def load(folder, records, name="train.jsonl", **options):
    text = (
        json.dumps(records, indent=1)
        if ".json" in name[-8:] and ".jsonl" not in name
        else "\n".join(map(json.dumps, records))
    )
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return open_file(folder, name, **options)


def open_file(folder, name="train.jsonl", **options):
    node = {"name": "chat_json", "file": str(folder / name), "images": str(folder / "images"), **options}
    return registry.build("dataset", node)


def llava(text, image="a.png", **more):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "red"}]
    return {"id": "r1", **({"image": image} if image else {}), "conversations": turns, **more}


def shape(dialog):
    return [
        (m["role"], [p["text"] if p["type"] == "text" else p["type"] for p in m["content"]]) for m in dialog.messages
    ]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.jsonl.gz", "t.json.gz"])
def test_reads_llava_records_from_each_kind_of_file(folder, name):
    data = load(folder, [llava("<image>\nWhich colour?"), llava("Hello", image=None, id="t")], name)
    assert len(data) == 2
    sample = data.get(0)
    assert sample.id == "r1"
    assert [str(i) for i in sample.images] == [str(folder / "images" / "a.png")]
    assert shape(sample.dialogs[0]) == [("user", ["image", "Which colour?"]), ("assistant", ["red"])]
    assert data.get(1).images == [] and shape(data.get(1).dialogs[0])[0] == ("user", ["Hello"])


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("<image>\nQ", "a.png", ["image", "Q"]),
        ("Q\n<image>", "a.png", ["Q", "image"]),
        ("Q", "a.png", ["image", "Q"]),  # no mark: in front
        ("Q", ["a.png", "b.png"], ["image", "image", "Q"]),
        ("<image>\n<image>\nQ", ["a.png", "b.png"], ["image", "image", "Q"]),
        ("Left <image> right <image>?", ["a.png", "sub/c.png"], ["Left ", "image", " right ", "image", "?"]),
        ("Q", [], ["Q"]),
        ("Q", "", ["Q"]),
    ],
)
def test_places_images_where_the_marks_are(folder, text, images, expected):
    sample = load(folder, [llava(text) | {"image": images}]).get(0)
    assert shape(sample.dialogs[0])[0] == ("user", expected)
    assert len(sample.images) == expected.count("image")


@pytest.mark.parametrize(
    ("text", "images", "count"),
    [("<image><image> Q", "a.png", "2 <image> for 1 image"), ("<image> Q", [], "1 <image> for 0")],
)
def test_a_wrong_number_of_marks_names_record_and_line(folder, text, images, count):
    with pytest.raises(ZooError, match=rf"train.jsonl:2 \(record 'r1'\): {count}"):
        load(folder, [llava("fine"), llava(text) | {"image": images}])


def test_a_mark_in_an_answer_is_refused(folder):
    with pytest.raises(ZooError, match="turn 2: an assistant turn cannot have <image>"):
        load(folder, [{"image": "a.png", "conversations": [
            {"from": "human", "value": "Q"}, {"from": "gpt", "value": "<image>"}]}])  # fmt: skip


def test_reads_chat_messages_with_parts_and_images_of_their_own(folder):
    inline = "data:image/png;base64," + base64.b64encode(png()).decode()
    content = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "and"}, {"type": "image"},
               {"type": "image_url", "image_url": {"url": inline}}]  # fmt: skip
    record = {
        "images": ["a.png"],
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "ok"}]},
        ],
    }
    sample = load(folder, [record]).get(0)
    assert shape(sample.dialogs[0])[:2] == [("system", ["Be short."]), ("user", ["image", "and", "image", "image"])]
    assert [getattr(i, "name", i) for i in sample.images] == ["b.png", "a.png", png()]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": [{"type": "text"}]}, "turn 2: the text of a part is null"),
        ({"content": [{"type": "text", "content": "red"}]}, "turn 2: the text of a part is null"),
        ({"content": "", "tool_calls": [{"id": "1", "type": "function"}]}, "turn 2 has 'tool_calls'"),
        ({"content": "", "function_call": {"name": "look"}}, "turn 2 has 'function_call'"),
    ],
)
def test_what_would_be_lost_of_a_turn_is_refused(folder, turn, message):
    with pytest.raises(ZooError, match=message):
        load(folder, [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", **turn}]}])


def test_reads_columns_with_a_prompt_answers_kind_task_and_meta(folder):
    record = {
        "q": "What {is} it?",
        "a": ["cat", "dog", "dog"],
        "picture": "a.png",
        "type": "open",
        "organ": "HEAD",
        "by": "vqa",
    }
    data = load(
        folder, [record], question_field="q", answer_field="a", image_field="picture", kind_field="type",
        task_field="by", meta_fields=["organ"], prompt="{organ}: {question}\nOne word.", system="Help.",
    )  # fmt: skip
    dialog = data.get(0).dialogs[0]
    assert shape(dialog) == [
        ("system", ["Help."]),
        ("user", ["image", "HEAD: What {is} it?\nOne word."]),
        ("assistant", ["dog"]),
    ]
    assert (dialog.kind, dialog.task, dialog.answers, dialog.meta) == ("open", "vqa", record["a"], {"organ": "HEAD"})


def test_groups_records_that_begin_with_the_same_images(folder):
    records = [llava("A"), llava("B", image="b.png"), llava("<image>\nC"), llava("D <image>"), llava("E", image=None)]
    data = load(folder, records, group_by_image=True)
    texts = [[shape(d)[0][1][-1] for d in data.get(i).dialogs] for i in range(len(data))]
    # D's image stands behind its text, so it shares no prefix with A and C
    assert texts == [["A", "C"], ["B"], ["image"], ["E"]]


def test_dialogs_that_are_grouped_keep_the_ids_of_their_records(folder):
    records = [llava(text, id=name) for text, name in (("A", 7), ("B", "q8"), ("C", None))]
    sample = load(folder, [*records, llava("D", id="q9", image="b.png")], group_by_image=True).get(0)
    assert sample.id == "7" and [d.meta for d in sample.dialogs] == [{"id": "7"}, {"id": "q8"}, {}]


def test_split_is_part_of_the_name_or_a_column(folder):
    for split in ("train", "dev"):
        load(folder, [llava(f"Q {split}")], f"{split}.jsonl")
    data = open_file(folder, "{split}.jsonl", split="dev", eval_split="dev")
    assert shape(data.get(0).dialogs[0])[0][1][-1] == "Q dev"
    assert shape(data.train_split().get(0).dialogs[0])[0][1][-1] == "Q train"
    assert open_file(folder, "{split}.jsonl").eval_split() is None
    rows = [llava("one", part="train"), llava("two", part="test"), llava("three", part="train")]
    assert len(load(folder, rows, "all.jsonl", split_field="part")) == 2
    assert len(load(folder, rows, "all.jsonl", split_field="part", limit=1)) == 1
    with pytest.raises(ZooError, match="no record with part = 'dev'"):
        open_file(folder, "all.jsonl", split_field="part", split="dev")


def test_reads_members_of_tar_archives_by_offset_and_from_other_processes(folder):
    with tarfile.open(folder / "one.tar", "w") as tar:
        for name in ("./a.png", "sub/c.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    data = load(folder, [llava("Q"), llava("Q", image="sub/c.png")], images=str(folder / "*.tar"))
    images = [pickle.loads(pickle.dumps(data.get(i).images[0])) for i in range(2)]
    assert [image() for image in images] == [png(), png()]
    with pytest.raises(
        ZooError, match=r"train.jsonl:1 \(record 'r1'\): there is no image 'a.pgn'.*Did you mean 'a.png'"
    ):
        load(folder, [llava("Q", image="a.pgn")], images=str(folder / "one.tar")).get(0)


def test_the_same_member_in_two_archives_is_refused(folder):
    for name in ("one.tar", "two.tar"):
        with tarfile.open(folder / name, "w") as tar:
            tar.add(folder / "images" / "a.png", "a.png")
    with pytest.raises(ZooError, match=r"'a.png' is in .*one.tar and again in .*two.tar"):
        load(folder, [llava("Q")], images=str(folder / "*.tar"))


def test_a_compressed_archive_is_refused(folder):
    with tarfile.open(folder / "one.tar.gz", "w:gz") as tar:
        tar.add(folder / "images" / "a.png", "a.png")
    with pytest.raises(ZooError, match="must not be compressed"):
        load(folder, [llava("Q")], images=str(folder / "one.tar.gz"))


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "C:\\x.png", "..\\secret.png", "http://x/a.png"]
)
def test_names_that_lead_out_of_the_images_are_refused(folder, name):
    (folder / "secret.png").write_bytes(png())
    with pytest.raises(ZooError, match=r"train.jsonl:1 .*(leads out|is an address)"):
        load(folder, [llava("Q", image=name)]).get(0)


@pytest.mark.parametrize(
    "name", ["a" * 5000, "\ud800.png", "circle.png", "circle.png/a.png", "a.png/b.png", "sub", "", "x" * 300 + ".png"]
)
def test_a_name_that_the_file_system_rejects_is_a_missing_image(folder, name):
    (folder / "images" / "circle.png").symlink_to("circle.png")
    with pytest.raises(ImageError, match=r"train.jsonl:1 .*image"):
        load(folder, [llava("Q", image=name or "sub/")]).get(0)


def test_links_that_lead_out_of_the_images_are_refused(folder):
    (folder / "secret.png").write_bytes(png())
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    with pytest.raises(ZooError, match="leads out of"):
        load(folder, [llava("Q", image="link.png")]).get(0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"question": "q", "answer": "a"}\n\n{"question": \n', "t.jsonl:3 is not JSON"),
        ("t.jsonl", "[1]\n", "t.jsonl:1 holds a int"),
        ("t.json", '[\n{"question": "q", "answer": "a"},\n{"question" "q"}\n]', "t.json:3 is not JSON"),
        ("t.json", '[\n{"question": "q", "answer": "a"}\n{"question": "q"}\n]', "t.json:3 is not JSON: ',' or ']'"),
        ("t.json", "x", "t.json:1 must begin with"),
        ("t.txt", "x", "is not a file of records"),
        ("t.jsonl", '{"question": "q"}', "t.jsonl:1: No field named 'answer'"),
        ("t.jsonl", '{"question": "q", "answer": ""}', "t.jsonl:1: 'answer' is empty"),
        ("t.jsonl", '{"text": "q"}', "t.jsonl:1 has none of 'conversations', 'messages', 'question'"),
        ("t.jsonl", '{"conversations": [{"from": "humn", "value": "q"}]}', "No speaker named 'humn'"),
        ("t.jsonl", '{"conversations": [{"from": "human", "value": "q"}]}', "the last turn is from the user"),
        ("t.jsonl", '{"conversations": "hello"}', "a list of turns is needed, got str"),
        ("t.jsonl", "", "has no record"),
    ],
)  # fmt: skip
def test_broken_files_name_file_and_line(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(ZooError, match=message.replace("[", r"\[").replace("]", r"\]")):
        open_file(folder, name)


def test_an_absent_file_names_those_that_are_there(folder):
    load(folder, [llava("Q")], "dev.jsonl")
    with pytest.raises(ZooError, match=r"There is no file '.*train.jsonl'. That folder has: dev.jsonl.*ZOO_DATA"):
        open_file(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "lava"}, "No format of records named 'lava'"),
        ({"prompt": "{question.x}"}, "prompt takes columns by name"),
        ({"prompt": "{question!r}"}, "must name columns only"),
        ({"prompt": "{question"}, "cannot be read"),
        ({"limit": -1}, "limit must be 0"),
    ],
)
def test_options_are_checked_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ZooError, match=message):
        open_file(tmp_path, **options)


def test_reads_vqa_rad_as_it_is():
    root = shared("vqa_rad")
    options = {"kind_field": "answer_type", "image_field": "image", "group_by_image": True}
    data = open_file(root, "{split}.jsonl.gz", images=str(root / "images.tar"), eval_split="dev", **options)
    dialogs = [d for i in range(len(data)) for d in data.get(i).dialogs]
    assert (len(data), len(dialogs)) == (292, 1651)
    assert {d.kind for d in dialogs} == {"open", "closed"}
    dev = data.eval_split()
    assert sum(len(dev.get(i).dialogs) for i in range(len(dev))) == 145
    assert Image.open(io.BytesIO(dev.get(0).images[0]())).size[0] <= 320


def test_an_eval_split_is_not_the_training_data(folder):
    (folder / "all.jsonl").write_text("")
    with pytest.raises(
        ZooError, match=r"eval_split='dev' would be the training data: \{split\} has to be in file, or sp"
    ):
        open_file(folder, "all.jsonl", eval_split="dev")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_an_image_may_be_base64_without_an_address(folder, kind):
    data = io.BytesIO()
    Image.new("RGB", (6, 4)).save(data, kind)
    text = base64.b64encode(data.getvalue()).decode()
    records = [
        {"image": text, "question": "q", "answer": "a"},
        {"image": text[:-9] + "*", "question": "q", "answer": "a"},
    ]
    found = load(folder, records)
    assert found.get(0).images == [data.getvalue()]
    with pytest.raises(ZooError, match=f"the image in '{text[:10]}"):
        found.get(1)


def test_the_commonest_answer_that_is_not_empty_is_learnt(folder):
    dialog = load(folder, [{"question": "q", "answer": ["", " ", "", "red", "blue", "red"]}]).get(0).dialogs[0]
    assert dialog.messages[-1]["content"][0]["text"] == "red"
    with pytest.raises(ZooError, match="'answer' is empty"):
        load(folder, [{"question": "q", "answer": ["", " "]}])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("images/sub/c.png", "sub/c.png"),
        ("sub\\c.png", "sub/c.png"),
        ("sub/c", "sub/c.png"),
        ("sub/c.jpg", "sub/c.png"),
        ("Sub/C.PNG", "sub/c.png"),
        ("sub/d.png", ""),
    ],
)
def test_the_name_of_a_missing_image_that_was_meant(folder, name, meant):
    with pytest.raises(ImageError) as error:
        load(folder, [{"image": name, "question": "q", "answer": "a"}]).get(0)
    assert str(error.value).partition("Did you mean ")[2] == (f"{meant!r}?" if meant else "")


def test_a_column_of_ids_that_is_named_has_to_be_there(folder):
    with pytest.raises(ZooError, match="No field named 'qid2'"):
        load(folder, [{"qid": 3, "question": "q", "answer": "a"}], id_field="qid2")


def test_a_file_that_another_data_set_reads_is_pointed_to(folder):
    (folder / "t.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(ZooError, match=r"allowed are .json, .*Data set hf reads it: data.hf.path=.*t.csv"):
        open_file(folder, "t.csv")


@pytest.mark.parametrize(
    ("field", "name", "refused"),
    [
        ("img", "a.png", True),
        ("path", "sub/c.png", True),
        ("paths", ["a.png"], True),
        ("clip", "film.mp4", True),
        ("img", "none.png", False),
        ("answer", "a.png", False),
    ],
)
def test_an_image_in_a_field_that_is_not_read_is_not_learnt_as_text(folder, field, name, refused):
    (folder / "images" / "film.mp4").write_bytes(b"film")
    record = {"question": "q", "answer": "a", field: name}
    assert load(folder, [record], check=False).get(0).images == []
    if not refused:
        assert load(folder, [record]).get(0).images == []
        return
    one = name[0] if isinstance(name, list) else name
    with pytest.raises(ZooError, match=rf"train.jsonl:1: '{field}' names the \w+ '{one}'.* Set image_field={field}"):
        load(folder, [record])
    (shown,) = load(folder, [record], image_field=field).get(0).images
    assert str(getattr(shown, "path", shown)) == str(folder / "images" / one)


def test_a_mark_of_videos_is_one_where_a_video_is_shown(folder):
    (folder / "images" / "film.mp4").write_bytes(b"film")
    turns = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "a"}]
    shown = load(folder, [{"conversations": turns, "image": "film.mp4"}]).get(0)
    assert [Path(v.path).name for v in shown.images] == ["film.mp4"]
    assert shown.dialogs[0].messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "what?"}]
    asked = {"question": "in <video> or <image>?", "answer": "a", "image": ["film.mp4", "a.png"]}
    parts = load(folder, [asked]).get(0).dialogs[0].messages[0]["content"]
    assert [p["type"] for p in parts] == ["text", "video", "text", "image", "text"]
    text = load(folder, [{"question": "<video> in HTML", "answer": "a", "image": "a.png"}]).get(0)
    assert text.dialogs[0].messages[0]["content"][1] == {"type": "text", "text": "<video> in HTML"}
