import builtins
import io
import pickle

import pytest
from PIL import Image

from zoo import registry
from zoo.registry import ZooError

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
