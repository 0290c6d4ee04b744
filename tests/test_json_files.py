"""JSON as people and tools write it: read rightly, or an error with file, line and reason."""

import gzip
import json
import resource
import subprocess
import sys

import pytest

from zoo import ZooError, registry
from zoo.data import record_file
from zoo.data.record_file import RecordFile

RECORDS = [
    {
        "id": i,
        "question": ["é 猫", "<image>", '"[{]}', "\\", "a\nb", " "][i % 6] * (i % 9),
        "answer": [1, {"b": None}, "}"],
    }
    for i in range(40)
]
ROW = {"question": "q", "answer": "a"}


def lines(end="\n", **how):
    return end.join(json.dumps(r, **how) for r in RECORDS)


PLAIN = json.dumps(RECORDS, ensure_ascii=False)
SOUND = {
    "one_line.json": PLAIN,
    "indented.json": json.dumps(RECORDS, indent=2),
    "wide.json": "\n\n [ \n" + ",\n\n".join(json.dumps(r) for r in RECORDS) + "\n ] \n\n",
    "comma.json": PLAIN[:-1] + ",\n]\n",
    "lines.jsonl": lines(),
    "lines.ndjson": lines(ensure_ascii=False) + "\n",
    "blank_lines.jsonl": lines("\n \n\t\n"),
    "crlf.jsonl": lines("\r\n") + "\r\n",
    "crlf.json": json.dumps(RECORDS, indent=1).replace("\n", "\r\n"),
    "cr.jsonl": lines("\r"),
    "list.jsonl": PLAIN,
    "list_indented.jsonl": json.dumps(RECORDS, indent=1),
    "lines.json": lines(),
    "objects.json": "\n".join(json.dumps(r, indent=2) for r in RECORDS),
    "objects_touch.json": "".join(json.dumps(r, indent=1) for r in RECORDS),
    "joined.jsonl": "\ufeff" + lines("\n\ufeff", ensure_ascii=False),
    "mark.json": "\ufeff" + PLAIN,
    "packed.jsonl.gz": gzip.compress(lines().encode()),
    "packed_twice.jsonl.gz": gzip.compress(lines().encode()[:900]) + gzip.compress(lines().encode()[900:]),
    "packed.json.gz": gzip.compress(PLAIN.encode("utf-16")),
    **{f"{name}.json": PLAIN.encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig")},
    "utf-16.jsonl": lines(ensure_ascii=False).encode("utf-16"),
}  # fmt: skip


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


@pytest.mark.parametrize("window", [1 << 20, 33])
def test_sound_files_are_read_however_they_are_written(tmp_path, monkeypatch, window):
    monkeypatch.setattr(record_file, "WINDOW", window)
    for name, content in SOUND.items():
        path = write(tmp_path, name, content)
        found = RecordFile(path)
        assert (name, list(found)) == (name, RECORDS)
        assert (name, found.where(0).partition(":")[0]) == (name, str(path))
        places = [found.where(i) for i in range(len(found))]
        assert len(set(places)) == len(places)  # each can be found again


@pytest.mark.parametrize(
    "name", ["indented.json", "lines.jsonl", "crlf.jsonl", "blank_lines.jsonl", "objects.json", "wide.json"]
)
def test_the_line_is_that_where_a_record_begins(tmp_path, name):
    path = write(tmp_path, name, SOUND[name])
    text = path.read_bytes().decode().split("\n")
    found = RecordFile(path)
    for i in range(len(found)):
        line = int(found.where(i).rpartition(":")[2])
        assert text[line - 1].strip().startswith("{")
        following = "\n".join(text[line - 1 :]).lstrip()
        assert json.JSONDecoder().raw_decode(following)[0] == RECORDS[i]


BROKEN = {
    "second_list.json": ('[{"a": 1}]\n[{"a": 2}]', r":2: '\[\{\"a\": 2\}\]' follows the list"),
    "rubbish_behind.json": ('[{"a": 1}]\n\nx', ":3: 'x' follows the list"),
    "two_lists.jsonl": ('[{"a": 1}]\n[{"a": 2}]', "follows the list"),
    "latin.jsonl": ('{"a": 1}\n{"a": "é"}'.encode("latin-1"), ":2: the byte 0xe9 is not UTF-8.*LATIN1"),
    "latin.json": ('[{"a": 1},\n{"a": "é"}]'.encode("latin-1"), ":2: the byte 0xe9 is not UTF-8"),
    "cp1252.jsonl": ('{"a": "“x”"}'.encode("cp1252"), ":1: the byte 0x93 is not UTF-8"),
    "half_16.json": ("[{}]".encode("utf-16")[:-1], "begins as UTF-16 and cannot be read on"),
    "half_line.jsonl": ('{"a": 1}\n{"a": "b', ":2 is not JSON: Unterminated string.*may have been cut off"),
    "half_record.json": ('[{"a": 1},\n{"a":', ":2 is not JSON: Expecting value.*in record 2.*cut off"),
    "half_list.json": ('[{"a": 1},\n', ":2 is not JSON: the file ends before its list is closed"),
    "open_list.json": ('[{"a": 1}', ":1 is not JSON: the file ends before its list is closed"),
    "half_in_the_middle.jsonl": ('{"a":\n{"a": 1}', r":1 is not JSON: Expecting value at column 6\.$"),
    "twice.jsonl": ('{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}', ":2 is not JSON: the key 'c' is there twice"),
    "twice.json": ('[{"image": 1,\n"image": 2}]', ":1 is not JSON: the key 'image' is there twice"),
    "deep.jsonl": ('{"a":' + "[" * 99999 + "]" * 99999 + "}", ":1 is not JSON: it is nested too deeply"),
    "deep.json": ('[{"a":' + "[" * 99999 + "]" * 99999 + "}]", ":1 is not JSON: it is nested too deeply, in record 1"),
    "comma_in_object.jsonl": ('{"a": 1,}', ":1 is not JSON: Expecting property name"),
    "two_commas.json": ('[{"a": 1},,{"a": 2}]', ":1 is not JSON: Expecting value at column 10, in record 2"),
    "no_comma.json": ('[{"a": 1}\n{"a": 2}]', ":2 is not JSON: ',' or ']' must follow a record"),
    "single_quotes.jsonl": ("{'a': 1}", ":1 is not JSON: Expecting property name"),
    "python.jsonl": ('{"a": True}', ":1 is not JSON: Expecting value"),
    "comment.json": ('[\n// x\n{"a": 1}]', ":2 is not JSON: Expecting value"),
    "tab_in_text.jsonl": ('{"a": "b\tc"}', ":1 is not JSON: Invalid control character"),
    "zeros.jsonl": (b'{"a": 1}\n\0\0\0\0', ":2 is not JSON: Expecting value"),
    "digits.jsonl": ('{"a": ' + "9" * 5000 + "}", ":1 is not JSON: it has a number of thousands of digits"),
    "number.json": ("[1, 2]", ":1, record 1 holds a int; a record is an object"),
    "list_in_list.json": ("[[1]]", ":1 holds a list; a record is an object"),
    "words.json": ("hello", r":1 must begin with '\[' or '\{'"),
    "cut.jsonl.gz": (gzip.compress(lines().encode())[:-20], "cut.jsonl.gz cannot be read"),
    "no_gzip.jsonl.gz": (b'{"a": 1}', "no_gzip.jsonl.gz cannot be read"),
    "wrong.txt": ("x", "is not a file of records"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_with_its_place(tmp_path, name):
    content, message = BROKEN[name]
    path = write(tmp_path, name, content)
    with pytest.raises(ZooError, match=message) as error:
        list(RecordFile(path))
    assert name in str(error.value)


@pytest.mark.parametrize("content", ["", " \n", "\ufeff", "[]", " [ ] ", "\n\n"])
@pytest.mark.parametrize("name", ["e.json", "e.jsonl"])
def test_an_empty_file_has_no_records(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert len(RecordFile(path)) == 0
    with pytest.raises(ZooError, match=f"{name} has no record"):
        registry.build("dataset", {"name": "chat_json", "file": str(path)})


def test_a_broken_line_costs_itself_alone(tmp_path):
    found = RecordFile(write(tmp_path, "t.jsonl", b'{"a": 1}\n{"a": \n{"a": "\xe9"}\n{"a": 4}'))
    assert len(found) == 4 and found[0] == {"a": 1} and found[3] == {"a": 4}
    for index in (1, 2):
        with pytest.raises(ZooError, match=f":{index + 1}"):
            found[index]


def turns(*said):
    return {
        "conversations": [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 9, said, strict=False)]
    }


TYPES = [
    ({"question": "q", "answer": float("nan")}, "'answer' is float 'nan'. Write null"),
    ({"question": float("inf"), "answer": "a"}, "'question' is float 'inf'"),
    ({"question": "q", "answer": 1e999}, "'answer' is float 'inf'"),
    ({"question": "q", "answer": {"text": "a"}}, "answer: a text is needed, got dict"),
    ({"question": {"text": "q"}, "answer": "a"}, "question: a text is needed, got dict"),
    ({"question": "q", "answer": ["a", None]}, "answer: a text is needed, got null"),
    ({"question": "q", "answer": [["a"]]}, "answer: a text is needed, got list"),
    ({"question": ["q", float("nan")], "answer": "a"}, "question: a text is needed, got float 'nan'"),
    ({"question": "q", "answer": "a", "image": 5}, "an image is named by a text, got int '5'"),
    ({"question": "q", "answer": "a", "image": ["a.png", None]}, "an image is named by a text, got null"),
    ({"question": "q", "answer": "a", "image": float("nan")}, "an image is named by a text, got float 'nan'"),
    ({"question": "q", "answer": "a", "image": True}, "an image is named by a text, got bool"),
    ({"question": "q", "answer": "a", "images": [["a.png"]]}, "an image is named by a text, got list"),
    ({"conversations": "hello"}, "a list of turns is needed, got str"),
    ({"conversations": {}}, "a list of turns is needed, got dict"),
    ({"conversations": 5}, "a list of turns is needed, got int"),
    ({"conversations": []}, "a list of turns is needed"),
    ({"conversations": ["hello"]}, "turn 1 is a str"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "No speaker named"),
    ({"conversations": [{"from": None, "value": "x"}]}, "No speaker named"),
    (turns("q", 5), "turn 2: a text or a list of parts is needed, got int"),
    (turns("q", None), "turn 2: a text or a list of parts is needed, got NoneType"),
    (turns("q", [{"type": "text", "text": 5}]), "turn 2: the text of a part is int '5'"),
    (turns("q", [{"type": "text", "text": None}]), "turn 2: the text of a part is null"),
    (turns("q", [{"type": "audio"}]), "turn 2: No part of a message named 'audio'"),
    (turns("q", [5]), "turn 2: No part of a message"),
]


@pytest.mark.parametrize(("record", "message"), TYPES)
def test_a_value_of_another_type_is_an_error_and_never_its_python_spelling(tmp_path, record, message):
    path = write(tmp_path, "t.jsonl", json.dumps(ROW) + "\n" + json.dumps(record))
    with pytest.raises(ZooError, match=rf"t.jsonl:2.*{message}"):
        registry.build("dataset", {"name": "chat_json", "file": str(path)})


@pytest.mark.parametrize("choices", ["abc", 5, {"a": 1}, ["a", None], ["a", {"b": 1}], ["a", float("nan")]])
def test_choices_of_another_type_are_an_error(tmp_path, choices):
    path = write(tmp_path, "t.jsonl", json.dumps({**ROW, "options": choices}))
    with pytest.raises(ZooError, match=r"t.jsonl:1, options: a (text|list of options) is needed"):
        registry.build("dataset", {"name": "chat_json", "file": str(path), "choices_field": "options"})


def test_numbers_and_truth_values_are_texts_and_nan_elsewhere_is_nobodys_business(tmp_path):
    rows = [{"question": 5, "answer": 7.5, "score": float("nan")}, {"question": None, "answer": [True, "x", True]}]
    path = write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    data = registry.build("dataset", {"name": "chat_json", "file": str(path)})
    said = [[p["text"] for m in data.get(i).dialogs[0].messages for p in m["content"]] for i in range(2)]
    assert said == [["5", "7.5"], ["", "True"]]
    with pytest.raises(ZooError, match="'score' is float 'nan'"):
        registry.build("dataset", {"name": "chat_json", "file": str(path), "meta_fields": ["score"]})


def test_braces_in_a_text_are_no_columns(tmp_path):
    path = write(tmp_path, "t.jsonl", json.dumps({"question": "{answer} {0} {{x}} %s $y", "answer": "{question}"}))
    data = registry.build("dataset", {"name": "chat_json", "file": str(path), "prompt": "Q: {question} {{A}}"})
    said = [p["text"] for m in data.get(0).dialogs[0].messages for p in m["content"]]
    assert said == ["Q: {answer} {0} {{x}} %s $y {A}", "{question}"]


def test_a_mark_beside_image_parts_is_a_word(tmp_path):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what does <image> mean?"}]
    rows = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a tag"}]}]
    turns = [{"role": "user", "content": ["<image>", "and?"]}, {"role": "assistant", "content": "b"}]
    rows += [{"messages": turns, "image": "a.png"}]
    path = write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    data = registry.build("dataset", {"name": "chat_json", "file": str(path)})
    (tmp_path / "a.png").write_bytes(b"")
    said = [[p.get("text", "image") for p in data.get(i).dialogs[0].messages[0]["content"]] for i in range(2)]
    assert said == [["image", "what does <image> mean?"], ["image", "and?"]]


def test_a_long_line_is_in_memory_once(tmp_path):
    """A list of 60 MB in one line, and one of 200 000 records: what reading it needs beside itself is a few MB."""
    row = json.dumps({"id": "0" * 9, "image": "a.png", "conversations": [{"from": "human", "value": "é " * 60}] * 2})
    path = write(tmp_path, "t.json", "[" + ",".join([row] * 60_000) + "]")
    code = (
        "import resource, sys; from pathlib import Path; from zoo.data.record_file import RecordFile\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); found = RecordFile(Path(sys.argv[1])); print(len(found), peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    number, more = map(int, done.stdout.split())
    size = path.stat().st_size
    assert size > 40e6 and number == 60_000 and more < size + 24e6 and resource.getpagesize()
