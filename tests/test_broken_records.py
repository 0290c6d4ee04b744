"""A record that cannot be used is named, or left out, counted and listed, whatever it was that raised."""

import io
import json
import multiprocessing
import pickle
import tarfile

import pytest
import torch
from PIL import Image

from tests import killed_runs
from tests.conftest import sample
from tests.test_loader import Names, Numbers
from tests.train_builders import config, recipe
from zoo.registry import RecordError, Sample, StreamingDataset, ZooError, naming
from zoo.runs.batches import Batches, Loader
from zoo.runs.data import RunData
from zoo.runs.folder import read_metrics
from zoo.runs.order import Mix, ShardPosition
from zoo.settings.stage import Stage
from zoo.training.loop import Run


class PanicException(BaseException):
    """As a Rust library raises it."""


RAISED = [
    KeyError("image"), OSError(5, "Input/output error"), PermissionError(13, "denied"), RecursionError("deep"),
    UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates not allowed"), AttributeError("'int' has no 'strip'"),
    IndexError("list index"), ZeroDivisionError(), AssertionError(), ZooError("broken"),
    PanicException("called unwrap"),
]  # fmt: skip


class Raising(Numbers):
    """Samples 2 and 5 cannot be read."""

    error: BaseException = ValueError()

    def get(self, index: int, epoch: int = 0) -> Sample:
        if index in (2, 5):
            raise self.error
        return super().get(index, epoch)


class RaisingStream(StreamingDataset):
    def __init__(self, inner):
        self.inner = inner

    def stream(self, epoch=0, start=0):
        for i in range(start, len(self.inner)):
            try:
                with naming(""):
                    one = self.inner.get(i, epoch)
            except RecordError as error:
                one = error
            yield one


def items(data, *, workers=0, skip=True, size=4, steps=3, start=0, streams=None, **stage):
    made = Stage(steps=steps, batch_size=size, workers=workers, skip_broken=skip, **stage)
    place = ShardPosition(0, 1, start, streams or {})
    return list(Loader(Batches(Mix({"mine": data}, {}, 0), Names(), made, steps, place)))


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("stream", [False, True], ids=["indexed", "stream"])
def test_whatever_a_data_set_raises_is_named_or_left_out(error, stream):
    data = Raising(8)
    data.error = error
    data = RaisingStream(data) if stream else data
    with pytest.raises(RecordError, match=r"data 'mine', record \d( of the stream)?: .") as caught:
        items(data, skip=False)
    assert caught.value.__cause__ is error
    found = items(data)
    assert sum(i["info"]["samples"] for i in found) == 12 - sum(len(i["info"]["broken"]) for i in found)
    assert {line["where"] for i in found for line in i["info"]["broken"]} == {
        f"record {n}{' of the stream' * stream}" for n in (2, 5)
    }


@pytest.mark.parametrize("fault", [MemoryError(), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_not_the_records_fault_ends_the_run(fault):
    data = Raising(8)
    data.error = fault
    with pytest.raises(type(fault)):
        items(data)


def test_workers_raise_the_error_itself_and_not_its_traceback():
    data = Raising(8)
    data.error = OSError(5, "Input/output error")
    before = set(multiprocessing.active_children())
    with pytest.raises(RecordError) as caught:
        items(data, workers=2, skip=False)
    assert before.issuperset(multiprocessing.active_children()), "they end with the error, whatever holds its traceback"
    assert str(caught.value).endswith("OSError: [Errno 5] Input/output error") and "Traceback" not in str(caught.value)
    assert [i["info"] for i in items(data, workers=2)] == [i["info"] for i in items(data)]


@pytest.mark.parametrize("buckets", [False, True])
def test_batches_of_one_are_none_and_the_others_what_they_were(buckets):
    data = Raising(8)
    found = items(data, size=1, steps=16, length_buckets=buckets)
    assert sum(i["batch"] is None for i in found) == 4
    if not buckets:
        whole = items(Numbers(8), size=1, steps=16)
        assert all(
            a["batch"] is None or a["batch"]["ids"] == b["batch"]["ids"] for a, b in zip(found, whole, strict=True)
        )


def test_of_several_processes_each_has_a_spare_batch():
    data, stage = Raising(8), Stage(steps=8, batch_size=2, skip_broken=True)
    for rank in (0, 1):
        made = list(Loader(Batches(Mix({"m": data}, {}, 0), Names(), stage, 8, ShardPosition(rank, 2))))
        assert all(i["spare"] is not None for i in made if i["batch"] is None)
    data.error = ZooError("no")
    data.get = lambda index, epoch=0: (_ for _ in ()).throw(data.error)
    with pytest.raises(ZooError, match="Every sample of this process is broken"):
        list(Loader(Batches(Mix({"m": data}, {}, 0), Names(), stage, 8, ShardPosition(0, 2))))


def test_an_error_can_be_printed_written_and_sent_to_another_process():
    error = RecordError("a \ud800 b", data="d", where="f:1", sample="x\udfff", kind="text")
    str(error).encode()
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.line(), again.kind) == (str(error), error.line(), "text")
    assert str(again).startswith("data 'd', f:1, sample ")


# ---- through real files, templates, tokenizers and decoders --------------------------------------------------------

GOOD = {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]}


def said(question, answer="a"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


BROKEN = {  # id -> record, and the kind of fault
    "missing": ({"image": "none.png", **GOOD}, "missing image"),
    "torn": ({"image": "torn.png", **GOOD}, "image"),
    "empty file": ({"image": "empty.png", **GOOD}, "image"),
    "no picture": ({"image": "text.png", **GOOD}, "image"),
    "bad base64": ({"image": "data:image/png;base64,%%%", **GOOD}, "record"),
    "inline bytes": ({"image": "data:image/png;base64,AAAA", **GOOD}, "image"),
    "a number": ({"image": 7, **GOOD}, "record"),
    "two marks": ({"image": "a.png", "conversations": said("<image> <image> what?")}, "record"),
    "no answer": ({"image": "a.png", "conversations": said("<image> what?", " ")}, "text"),
    "surrogate": ({"image": "a.png", "conversations": said("<image> what \ud83d?")}, "text"),
    "system": ({"image": "a.png", "conversations": [{"from": "system", "value": "s"}, *said("<image> q")]}, "text"),
    "two users": ({"image": "a.png", "conversations": [{"from": "human", "value": "q"}, *said("<image> q")]}, "text"),
    "turns are text": ({"image": "a.png", "conversations": "hello"}, "record"),
    "turn of numbers": ({"image": "a.png", "conversations": [1, 2]}, "record"),
    "a value of numbers": ({"image": "a.png", "conversations": said(3)}, "record"),
    "no fields": ({"image": "a.png"}, "record"),
}


def png(size=8):
    out = io.BytesIO()
    Image.new("RGB", (size, size), (200, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def broken_file(tmp_path):
    """A file with twelve good records, one of each broken kind and half a line; images in a folder and in a tar."""
    images = {"a.png": png(), "torn.png": png(64)[:60], "empty.png": b"", "text.png": b"hello"}
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name, data in images.items():
            (tmp_path / "images" / name).write_bytes(data)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    records = [{"id": f"g{i}", "image": "a.png", **GOOD} for i in range(12)]
    records += [{"id": name, **record} for name, (record, _) in BROKEN.items()]
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "d.jsonl").write_text(text + '{"id": "half", "image": "a.p\n')
    return tmp_path


ALTERNATES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("images", ["images", "images.tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_broken_record_is_left_out(broken_file, make_model, images, workers):
    processor = make_model()[1]
    processor.chat_template = ALTERNATES
    node = {"name": "chat_json", "file": str(broken_file / "d.jsonl"), "images": str(broken_file / images)}
    with pytest.raises(ZooError, match=r"d.jsonl:\d+"):
        RunData({"d": node})  # the first one, when the file is opened
    data = RunData({"d": node}, skip_broken=True)
    stage = Stage(epochs=1, batch_size=1, skip_broken=True, workers=workers)
    batches = Batches(data.mix(stage, 0), processor, stage, 29, ShardPosition())
    found = list(Loader(batches))
    names = dict(enumerate([*BROKEN, "half a line"], 13))  # by line
    lines = {names[int(line["where"].rpartition(":")[2])]: line for i in found for line in i["info"]["broken"]}
    kinds = {name: kind for name, (_, kind) in BROKEN.items()} | {"half a line": "record"}
    assert {name: line["kind"] for name, line in lines.items()} == kinds
    assert sum(i["batch"] is not None for i in found) == 12
    assert all(line["where"].startswith(str(broken_file / "d.jsonl:")) for line in lines.values())
    assert all(line["reason"] and "\n" not in line["reason"] for line in lines.values())


def test_half_of_a_surrogate_pair_is_named(make_model):
    """Where it comes through other files than JSON, the tokenizer refuses it."""
    _, processor = make_model()
    with (
        pytest.raises(RecordError, match="data 'd', f, sample 'n': the tokenizer refuses the text: it holds half of a"),
        naming("d", "f", "n", "text"),
    ):
        processor.encode(sample(("what \ud83d?", "yes"), name="n"))


# ---- whole runs ----------------------------------------------------------------------------------------------------


def run(place, folder, *more, stage):
    stages = {"tune": f"checkpoint_every: 2, lr: 0.01, train: [all], {stage}"}
    data = [f"data.chat_json.file={place / 'd.jsonl'}", f"data.chat_json.images={place / 'images'}"]
    return [*recipe(place, stages), "data=[chat_json]", *data, f"run.folder={place / folder}", *more]


def trained(words):
    with Run(config(words)) as made:
        made.train()
    return made


def test_a_run_lists_counts_and_goes_on_bit_for_bit(broken_file):
    """Half of the records are broken: metrics count them, the list has each once, a resumed run is the same."""
    skip = ["skip_broken=true", "max_broken=1"]
    whole = trained(run(broken_file, "whole", *skip, stage="steps: 16, batch_size: 4"))
    rows = read_metrics(whole.folder.metrics)
    listed = read_metrics(whole.folder.skipped)
    assert sum(r.get("skipped", 0) for r in rows) > len(listed) == len({(r["where"], r["id"]) for r in listed}) == 15
    assert {r["stage"] for r in listed} == {"tune"} and all(r["reason"] for r in listed)

    cut = trained(run(broken_file, "cut", *skip, stage="steps: 16, batch_size: 4"))
    for path in cut.folder.list_checkpoints()[1:]:
        path.joinpath("state.json").write_text("{")  # the newest is damaged: the one before counts
    state = json.loads((cut.folder.list_checkpoints()[0] / "state.json").read_text())
    assert state["seen"] == 4 * state["step"] and 0 < state["left_out"] < state["seen"]
    again = trained([*recipe(broken_file, {"tune": "steps: 1"})[:2], f"resume={cut.folder.path}"])
    kept = ("step", "loss", "losses", "skipped")
    assert [[r.get(k) for k in kept] for r in read_metrics(cut.folder.metrics)] == [
        [r.get(k) for k in kept] for r in rows
    ]
    assert read_metrics(cut.folder.skipped) == listed
    both = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


def test_too_many_end_the_run(broken_file):
    with pytest.raises(ZooError, match=r"leave out \d\d of 100 records, more than max_broken=0.1.*skipped.jsonl"):
        trained(run(broken_file, "run", "skip_broken=true", stage="steps: 40, batch_size: 4"))
    text = "".join(json.dumps({"id": f"b{i}", "image": "none.png", **GOOD}) + "\n" for i in range(4))
    (broken_file / "d.jsonl").write_text(text)
    with pytest.raises(ZooError, match="learnt nothing: each of its 8 records is broken"):
        trained(run(broken_file, "none", "skip_broken=true", stage="steps: 2, batch_size: 4"))


def test_two_processes_list_what_both_left_out(broken_file):
    """Batches of one: often one of the processes has nothing to learn from, and takes part all the same."""
    more = ["skip_broken=true", "max_broken=1"]
    words = run(broken_file, "two", *more, stage="steps: 29, batch_size: 2")
    with killed_runs.served():
        ended = killed_runs.train(broken_file / "forked", words, processes=2)
    assert ended.code == 0, ended.said[-2000:]
    alone = trained(run(broken_file, "one", *more, stage="steps: 29, batch_size: 2"))
    listed = [
        {(r["step"], r["where"]) for r in read_metrics(broken_file / n / "skipped.jsonl")} for n in ("one", "two")
    ]
    assert listed[0] == listed[1] and len(listed[0]) == 15
    rows = [[r for r in read_metrics(broken_file / n / "metrics.jsonl") if "lr" in r] for n in ("one", "two")]
    assert [r.get("skipped") for r in rows[0]] == [r.get("skipped") for r in rows[1]]
    for a, b in zip(*rows, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-4)
    assert alone.progress.global_step == 29
