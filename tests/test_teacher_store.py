"""What a teacher said, kept: the same gradients as live up to what was left out, found by what a sample says."""

import json
import pickle
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from tests.teacher_builders import KD, save_teacher, taught
from tests.train_builders import losses
from zoo.checking import checker
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.registry import Dataset, StreamingDataset, ZooError, build
from zoo.runs.folder import read_metrics
from zoo.runs.left_out import Sieve
from zoo.runs.order import Mix
from zoo.settings.stage import Stage
from zoo.storage.shards import shards_of
from zoo.teaching.teacher import Teacher, TeacherRows
from zoo.teaching.teacher_store import TeacherStore, Writer, data_hash, draws_pictures, read_about, sample_key
from zoo.text.tokenizer import OF_MODEL
from zoo.training.loop import Run
from zoo.training.step import Counts, TrainStep, count_images, count_labels
from zoo.training.teach import Truncation, batches, encoded, main, needs_of, outputs_of, samples, stage_of
from zoo.vision.images.processors import Pictures

NO_RELATION = "{name: llava_kd, relation_weight: 0}"
STAGE = f"steps: 3, {KD}".replace("distiller: llava_kd", f"distiller: {NO_RELATION}")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model", tokenizer)


@pytest.fixture(scope="module")
def store(tmp_path_factory, teacher):
    """Everything a stage of three steps sees, almost all of the vocabulary, in two shards."""
    place = tmp_path_factory.mktemp("store")
    options = ["teach.k=1000", "teach.dtype=float32", "teach.shard=16", f"teach.folder={place / 'kept'}"]
    return main(taught(place, teacher, {"dft": STAGE}, *options))


def from_store(store):
    return STAGE.replace("teacher: '{teacher}'", f"teacher: {{store: '{store}'}}")


def curves(folder):
    return [r["losses"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def live_curves(tmp_path_factory, teacher):
    """The losses of a run with the teacher itself."""
    place = tmp_path_factory.mktemp("live")
    Run(taught(place, teacher, {"dft": STAGE}, f"run.folder={place / 'run'}")).train()
    return curves(place / "run")


@pytest.mark.parametrize("change", ["pack: none, ", "accumulate: 2, pack_length: 120, workers: 1, "])
def test_a_stored_teacher_trains_as_a_live_one(tmp_path, teacher, store, live_curves, change):
    Run(taught(tmp_path, teacher, {"dft": change + from_store(store)}, f"run.folder={tmp_path / 'run'}")).train()
    for live, stored in zip(live_curves, curves(tmp_path / "run"), strict=True):
        assert live.keys() == stored.keys() == {"answer", "response", "visual"}
        for name in live:
            assert stored[name] == pytest.approx(live[name], rel=1e-4), name


def test_a_pruned_student_learns_from_the_stored_cells_it_kept(tmp_path, teacher, store):
    pruner = ["pruner=[random]", "pruner.random.keep_ratio=0.25"]
    for name, stage in (("live", STAGE), ("stored", from_store(store))):
        Run(taught(tmp_path, teacher, {"dft": stage}, *pruner, f"run.folder={tmp_path / name}")).train()
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), rel=1e-4)


TILES = {"name": "tiles"}
CUT = {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 64},
       "max_image_size": {"longest_edge": 32}}  # fmt: skip


def test_stored_tiles_are_those_that_the_student_sees(tmp_path, make_model):
    """A square image is four tiles and an overview, one twice as wide as high two; the student drops half of each."""
    student, own = make_model(seed=1, layout=TILES, pruner={"random": {"keep_ratio": 0.5}})
    model, theirs = make_model(seed=2, layout=TILES)
    own.pictures = theirs.pictures = Pictures(CUT)
    several = [sample((q, a), seed=i, name=str(i)) for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=False))]
    several[1].images[0] = several[1].images[0][:16]
    distiller = build("distiller", {"name": "llava_kd", "relation_weight": 0.0})
    teacher = Teacher(model, distiller.needs)
    about = {"vocab_size": len(theirs.tokenizer), "positions": ["response", "visual"], "dtype": "float32",
             "cells": model.layout.row_tokens, "data": {}}  # fmt: skip
    keyed = [(sample_key(s), theirs.encode(s)) for s in several]
    Writer(tmp_path, about).write(outputs_of(teacher, theirs, keyed, len(theirs.tokenizer) - 1, about, Truncation()))
    found = []
    for who, writes in ((teacher, TeacherRows(theirs, own)), (stored := TeacherStore(tmp_path, distiller.needs),) * 2):
        batch = own.collate([row for s in several[:3] for row in writes.add(s, [s], [own.encode(s)])])
        assert [cut.rows for cut in batch["cuts"]] == [5, 3, 5]
        step = TrainStep(student, distiller, who, Stage(steps=1, distiller="llava_kd", teacher="t"))
        found.append(step(batch, Counts(count_labels(batch), count_images(batch))))
    for name in ("answer", "response", "visual"):
        assert found[1][name].item() == pytest.approx(found[0][name].item(), rel=1e-4), name
    own.pictures = None
    with pytest.raises(ZooError, match=r"has 80 image tokens for sample .*, and the student cuts .* into 1 of 16"):
        stored.add(several[0], several[:1], [own.encode(several[0])])


HALF = {"pruner": {"random": {"name": "random", "keep_ratio": 0.5}}}


@pytest.mark.parametrize(
    ("slots", "stored", "reason"),
    [
        ({"layout": TILES}, {}, "layout is TilesConfig.* the teacher's none"),
        ({"pruner": {"pool": {}}}, {}, "'pool' makes new tokens"),
        (HALF, HALF, r"has pruners \[random\], and a store has image tokens by their position"),  # live it may
    ],
    ids=["tiles", "pool", "both drop"],
)
def test_image_tokens_that_the_store_cannot_give_are_refused(
    tmp_path, monkeypatch, store, teacher, slots, stored, reason
):
    monkeypatch.setattr(checker, "_MOST_TRIES", 3)  # the fixes of teaching come first
    about = read_about(store)
    (tmp_path / "store.json").write_text(json.dumps(about | {"slots": about["slots"] | stored}))
    stage = Stage(steps=3, distiller={"name": "llava_kd", "relation_weight": 0.0}, teacher={"store": str(tmp_path)})
    plan = Plan(tiny_slots(**slots), stages={"dft": stage}, data=("scenes",), tokenizer=f"{OF_MODEL}{teacher}")
    with pytest.raises(RefusedError, match=f"(?s)Stage 'dft': .*{reason}") as refusal:
        check(plan)
    assert any("visual_weight:0" in fix for fix in refusal.value.fixes)


def test_stopped_it_goes_on(tmp_path, teacher, store, capsys):
    options = ["teach.k=1000", "teach.dtype=float32", "teach.shard=16", f"teach.folder={tmp_path / 'kept'}"]
    cfg = taught(tmp_path, teacher, {"dft": STAGE}, *options, "teach.limit=16")
    again = main(cfg)
    assert len(shards_of(again)) == 1
    cfg.teach.limit = None
    main(cfg)
    assert "16 samples are stored already" in capsys.readouterr().out
    for mine, theirs in zip(shards_of(again), shards_of(store), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    before = [f.stat().st_mtime_ns for f in shards_of(again)]
    main(cfg)
    assert [f.stat().st_mtime_ns for f in shards_of(again)] == before
    cfg.teach.k = 5
    with pytest.raises(ZooError, match=r"begun with another k: .*, now 5"):
        main(cfg)


def test_processes_share_the_samples_and_write_what_one_does(tmp_path, teacher, store, monkeypatch):
    """One after the other, each as if the other's shards were not there yet."""
    options = ["teach.k=1000", "teach.dtype=float32", "teach.shard=16", f"teach.folder={tmp_path / 'kept'}"]
    monkeypatch.setattr(Writer, "known", lambda writer: set())
    monkeypatch.setattr("zoo.training.teach.gather", lambda accelerator, value: [value])
    for rank in (0, 1):
        one = SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"), print=print)
        one.main_process_first, one.wait_for_everyone = nullcontext, lambda: None
        monkeypatch.setattr("zoo.training.teach.start_accelerator", lambda device, one=one: one)
        main(taught(tmp_path, teacher, {"dft": STAGE}, *options))
    both, alone = (TeacherStore(folder, frozenset({"teacher.response"})) for folder in (tmp_path / "kept", store))
    assert both.shards.where.keys() == alone.shards.where.keys() and len(both.shards.files) == 2
    for key, place in alone.shards.where.items():
        mine, wanted = both.read(both.shards.where[key], "response"), alone.read(place, "response")
        assert np.array_equal(mine["ids"], wanted["ids"]) and np.allclose(
            mine["log_probs"], wanted["log_probs"], atol=1e-5
        )


def test_a_stream_is_asked_as_far_as_the_stage_reads_it():
    class Stream(StreamingDataset):
        def stream(self, epoch, start):
            return (sample((QUESTIONS[0], "yes"), seed=i) for i in range(start, 7))

    mix, stage = Mix({"a": Stream()}, {}, 0), Stage(steps=3, batch_size=2)
    assert len(list(samples(mix, stage, None))) == 6 and len(list(samples(mix, stage, 4))) == 4
    assert data_hash(Stream()) == ""
    with pytest.raises(ZooError, match="a stream without a length: give the stage steps"):
        samples(mix, Stage(epochs=1), None)


def test_it_says_what_keeping_few_tokens_costs(tmp_path, teacher, capsys):
    folder = main(taught(tmp_path, teacher, {"dft": STAGE}, "teach.k=4", f"teach.folder={tmp_path / 'kept'}"))
    said = capsys.readouterr().out
    assert "positions, the 4 likeliest tokens of each" in said and "gradient of the loss is off by" in said
    assert float(said.split("off by ")[1].split("%")[0]) > 0.01
    stored = TeacherStore(folder, frozenset({"teacher.response"}))
    assert stored.about["positions"] == ["response", "visual"] and stored.positions == ["response"]
    kept = stored.read((0, 0), "response")
    mass = np.exp(kept["log_probs"].astype(np.float64)).sum(-1) + np.exp(kept["log_rest"].astype(np.float64))
    assert kept["log_probs"].dtype == np.float16 and np.allclose(mass, 1, atol=5e-3)
    assert (np.diff(kept["log_probs"], axis=-1) <= 0).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"distiller": {"name": "kl", "temperature": 2.0}}, "set temperature=1, not 2.0, or load the teacher"),
        ({"data": {"photos": 1.0}}, "is of scenes, not of 'photos'"),
        (
            {"tokenizer": None, "vocab_size": 341},
            "would train a tokenizer of its own, which is not that of the stored teacher",
        ),
        ({"template": "chatml"}, "has another tokenizer or chat template than the student"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_before_earlier_stages_train(teacher, store, change, reason):
    stage = {"distiller": "kl", "teacher": {"store": str(store)}} | {
        k: change[k] for k in change if k in ("distiller", "data")
    }
    given = {"tokenizer": f"{OF_MODEL}{teacher}"} | {
        k: change[k] for k in change if k in ("tokenizer", "template", "vocab_size")
    }
    plan = Plan(tiny_slots(), stages={"dft": Stage(steps=3, **stage)}, data=("scenes", "photos"), **given)
    with pytest.raises(RefusedError, match=f"(?s)Stage 'dft': .*{reason}"):
        check(plan, fixes=0)


def test_other_data_and_other_needs_are_refused(tmp_path, teacher, store):
    other = taught(tmp_path, teacher, {"dft": from_store(store)}, "data.scenes.seed=1", f"run.folder={tmp_path / 'a'}")
    with pytest.raises(ZooError, match="data 'scenes' is not the data that the store"):
        Run(other).train()
    whole = {"dft": from_store(store).replace(NO_RELATION, "llava_kd")}
    with pytest.raises(ZooError, match=r"not relation. Set stages.dft.distiller={name: llava_kd, relation_weight: 0}"):
        Run(taught(tmp_path, teacher, whole, f"run.folder={tmp_path / 'b'}"))
    with pytest.raises(ZooError, match="Sample 's' is not in the store"):
        TeacherStore(store).add(sample((QUESTIONS[0], ANSWERS[0])), [], [])


def test_a_sample_is_known_by_what_it_says():
    one, same, other = (sample((QUESTIONS[0], a)) for a in ("yes", "yes", "no"))
    assert sample_key(one) == sample_key(same) != sample_key(other)

    class Data(Dataset):
        def __init__(self, seed):
            self.seed = seed

        def __len__(self):
            return 3

        def get(self, index, epoch=0):
            return sample((QUESTIONS[index], "yes"), seed=self.seed + index)

    assert data_hash(Data(0)) == data_hash(Data(0)) != data_hash(Data(1)), "pictures count"


def test_pictures_that_are_drawn_anew_in_each_epoch_are_stored_for_each(tmp_path):
    class Data(Dataset):
        def __init__(self, moves):
            self.moves = moves

        def __len__(self):
            return 2

        def get(self, index, epoch=0):
            return sample((QUESTIONS[index], "yes"), seed=index + 2 * self.moves * (epoch % 2))

    stage = Stage(steps=6, batch_size=2)  # six epochs, in which two pictures of each sample turn up
    for moves, drawn in ((0, []), (1, ["a"])):
        mix = Mix({"a": Data(moves)}, {}, 0)
        assert draws_pictures(mix.datasets[0]) is bool(drawn)
        asked = [each for group in batches(samples(mix, stage, None), 4, set(), drawn) for each in group]
        assert len(asked) == 2 + 2 * moves
        store = TeacherStore.__new__(TeacherStore)
        store.folder, store.positions, store.about = tmp_path, [], {"pictures": drawn}
        store.shards = SimpleNamespace(where=dict.fromkeys([key for key, _ in asked[:2]], (0, 0)))
        assert store.add(asked[0][1], [], []) == []
    with pytest.raises(ZooError, match="its text, or its picture, which is drawn anew in each epoch, differs"):
        store.add(asked[-1][1], [], [])


def test_one_name_and_one_text_in_two_data_sets_are_two_samples(tmp_path):
    class Data(Dataset):
        def __init__(self, seed):
            self.seed = seed

        def __len__(self):
            return 2

        def get(self, index, epoch=0):
            return sample((QUESTIONS[0], "yes"), seed=self.seed + index, name=f"train-{index}")

    mix = Mix({"a": Data(0), "b": Data(9)}, {}, 0)
    asked = [
        each
        for group in batches(samples(mix, Stage(steps=2, batch_size=2), None), 4, set(), (), True)
        for each in group
    ]
    assert sorted((s.data, s.id) for _, s in asked) == [(d, f"train-{i}") for d in "ab" for i in (0, 1)]
    store = TeacherStore.__new__(TeacherStore)
    store.folder, store.positions, store.about = tmp_path, [], {"by_data": True}
    store.shards = SimpleNamespace(where={key: (0, 0) for key, s in asked if s.data == "a"})
    for _, each in asked:
        with nullcontext() if each.data == "a" else pytest.raises(ZooError, match="is not in the store"):
            store.add(each, [], [])


def test_a_teacher_that_was_trained_on_does_not_go_on_with_its_store(tmp_path, tokenizer):
    name = save_teacher(tmp_path / "model", tokenizer)

    def cfg(*more):
        return taught(tmp_path, name, {"dft": STAGE}, "teach.limit=2", f"teach.folder={tmp_path / 'kept'}", *more)

    folder = main(cfg())
    with pytest.raises(ZooError, match='begun with another precision: "fp32", now "bf16"'):
        main(cfg("precision=bf16"))
    save_teacher(tmp_path / "model", tokenizer, seed=6)
    with pytest.raises(ZooError, match="begun with another state of the teacher's weights"):
        main(cfg())
    warned = pytest.warns(UserWarning, match=r"'dir:.*' has other weights than when '.*kept' was stored.*teach.folder")
    with warned, pytest.raises(ZooError, match="is not in the store"):  # which is of two samples
        Run(taught(tmp_path, name, {"dft": from_store(folder)}, f"run.folder={tmp_path / 'run'}")).train()
    save_teacher(tmp_path / "model", tokenizer)
    assert not TeacherStore(folder).teacher_has_changed()
    shutil.rmtree(tmp_path / "model")
    assert not TeacherStore(folder).teacher_has_changed()  # the store does without it
    save_teacher(tmp_path / "model", tokenizer, seed=6)
    about = read_about(folder)
    (folder / "store.json").write_text(
        json.dumps({k: v for k, v in about.items() if k not in ("weights", "precision", "files")})
    )
    main(cfg())  # of an earlier version, which noted neither


def test_each_dialog_is_a_row_of_its_own_where_the_stage_has_it_so(make_model):
    model, processor = make_model(seed=2)
    distiller = build("distiller", {"name": "llava_kd", "relation_weight": 0.0})
    several = sample(*zip(QUESTIONS[:3], ANSWERS, strict=False))
    about = {"vocab_size": len(processor.tokenizer), "positions": ["response", "visual"], "dtype": "float32"}
    found, teacher = [], Teacher(model, distiller.needs)
    for pack, number in (("dialogs", 1), ("none", 3)):
        rows = encoded(processor, [(b"0" * 16, several)], Sieve(False, 0.1, ""), Stage(steps=1, pack=pack))
        assert len(rows) == number
        found += outputs_of(teacher, processor, rows, 4, about, Truncation())
    (key, together), (same, apart) = found
    assert key == same and together.keys() == apart.keys()
    for positions, kept in together.items():
        torch.testing.assert_close(apart[positions]["log_probs"], kept["log_probs"], rtol=1e-4, atol=1e-5)
    unlike = sample((QUESTIONS[0], "yes"), (QUESTIONS[1], "no"))
    unlike.dialogs[1].messages[0]["content"].reverse()  # the question in front of the image
    with pytest.raises(ZooError, match="its dialogs do not begin alike"):
        encoded(processor, [(b"0" * 16, unlike)], Sieve(False, 0.1, ""), Stage(steps=1, pack="none"), visual=True)


@pytest.mark.parametrize(
    ("distiller", "slots", "message"),
    [
        ({"name": "kl", "temperature": 2.0}, {}, "set temperature=1, not 2.0, or train with the teacher itself"),
        ({"name": "llava_mod", "unshifted": True}, {}, "set unshifted=false and positions=response"),
        ({"name": "llava_kd", "response_weight": 0.0, "visual_weight": 0.0}, {}, "asks for teacher.relation"),
        (
            {"name": "llava_kd"},
            {"pruner": {"fastv": {"name": "fastv", "layer": 1}}},
            r"the teacher has pruners \[fastv\]: take them away with stages.dft.teacher",
        ),
    ],
)
def test_what_a_store_cannot_hold_is_refused_before_it_is_made(tmp_path, tokenizer, distiller, slots, message):
    name = save_teacher(tmp_path / "model", tokenizer, **slots)
    with pytest.raises(ZooError, match=message):
        needs_of("dft", Stage(steps=1, distiller=distiller, teacher=name))


def test_half_a_shard_is_no_shard(tmp_path):
    said = {"response": {"ids": torch.zeros(1, 2, dtype=torch.int32), "log_probs": torch.zeros(1, 2),
                         "log_rest": torch.zeros(1)}}  # fmt: skip
    about = {"vocab_size": 4, "positions": ["response"], "cells": 0, "data": {}}
    writer = Writer(tmp_path, about)
    writer.write([(b"0" * 16, said), (b"1" * 16, said)])
    (tmp_path / ".shard-00001.safetensors.writing").write_bytes(b"cut off")
    again = Writer(tmp_path, about)
    assert again.known() == {b"0" * 16, b"1" * 16} and again.number == 1
    copy = pickle.loads(pickle.dumps(TeacherStore(tmp_path, frozenset({"teacher.response"}))))
    assert copy.read((0, 1), "response")["ids"].shape == (1, 2)
    (tmp_path / "store.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ZooError, match="format 99"):
        read_about(tmp_path)
    with pytest.raises(ZooError, match=r"no store\.json"):
        read_about(tmp_path / "nowhere")


def test_the_stage_is_the_one_with_a_teacher(tmp_path, teacher):
    stages = {"pt": "steps: 1", "dft": STAGE}
    assert stage_of(taught(tmp_path, teacher, stages))[0] == "dft"
    for option, message in (("pt", "'pt' has no model as its teacher"), ("dtf", "Did you mean 'dft'")):
        with pytest.raises(ZooError, match=message):
            stage_of(taught(tmp_path, teacher, stages, f"teach.stage={option}"))
    with pytest.raises(ZooError, match="this run has: a, b"):
        stage_of(taught(tmp_path, teacher, {"a": STAGE, "b": STAGE}))
