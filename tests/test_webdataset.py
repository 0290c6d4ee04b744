"""Tar shards: samples come back as they were packed, each is read by one process, and broken shards are named."""

import io
import json
import random
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from zoo import registry
from zoo.data import tar_shards
from zoo.data.tar_shards import Shards, find_shards
from zoo.registry import ImageError, Sample, ZooError
from zoo.runs.batches import Batches, Loader
from zoo.runs.order import Mix, ShardPosition
from zoo.settings.stage import Stage
from zoo.vision.images.decode import open_image

SIZES = [7, 0, 12, 5, 9]  # samples of each shard


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def pack(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def turns(text: str, **more) -> bytes:
    said = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "so"}]
    return json.dumps({"conversations": said, **more}).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for shard, size in enumerate(SIZES):
        members = {}
        for i in range(size):
            members |= {f"./{shard}-{i}.png": png(i), f"./{shard}-{i}.json": turns(f"why {i}")}
        pack(root / f"train-{shard:03d}.tar", members)
    pack(root / "dev-000.tar", {"d.png": png(1), "d.json": turns("dev")})
    return root


def build(place, **options):
    return registry.build("dataset", {"name": "webdataset", "shards": str(place), **options})


def names(samples):
    return [s.id.removeprefix("./") for s in samples]


STORED = [f"{shard}-{i}" for shard, size in enumerate(SIZES) for i in range(size)]


def test_samples_are_what_was_packed(folder):
    data = build(folder / "{split}-*.tar", eval_split="dev")
    assert len(data) == sum(SIZES) and names(map(data.get, range(len(data)))) == STORED
    sample = data.get(9)
    assert sample.where == f"{folder}/train-002.tar::./2-2" and data.place(9) == f"{folder}/train-002.tar, sample 3"
    assert open_image(sample.images[0]).getpixel((0, 0)) == (2, 0, 0)
    assert sample.dialogs[0].messages[0]["content"][-1]["text"] == "why 2"
    assert names([data.eval_split().get(0)]) == ["d"] and data.train_split() is data
    assert len(build(folder / "train-*.tar", limit=8)) == 8
    assert names([build(folder / "train-{002..003}.tar").get(12)]) == ["3-0"]
    assert len(list(folder.glob(".*.zoo-index"))) == len(SIZES) + 1


def test_threads_read_side_by_side(folder):
    data = build(folder / "train-*.tar")
    was, wrong = sys.getswitchinterval(), []

    def read():
        wrong.extend(i for _ in range(20) for i in range(len(data)) if names([data.get(i)]) != [STORED[i]])

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            for ended in [pool.submit(read) for _ in range(3)]:
                ended.result()
    finally:
        sys.setswitchinterval(was)
    assert not wrong


def test_an_eval_split_is_not_the_training_data(folder):
    with pytest.raises(ZooError, match=r"eval_split='dev' would be the training data: \{split\} has to be in shards"):
        build(folder / "train-*.tar", eval_split="dev")


def test_texts_several_images_and_names_in_records(tmp_path):
    long = "a" * 120 + "/"  # a name that needs a second header
    members = {
        f"{long}0.jpg": png(3), f"{long}0.txt": " a red square".encode("utf-8-sig"), f"{long}0.cls": b"4",
        "1.left.png": png(1), "1.right.png": png(2), "1.txt": b"two", "1.npy": b"not read",
        "2.txt": b"no picture", "LICENSE": b"",
    }  # fmt: skip
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        shard = pack(tmp_path / f"{number}.tar", members, format=form)
        data = build(shard, format="columns", prompt="Describe.", answer_field="txt", meta_fields=[])
        got = [data.get(i) for i in range(3)]
        assert names(got) == [f"{long}0", "1", "2"] and [len(s.images) for s in got] == [1, 2, 0]
        assert [s.dialogs[0].messages[1]["content"][0]["text"] for s in got] == [" a red square", "two", "no picture"]
        shades = [open_image(image).getpixel((0, 0))[0] for s in got for image in s.images]
        assert shades == [3, 1, 2]

    def of(members, **record):
        said = turns(
            "x" if len(record.get("image", [])) < 2 or isinstance(record["image"], str) else "<image> x", **record
        )
        return build(pack(tmp_path / "named.tar", {**members, "k.json": said})).get(0)

    assert names([of({"k.png": png(5)}, image="coco/train/9.jpg", id=12)]) == ["12"]  # the only one, by any name
    two = {"k.a.png": png(1), "k.b.png": png(2)}
    swapped = of(two, image=["k.b.png", "a.png"]).images
    assert [open_image(image).getpixel((0, 0))[0] for image in swapped] == [2, 1]
    with pytest.raises(ImageError, match=r"named\.tar::k: there is no image 'x\.png'; .*: k\.a\.png, k\.b\.png"):
        of(two, image=["k.b.png", "x.png"])


class Ids:
    """Stands in for a processor: a batch is the names of its samples."""

    def encode(self, one: Sample) -> Sample:
        return one

    def collate(self, rows, multiple_of=1):
        return {"ids": names(rows)}


def batches(data, *, rank=0, world=1, start=0, streams=None, steps=12, **stage):
    stage = Stage(steps=steps, batch_size=8, **stage)
    return Batches(
        Mix({"s": data}, {"s": 1.0}, 0), Ids(), stage, steps, ShardPosition(rank, world, start, streams or {})
    )


def ids(items):
    return [name for item in items for name in item["batch"]["ids"]]


STREAMS = [
    {},
    {"shuffle_buffer": 6},
    {"lanes": 4},
    {"shuffle_buffer": 4, "lanes": 2},
    {"limit": 11, "shuffle_buffer": 15},
]


@pytest.mark.parametrize("options", STREAMS)
def test_an_epoch_has_every_sample_once(folder, options):
    data = build(folder / "train-*.tar", streaming=True, **options)
    total = options.get("limit", sum(SIZES))
    epochs = [names(data.stream(epoch)) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(STORED[:total])] * 3
    assert len(set(map(tuple, epochs))) == (3 if "shuffle_buffer" in options else 1)
    assert names(data.stream(1, start=5)) == epochs[1][5:]
    if not options:
        assert epochs[0] == STORED
    drawn = ids(map(batches(data).__getitem__, range(12)))  # across epochs
    assert sorted(drawn[:total]) == sorted(STORED[:total])


@pytest.mark.parametrize("options", STREAMS)
def test_processes_read_their_own_samples_and_no_other(folder, options, monkeypatch):
    read = []
    find = Shards.__getitem__
    monkeypatch.setattr(Shards, "__getitem__", lambda self, place: read.append(place) or find(self, place))
    alone = ids(map(batches(build(folder / "train-*.tar", streaming=True, **options)).__getitem__, range(12)))
    assert len(read) == len(alone) == 96
    for world in (2, 4, 8):
        read.clear()
        ranks = [build(folder / "train-*.tar", streaming=True, **options) for _ in range(world)]
        made = [[batches(d, rank=r, world=world)[j]["batch"]["ids"] for j in range(12)] for r, d in enumerate(ranks)]
        assert [name for step in zip(*made, strict=True) for part in step for name in part] == alone
        assert len(read) == 96


def test_workers_and_resumed_runs_go_on_with_the_same_samples(folder):
    data = build(folder / "train-*.tar", streaming=True, shuffle_buffer=6)
    one = list(Loader(batches(data)))
    assert list(Loader(batches(data, workers=2))) == one
    streams = json.loads(json.dumps(one[4]["info"]["streams"]))
    assert ids(Loader(batches(data, start=5, streams=streams))) == ids(one[5:])
    halves = [ids(Loader(batches(data, start=5, streams=streams, rank=rank, world=2))) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(ids(one[5:]))


def test_a_broken_member_is_a_record_that_may_be_left_out(tmp_path):
    members = {}
    for i in range(8):
        members |= {f"{i}.png": png(i), f"{i}.json": turns("q") if i != 3 else b'{"conversations": ['}
    data = build(pack(tmp_path / "a.tar", members), streaming=True)
    with pytest.raises(ZooError, match=r"data 's', .*a\.tar, sample 4: .*a\.tar::3\.json is not JSON"):
        batches(data, steps=1)[0]
    made = batches(data, steps=1, skip_broken=True)[0]
    assert made["batch"]["ids"] == ["0", "1", "2", "4", "5", "6", "7"]
    assert made["info"]["broken"][0]["where"] == f"{tmp_path}/a.tar, sample 4"
    film = build(
        pack(tmp_path / "b.tar", {"0.mp4": b"", "0.txt": b"a"}), format="columns", prompt="Say.", answer_field="txt"
    )
    with pytest.raises(ZooError, match=r"b\.tar::0\.mp4: the video lies in an archive"):
        film.get(0)


def test_a_shard_that_was_cut_off_is_named_wherever_the_cut_is(tmp_path, folder):
    whole = (folder / "train-000.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    random.seed(0)
    for cut in [1, 600, 1536, *random.sample(range(2, end), 40)]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        try:
            got = build(tmp_path / "cut.tar")
        except ZooError as error:
            assert "cut.tar" in str(error)
            continue
        # Between two members nothing tells that more should follow: what is there is whole.
        assert cut % 512 == 0
        assert names(map(got.get, range(len(got)))) == STORED[: len(got)]


def test_what_cannot_be_read_is_refused_with_shard_and_member(tmp_path, folder):
    whole = bytearray((folder / "train-002.tar").read_bytes())
    with tarfile.open(folder / "train-002.tar") as tar:
        third = tar.getmembers()[2].offset
    whole[third : third + 512] = random.Random(0).randbytes(512)
    (tmp_path / "a.tar").write_bytes(whole)
    pack(tmp_path / "b.tar", {"1.png": b"", "2.png": b"", "1.txt": b""})
    (tmp_path / "c.tar").write_bytes(b"text, not an archive" * 99)
    with pytest.raises(ZooError) as error:
        build(tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and "bytes that are not of a member behind the member './2-0.json'" in lines[0]
    assert "the members of sample '1' are not next to each other" in lines[1] and "c.tar cannot be read" in lines[2]
    for place, message in [
        ("{5..7}.tar", "There is no tar shard '5.tar'"), ("*.tar.gz", "no tar shard"), ("http://h/a.tar", "an address"),
        ("pipe:cat a.tar", "a command"),
    ]:  # fmt: skip
        with pytest.raises(ZooError, match=message):
            find_shards(place)
    (tmp_path / "d.tar.gz").write_bytes(b"")
    with pytest.raises(ZooError, match=r"gunzip d\.tar\.gz"):
        find_shards(str(tmp_path / "d.tar.gz"))
    with pytest.raises(ZooError, match="has no samples"):
        build(pack(tmp_path / "none.tar", {"README": b"x"}))
    with pytest.raises(ZooError, match="streaming=true"):
        build(folder, lanes=2)


def test_an_index_is_made_once_and_again_for_a_changed_shard(tmp_path, monkeypatch):
    shard = pack(tmp_path / "a.tar", {"0.png": png(0), "0.json": turns("q")})
    data = build(shard)
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "tar_members", lambda path: pytest.fail("the shard is read again"))
        assert len(build(shard)) == 1
    pack(shard, {f"{i}.{e}": d for i in range(3) for e, d in (("png", png(i)), ("json", turns("q")))})
    with pytest.raises(ZooError, match="has changed since it was opened"):
        data.get(0)
    assert len(build(shard)) == 3
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir())) if files.exists() else 0
    again = build(shard)
    assert [again.get(i).id for i in (2, 0, 1)] == ["2", "0", "1"]
    assert not before or len(list(files.iterdir())) == before
