import numpy as np
import pytest

from zoo import registry
from zoo.registry import Dialog, Score, ZooError
from zoo.tasks import estimates
from zoo.tasks.answers import plain
from zoo.tasks.baselines import Commonest
from zoo.tasks.boxes import boxes_in, overlap
from zoo.tasks.vqa import normalise
from zoo.tasks.yes_no import yes_or_no


def task(name, **options):
    return registry.build("task", {"name": name, **options})


def dialog(answer="", **more):
    said = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else []
    return Dialog([{"role": "user", "content": [{"type": "text", "text": "Q"}]}, *said], **more)


def run(name, pairs, **options):
    """Score (dialog, prediction) pairs and summarise them."""
    one = task(name, **options)
    return one.summarise([one.score(*pair) for pair in pairs])


# ---- estimates


def test_a_mean_has_the_standard_error_of_a_share():
    values = np.array([1.0] * 30 + [0.0] * 70)
    score = estimates.mean(values)
    assert score.value == 0.3 and score.n == 100
    assert score.stderr == pytest.approx(np.sqrt(0.3 * 0.7 / 99))
    assert estimates.mean(values[:1]) == Score(1.0, 1, 0.0)
    assert estimates.mean(values[:0]) == Score(0.0, 0, 0.0)


def test_the_error_of_a_ratio_is_what_resampling_gives():
    rng = np.random.default_rng(0)
    truth = (rng.random(400) < 0.4).astype(float)
    said = np.where(rng.random(400) < 0.8, truth, 1 - truth)
    above, below = 2 * truth * said, truth + said
    score = estimates.ratio(above, below)
    draws = rng.integers(0, 400, (4000, 400))
    values = above[draws].sum(1) / below[draws].sum(1)
    assert score.value == pytest.approx(above.sum() / below.sum())
    assert score.stderr == pytest.approx(values.std(), rel=0.05)  # 4000 resamples: within about 2 %
    assert estimates.ratio(above * 0, below * 0) == Score(0.0, 0, 0.0)


# ---- exact


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        ("Ankle boot", " ankle  BOOT.", 1),
        ("Ankle boot", "boot", 0),
        ("yes", '"Yes"', 1),
        ("3.5", "3.5", 1),
        ("3.5", "35", 0),
        ("a", "", 0),
        (".", ".", 1),
        (".", "!", 0),
        ("6'", '6"', 0),
        ("\u7ea2\u8272", "\u7ea2\u8272\u3002", 1),  # red, in Chinese, with its full stop
        ("\u05d0\u05d3\u05d5\u05dd", "\u200f\u05d0\u05d3\u05d5\u05dd\u200e.", 1),  # in Hebrew, with marks of direction
        ("cafe\u0301", "Caf\u00e9", 1),
        ("\u200b", "", 0),
    ],
)
def test_exact_forgives_what_a_person_would(answer, prediction, right):
    assert task("exact").score(dialog(answer), prediction) == {"accuracy": right}


def test_exact_takes_any_accepted_answer_or_the_text_as_it_is():
    assert task("exact").score(dialog("a", answers=["b", "c"]), "C")["accuracy"] == 1
    assert task("exact").score(dialog("a", answers=["b", "c"]), "a")["accuracy"] == 0
    assert task("exact", strict=True).score(dialog("A"), "a")["accuracy"] == 0
    assert plain(" The  'End'. ") == "the 'end'" and plain("'End.'!") == "end"


def test_consistency_counts_groups_that_are_right_throughout():
    groups = ["x", "x", "y", "y", "z"]
    scores = run("exact", [(dialog("1", meta={"group": g}), p) for g, p in zip(groups, "11011", strict=True)])
    assert scores["accuracy"] == Score(0.8, 5, pytest.approx(0.2))
    assert (scores["consistency"].value, scores["consistency"].n) == (pytest.approx(2 / 3), 3)
    assert set(run("exact", [(dialog("1"), "1")])) == {"accuracy"}


# ---- yes_no


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", True), ("yes, there is a dog.", True), ("No.", False), ("There is not. Yes?", False),
        ("I don't see it", False),
        ("It isn't\nyes", False), ("true", True), ("False", False), ("", None), ("maybe", None), ("nothing", None),
    ],
)  # fmt: skip
def test_reads_yes_and_no_as_pope_does(text, said):
    assert yes_or_no(text) is said


def test_gives_the_figures_of_pope():
    truth = ["yes"] * 50 + ["no"] * 50
    said = ["yes"] * 40 + ["no"] * 8 + ["maybe", ""] + ["yes"] * 20 + ["no"] * 30
    scores = run("yes_no", [(dialog(t), s) for t, s in zip(truth, said, strict=True)])
    values = {name: score.value for name, score in scores.items()}
    assert values == pytest.approx(
        {
            "accuracy": 0.7,
            "precision": 40 / 60,
            "recall": 0.8,
            "f1": 2 * 40 / (60 + 50),
            "yes_rate": 0.6,
            "unparsed": 0.02,
        }
    )
    assert {name: score.n for name, score in scores.items()} == {
        "accuracy": 100, "precision": 60, "recall": 50, "f1": 70, "yes_rate": 100, "unparsed": 100,
    }  # fmt: skip
    assert scores["recall"].stderr == pytest.approx(np.sqrt(0.8 * 0.2 / 50), rel=0.02)
    assert scores["precision"].stderr == pytest.approx(np.sqrt(2 / 9 / 60), rel=0.02)


def test_never_saying_yes_gives_zeros_and_wrong_truth_is_an_error():
    scores = run("yes_no", [(dialog("yes"), "no"), (dialog("no"), "no")])
    assert (scores["precision"].value, scores["f1"].value, scores["yes_rate"].value) == (0, 0, 0)
    with pytest.raises(ZooError, match="needs answers that are yes or no, got \\['red'\\]"):
        task("yes_no").score(dialog("red"), "yes")


# ---- vqa


@pytest.mark.parametrize(("count", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_answers(count, accuracy):
    answers = ["a red bus"] * count + [f"x{i}" for i in range(10 - count)]
    answers = ["red bus" if a == "a red bus" else a for a in answers]
    assert task("vqa").score(dialog("-", answers=answers), "A red bus.")["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Two dogs!", "2 dogs"), ("the cat", "cat"), ("1,000", "1000"), ("black/white", "black white"),
        ("black / white", "black white"),
        ("Its 3.5 m.", "its 3.5 m"), ("dont know", "don't know"), ("it's", "it's"), ("None", "0"),
        ("t-shirt", "t shirt"),
    ],
)  # fmt: skip
def test_vqa_normalises_as_the_official_script(text, form):
    assert normalise(text) == form


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_one_of_ten_people_who_wrote_nothing_counts_among_them(blank):
    ten = dialog(answers=["red", *["blue"] * 8, blank])
    assert task("vqa").score(ten, "red") == {"accuracy": pytest.approx(0.3)}
    assert task("vqa").score(ten, blank) == {"accuracy": 0.0}


def test_vqa_with_fewer_answers_takes_any_and_numbers_within_the_tolerance():
    assert task("vqa").score(dialog("x", answers=["MRI", "the scan"]), "scan")["accuracy"] == 1
    assert task("vqa").score(dialog("100"), "104")["accuracy"] == 0
    close = task("vqa", tolerance=0.05)
    said = ("1040", "951", "1060", "$1,000", "1,0", "about", "", "nan", "inf", "1e3", "1e999")
    assert [close.score(dialog("1000"), p)["accuracy"] for p in said] == [1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert close.score(dialog("inf"), "5")["accuracy"] == 0
    assert close.score(dialog("50%"), "0.51")["accuracy"] == 1
    for mark in ("%", "$", "-", "+", ".", "$%", "-%", "e5"):  # beginnings and ends of numbers, without one
        assert close.score(dialog("5"), mark) == {"accuracy": 0.0}
        assert close.score(dialog("5", answers=["about", mark]), mark) == {"accuracy": 1.0}
    assert close.score(dialog(".5"), "+0.5")["accuracy"] == 1


# ---- boxes


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("The box is [0.1,0.2, 0.3,0.45].", (0.1, 0.2, 0.3, 0.45)),
        ("<box>(1,2),(3,4)</box>", (1, 2, 3, 4)),
        ("(1 2 3 4)", (1, 2, 3, 4)),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a 5"}]', (1, 2, 3, 4)),
        ("1 2 3 4", (1, 2, 3, 4)),
        ("-1, 2, 3, 4", (-1, 2, 3, 4)),
        ("<loc0010><loc0020><loc0030><loc0040> dog", (20, 10, 40, 30)),
        ("x1=1", None),
        ("1 2 3", None),
        ("1 2 3 4 5", None),
        ("", None),
        ("no box2d", None),
    ],
)
def test_reads_boxes_in_the_formats_of_the_field(text, box):
    assert next((found for found, _ in boxes_in(text)), None) == box


def test_overlap_is_what_counting_cells_gives():
    rng = np.random.default_rng(0)
    for _ in range(50):
        (x1, x2, x3, x4), (y1, y2, y3, y4) = np.sort(rng.integers(0, 9, (2, 2, 2))).reshape(2, 4)
        canvas = np.zeros((2, 10, 10))
        canvas[0, y1:y2, x1:x2] = canvas[1, y3:y4, x3:x4] = 1
        both, either = canvas.all(0).sum(), canvas.any(0).sum()
        assert overlap((x1, y1, x2, y2), (x3, y3, x4, y4)) == pytest.approx(both / either if either else 0)


def test_boxes_count_overlap_half_and_unparsed():
    scores = run("boxes", [(dialog("0 0 10 10"), p) for p in ("[0, 0, 10, 10]", "0 0 10 5", "5 0 15 10", "none")])
    assert scores["iou"].value == pytest.approx((1 + 0.5 + 1 / 3 + 0) / 4)
    assert (scores["accuracy_50"].value, scores["unparsed"].value, scores["iou"].n) == (0.5, 0.25, 4)


def test_boxes_in_other_units_and_orders():
    meta = {"box": [100, 50, 300, 100], "image_size": [400, 100]}
    assert task("boxes", scale=1000).score(dialog(meta=meta), "[250, 500, 750, 1000]")["iou"] == pytest.approx(1)
    assert task("boxes", scale=1).score(dialog(meta=meta), "0.25 0.5 0.75 1.0")["iou"] == pytest.approx(1)
    paligemma = "<loc0512><loc0256><loc1024><loc0768>"
    assert task("boxes", scale=1000).score(dialog(meta=meta), paligemma)["iou"] == pytest.approx(1)
    assert task("boxes", order="xywh").score(dialog(meta=meta), "100 50 200 50")["iou"] == pytest.approx(1)
    assert task("boxes", order="yxyx").score(dialog(meta=meta), "50 100 100 300")["iou"] == pytest.approx(1)
    assert task("boxes").score(dialog(answers=["0 0 1 1", "5 5 9 9"]), "5 5 9 9")["iou"] == 1
    with pytest.raises(ZooError, match="needs meta\\['image_size'\\]"):
        task("boxes", scale=1).score(dialog(meta={"box": [0, 0, 1, 1]}), "0 0 1 1")
    with pytest.raises(ZooError, match="needs answers with four numbers"):
        task("boxes").score(dialog("left"), "0 0 1 1")


# ---- choice


def test_choice_accepts_the_option_or_its_letter():
    choices = ["a cat", "a dog", "a cow"]
    pairs = [(dialog("a dog", choices=choices), "a dog"), (dialog("B", choices=choices), "a dog")]
    pairs += [(dialog("(c)", choices=choices), "a cat")]
    scores = run("choice", pairs)
    assert scores["accuracy"].value == pytest.approx(2 / 3) and scores["chance"].value == pytest.approx(1 / 3)
    with pytest.raises(ZooError, match="two or more choices"):
        task("choice").score(dialog("a"), "a")
    with pytest.raises(ZooError, match="None of the answers"):
        task("choice").score(dialog("D", choices=choices), "a cat")


# ---- caption


def test_captions_are_scored_by_sacrebleu():
    from sacrebleu.metrics import BLEU, CHRF

    references = [["A red dog runs.", "a dog is running"], ["two cats sleep on a mat", "cats"], ["Blue sky"]]
    said = ["A red dog is running", "two cats sleep on the mat", ""]
    scores = run("caption", [(dialog(answers=r), s) for r, s in zip(references, said, strict=True)])
    padded = [[r[i] if i < len(r) else None for r in references] for i in range(2)]
    assert scores["bleu"].value == pytest.approx(BLEU(lowercase=True).corpus_score(said, padded).score / 100)
    each = [CHRF(lowercase=True).sentence_score(s, r).score / 100 for s, r in zip(said, references, strict=True)]
    assert scores["chrf"].value == pytest.approx(np.mean(each))
    assert scores["bleu"].stderr > 0 and set(scores) == {"bleu", "chrf"}
    with pytest.raises(ZooError, match="an accepted answer that is not empty"):
        task("caption").score(dialog(answers=[" "]), "x")


# ---- baselines


def test_captions_without_a_match_of_four_words_are_smoothed_as_sacrebleu_does():
    from sacrebleu.metrics import BLEU

    said, written = ["a red dog on a mat", "two cats sleep"], ["a red cat on a mat runs", "two cats on a mat sleep"]
    found = run("caption", [(dialog(w), s) for w, s in zip(written, said, strict=True)])["bleu"]
    expected = BLEU(lowercase=True).corpus_score(said, [written]).score / 100
    assert found.value == pytest.approx(expected) and expected > 0.2


def test_the_majority_of_each_kind_is_guessed():
    train = [dialog(a, kind="colour") for a in ("red", "red", "blue")] + [dialog(a, kind="count") for a in "1222"]
    commonest, exact = Commonest(train), task("exact")
    guesses = {kind: commonest.guess(dialog("x", kind=kind), exact) for kind in ("colour", "count", "count_big", "new")}
    assert guesses == {"colour": "red", "count": "2", "count_big": "2", "new": ""}
    assert commonest.guess(dialog("blue", kind="colour", choices=["green", "blue"]), task("choice")) == "blue"
    assert commonest.guess(dialog("b", kind="new", choices=["a", "b"]), task("choice")) == "a"
    letters = Commonest([dialog(answer, kind="which") for answer in "ABCBB"])  # of options that no two questions share
    assert letters.guess(dialog("A", kind="which", choices=["a dog", "a cat"]), task("choice")) == "a cat"
    people = Commonest([dialog(answers=answers) for answers in (["", "", "red"], ["red"], ["blue", "blue"])])
    assert people.guess(dialog("x"), exact) == "red"
