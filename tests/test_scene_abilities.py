"""Signs, dialogs of several turns and POPE's questions in drawn scenes: true to the pixels, and asked as stated."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from zoo import registry
from zoo.data.scene_draw import HELD_OUT
from zoo.data.scene_questions import ABILITIES, KINDS, ON_SIGNS
from zoo.data.scene_signs import CHARACTERS, GLYPHS, LENGTH, PITCH, WORDS
from zoo.data.scenes import QUESTIONS, Scenes, ScenesConfig
from zoo.registry import ZooError

ASKED = dict.fromkeys(QUESTIONS, 0) | {"word": 1, "number": 1, "digit": 3, "turns": 2}
ASKED |= {"pope_random": 4, "pope_popular": 6, "pope_adversarial": 6}
OPTIONS = {"size": 128, "grid": 16, "signs": True, "skew": 0.5, "scene_labels": True, "questions": ASKED}
TRAIN = Scenes(ScenesConfig(scenes=320, **OPTIONS))
EVAL = Scenes(ScenesConfig(split="eval", scenes=320, eval_scenes=320, **OPTIONS))
ORDINARY = [i for i in range(320) if i % 4 != 3]


def turns(dialog):
    return [
        (q["content"][-1]["text"], a["content"][0]["text"]) for q, a in zip(*[iter(dialog.messages)] * 2, strict=True)
    ]


def dialogs(dataset, kind, indices=range(320)):
    for i in indices:
        for dialog in dataset.get(i).dialogs:
            if dialog.kind == kind:
                yield i, turns(dialog)


def read(picture, box):
    """Compare what is inked of a plate with every glyph."""
    x1, y1, x2, y2 = box
    light = picture[y1:y2, x1:x2].mean(-1) > 128
    inked = (light != light[0, 0])[::2, ::2]  # a dot is 2 pixels
    cells = [inked[1:8, 1 + PITCH * i : 6 + PITCH * i] for i in range(LENGTH)]
    return "".join(next(c for c, glyph in GLYPHS.items() if np.array_equal(glyph, cell)) for cell in cells)


def test_signs_read_what_is_said_of_them():
    shown = Counter()
    for i in range(320):
        for name, sign in TRAIN.signs(i).items():
            assert read(TRAIN.get(i).images[0](), sign["box"]) == sign["text"]
            shown[name] += 1
    assert shown["word"] > 300 and shown["number"] > 280
    for i, [(question, answer)] in dialogs(TRAIN, "word"):
        assert question == "what does the sign say?" and answer == TRAIN.signs(i)["word"]["text"]
    for i, [(_, answer)] in dialogs(TRAIN, "number"):
        assert answer.replace(" ", "") == TRAIN.signs(i)["number"]["text"] and len(set(answer)) == 4
    sides = Counter()
    for i, [(question, answer)] in dialogs(TRAIN, "digit"):
        *_, side, _, named = question.rstrip("?").split()
        two = named + answer if side == "after" else answer + named
        assert two in TRAIN.signs(i)["number"]["text"]
        sides[side] += 1
    assert min(sides.values()) > 400


def test_no_glyph_or_word_is_like_another_and_none_is_frequent():
    assert len(GLYPHS) == len(CHARACTERS) == 23 and set("".join(WORDS)) == set(CHARACTERS[10:])
    assert all((GLYPHS[a] != GLYPHS[b]).sum() >= 3 for a, b in combinations(CHARACTERS, 2))
    words = Counter(answer for _, [(_, answer)] in dialogs(TRAIN, "word"))
    assert len(words) == len(WORDS) == 32 and max(words.values()) < 25


def test_signs_cover_no_object_and_change_nothing_else():
    plain = Scenes(replace(TRAIN.config, signs=False, questions={}))
    for i in range(60):
        with_signs, without = TRAIN.get(i).images[0](), plain.get(i).images[0]()
        assert TRAIN.scene(i) == plain.scene(i)
        same = (with_signs == without).all(-1)
        boxes = [sign["box"] for sign in TRAIN.signs(i).values()]
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
            same[y1:y2, x1:x2] = True
            for o in TRAIN.scene(i):
                apart_x = o["x"] + o["radius"] <= x1 or o["x"] - o["radius"] >= x2
                assert apart_x or o["y"] + o["radius"] <= y1 or o["y"] - o["radius"] >= y2
        assert same.all()
        if len(boxes) == 2:
            (a1, b1, a2, b2), (c1, d1, c2, d2) = boxes
            assert a2 <= c1 or c2 <= a1 or b2 <= d1 or d2 <= b1


def test_labels_name_characters_and_whole_pictures():
    """Every character has a cell in patches of 8, and [CLS] is told of what there is."""
    for i in range(60):
        sample, signs = TRAIN.get(i), TRAIN.signs(i)
        cells = sample.targets["patch_labels"][0, :, 7].reshape(16, 16)
        for sign in signs.values():
            x1, y1, x2, _ = sign["box"]
            row = cells[round(y1 / 8)]  # a row of cells whose centres the plate holds
            seen = [row[c] for c in range(16) if x1 + 2 <= 8 * c + 4 < x2]
            assert list(dict.fromkeys(seen)) == [1 + CHARACTERS.index(c) for c in sign["text"]]
        assert (cells > 0).sum() <= 32 and (
            cells[sample.targets["patch_labels"][0, :, 0].reshape(16, 16) > 0] == 0
        ).mean() > 0.9
        labels = sample.targets["scene_labels"][0, 0].tolist()
        assert len(labels) == 24 + 1 + LENGTH and sum(labels[:24]) == len(TRAIN.scene(i))
        assert labels[24] == (1 + WORDS.index(signs["word"]["text"]) if "word" in signs else 0)
        assert labels[25:] == ([1 + int(d) for d in signs["number"]["text"]] if "number" in signs else [0, 0, 0])


def test_later_turns_are_about_the_object_of_the_first():
    answers = Counter()
    for i, said in dialogs(EVAL, "turns", ORDINARY):
        objects = {f"{o['color']} {o['shape']}": o for o in EVAL.scene(i)}
        (exist, yes), (size, large), (where, side) = said
        first = objects[exist.removeprefix("is there a ").rstrip("?")]
        second = objects[" ".join(where.rstrip("?").split()[-2:])]
        assert (yes, size, large) == ("yes", "what size is it?", first["size"])
        axis, sides = ("x", ("left", "right")) if "left" in where else ("y", ("above", "below"))
        assert side == sides[first[axis] > second[axis]]
        answers[side] += 1
    assert min(answers.values()) > 0.15 * sum(answers.values())


@pytest.mark.parametrize("how", ["random", "popular", "adversarial"])
def test_pope_asks_for_as_many_absent_objects_as_present_ones(how):
    """Absent ones by the protocol, from counts over the training pictures."""
    there = [{f"{o['color']} {o['shape']}" for o in TRAIN.scene(i)} for i in range(320)]
    alone = Counter(pair for pairs in there for pair in pairs)
    together = Counter(two for pairs in there for a in pairs for two in ((a, b) for b in pairs if a != b))
    named = Counter()
    for i in ORDINARY:
        here = {f"{o['color']} {o['shape']}" for o in EVAL.scene(i)}
        asked = [t for _, [t] in dialogs(EVAL, f"pope_{how}", [i])]
        pairs = [question.removeprefix("is there a ").rstrip("?") for question, _ in asked]
        assert [a for _, a in asked] == ["yes", "no"] * (len(asked) // 2)
        assert all((pair in here) == (a == "yes") for pair, (_, a) in zip(pairs, asked, strict=True))
        absent = pairs[1::2]
        assert len(set(absent)) == len(absent) and not {f"{c} {s}" for c, s in HELD_OUT} & set(absent)
        named.update(absent)
        if how == "random":
            continue
        key = (lambda p: alone[p]) if how == "popular" else (lambda p: sum(together[h, p] for h in here))  # noqa: B023
        others = sorted((key(p) for p in alone if p not in here), reverse=True)
        assert [key(p) for p in absent] == others[: len(absent)]
    if how == "random":
        assert len(named) == 20 and max(named.values()) < 3 * min(named.values())


def test_skew_makes_some_pairs_frequent():
    def shares(dataset):
        return sorted(Counter(f"{o['color']} {o['shape']}" for i in range(320) for o in dataset.scene(i)).values())

    even = shares(Scenes(ScenesConfig(scenes=320)))
    skewed = shares(TRAIN)
    assert len(skewed) == 20 and skewed[-1] > 1.5 * even[-1]


def test_scenes_with_a_new_pair_are_asked_about_that_alone():
    for i in range(3, 320, 4):
        assert {d.kind for d in EVAL.get(i).dialogs} <= {"exist", "turns"}
        assert all(d.meta["held_out"] for d in EVAL.get(i).dialogs)


def test_is_a_function_of_the_seed_and_every_kind_has_an_ability():
    again = Scenes(EVAL.config)
    for i in (319, 5, 0):
        one, two = EVAL.get(i), again.get(i)
        assert np.array_equal(one.images[0](), two.images[0]()) and EVAL.signs(i) == again.signs(i)
        assert [turns(d) for d in one.dialogs] == [turns(d) for d in two.dialogs]
    assert sorted(kind for kinds in ABILITIES.values() for kind in kinds) == sorted(set(KINDS) - {"caption"})
    assert {d.task for d in EVAL.get(0).dialogs if d.kind.startswith("pope")} == {"yes_no"}


@pytest.mark.parametrize("kind", ON_SIGNS)
def test_refuses_to_read_signs_that_are_not_there(kind):
    with pytest.raises(ZooError, match=f"questions.{kind} asks about signs, and there are none: set signs=true"):
        registry.build("dataset", {"name": "scenes", "questions": {kind: 1}})
    with pytest.raises(ZooError, match="skew must be 0 or more, got -1"):
        registry.build("dataset", {"name": "scenes", "skew": -1.0})


@pytest.mark.parametrize("size", [32, 64, 100])
def test_signs_fit_pictures_of_any_size(size):
    dataset = Scenes(replace(TRAIN.config, size=size, grid=8))
    assert sum(len(dataset.signs(i)) for i in range(64)) > 20
    for i in range(64):
        assert dataset.get(i).images[0]().shape == (size, size, 3)
