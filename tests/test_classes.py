import gzip

import numpy as np
import pytest

from tests.data_places import shared
from zoo import registry
from zoo.registry import ZooError

NAMES = ["shirt", "bag", "coat"]


def idx(array, zipped=True):
    data = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    return gzip.compress(data, mtime=0) if zipped else data  # no clock: the bytes are part of test names


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("dev", 6)):
        (tmp_path / f"{split}-images.gz").write_bytes(idx(rng.integers(0, 256, (n, 5, 4), np.uint8)))
        (tmp_path / f"{split}-labels").write_bytes(idx(rng.integers(0, 3, n, np.uint8), zipped=False))
    return tmp_path


def load(folder, **options):
    node = {"name": "classes", "images": str(folder / "{split}-images.gz"), "labels": str(folder / "{split}-labels")}
    return registry.build("dataset", {**node, "classes": NAMES, **options})


def said(dialog):
    user, assistant = dialog.messages
    return user["content"][-1]["text"], assistant["content"][0]["text"]


def test_asks_for_the_name_and_for_yes_or_no(folder):
    data = load(folder, yes_no=3)
    for index in range(len(data)):
        sample = data.get(index)
        assert sample.images[0].shape == (5, 4, 3) and sample.images[0].dtype == np.uint8
        assert (sample.images[0] == data.images[index][..., None]).all()
        name, *others = map(said, sample.dialogs)
        label = NAMES[data.labels[index]]
        assert name == ("What is shown?", label) and sample.dialogs[0].choices == NAMES
        assert len(others) == 3
        for question, answer in others:
            assert (question == f"Is this a {label}?") == (answer == "yes")


def test_wordings_are_drawn_in_training_alone(folder):
    data = load(folder, name_wordings=["Name it."], yes_no_wordings=["A {class}?"], eval_split="dev")
    asked = {said(d)[0].replace(name, "{class}") for i in range(60) for d in data.get(i).dialogs for name in NAMES}
    assert {"What is shown?", "Name it.", "Is this a {class}?", "A {class}?"} <= asked
    dev = [said(d)[0] for i in range(6) for d in data.eval_split().get(i).dialogs]
    assert all(q == "What is shown?" or q.startswith("Is this a ") for q in dev)
    for question, answer in (said(d) for i in range(60) for d in data.get(i).dialogs):
        assert (answer in ("yes", "no")) == any(name in question for name in NAMES)
    with pytest.raises(ZooError, match=r"takes '\{class\}'"):
        load(folder, yes_no_wordings=["A {name}?"])


def test_half_of_the_questions_are_true_and_the_rest_are_spread_evenly(folder):
    data = load(folder, yes_no=20, name_question="")
    pairs = [(int(data.labels[i]), *said(d)) for i in range(60) for d in data.get(i).dialogs]
    assert abs(np.mean([answer == "yes" for _, _, answer in pairs]) - 0.5) < 0.06  # 1200 draws: 4 standard errors
    wrong = [NAMES.index(q[10:-1]) - label for label, q, answer in pairs if answer == "no"]
    assert abs(np.mean([d % 3 == 1 for d in wrong]) - 0.5) < 0.09


def test_questions_depend_on_seed_epoch_and_index_alone(folder):
    def questions(data, epoch):
        return [said(data.get(i, epoch).dialogs[1]) for i in range(20)]

    assert questions(load(folder), 3) == questions(load(folder), 3)
    assert questions(load(folder), 3) != questions(load(folder), 4)
    assert questions(load(folder), 3) != questions(load(folder, seed=1), 3)


def test_pairs_are_the_same_questions_with_a_right_and_a_wrong_answer(folder):
    single, paired = load(folder, yes_no=2, flip=True, shift=1), load(folder, yes_no=2, flip=True, shift=1, pairs=True)
    wrong_names = set()
    for index in range(len(single)):
        one, two = single.get(index, 3), paired.get(index, 3)
        assert (one.images[0] == two.images[0]).all()
        chosen, rejected = two.dialogs[::2], two.dialogs[1::2]
        assert {d.preference for d in chosen} == {"chosen"} and {d.preference for d in rejected} == {"rejected"}
        assert list(map(said, chosen)) == list(map(said, one.dialogs))
        for (asked, right), (again, wrong) in zip(map(said, chosen), map(said, rejected), strict=True):
            assert asked == again and right != wrong
            assert wrong in (NAMES if asked == "What is shown?" else ["yes", "no"])
        wrong_names.add((said(chosen[0])[1], said(rejected[0])[1]))
    assert len(wrong_names) == 6  # every class in the place of every other


def test_training_pictures_are_mirrored_and_moved(folder):
    still, moving = load(folder), load(folder, flip=True, shift=1)
    shown = {moving.get(0, epoch).images[0].tobytes() for epoch in range(200)}
    assert len(shown) == 2 * 9
    image = still.get(0).images[0]
    wide = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    windows = [wide[y : y + 5, x : x + 4] for y in range(3) for x in range(3)]
    flipped = np.pad(image[:, ::-1], ((1, 1), (1, 1), (0, 0)), mode="edge")
    windows += [flipped[y : y + 5, x : x + 4] for y in range(3) for x in range(3)]
    assert shown == {np.ascontiguousarray(w).tobytes() for w in windows}
    dev = load(folder, split="dev", flip=True, shift=1)
    assert {dev.get(0, epoch).images[0].tobytes() for epoch in range(20)} == {dev.get(0).images[0].tobytes()}


def test_knows_its_other_splits(folder):
    data = load(folder, eval_split="dev", limit=2)
    assert (len(data), len(data.eval_split()), len(data.eval_split().train_split())) == (2, 6, 60)
    assert load(folder).eval_split() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["a", "a"]}, "two or more different names"),
        ({"classes": ["a", "b"]}, "has label 2, but classes names 2"),
        ({"yes_no_question": "Is it?"}, "takes '{class}'"),
        ({"yes_no_question": "{class} {x}?"}, "takes '{class}'"),
        ({"name_question": "", "yes_no": 0}, "nothing to ask"),
        ({"limit": -1}, "must be 0 or more"),
        ({"split": "test"}, "There is no file .*test-images"),
        ({"labels": "{images}"}, "There is no file"),
    ],
)
def test_mistakes_are_named(folder, options, message):
    with pytest.raises(ZooError, match=message):
        load(folder, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PNG", "not an IDX file"),
        (idx(np.zeros((2, 2), np.uint8), zipped=False)[:-1], "is 4 values, and holds 3"),
        (idx(np.zeros(3, np.uint8))[:-9], "cannot be read"),
        (idx(np.zeros(3, np.uint8)), "do not fit"),
    ],
)
def test_broken_files_are_named(folder, content, message):
    (folder / "train-labels").write_bytes(content)
    with pytest.raises(ZooError, match=message):
        load(folder)


def test_reads_fashion_mnist():
    root = shared("fashion_mnist")
    files = {"images": str(root / "{split}-images-idx3-ubyte.gz"), "labels": str(root / "{split}-labels-idx1-ubyte.gz")}
    data = registry.build("dataset", {"name": "classes", **files, "classes": [str(i) for i in range(10)]})
    assert len(data) == 24000
    assert np.bincount(data.labels).tolist() == [2400] * 10
    assert data.get(0).images[0].shape == (28, 28, 3)
