# ruff: noqa: RUF001, SIM905
"""Each score against the rule of the script that people compare with, on a hundred answers."""

import re
from collections import Counter

import numpy as np
import pytest

from zoo import registry
from zoo.registry import Dialog, ZooError
from zoo.tasks.boxes import boxes_in
from zoo.tasks.vqa import CONTRACTIONS, alike
from zoo.tasks.yes_no import yes_or_no


def task(name, **options):
    return registry.build("task", {"name": name, **options})


def dialog(*answers, **more):
    return Dialog([{"role": "user", "content": [{"type": "text", "text": "Q"}]}], answers=list(answers), **more)


# ---- vqa, ten people

PREDICTIONS = """yes;Yes;yes.;YES!;no;No, it is not;2;two;Two;two dogs;2 dogs;the dog;a dog;an apple;dog;dogs;red;Red.;
red and white;red, white;red,white;red / white;red/white;t-shirt;t shirt;tshirt;T-Shirt;black-white;none;None;
zero;0;nothing;10;ten;eleven;11;1,000;1000;1 000;3.5;3.5.;.5;5.;5%;50 %;$5;10:30;10:30 am;10 30;dont know;
don't know;do not know;cant;can't;its;it's;wont;hes;lets go;u.s.;us;U.S.A;the;a;A;an;?;.;-;...;"red";'red';
(red);[red];red?;red!;red;  red  ;re d;left side;left  side;the left side of the a;left;on the left;9 to 5;9-5;
9 - 5;9- 5;-5;+5;5+;<5;b+;B-;c++;x=1;x = 1;a@b.c;hot dog;hotdog;hot-dog;umbrella_stand;a man and the woman;
man and woman;1st;one;One way;oneway;isnt it;isn't it"""
PREDICTIONS = list(PREDICTIONS.replace("\n", "").split(";"))
PEOPLE = [  # what ten people said: some, with how many of them
    {"yes": 7, "no": 3},
    {"no": 10},
    {"2": 2, "two": 5, "2 dogs": 3},
    {"red": 3, "red and white": 2, "red, white": 2, "red/white": 3},
    {"t-shirt": 10},
    {"t-shirt": 5, "t shirt": 2, "tshirt": 3},
    {"0": 4, "none": 4, "zero": 2},
    {"1000": 5, "1,000": 5},
    {"dont know": 5, "don't know": 5},
    {"a": 5, "b+": 3, ".": 2},
    {"left": 2, "left side": 4, "the left side": 4},
    {"hot dog": 6, "hotdog": 3, "hot-dog": 1},
]


def official(prediction, answers):
    """The rule of visualqa.org's script, told again: comparing the answer with all but one person, over all persons."""

    def no_marks(text):
        out = text
        for mark in ';/[]"{}()=+\\_-><@`,?!':
            beside_a_space = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if beside_a_space or re.search(r"\d,\d", text) else " ")
        return re.sub(r"\.(?!\d)", "", out)

    numbers = dict(
        zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True)
    )
    numbers["none"] = "0"
    said = no_marks(prediction.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    said = [numbers.get(w, w) for w in said]
    said = " ".join(CONTRACTIONS.get(w, w) for w in said if w not in ("a", "an", "the"))
    people = [no_marks(a) for a in answers] if len(set(answers)) > 1 else answers
    shares = []
    for i in range(len(people)):
        others = people[:i] + people[i + 1 :]
        shares.append(min(1, others.count(said) / 3))
    return np.mean(shares)


def test_vqa_is_the_script_of_visualqa_but_for_what_its_docstring_lists():
    assert len(PREDICTIONS) >= 100
    score, others = task("vqa"), set()
    for number, counts in enumerate(PEOPLE):
        answers = list(Counter(counts).elements())
        for prediction in PREDICTIONS:
            ours, theirs = score.score(dialog(*answers), prediction)["accuracy"], official(prediction, answers)
            if ours != pytest.approx(theirs):
                others.add((prediction.strip(), number))
    unanimous = {("t-shirt", 4), ("T-Shirt", 4)}
    nothing_left = {(p, 9) for p in ("the", "a", "A", "an", "?", "-", "...")}
    marked = {("b+", 9)}  # the script leaves a space in place of a mark at the end, and then finds no answer equal
    assert others == unanimous | nothing_left | marked
    fives = dialog(*["-5"] * 4, *["5"] * 6)
    assert official("<5", fives.answers) == official("-5", fives.answers) == 1
    assert [score.score(fives, p)["accuracy"] for p in ("-5", "5", "<5", "+5")] == [1, 1, 0, 0]
    five = dialog("a", "a", "a", "a", "a", *["b"] * 5)
    assert score.score(five, "the")["accuracy"] == 0 and score.score(five, "A")["accuracy"] == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("the", "A"), ("?", "!"), ("a", "an"), ("-5", "5"), ("<5", ">5"), ("+5", "-5"), ("1/2", "1-2"), ("1/2", "1 2"),
        ("1,5", "15"), ("B+", "B-"), ("A-", "a"), ("vitamin a", "vitamin"), ("none", "0"), ("5'", '5"'), ("10+", "10"),
        ("24/7", "247"), ("c", "c++"), ("10:30", "1030"), ("5%", "5"), ("$5", "5"), ("plan a", "plan"), ("1.5", "15"),
        (".5", "5"), ("no one", "no 0"), ("3-4", "34"), ("it's", "its"), ("men", "man"), ("a b", "b a"),
        (">=5", "<=5"), (">=5", ">5"), ("5 < 6", "5 > 6"), ("x<y", "x>y"), ("x->y", "x<-y"), ("x -> y", "x <- y"),
        ("x=-5", "x=5"), ("[-5]", "5"), ("AB+", "AB-"), ("ab-", "ab"), ("Na+", "Na"), ("3,-5", "3,5"),
    ],
)  # fmt: skip
def test_vqa_of_one_person_tells_apart_what_means_different_things(one, other):
    assert not alike(one, other) and not alike(other, one)
    assert task("vqa").score(dialog(one), other)["accuracy"] == 0
    assert task("vqa").score(dialog(one), one)["accuracy"] == task("vqa").score(dialog(other), other)["accuracy"] == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a cat", "Cat."), ("the scan", "scan"), ("two dogs", "2 dogs!"), ("1,000", "1000"), ("1,234,567", "1234567"),
        ("t-shirt", "T shirt"), ("black/white", "black white"), ("dont know", "don’t know"), ("-5", "−5"), ("(5)", "5"),
        ("zero", "0"), ('"yes"', "yes"), ("yes, it is", "yes it is"), ("right-sided", "right sided"), ("A", "a"),
        ("caf\u00e9", "cafe\u0301"), ("CAFE\u0301 noir", "caf\u00e9-noir"), ("x = -5", "x=-5"),
        ("black - white", "black white"),
    ],
)  # fmt: skip
def test_vqa_of_one_person_takes_for_equal_what_means_the_same(one, other):
    assert alike(one, other) and alike(other, one)


def test_chart_qa_is_relaxed_accuracy_but_for_what_the_docstring_lists():
    def relaxed(prediction, target):
        def number(text):
            try:
                return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
            except ValueError:
                return None

        given, truth = number(prediction), number(target)
        if given is not None and truth:
            return abs(given - truth) / abs(truth) <= 0.05
        return prediction.lower() == target.lower()

    said = "104 105 95 94.9 106 100.0 1e2 100% 1 0.5 50% 52% 0.53 -100 0 yes Yes no 2015 2016 1999 red 12 12.6 11.4"
    said = said.split()
    close, others = task("vqa", tolerance=0.05), set()
    for target in ("100", "50%", "0.5", "-100", "yes", "2015", "12"):
        for prediction in said:
            if close.score(dialog(target), prediction)["accuracy"] != relaxed(prediction, target):
                others.add((target, prediction))
    assert len(said) * 7 > 100 and not others
    assert close.score(dialog("0"), "0.0")["accuracy"] == close.score(dialog("$1,000"), "1010")["accuracy"] == 1


# ---- yes_no

# What is said, how we read it (y, n, - for neither) and, where that is another, how POPE's script reads it.
READ = """Yes|y;yes|y;YES|y;Yes.|y;Yes, there is a dog.|y;Yes!|y;"Yes"|y;**Yes**|y;- Yes|y;1. Yes|y;1) Yes|y;(a) Yes|y;
A. Yes|y;Answer: yes|y;yes sir|y;Yeah|y;yep|y;Yup, a cat|y;True|y;true.|y;Correct|y;Indeed, two|y;Certainly|y;
Definitely a dog|y;Absolutely.|y;Right|y;Affirmative|y;Is there a dog? Yes|y;The answer is yes|y;it is true|y;
Yes. There is not a cat.|y;Yes! No cat is there|y n;I see it, yes|y;...Yes|y;yes yes yes|y;Yes_|y;No|n;no|n;
NO|n y;No.|n;no,|n;No, there is no dog.|n;No!|n y;"No"|n y;**No**|n y;- No|n;1. No|n y;2) No|n;(b) no|n;
B. No|n y;Answer: no|n;nope|n y;Nope.|n y;Nah|n y;never|n y;None|n y;none of them|n y;not at all|n;It is not|n;
There is not. Yes?|n;There isn't|n y;There isn’t one|n y;It isn`t|n y;I don't see it|n y;I don’t see one|n y;
I do not see one|n;I cannot see one|n y;I can't see any|n y;I can’t see a dog|n y;cannot|n y;dont see it|n y;
It is not there|n;neither|n y;false|n y;False.|n y;Incorrect|n y;Wrong|n y;Negative|n y;unable to see one|n y;
no dog here|n;There is no dog|n;there are no dogs, yes|n;Yes, and no cat|n;Yes, there is no doubt|n;No yes|n;
No idea|n;it's not a dog|n;aint one|n y;It won't fit|n y;Dogs? No|n;NOT|n y;not|n;maybe|- y;|- y;dog|- y;
a dog|- y;nothing|- y;perhaps|- y;?|- y;42|- y;yes or no|- n;Yes/No|- y;yes/no|- y;No or yes|- n;yes and no|- n;
I don't know|- y;I do not know|- n;not sure|- n;I'm not certain|- n;I cannot tell|- y;I can't really say|- y;
unclear|- y;knot|- y;yesterday|- y;nobody|- y;nonsense|- y;不|- y;it is correct|- y"""


def test_yes_no_is_the_script_of_pope_but_for_what_its_docstring_lists():
    def pope(text):
        words = text.split(".")[0].replace(",", "").split(" ")
        return "n" if {"No", "not", "no"} & set(words) else "y"

    rows = [row.split("|") for row in READ.replace("\n", "").split(";")]
    assert len(rows) >= 100
    for text, expected in rows:
        ours, _, theirs = expected.partition(" ")
        assert (text, {True: "y", False: "n", None: "-"}[yes_or_no(text)]) == (text, ours)
        assert (text, pope(text)) == (text, theirs or ours)


@pytest.mark.parametrize(
    ("answers", "truth"),
    [
        (["yes"], "yes"),
        (["No, there is none."], "no"),
        (["yes", "yes", "no"], "yes"),
        (["true"], "yes"),
        (["False"], "no"),
    ],
)
def test_the_truth_is_what_most_answers_say(answers, truth):
    assert task("yes_no").score(dialog(*answers), truth)["accuracy"] == 1


@pytest.mark.parametrize("answers", [["red"], ["yes", "maybe"], ["yes", "no"], ["I do not know"], ["yes or no"], [""]])
def test_a_truth_that_is_neither_is_an_error(answers):
    with pytest.raises(ZooError, match="needs answers that are yes or no"):
        task("yes_no").score(dialog(*answers), "yes")


# ---- boxes

TEXTS = """[0, 0, 10, 10] ;; [0,0,10,10] ;; [0 0 10 10] ;; (0,0,10,10) ;; {0,0,10,10} ;; <0,0,10,10> ;; 0 0 10 10 ;; 
0,0,10,10 ;; (0,0),(10,10) ;; (0,0) (10,10) ;; (0,0) to (10,10) ;; [0, 0] [10, 10] ;; [0,0] and [10,10] ;; 
(0,0)-(10,10) ;; <box>(0,0),(10,10)</box> ;; <box>[[0, 0, 10, 10]]</box> ;; [[0, 0, 10, 10]] ;; 
The dog is at [0, 0, 10, 10]. ;; [0.0, 0.0, 10.0, 10.0] ;; [0., 0., 10., 10.] ;; [0e0, 0, 1e1, 1E+1] ;; 
[+0, +0, +10, +10] ;; x1: 0, y1: 0, x2: 10, y2: 10 ;; [0, 0, 10, 10], [50, 50, 60, 60] ;; 
{"bbox_2d": [0, 0, 10, 10], "label": "a 5"} ;;   [ 0 ,0 , 10,10 ]  ;; 0 0 10 5 ;; [0, 0, 5, 10] ;; 
[5, 0, 15, 10] ;; [5, 5, 15, 15] ;; [9, 9, 19, 19] ;; [-5, -5, 5, 5] ;; [−5, −5, 5, 5] ;; [2, 2, 8, 8] ;; 
[.5, .5, 9.5, 9.5] ;; [0, 0, 20, 20] ;; [0, 0, 100, 100] ;; [0, 0, 1e30, 1e30] ;; [-1e30, -1e30, 1e30, 1e30] ;; 
[0, 0, 1e-30, 1e-30] ;; [0, 0, 1e308, 1e308] ;; [0, 0, 10.001, 10] ;; [1, 0, 10, 10] ;; [0, 1, 10, 10] ;; 
[0, 0, 9, 10] ;; [0, 0, 10, 9] ;; [3, 3, 4, 4] ;; [0, 0, 10, 20] ;; [0, 0, 20, 10] ;; [20, 20, 30, 30] ;; 
[10, 0, 20, 10] ;; [0, 10, 10, 20] ;; [-10, -10, 0, 0] ;; [10, 10, 0, 0] ;; [10, 0, 0, 10] ;; [0, 10, 10, 0] ;; 
[5, 5, 5, 5] ;; [0, 0, 0, 10] ;; [0, 0, 10, 0] ;; [1000, 1000, 2000, 2000] ;; 
[1e300, 1e300, 1.1e300, 1.1e300] ;; [-20, -20, -10, -10] ;; ! ;; none ;; no box ;; nan nan nan nan ;; 
[nan, 0, 10, 10] ;; [inf, 0, 10, 10] ;; [0, 0, inf, inf] ;; [0, 0, 1e999, 1e999] ;; 1e999 0 10 10 ;; [] ;; 
[0] ;; [0, 0] ;; [0, 0, 10] ;; [0, 0, 10, 10, 5] ;; 0 0 10 ;; 0 0 10 10 5 ;; [a, b, c, d] ;; 
[0, 0, ten, ten] ;; (0,0) ;; (0,0),(10) ;; x1=1 ;; 1.2.3.4 ;; 0x0 0x0 0xa 0xa ;; [0, 0, 10, 10 ;; 
0, 0, 10, 10] ;; [0 ;;  0 ;;  10 ;;  10] ;; [0:0:10:10] ;; 0 0 10 10px ;; box1 box2 box3 box4 ;; 
[--1, 0, 10, 10] ;; [1_0, 0, 10, 10] ;; [0, 0, 10, 10%] ;; yes ;; <loc0000> ;; 
<loc0000><loc0000><loc0010><loc0010> ;; <loc9999><loc9999><loc9999><loc9999> ;; [0, 0, ٠, ٠] ;; [ , , , ] ;; 
[0,, 0,, 10,, 10] ;; (0 0 10 10]"""


def test_boxes_are_scored_as_counting_areas_says():
    rows = TEXTS.replace("\n", "").split(" ;; ")
    assert len(rows) >= 100
    score = task("boxes")
    for text in rows:
        row = score.score(dialog("0 0 10 10"), text)
        found = next(boxes_in(text), None)
        assert row["unparsed"] == float(found is None or found[1] > 0), text
        if row["unparsed"]:
            assert row["iou"] == row["accuracy_50"] == 0
            continue
        (x1, y1, x2, y2), _ = found
        wide, high = max(0.0, min(x2, 10) - max(x1, 0)), max(0.0, min(y2, 10) - max(y1, 0))
        both = wide * high  # of numbers that a float can square
        expected = both / (100 + max(0.0, x2 - x1) * max(0.0, y2 - y1) - both) if max(x2, y2) < 1e150 else 0.0
        assert row["iou"] == pytest.approx(expected, abs=1e-12), text
        assert row["accuracy_50"] == float(expected >= 0.5) and 0 <= row["iou"] <= 1
    read = [text for text in rows if not score.score(dialog("0 0 10 10"), text)["unparsed"]]
    assert rows.index("!") == len(read[: rows.index("!")])  # all before it are boxes
    behind = {"[0, 0, 10, 10%]", "(0 0 10 10]", "[0, 0, 10, 10", "[0; 0; 10; 10]", "[0:0:10:10]", "0, 0, 10, 10]"}
    assert {text.strip() for text in read[rows.index("!") :]} <= behind | {"[0,, 0,, 10,, 10]", "[0, 0, ٠, ٠]"}


@pytest.mark.parametrize(
    ("answers", "meta"),
    [
        (["left"], {}), (["[0,0,1,1]", "none"], {}), (["[1,1,0,0]"], {}), (["0 0 0 5"], {}), (["nan nan nan nan"], {}),
        (["[0,0,1e999,1]"], {}), (["<loc0000><loc0000><loc0010><loc0010>", "0 0 1 1"], {}), ([], {}),
        ([], {"box": [1, 2, 3]}), ([], {"box": "1,2,3,4"}), ([], {"box": [1, 2, 3, "4"]}), ([], {"box": []}),
        ([], {"box": [0, 0, float("nan"), 1]}), ([], {"box": [0, 0, float("inf"), 1]}), ([], {"box": [5, 5, 1, 1]}),
        ([], {"box": [0, 0, 0, 0]}), ([], {"box": 5}), ([], {"box": {"x": 1}}), ([], {"box": [[0, 0, 1, 1], [0, 0]]}),
        ([], {"box": [0, 0, 1, 1], "image_size": [0, 5]}), ([], {"box": [0, 0, 1, 1], "image_size": "5x5"}),
        ([], {"box": [0, 0, 1, 1], "image_size": [float("nan"), 5]}), ([], {"box": [None] * 4}),
    ],
)  # fmt: skip
def test_a_truth_that_is_no_box_is_an_error(answers, meta):
    with pytest.raises(ZooError, match=r"needs answers|true box|meta\['"):
        task("boxes").score(dialog(*answers, meta=meta), "0 0 1 1")


def test_units_are_compared_only_where_both_are_known():
    locations = "<loc0000><loc0000><loc0512><loc1024>"
    pixels = {"box": [0, 0, 200, 50], "image_size": [200, 100]}
    assert task("boxes").score(dialog(meta=pixels), locations)["iou"] == pytest.approx(1)
    assert task("boxes").score(dialog(meta=pixels), "[0, 0, 200, 50]")["iou"] == pytest.approx(1)
    assert task("boxes").score(dialog(locations), locations)["iou"] == pytest.approx(1)
    unknown = {"iou": 0, "accuracy_50": 0, "unparsed": 1}
    assert task("boxes").score(dialog("0 0 200 50"), locations) == unknown
    assert task("boxes").score(dialog(locations), "0 0 1024 512") == unknown
    several = {"box": [[0, 0, 1, 1], [5, 5, 9, 9]]}
    assert task("boxes").score(dialog(meta=several), "5 5 9 9")["iou"] == 1
    assert task("boxes").score(dialog("[0,0,1,1] [5,5,9,9]"), "5 5 9 9")["iou"] == 1
    assert task("boxes", scale=1e-9).score(dialog(meta=pixels), "[0, 0, 1e308, 1]")["unparsed"] == 1


# ---- exact, choice, caption


def test_exact_is_string_match_but_for_case_spaces_and_marks_around():
    words = ["red", "Red", "red.", "red!", '"red"', "'red'", "“red”", " red ", "red  car", "red car", "re d", "5'"]
    words += ['5"', "5", ".", "!", "?", "...", "", " ", "a", "the", "C", "c", "e.g.", "e.g", "3.5", "35", "-5", "5%"]
    score, strict = task("exact"), task("exact", strict=True)
    same = [
        {"red", "Red", "red.", "red!", '"red"', "'red'", "“red”", " red "},
        {"red  car", "red car"},
        {"C", "c"},
        {"e.g.", "e.g"},
    ]
    for answer in filter(str.strip, words):
        for said in words:
            alike_ = said == answer or any({said, answer} <= group for group in same)
            assert (answer, said, score.score(dialog(answer), said)["accuracy"]) == (answer, said, float(alike_))
            assert strict.score(dialog(answer), said)["accuracy"] == float(answer.strip() == said.strip())


@pytest.mark.parametrize("name", ["exact", "vqa", "caption"])
@pytest.mark.parametrize("answers", [[], [""], [" ", "\n"]])
def test_an_empty_truth_is_an_error(name, answers):
    with pytest.raises(ZooError, match="needs an accepted answer that is not empty"):
        task(name).score(dialog(*answers), "x")


def test_choice_takes_text_or_letter_over_a_hundred_options():
    for count in range(2, 12):
        options = [f"thing {i}" for i in range(count)]
        for i, option in enumerate(options):
            letter = chr(ord("A") + i)
            for answer in (option, option.upper() + ".", letter, f"({letter.lower()})", f"{letter}."):
                row = task("choice").score(dialog(answer, choices=options), option)
                assert row == {"accuracy": 1, "chance": pytest.approx(1 / count)}
            assert task("choice").score(dialog(letter, choices=options), options[i - 1])["accuracy"] == 0
    units = dialog("MW", choices=["mW", "MW"])
    assert [task("choice").score(units, p)["accuracy"] for p in ("mW", "MW")] == [0, 1]


@pytest.mark.parametrize("choices", [["a"], ["a", "a"], ["a", ""], ["a", " a"]])
def test_options_that_cannot_be_told_apart_are_an_error(choices):
    with pytest.raises(ZooError, match="two or more choices, none of them empty or there twice"):
        task("choice").score(dialog("a", choices=choices), "a")


def test_captions_of_a_hundred_pictures_are_scored_as_sacrebleu_does():
    from sacrebleu.metrics import BLEU, CHRF

    rng, words = (
        np.random.default_rng(0),
        "a the red dog cat runs sits on grass mat, near two boats 3.5 % é 猫 <b> $x$".split(),
    )

    def text():
        return " ".join(rng.choice(words, rng.integers(1, 9)))

    said = [text() if i % 10 else "" for i in range(100)]
    references = [[text() for _ in range(1 + i % 3)] for i in range(100)]
    score = task("caption")
    rows = [score.score(dialog(*r, *[""] * (i % 2)), s) for i, (r, s) in enumerate(zip(references, said, strict=True))]
    padded = [[r[i] if i < len(r) else None for r in references] for i in range(3)]
    found = score.summarise(rows)
    assert found["bleu"].value == pytest.approx(BLEU(lowercase=True).corpus_score(said, padded).score / 100)
    each = [CHRF(lowercase=True).sentence_score(s, r).score / 100 for s, r in zip(said, references, strict=True)]
    assert found["chrf"].value == pytest.approx(np.mean(each))
    cased = task("caption", lowercase=False)
    assert cased.score(dialog("A Dog runs fast"), "a dog runs fast")["bleu"] < 1
