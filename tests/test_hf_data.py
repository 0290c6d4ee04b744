import builtins
import datetime
import io
import pickle

import pytest
from PIL import Image

from zoo import registry
from zoo.registry import ZooError, read_sample

datasets = pytest.importorskip("datasets")


def png(color=(9, 9, 9)):
    data = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same twenty rows as a parquet file, a folder of parquet files and what `save_to_disk` writes."""
    root = tmp_path_factory.mktemp("hub")
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    rows = {
        "image": [{"bytes": png((i, 0, 0)), "path": None} for i in range(20)],
        "several": [[{"bytes": png(), "path": None}] * (i % 3) for i in range(20)],
        "file": ["a.png"] * 20,
        "question": [f"q{i}" for i in range(20)],
        "answer": [f"a{i}" for i in range(20)],
    }
    text = datasets.Value("string")
    features = {"image": datasets.Image(), "several": datasets.List(datasets.Image()), "file": text, "question": text}
    data = datasets.Dataset.from_dict(rows, datasets.Features({**features, "answer": text}))
    (root / "folder" / "data").mkdir(parents=True)
    data.to_parquet(root / "rows.parquet")
    data.to_parquet(root / "folder" / "data" / "train-00000-of-00001.parquet")
    data.save_to_disk(root / "saved")
    datasets.DatasetDict(train=data, dev=data.select(range(3))).save_to_disk(root / "splits")
    (root / "images").mkdir()
    (root / "images" / "a.png").write_bytes(png())
    return root


def load(path, **options):
    return registry.build("dataset", {"name": "hf", "path": str(path), **options})


def question(sample):
    return sample.dialogs[0].messages[0]["content"][-1]["text"]


@pytest.mark.parametrize("place", ["rows.parquet", "folder", "saved", "splits"])
@pytest.mark.parametrize("streaming", [False, True])
def test_reads_rows_with_undecoded_images(places, place, streaming):
    data = load(places / place, streaming=streaming)
    samples = list(data.stream()) if streaming else [data.get(i) for i in range(len(data))]
    assert [question(s) for s in samples] == [f"q{i}" for i in range(20)]
    assert samples[3].images == [png((3, 0, 0))]
    assert hasattr(data, "stream") == streaming and hasattr(data, "get") != streaming


def test_reads_lists_of_images_and_names_of_files(places):
    several = load(places / "saved", image_field="several")
    assert [len(several.get(i).images) for i in range(3)] == [0, 1, 2]
    named = load(places / "saved", image_field="file", images=str(places / "images"))
    assert named.get(0).images == [(places / "images" / "a.png").resolve()]
    with pytest.raises(
        ZooError, match=r"row 0: the image is the name .a[.]png.; give the place of the files with images="
    ):
        load(places / "saved", image_field="file").get(0)


def test_a_stream_goes_on_where_it_broke_off(places):
    data = load(places / "rows.parquet", streaming=True, shuffle_buffer=8)
    whole = [question(s) for s in data.stream(1)]
    assert sorted(whole) == sorted(f"q{i}" for i in range(20)) and whole != [f"q{i}" for i in range(20)]
    assert [question(s) for s in data.stream(1, start=7)] == whole[7:]
    assert [question(s) for s in data.stream(2)] != whole
    again = load(places / "rows.parquet", streaming=True, shuffle_buffer=8)
    assert [question(s) for s in again.stream(1)] == whole
    assert len(list(load(places / "rows.parquet", streaming=True, limit=4).stream())) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_travels_to_another_process(places, streaming):
    data = pickle.loads(pickle.dumps(load(places / "rows.parquet", streaming=streaming)))
    assert question(next(iter(data.stream())) if streaming else data.get(0)) == "q0"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["t.csv", ""])
def test_values_of_csv_are_the_texts_of_the_file(tmp_path, streaming, place):
    said = ["007", "1.50", "None", "n/a", "TRUE", "1e5", 'two\nlines, "quoted"']
    rows = [f'{i},q{i},"{text.replace(chr(34), chr(34) * 2)}",\r\n' for i, text in enumerate(said)]
    name = place or "train.csv"
    (tmp_path / name).write_bytes(("\ufeff,question,answer,nothing\r\n" + "".join(rows)).encode())
    data = load(tmp_path / place, streaming=streaming, meta_fields=["nothing"])
    samples = list(data.stream()) if streaming else [data.get(i) for i in range(len(data))]
    assert [s.dialogs[0].messages[-1]["content"][0]["text"] for s in samples] == said
    assert all(s.dialogs[0].meta == {"nothing": None} for s in samples)


@pytest.mark.parametrize("name", ["t.tsv", "t.csv.gz", "t.xlsx"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_another_kind_is_refused(tmp_path, name, streaming):
    (tmp_path / name).write_text("question\tanswer\nq\ta\n")
    with pytest.raises(ZooError, match=rf"{name} is a file of another kind: allowed are .parquet, .*\.csv"):
        load(tmp_path / name, streaming=streaming)


def test_a_column_of_csv_is_there_once(tmp_path):
    (tmp_path / "t.csv").write_text("question,answer,answer\nq,a,b\n")
    with pytest.raises(ZooError, match=r"t.csv:1 names the column 'answer' twice"):
        load(tmp_path / "t.csv")


def test_a_column_of_bytes_is_an_image_and_a_date_beside_predictions_is_a_text(tmp_path):
    day = datetime.datetime(2020, 1, 2)
    rows = {"image": [png()], "question": ["q"], "answer": ["a"], "when": [{"day": [day], "n": 3}]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "t.parquet")
    sample = load(tmp_path / "t.parquet", meta_fields=["when"]).get(0)
    assert sample.images == [png()]
    assert sample.dialogs[0].meta == {"when": {"day": ["2020-01-02"], "n": 3}}
    with pytest.raises(ZooError, match="row 0, image: a text is needed, got bytes"):
        load(tmp_path / "t.parquet", meta_fields=["image"]).get(0)


def test_the_split_for_evaluation_may_have_fewer_files_than_the_stream_has_lanes(tmp_path):
    for name, n in (("train-0", 2), ("train-1", 2), ("test-0", 1)):
        rows = {"question": ["q"] * n, "answer": ["a"] * n}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")
    data = load(tmp_path, streaming=True, lanes=2, eval_split="test")
    assert (len(list(data.stream())), len(list(data.eval_split().stream()))) == (4, 1)


def test_knows_its_other_splits(places):
    data = load(places / "splits", eval_split="dev")
    assert (len(data), len(data.eval_split()), len(data.eval_split().train_split())) == (20, 3, 20)
    assert load(places / "splits").eval_split() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere.parquet"}, "'nowhere.parquet' cannot be opened"),
        ({"split": "val"}, "split 'val' is not among"),
        ({"question_field": "quesion"}, r"splits \(train\), row 0 has none of"),
        (
            {"format": "columns", "question_field": "quesion"},
            "row 0: No field named 'quesion'. Did you mean",
        ),
        ({"shuffle_buffer": 5}, "shuffle_buffer orders a stream"),
        ({"limit": -1}, "must be 0 or more"),
    ],
)
def test_mistakes_are_named(places, options, message):
    with pytest.raises(ZooError, match=message):
        load(**{"path": places / "splits", **options}).get(0)


def test_without_the_library_the_extra_is_named(places, monkeypatch):
    def missing(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ZooError, match=r"needs the package `datasets`: pip install 'zoo-vlm\[datasets\]'"):
        load(places / "rows.parquet")


def test_a_part_of_the_train_split_is_for_training_beside_one_for_evaluation(places):
    from zoo.runs.data import RunData
    from zoo.settings.stage import Stage

    node = {"name": "hf", "path": str(places / "rows.parquet"), "split": "train[:75%]"}
    run = RunData({"hf": {**node, "eval_split": "train[75%:]"}})
    assert {n: len(d) for n, d in run.training.items()} == {"hf": 15}
    assert {n: len(d) for n, d in run.evaluation.items()} == {"hf": 5}
    with pytest.raises(ZooError, match=r"name it: stages.<stage>.data=\{hf: 1\}"):
        RunData({"hf": node}).mix(Stage(steps=1), 0)
    assert len(run.mix(Stage(steps=1), 0).places(0, 15)) == 15
    for split, other in ("train", "train[75%:]"), ("train[:80%]", "train[75%:]"), ("train[:16]", "train[15:18]"):
        both = RunData({"hf": {**node, "split": split, "eval_split": other}})
        with pytest.raises(ZooError, match=r"data.hf: eval_split=.* would be trained on, as a part of split="):
            both.mix(Stage(steps=1), 0)
    RunData({"hf": {**node, "split": "train[:15]", "eval_split": "train[15:]"}}).mix(Stage(steps=1), 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"t.csv": "question,answer\nq,a\nq,a,b\n"}, "Expected 2 fields in line 3, saw 3"),
        (
            {"a.jsonl": '{"question": "q"}', "b.jsonl": '{"question": "q", "answer": "a"}'},
            "answer: string .* column names don't match",
        ),
    ],
)
def test_what_the_library_cannot_read_is_said(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    with pytest.raises(ZooError, match=message):
        load(tmp_path)


def test_dates_of_a_file_stay_what_they_were(tmp_path):
    said = ["2020-01-31", "2021-02-03"]  # which the library takes for times
    (tmp_path / "t.jsonl").write_text("\n".join(f'{{"question": "q", "answer": "{day}"}}' for day in said))
    data = load(tmp_path / "t.jsonl")
    assert [data.get(i).dialogs[0].messages[-1]["content"][0]["text"] for i in range(2)] == said


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_is_written_by_its_name(tmp_path, streaming):
    label = datasets.ClassLabel(names=["cat", "red dog"])
    rows = {"question": ["q"] * 3, "label": [1, 0, -1], "all": [[0, 1], [1], []]}
    features = {"question": datasets.Value("string"), "label": label, "all": datasets.List(label)}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(tmp_path / "t.parquet")
    options = {"streaming": streaming, "answer_field": "label", "meta_fields": ["all"]}
    data = load(tmp_path / "t.parquet", **options)
    one, two, none = data.stream() if streaming else [read_sample("hf", data, i) for i in range(3)]
    said = [s.dialogs[0].messages[-1]["content"][0]["text"] for s in (one, two)]
    assert said == ["red dog", "cat"] and one.dialogs[0].meta == {"all": ["cat", "red dog"]}
    assert "'label' is empty" in str(none)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_inside_of_turns_are_not_decoded(tmp_path, streaming):
    text, image = datasets.Value("string"), {"bytes": png(), "path": None}
    part = {"type": text, "image": datasets.Image(), "text": text}
    turns = datasets.List({"role": text, "content": datasets.List(part)})
    asked = [{"type": "image", "image": image, "text": None}, {"type": "text", "image": None, "text": "q"}]
    said = [{"type": "text", "image": None, "text": "a"}]
    rows = {"messages": [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}]]}
    datasets.Dataset.from_dict(rows, datasets.Features({"messages": turns})).to_parquet(tmp_path / "t.parquet")
    data = load(tmp_path / "t.parquet", streaming=streaming)
    sample = next(iter(data.stream())) if streaming else data.get(0)
    assert sample.images == [png()] and question(sample) == "q"


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_a_column_that_is_not_read_are_not_learnt_as_text(places, tmp_path, streaming):
    rows = {"question": ["q", "r"], "answer": ["a", "b"], "img": [{"bytes": png(), "path": None}] * 2}
    made = datasets.Dataset.from_dict(rows)
    made.cast_column("img", datasets.Image()).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("question,answer,img\nq,a,a.png\nr,b,a.png\n")
    for name, more in {"t.parquet": {}, "t.csv": {"images": str(places / "images")}}.items():
        with pytest.raises(ZooError, match=r"'img' (holds images|names the image 'a.png'), .* Set image_field=img"):
            load(tmp_path / name, streaming=streaming, **more)
        for options, shown in ({"check": False}, 0), ({"image_field": "img"}, 1):
            data = load(tmp_path / name, streaming=streaming, **more, **options)
            sample = next(iter(data.stream())) if streaming else data.get(0)
            assert len(sample.images) == shown


def test_turns_of_both_forms_share_a_table(tmp_path):
    none = {"from": None, "value": None, "role": None, "content": None}
    turns = [none | {"from": "human", "value": "q"}, none | {"role": "assistant", "content": "a"}]
    datasets.Dataset.from_dict({"conversations": [turns]}).to_parquet(tmp_path / "t.parquet")
    said = [(m["role"], m["content"][0]["text"]) for m in load(tmp_path / "t.parquet").get(0).dialogs[0].messages]
    assert said == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_of_few_bits_are_written_as_they_are(tmp_path, streaming):
    short = datasets.Value("float32")
    rows = {"question": ["q"] * 3, "answer": [0.1, 2.5, 1e9], "all": [[0.3], [0.7, 1.0], []]}
    features = {"question": datasets.Value("string"), "answer": short, "all": datasets.List(short)}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(tmp_path / "t.parquet")
    data = load(tmp_path / "t.parquet", streaming=streaming, meta_fields=["all"])
    samples = list(data.stream()) if streaming else [data.get(i) for i in range(3)]
    assert [s.dialogs[0].messages[-1]["content"][0]["text"] for s in samples] == ["0.1", "2.5", "1000000000.0"]
    assert [s.dialogs[0].meta["all"] for s in samples] == [[0.3], [0.7, 1.0], []]


def test_lists_of_rows_that_older_libraries_made_mappings_of_lists_are_read(tmp_path):
    rows = {
        "conversations": [{"from": ["human", "gpt"], "value": ["q", "a"]}],
        "question": ["q"],
        "answers": [{"answer": ["no", "a", "a"], "answer_id": [1, 2, 3]}],
        "choices": [{"text": ["a", "no"], "label": ["A", "B"]}],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "t.parquet")
    first = load(tmp_path / "t.parquet").get(0).dialogs[0]
    assert [(m["role"], m["content"][0]["text"]) for m in first.messages] == [("user", "q"), ("assistant", "a")]
    options = {"format": "columns", "answer_field": "answers", "choices_field": "choices"}
    dialog = load(tmp_path / "t.parquet", **options).get(0).dialogs[0]
    assert dialog.answers == ["no", "a", "a"] and dialog.choices == ["a", "no"]
    assert dialog.messages[-1]["content"][0]["text"] == "a"
