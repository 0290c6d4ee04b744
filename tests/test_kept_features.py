"""Kept features of frozen encoders: the same training as live, found by what an image holds, whoever wrote them."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import picture, sample
from tests.test_teacher_store import CUT, TILES
from tests.train_builders import config, recipe
from zoo.registry import Cut, ZooError, build
from zoo.runs.kept_features import KeptFeatures, Recall, keep_features
from zoo.settings.schema import FeaturesConfig
from zoo.settings.stage import Stage
from zoo.storage import atomic, feature_store
from zoo.storage.feature_store import FeatureStore
from zoo.storage.packed_features import DTYPES, pack, unpack
from zoo.teaching.teacher import Teacher, TeacherRows
from zoo.training.loop import Run
from zoo.training.step import Counts, TrainStep, count_images, count_labels
from zoo.vision.images.identity import identify
from zoo.vision.images.processors import FEATURES, Pictures
from zoo.vision.images.transform import to_pixels
from zoo.vision.images.video import Video

STAGE = "epochs: 2.5, batch_size: 8, train: [projector, llm], pack_length: 200"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The words of a run, and the weights that it ends with."""
    place = tmp_path_factory.mktemp("live")
    words = recipe(place, {"a": STAGE})
    return words, weights(words, f"run.folder={place / 'run'}")


def weights(words, *more):
    with Run(config(words, *more)) as run:
        run.train()
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}


def same(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- runs --------------------------------------------------------------------------------------------------------


def test_a_run_is_that_of_live_features_to_the_bit(live, tmp_path, capsys):
    """Packed rows of several dialogs; in the first epoch, from its own folder, and by loader workers of a later run."""
    words, wanted = live
    keep = [f"features.folder={tmp_path / 'kept'}", "features.keep=fp32"]
    assert same(weights(words, *keep, f"run.folder={tmp_path / 'one'}"), wanted)
    assert "64 found, 40 encoded" in capsys.readouterr().err
    assert same(weights(words, *keep, f"run.folder={tmp_path / 'two'}", "stages.a.workers=2"), wanted)
    assert "104 found, 0 encoded" in capsys.readouterr().err
    few = weights(words, *keep[:1], "features.keep=int8", f"run.folder={tmp_path / 'few'}")
    assert not same(few, wanted) and all(torch.allclose(few[n], wanted[n], atol=1e-3) for n in wanted)
    assert len(list((tmp_path / "kept").glob("*/store.json"))) == 2, "each dtype has a store of its own"


def test_a_stage_that_trains_the_encoder_keeps_nothing_and_the_next_one_does(tmp_path, capsys):
    stages = {"a": "steps: 2, batch_size: 8", "b": "epochs: 1, batch_size: 8, train: [llm]"}
    words = recipe(tmp_path, stages)
    wanted = weights(words, f"run.folder={tmp_path / 'live'}")
    kept = weights(words, "features.keep=fp32", f"run.folder={tmp_path / 'run'}")
    said = capsys.readouterr().err
    assert same(kept, wanted) and "stage a: the encoder trains, and its features are not kept" in said
    assert "stage b: features are kept as fp32" in said and len(list((tmp_path / "features").iterdir())) == 2  # .lock


@pytest.mark.parametrize("shared", [False, True])
def test_teachers_share_what_is_kept_or_get_pixels(make_model, tmp_path, shared):
    """A teacher with the student's encoder takes the kept features, one with another encoder all pixels."""
    draws = {"pruner": {"random": {"keep_ratio": 0.5}}}
    (student, own), (model, theirs) = make_model(seed=1, **draws), make_model(seed=2, **draws)
    if shared:
        model.vision.load_state_dict(student.vision.state_dict())
    student.vision.requires_grad_(False)
    distiller = build("distiller", {"name": "llava_kd", "relation_weight": 0})
    step = TrainStep(student, distiller, Teacher(model, distiller.needs), Stage(steps=1))
    samples = [sample(("what", "red"), ("how", "big"), seed=seed, name=f"s{seed}") for seed in range(3)]
    twins = TeacherRows(theirs, own)

    def losses_of(prepare):
        batch = own.collate([row for s in samples for row in twins.add(s, [s], [own.encode(s, prepare(s))])])
        return batch, step(batch, Counts(count_labels(batch), count_images(batch)))

    _, wanted = losses_of(lambda _: None)
    assert step.teacher.needs_pixels == (not shared)
    step.features = opened(student, own, tmp_path, "fp32")
    recall = Recall(step.features.store, own, step.teacher.needs_pixels)
    assert recall(samples[0])[0].features is None and losses_of(recall)[1] == wanted
    batch, again = losses_of(recall)
    assert again == wanted and ("pixel_values" in batch) == (not shared)
    assert (step.features.found, step.features.encoded) == (3, 3)


# ---- what a batch holds ------------------------------------------------------------------------------------------


CASES = {
    "scores": {"pruner": {"fastervlm": {"name": "fastervlm", "keep_ratio": 0.5}}},
    "draws": {"pruner": {"random": {"name": "random", "keep_ratio": 0.5}}},
    "keys": {"pruner": {"visionzip": {"name": "visionzip"}}},
    "another block": {"pruner": {"hiprune": {"name": "hiprune"}}},
    "crops": {"layout": TILES, "pruner": {"fastervlm": {"name": "fastervlm", "keep_ratio": 0.5}}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keep", DTYPES)
def test_what_parts_ask_for_is_kept_with_the_tokens(make_model, tmp_path, case, keep):
    """The features of a batch in which some images are kept, one is shown twice, one is new: as the encoder gives."""
    model, processor = made(make_model, CASES[case])
    kept = opened(model, processor, tmp_path, keep)
    recall = Recall(kept.store, processor)
    samples = [sample(("what", "red"), images=2, seed=seed, name=f"s{seed}") for seed in (0, 2, 1)]
    first = filled(kept, processor, [(s, recall(s)) for s in samples[:1]])
    assert len(first["encoded"][0].tokens) and kept.encoded == 2
    batch = [(s, recall(s)) for s in samples]
    pixels = [bool(len(image.pixels)) for _, images in batch for image in images]
    assert pixels == [False, False, True, True, False, True]
    own = filled(kept, processor, batch)
    plain = processor.collate([processor.encode(s) for s in samples])
    with torch.no_grad():
        wanted = model.encode_images(plain["pixel_values"], plain.get("cuts"))
        got = model.encode_features(own["encoded"][0], own.get("cuts"))
        whole, half = model(**plain), model(**own)
    exact = keep == "fp32"
    assert (kept.found, kept.encoded) == (3, 5) and "pixel_values" not in own
    for name in ("tokens", "keep", "cls_attention", "checksum", "keys"):
        mine, theirs = getattr(got.kept, name), getattr(wanted.kept, name)
        assert (mine is None) == (theirs is None) or name == "checksum"
        close = name in ("keep", "checksum") or (exact and name != "cls_attention")
        assert theirs is None or (torch.equal(mine, theirs) if close else torch.allclose(mine, theirs, atol=0.05))
        # The last bit of scores depends on how many rows are together, in live batches too.
        assert name != "cls_attention" or theirs is None or torch.allclose(mine, theirs, rtol=0, atol=1e-7)
    assert torch.equal(half.loss, whole.loss) if exact else torch.allclose(half.loss, whole.loss, atol=1e-2)


def made(make_model, slots):
    model, processor = make_model(**slots)
    if "layout" in slots:
        processor.pictures = Pictures(CUT)
    return model.eval().requires_grad_(False), processor


def opened(model, processor, folder, keep, **options):
    more = {"stage": "a", "precision": "fp32", "sharded": False, "folder": folder, "note": print} | options
    kept = keep_features(FeaturesConfig(keep=keep), model, processor, **more)
    assert isinstance(kept, KeptFeatures)
    return kept


def filled(kept, processor, samples):
    return kept.fill(processor.collate([processor.encode(s, images) for s, images in samples]))


def test_nothing_is_kept_of_what_cannot_be(make_model, tmp_path):
    model, processor = make_model()
    assert keep_features(FeaturesConfig(), model, processor, stage="a", precision="fp32", sharded=False,
                         folder=tmp_path, note=print) is None  # fmt: skip
    model.requires_grad_(False)
    with pytest.raises(ZooError, match="FSDP"):
        opened(model, processor, tmp_path, "bf16", sharded=True)
    kept = opened(model, processor, tmp_path, "fp16")
    model.vision.tower.blocks[-1].mlp.fc2.weight.fill_(1e8)
    with pytest.raises(ZooError, match=r"tokens reach .*float16 ends at 65504: set features\.keep=bf16"):
        filled(kept, processor, [(s, Recall(kept.store, processor)(s)) for s in [sample(("what", "red"))]])
    kept = opened(model, processor, tmp_path, "int8")  # whose scales are float16: they became inf, and features NaN
    with pytest.raises(ZooError, match=r"tokens reach .*int8 ends at .*: set features\.keep=bf16"):
        filled(kept, processor, [(s, Recall(kept.store, processor)(s)) for s in [sample(("what", "red"))]])
    model.vision = None
    with pytest.raises(ZooError, match="the model has no encoder"):
        opened(model, processor, tmp_path, "bf16")
    with pytest.raises(ZooError, match="bf16"):
        FeaturesConfig(keep="bf61")


@pytest.mark.parametrize("keep", ["fp16", "int8"])
def test_features_of_new_images_are_joined_in_bf16(make_model, tmp_path, keep):
    model, processor = make_model()
    model.requires_grad_(False)
    kept = opened(model, processor, tmp_path, keep)
    samples = [sample(("what", "red"), seed=seed) for seed in (0, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        filled(kept, processor, [(s, Recall(kept.store, processor)(s)) for s in samples])


def test_another_encoder_or_transform_is_another_store(make_model, tmp_path):
    model, processor = make_model()
    model.requires_grad_(False)
    folders = {opened(model, processor, tmp_path, "bf16").store.folder}
    folders.add(opened(model, processor, tmp_path, "bf16").store.folder)
    assert len(folders) == 1
    folders.add(opened(model, processor, tmp_path, "bf16", precision="bf16").store.folder)
    with torch.no_grad():
        model.vision.tower.pos_embed[0, 0, 0] += 1e-6
    folders.add(opened(model, processor, tmp_path, "bf16").store.folder)
    model.requested |= {"cls_attention"}
    folders.add(opened(model, processor, tmp_path, "bf16").store.folder)
    processor.transform = type(processor.transform)(**{**vars(processor.transform), "fit": "squash"})
    folders.add(opened(model, processor, tmp_path, "bf16").store.folder)
    assert len(folders) == 5


# ---- images ------------------------------------------------------------------------------------------------------


def test_an_image_is_what_it_holds(tmp_path):
    """Its file, however it is named and dated; what is decoded is what was read."""
    file, again = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(picture(1, 40)).save(file)
    again.write_bytes(file.read_bytes())
    content, image, where = identify(file)
    assert identify(str(again))[0] == content == identify(lambda: file)[0] == identify(file.read_bytes())[0]
    assert identify(file.open("rb"))[0] == content and where == repr(str(file))
    before = file.stat()
    Image.fromarray(255 - picture(1, 40)).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert identify(file)[0] != content, "a file that changed is another image, whatever its date says"
    assert image == again.read_bytes()
    decoded = [identify(Image.open(again)), identify(picture(1, 40)), identify(torch.from_numpy(picture(1, 40)))]
    assert decoded[1][0] == decoded[2][0] != decoded[0][0]
    for source in (tmp_path / "none.png", "https://a.b/c.png", 5, np.zeros(3)):
        assert identify(source)[0] in ((), (b"array", b"float64 (3,)", bytes(24)))


@pytest.mark.parametrize("kind", [str, Video])
def test_what_may_never_end_is_not_read(tmp_path, kind):
    """A pipe and a device: what decodes them refuses them."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/zero"):
        assert identify(kind(str(place)))[0] == ()


def test_a_video_is_the_same_with_indices_of_numpy(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"frames")
    chosen = [
        Video(str(tmp_path / "a.mp4"), sampling="explicit", indices=some) for some in ((0, 3), (*np.array([0, 3]),))
    ]
    assert identify(chosen[0])[0] == identify(chosen[1])[0] != ()


def test_a_broken_image_is_named_as_without(make_model, tmp_path):
    model, processor = make_model()
    kept = opened(model.requires_grad_(False), processor, tmp_path / "kept", "fp32")
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    for name in ("half.png", "none.png"):
        shown = sample(("what", "red"))
        shown.images = [str(tmp_path / name)]
        said = []
        for prepare in (Recall(kept.store, processor), processor.encode):
            with pytest.raises(ZooError) as error:
                prepare(shown)
            said.append(str(error.value))
        assert said[0] == said[1] and name in said[0]


# ---- the folder --------------------------------------------------------------------------------------------------


def add(store, *numbers, size=4):
    for n in numbers:
        store.add(bytes([n]) * 16, Cut(), {"tokens": torch.full((1, size), float(n))}, {"tokens": "float32"})


def test_processes_add_side_by_side_and_find_each_others(tmp_path):
    mine, theirs = FeatureStore(tmp_path, {"a": 1}), FeatureStore(tmp_path, {"a": 1})
    add(mine, 1, 2)
    assert mine.find(b"\2" * 16) and theirs.find(b"\2" * 16) is None
    mine.flush()
    add(theirs, 2, 3)
    theirs.flush()
    worker = pickle.loads(pickle.dumps(mine))
    for store in (mine, theirs, worker):
        found = [store.find(bytes([n]) * 16).tensors["tokens"][0, 0].item() for n in (1, 2, 3)]
        assert found == [1, 2, 3] and store.find(b"\4" * 16) is None
    assert not worker.adds and len(theirs) == 3 and theirs.dtypes == {"tokens": "float32"}
    assert FeatureStore(tmp_path, {"a": 2}).find(b"\1" * 16) is None


def test_a_shard_in_part_is_not_read_and_a_damaged_one_is_left_out(tmp_path):
    store = FeatureStore(tmp_path, {})
    add(store, 1)
    store.flush()
    (shard,) = store.folder.glob("shard-*")
    (store.folder / f".{shard.name}{atomic.BESIDE}").write_bytes(b"half")
    (store.folder / "shard-damaged.safetensors").write_bytes(shard.read_bytes()[:-7])
    notes = []
    again = FeatureStore(tmp_path, {}, note=notes.append)
    assert len(again) == 1 and again.find(b"\1" * 16) and "shard-damaged" in notes[0]
    shard.unlink()
    late = FeatureStore(tmp_path, {}, note=notes.append)
    assert late.find(b"\1" * 16) is None and again.find(b"\1" * 16), "an open file is there until it is closed"


def test_a_shard_that_is_removed_is_noted_once(tmp_path):
    notes = []
    stores = [FeatureStore(tmp_path, {"a": 1}, note=notes.append)]
    for turn in range(2):
        for i in range(turn * 5, turn * 5 + 5):
            stores[0].add(bytes([i]) * 16, Cut(), {"tokens": torch.full((1, 2, 2), i)}, {"tokens": "int64"})
        stores[0].flush()
    stores.append(FeatureStore(tmp_path, {"a": 1}, note=notes.append))
    sorted(stores[0].folder.glob("shard-*"))[0].unlink()
    found = [stores[1].find(bytes([i]) * 16) for i in range(10)]
    assert [f is None for f in found] == [True] * 5 + [False] * 5 and int(found[7].tensors["tokens"][0, 0, 0]) == 7
    assert len(notes) == 1 and "computed again" in notes[0]


def test_a_full_folder_and_one_that_cannot_be_written_are_read(tmp_path, monkeypatch):
    notes = []
    store = FeatureStore(tmp_path, {}, max_bytes=60_000, note=notes.append)
    for n in range(1, 6):
        add(store, n, size=5000)  # 20 kB each
        store.flush()
    assert 40_000 < store.size <= 60_000 and len(store) == 2
    assert len(notes) == 1 and "features.max_gb=6e-05. Features that are kept are used, and no others" in notes[0]
    monkeypatch.setattr(feature_store.os, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    read = FeatureStore(tmp_path, {}, note=notes.append)
    add(read, 9)
    read.flush()
    assert read.find(b"\1" * 16) and len(read) == 2 and not read.adds and "Permission denied" in notes[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="Cannot write kept features"):
        FeatureStore(tmp_path / "file", {})


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_scores_stay_and_other_numbers_take_the_bits_of_the_dtype():
    from zoo.registry import ImageFeatures

    torch.manual_seed(0)
    tokens = torch.randn(3, 5, 7) * torch.tensor([1.0, 30, 1e-3]).view(3, 1, 1)
    image = ImageFeatures(tokens, (1, 5), cls_attention=torch.rand(3, 5), block_attention={"k@1": torch.rand(3, 5)})
    for keep, dtype in DTYPES.items():
        packed, dtypes = pack(image, keep)
        back = unpack(packed, dtypes, (1, 5))
        assert packed["tokens"].dtype == dtype and back.tokens.dtype == torch.float32
        assert torch.equal(back.cls_attention, image.cls_attention)
        assert torch.equal(back.block_attention["k@1"], image.block_attention["k@1"])
        # Of each block of 32 values, half a step of 127 in its largest; the scale has 11 bits.
        largest = tokens.flatten(1).abs().amax(1)
        bound = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 254 + 2**-11}[keep] * largest
        assert ((back.tokens - tokens).flatten(1).abs().amax(1) <= bound + 1e-9).all()
    half = ImageFeatures(tokens.bfloat16(), (1, 5))
    packed, dtypes = pack(half, "fp32")
    assert packed["tokens"].dtype == torch.bfloat16, "no more bits than the encoder gave"
    assert torch.equal(unpack(packed, dtypes, (1, 5)).tokens, half.tokens)


def test_pixels_are_as_without(make_model, tmp_path):
    """What is prepared on a miss is what the processor prepares."""
    model, processor = make_model()
    kept = opened(model.requires_grad_(False), processor, tmp_path, "fp32")
    shown = sample(("what", "red"))
    (image,) = Recall(kept.store, processor)(shown)
    assert torch.equal(image.pixels[0], to_pixels(shown.images[0], processor.transform)) and image.plain
    assert FEATURES in processor.collate([processor.encode(shown, [image])])
