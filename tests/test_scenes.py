"""Drawn scenes: reproducible, true to their pixels, honestly split, and asked about fairly."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from zoo import registry
from zoo.data.scene_draw import COLORS, HELD_OUT, LEVELS, SHAPES
from zoo.data.scene_questions import CAPTION
from zoo.data.scenes import CHUNK, KINDS, QUESTIONS, Scenes, ScenesConfig
from zoo.registry import IGNORE_INDEX, ZooError

BASICS = KINDS[: CAPTION + 1]  # without signs and what else is asked on request: tests/test_scene_abilities.py
TRAIN = Scenes(ScenesConfig(scenes=600, questions={"point": 1}))
EVAL = Scenes(ScenesConfig(split="eval", eval_scenes=600, questions={"caption": 1, "point": 1}))


def said(sample):
    return [(d.kind, d.messages[0]["content"][1]["text"], d.messages[1]["content"][0]["text"]) for d in sample.dialogs]


def everything(dataset, epoch=0):
    for i in range(len(dataset)):
        yield dataset.scene(i), said(dataset.get(i, epoch))


def named(o):
    return f"{o['color']} {o['shape']}"


def singular(word):
    return next(s for s in SHAPES if word in (s + "s", s + "es"))


def solve(objects, question):
    """Answer a question from the list of objects alone, in the slowest and plainest way; None for no single answer."""
    words = question.rstrip("?").split()

    def find(name):
        (found,) = [o for o in objects if named(o) == name]
        return found

    if question.startswith("is there a"):
        return "yes" if " ".join(words[3:]) in map(named, objects) else "no"
    if question.startswith("what color"):
        found = [o["color"] for o in objects if o["shape"] == words[-1]]
        return found[0] if len(found) == 1 else None
    if question.startswith("what shape"):
        found = [o["shape"] for o in objects if o["color"] == words[4]]
        return found[0] if len(found) == 1 else None
    if question.startswith("what size"):
        return find(" ".join(words[-2:]))["size"]
    if question.startswith("how many"):
        if words[-1] == "objects":
            return str(sum(o["color"] == words[2] for o in objects))
        return str(sum(o["shape"] == singular(words[2]) for o in objects))
    if question.startswith("where is"):
        return " ".join(map(str, find(" ".join(words[-2:]))["box"]))
    if question.startswith("what is at"):
        x, y = (int(w) * 2 + 1 for w in words[-2:])  # the middle of that bin, in a picture of 64 pixels
        over = [o for o in objects if abs(o["x"] - x) < o["radius"] and abs(o["y"] - y) < o["radius"]]
        return named(over[-1]) if over else None
    if question.startswith("is the"):
        a, b, side = find(" ".join(words[2:4])), find(" ".join(words[-2:])), words[4]
        axis = "x" if side in ("left", "right") else "y"
        assert abs(a[axis] - b[axis]) > 4, "too close to be asked about"
        less = side in ("left", "above")
        if "or" in words:
            return side if (a[axis] < b[axis]) else {"left": "right", "above": "below"}[side]
        return "yes" if (a[axis] < b[axis]) == less else "no"
    return None


def test_every_answer_is_right():
    for dataset in (
        TRAIN,
        EVAL,
        Scenes(ScenesConfig(split="eval", eval_scenes=300, difficulty=2, questions={"point": 1})),
    ):
        asked = Counter()
        for objects, dialogs in everything(dataset):
            for kind, question, answer in dialogs:
                if question != "describe the image.":
                    assert solve(objects, question) == answer, (question, objects)
                    asked[kind] += 1
        assert set(asked) == {*BASICS} - {"caption"}


def test_captions_name_every_object_from_left_to_right():
    for i in range(50):
        caption = next(a for k, _, a in said(EVAL.get(i)) if k == "caption")
        objects = sorted(EVAL.scene(i), key=lambda o: o["x"])
        parts = caption.replace(" and ", ", ").split(", ")
        assert parts == [f"a {o['size']} {o['color']} {o['shape']}" for o in objects]


def test_pixels_are_what_is_said():
    """The colour at an object's centre is its own, and its box is where its colour ends."""
    right = total = 0
    for i in range(300):
        image, objects = TRAIN.get(i).images[0]().astype(float), TRAIN.scene(i)
        assert image.shape == (64, 64, 3)
        for o in objects:
            pixel = image[int(o["y"]), int(o["x"])]
            distance = {name: np.linalg.norm(pixel - rgb) for name, rgb in COLORS.items() if name in list(COLORS)[:6]}
            right += min(distance, key=distance.get) == o["color"]
            total += 1
    assert right / total > 0.99  # the rest: far jitter of a colour
    i = next(i for i in range(300) if len(TRAIN.scene(i)) == 2 and all(o["shape"] != "cross" for o in TRAIN.scene(i)))
    image, (first, second) = TRAIN.get(i).images[0]().astype(float), TRAIN.scene(i)
    for o in (first, second):
        color = image[int(o["y"]), int(o["x"])]
        near = np.linalg.norm(image - color, axis=-1) < 25
        ys, xs = np.nonzero(near)
        x1, y1, x2, y2 = o["box"]
        inside = (xs >= 2 * x1 - 1) & (xs < 2 * x2 + 3) & (ys >= 2 * y1 - 1) & (ys < 2 * y2 + 3)
        assert inside.mean() > 0.9
        assert np.ptp(ys[inside]) + 1 == pytest.approx(2 * o["radius"], abs=2.5)


def test_scenes_hold_what_the_level_says():
    for number, level in enumerate(LEVELS):
        dataset = Scenes(ScenesConfig(scenes=400, difficulty=number, questions={"caption": 1}))
        counts, colors, shapes, sizes = Counter(), set(), set(), set()
        for i in range(400):
            objects = dataset.scene(i)
            counts[len(objects)] += 1
            assert len({named(o) for o in objects}) == len(objects), "a pair stands twice"
            colors |= {o["color"] for o in objects}
            shapes |= {o["shape"] for o in objects}
            sizes |= {o["size"] for o in objects}
            for o in objects:
                assert o["radius"] <= o["x"] <= 64 - o["radius"]
        assert min(counts) >= level.objects[0] - 1  # one that finds no place is left out
        assert max(counts) == level.objects[1]
        assert (len(colors), len(shapes), len(sizes)) == (level.num_colors, level.num_shapes, 2)
        assert dataset.get(0).images[0]().dtype == np.uint8
    assert counts[4] > 20 and counts[8] > 20


def test_the_default_world_is_no_toy():
    counts = Counter(len(TRAIN.scene(i)) for i in range(600))
    assert set(counts) == {2, 3, 4, 5} and min(counts.values()) > 90
    overlapping = 0
    for i in range(600):
        objects = TRAIN.scene(i)
        boxes = [(o["x"], o["y"], o["radius"]) for o in objects]
        overlapping += any(
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) < a[2] + b[2] for n, a in enumerate(boxes) for b in boxes[:n]
        )
    assert 0.05 < overlapping / 600 < 0.6
    ground = TRAIN.get(0).images[0]()
    assert ground.reshape(-1, 3).std(0).min() > 10


def test_is_a_function_of_seed_split_index_and_epoch():
    again = Scenes(TRAIN.config)
    for i in (599, 3, 3, CHUNK, 0):  # whatever was asked for before
        one, two = TRAIN.get(i, 5), again.get(i, 5)
        assert np.array_equal(one.images[0](), two.images[0]()) and said(one) == said(two)
        assert np.array_equal(one.targets["patch_labels"], two.targets["patch_labels"])
    assert said(again.get(0, 1)) != said(again.get(0, 2))
    assert np.array_equal(again.get(0, 1).images[0](), again.get(0, 2).images[0]())
    assert said(EVAL.get(0, 1)) == said(EVAL.get(0, 2))
    other = Scenes(replace(TRAIN.config, seed=1))
    assert not np.array_equal(other.get(0).images[0](), TRAIN.get(0).images[0]())
    longer = Scenes(replace(TRAIN.config, scenes=5000))
    assert np.array_equal(longer.get(17).images[0](), TRAIN.get(17).images[0]())


def test_data_sets_that_differ_in_their_questions_share_pictures():
    other = Scenes(replace(TRAIN.config, questions={"relation": 9}))
    assert np.shares_memory(other.get(5).images[0](), TRAIN.get(5).images[0]())
    assert said(other.get(5)) != said(TRAIN.get(5))
    assert not np.shares_memory(Scenes(replace(TRAIN.config, size=32)).get(5).images[0](), TRAIN.get(5).images[0]())


def test_splits_share_no_picture_and_training_sees_no_held_out_pair():
    pairs = {f"{c} {s}" for c, s in HELD_OUT}
    train = {TRAIN.get(i).images[0]().tobytes() for i in range(600)}
    assert len(train) == 600
    assert not train & {EVAL.get(i).images[0]().tobytes() for i in range(600)}
    for epoch in (0, 3):
        for objects, dialogs in everything(TRAIN, epoch):
            assert not pairs & {named(o) for o in objects}
            assert not any(pair in q or pair in a for _, q, a in dialogs for pair in pairs)


def test_held_out_pairs_are_asked_about_apart():
    pairs = {f"{c} {s}" for c, s in HELD_OUT}
    seen = Counter()
    for i, (objects, dialogs) in enumerate(everything(EVAL)):
        new = [o for o in objects if named(o) in pairs]
        assert len(new) == (i % 4 == 3)
        assert all(d.meta["held_out"] == bool(new) for d in EVAL.get(i).dialogs)
        for kind, question, answer in dialogs:
            if not new:
                assert not any(pair in question for pair in pairs)
            elif kind == "exist":
                assert any(pair in question for pair in pairs)
            elif kind in ("relation", "box", "point", "size"):
                assert named(new[0]) in question + answer
            elif kind == "count":
                assert new[0]["color"] in question or new[0]["shape"] in question
            if new:
                seen[kind] += 1
    assert set(seen) == {*BASICS}


def test_answers_cannot_be_guessed():
    """Nor are they said by the question: of each form of relation, either answer is right half of the time."""
    answers, forms, negatives = {}, {}, Counter()
    for objects, dialogs in everything(TRAIN):
        for kind, question, answer in dialogs:
            answers.setdefault(kind, Counter())[answer] += 1
            if kind == "relation":
                forms.setdefault(" ".join(question.split()[4:-3]), Counter())[answer] += 1
            if kind == "exist" and answer == "no":
                color, shape = question.rstrip("?").split()[-2:]
                negatives[any(o["color"] == color for o in objects) + any(o["shape"] == shape for o in objects)] += 1
    share = {kind: max(c.values()) / c.total() for kind, c in answers.items()}
    assert share["exist"] < 0.55 and share["relation"] < 0.3 and share["size"] < 0.6
    assert set(forms) == {"left of", "right of", "above", "below", "left or right of", "above or below"}
    assert all(len(c) == 2 and max(c.values()) / c.total() < 0.57 for c in forms.values()), forms
    assert share["color"] < 0.3 and share["shape"] < 0.4 and share["count"] < 0.45
    assert negatives[2] > negatives[0], "most pairs that are absent must have both halves in the scene"
    assert {"0", "1", "2", "3"} <= set(answers["count"])


def test_a_sample_has_as_many_dialogs_as_asked_for():
    for i in range(100):
        dialogs = TRAIN.get(i).dialogs
        assert len(dialogs) == sum(QUESTIONS.values()) + 1
        kinds = Counter(d.kind for d in dialogs)
        assert all(kinds[k] == n for k, n in QUESTIONS.items() if k not in ("color", "shape", "size", "exist", "point"))
        assert {d.kind: d.task for d in dialogs}["box"] == "boxes"
        for dialog in dialogs:
            assert [p["type"] for p in dialog.messages[0]["content"]] == ["image", "text"]
    few = Scenes(ScenesConfig(questions=dict.fromkeys(QUESTIONS, 0) | {"box": 3}))
    boxes = [q for _, q, _ in said(few.get(0))]
    assert len(boxes) == 3 and len(set(boxes)) == min(3, len(few.scene(0)))


def test_cells_say_what_stands_there():
    for i in range(40):
        objects, cells = TRAIN.scene(i), TRAIN.get(i).targets["patch_labels"]
        assert cells.shape == (1, 64, 7)
        for n, cell in enumerate(cells[0].tolist()):
            x, y = n % 8 * 8 + 4, n // 8 * 8 + 4
            over = [o for o in objects if max(abs(o["x"] - x), abs(o["y"] - y)) <= o["radius"] + 1]
            if not over:
                assert cell == [0, 0, 0] + [IGNORE_INDEX] * 4
            else:
                top = over[-1]
                kinds = [list(COLORS).index(top["color"]), SHAPES.index(top["shape"]), int(top["size"] == "large")]
                assert cell == [k + 1 for k in kinds] + top["box"]
    assert TRAIN.eval_split().get(0).id == "eval-0" and EVAL.train_split().get(0).id == "train-0"
    assert Scenes(ScenesConfig(eval_scenes=0)).eval_split() is None
    plain = Scenes(ScenesConfig(grid=0))
    assert plain.get(0).targets == {}
    assert Scenes(ScenesConfig(grid=4)).get(0).targets["patch_labels"].shape == (1, 16, 7)


@pytest.mark.parametrize("size", [32, 50, 224])
def test_any_size_shows_the_same_world(size):
    dataset = Scenes(ScenesConfig(size=size, split="eval"))
    for i in range(40):
        assert dataset.get(i).images[0]().shape == (size, size, 3)
        for o in dataset.scene(i):
            x1, _, x2, _ = o["box"]
            assert x2 - x1 == pytest.approx(2 * o["radius"] * 32 / size, abs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "evl"}, "'evl'. Did you mean 'eval'"),
        ({"difficulty": 3}, "from 0 to 2, got 3"),
        ({"questions": {"colour": 1}}, "'colour'. Did you mean 'color'"),
        ({"questions": {"box": -1}}, "'box' questions must not be negative"),
        ({"questions": dict.fromkeys(QUESTIONS, 0)}, "at least one question"),
        ({"size": 16}, "at least 32 pixels"),
        ({"scenes": 0}, "scenes must be at least 1"),
        ({"split": "eval", "eval_scenes": 0}, "eval_scenes 1, got 20000 and 0"),
        ({"sise": 64}, "'sise'. Did you mean 'size'"),
    ],
)
def test_refuses_options_that_make_no_sense(options, message):
    with pytest.raises(ZooError, match=message):
        registry.build("dataset", {"name": "scenes", **options})


def test_an_index_outside_is_an_error():
    with pytest.raises(IndexError, match="600 pictures, got index 600"):
        TRAIN.get(600)


def test_what_is_asked_stays_in_words_that_repeat():
    """Few questions in all: their tokens can be remembered, which a training step depends on."""
    texts = {q for _, dialogs in everything(TRAIN) for _, q, _ in dialogs}
    pairs = 24 - len(HELD_OUT)
    assert len(texts) <= 2 * pairs + 20 + 4 * pairs * (pairs - 1) + 1024 + 200
    words = sorted({w for t in texts for w in t.rstrip("?").split() if not w.isdigit()})
    assert len(words) < 60 and all(a != b for a, b in pairwise(words))


def test_the_default_recipe_is_scored_on_one_data_set_and_reads_all_of_its_words():
    from zoo.runs.data import RunData
    from zoo.settings.config import compose

    config = compose("train", ["data.scenes.scenes=300"])
    data = RunData(config.data)
    assert set(data.evaluation) == {"scenes"}
    assert all(set(stage.data) <= set(data.training) for stage in config.stages.values())
    words = {word for text in data.texts() for word in text.rstrip("?").split()}
    assert words >= {"left", "right", "above", "below", "or", "small", "large", "what", "31", *list(COLORS)[:6]}
