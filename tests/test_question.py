"""Pruners that choose by the question: which text it is, and that each prompt gets its own, in every pass."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import zoo
from tests import published_builders
from tests.conftest import QUESTIONS, picture, sample, talk
from tests.test_published_families import said
from zoo.checking.checker import check
from zoo.composed.chat_session import Talk
from zoo.evaluation.predict import Question, answer
from zoo.registry import Asked, Dialog, ImageFeatures, Pruner, Sample, ZooError, register
from zoo.registry.versions import cache_argument
from zoo.teaching.teacher import Teacher

RED, BLUE = "is there a red circle?", "what color is the square?"


@dataclass
class NoOptions:
    pass


@pytest.fixture(autouse=True)
def asking():
    """Keeps the half of the tokens that are most like the mean of the question's embeddings."""

    @register("pruner", "asking")
    class Asking(Pruner, nn.Module):
        needs = frozenset({"question", "projected"})
        destroys = frozenset({"grid"})

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n // 2

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            asked = image.question
            count = asked.mask.sum(1, keepdim=True).clamp(min=1)
            mean = (asked.embeds * asked.mask.unsqueeze(-1)).sum(1) / count  # (M, C)
            score = (image.projected @ mean.unsqueeze(-1)).squeeze(-1)  # (M, N)
            order = score.argsort(dim=1, descending=True, stable=True)
            return image.take_best(order[:, : self.num_tokens(score.shape[1])])


@pytest.fixture
def model(make_model):
    net, processor = make_model(pruner={"asking": {}}, llm=_LLM)
    with torch.no_grad():  # fresh embeddings are small: questions have to differ
        net.llm.lm.get_input_embeddings().weight.mul_(30)
    return net, processor


_LLM = {
    "name": "hf", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 256
}  # fmt: skip


def batch(processor, *samples, **options):
    return processor.collate([processor.encode(s) for s in samples], **options)


# ---- which text ----------------------------------------------------------------------------------------------------

IMAGE = {"type": "image"}


def turn(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


@pytest.mark.parametrize(
    ("messages", "options", "wanted"),
    [
        ([turn("user", IMAGE, "a?")], {"prompt": True}, "a?"),
        ([turn("system", "be kind"), turn("user", IMAGE, "a?"), turn("assistant", "b")], {}, "a?"),
        ([turn("user", IMAGE, "a?"), turn("assistant", "b"), turn("user", "c?"), turn("assistant", "d")], {}, "a?"),
        ([turn("user", IMAGE, "a?"), turn("assistant", "b"), turn("user", "c?")], {"prompt": True}, "c?"),
        (
            [turn("user", IMAGE, "a?"), turn("assistant", "b"), turn("user", "c?"), turn("assistant", "d")],
            {"only_last": True},
            "c?",
        ),
        ([turn("user", "hi"), turn("assistant", "b"), turn("user", IMAGE, "c?"), turn("assistant", "d")], {}, "c?"),
        ([turn("user", "a ", IMAGE, "b?")], {"prompt": True}, "a b?"),
        ([turn("user", IMAGE)], {"prompt": True}, ""),
        ([{"role": "user", "content": "<image>\na?"}], {"prompt": True}, "a?"),
        (
            [turn("user", IMAGE, "a?"), {"role": "assistant", "tool_calls": []}, turn("tool", "5")],
            {"prompt": True},
            "a?",
        ),
        ([turn("user", IMAGE, "a?"), {"role": "user", "content": None}], {"prompt": True}, ""),
    ],
)
def test_it_is_the_last_turn_of_the_user_before_the_first_answer_behind_an_image(model, messages, options, wanted):
    processor = model[1]
    (found,) = processor.asked(messages, **options)
    assert found.text == wanted and found.images == 1
    assert list(found.ids) == processor.tokenizer(wanted, add_special_tokens=False)["input_ids"]


def test_batches_have_it_only_where_a_part_needs_it(model, make_model, tmp_path):
    assert "questions" not in batch(make_model()[1], sample((RED, "yes")))
    processor = model[1]
    assert batch(processor, sample((RED, "yes")))["questions"] == [processor.asked(talk(RED, "yes").messages)[0]]
    processor.save_pretrained(tmp_path)
    assert type(processor).from_pretrained(tmp_path).asks
    chat = processor.apply_chat_template(
        [turn("user", {"type": "image", "image": sample((RED, "")).images[0]}, RED)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert [a.text for a in chat["questions"]] == [RED]


def test_from_ids_alone_it_is_the_text_behind_the_image_and_before_the_labels(model):
    net, processor = model
    rows = batch(processor, sample((RED, "yes")), sample((BLUE, "blue")))
    written = [a.ids for a in rows.pop("questions")]
    asked = net(**rows).image_kept.question
    for ids, mask, own in zip(asked.ids, asked.mask, written, strict=True):
        found = tuple(ids[mask].tolist())
        assert any(found[i : i + len(own)] == own for i in range(len(found))), "the template's words are around it"
        assert len(found) < len(own) + 5 and asked.texts is None


# ---- each its own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_of_unlike_questions_is_each_alone(model, side):
    net, processor = model
    some = [sample((q, "yes"), seed=i // 2) for i, q in enumerate([RED, "describe the picture.", BLUE, ""])]
    rows = batch(processor, *some, padding_side=side)
    for given in (rows, {k: v for k, v in rows.items() if k != "questions"}):
        out = net(**given, all_logits=True)
        assert len({tuple(k) for k in out.image_kept.keep.tolist()}) > 2, "the question decides"
        for i, one in enumerate(some):
            own = batch(processor, one)
            own = own if "questions" in given else {k: v for k, v in own.items() if k != "questions"}
            alone = net(**own, all_logits=True)
            assert torch.equal(alone.image_kept.keep[0], out.image_kept.keep[i])
            there = rows["attention_mask"][i].bool()
            torch.testing.assert_close(out.logits[i][there], alone.logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_samples_are_each_alone_and_two_images_share_a_question(model):
    net, processor = model
    some = [sample((RED, "yes"), images=2), sample((BLUE, "blue"), seed=4), sample(("describe the picture.", "a"))]
    row = processor.collate(processor.pack([processor.encode(s) for s in some], 200))
    assert len(row["input_ids"]) == 1 and [a.images for a in row["questions"]] == [2, 1, 1]
    alone = [net(**batch(processor, s)).image_kept.keep for s in some]
    assert torch.equal(net(**row).image_kept.keep, torch.cat(alone))
    assert net(**row).image_kept.question.prompts.tolist() == [0, 0, 1, 2]
    del row["questions"]  # from the ids of each sample
    plain = [net(**{k: v for k, v in batch(processor, s).items() if k != "questions"}) for s in some]
    assert torch.equal(net(**row).image_kept.keep, torch.cat([p.image_kept.keep for p in plain]))


def test_dialogs_that_share_an_image_ask_the_same_or_are_refused(model):
    net, processor = model
    alike = processor.encode(sample((RED, "yes"), (RED, "no")))
    assert alike.blocks.max() == 2 and len(alike.asked) == 1
    net(**processor.collate([alike]))
    why = "several dialogs of a row share an image. Set pack=none in the stage, and no pack_length"
    with pytest.raises(ZooError, match=why):
        processor.encode(sample((RED, "yes"), (BLUE, "blue")))
    rows = processor.collate([alike])
    del rows["questions"]
    with pytest.raises(ZooError, match=why):
        net(**rows)


@torch.no_grad()
def test_questions_are_given_by_hand(model):
    net, processor = model
    rows = batch(processor, sample((RED, "yes"), images=2), sample((BLUE, "blue")))
    wanted = net(**rows).image_kept.keep
    net.__dict__["processor"] = processor  # its tokenizer
    assert torch.equal(net(**{**rows, "questions": [RED, BLUE]}).image_kept.keep, wanted)
    other = net(**{**rows, "questions": [BLUE, RED]}).image_kept.keep
    assert not torch.equal(other, wanted)
    for wrong, why in (
        ("red", "must be a list of texts"),
        ([RED], "1 questions for 2 rows"),
        ([1, 2], "list of texts"),
    ):
        with pytest.raises(ZooError, match=why):
            net(**{**rows, "questions": wrong})
    uneven = batch(processor, sample((RED, "yes"), images=2), Sample("w", [], [talk(BLUE, "a", images=0)]))
    alone = net(**batch(processor, sample((RED, "yes"), images=2))).image_kept
    uneven["questions"] = [RED, BLUE]  # of rows, of which one has no image
    assert torch.equal(net(**uneven).image_kept.keep, alone.keep)
    with pytest.raises(ZooError, match="about 5 images, and there are 3"):
        net(**{**rows, "questions": [Asked(RED, (), 4), Asked(BLUE, (), 1)]})
    with pytest.raises(ZooError, match="'asking' chooses image tokens by the question, and this pass has none"):
        net(encoded=net.encode_images(rows["pixel_values"]), inputs_embeds=None)


# ---- what is kept for several questions ------------------------------------------------------------------------------


@torch.no_grad()
def test_encoded_images_are_shared_by_questions_and_what_is_kept_is_not(model):
    net, processor = model
    pixels = batch(processor, sample((RED, "yes")))["pixel_values"]
    encoded = net.encode_images(pixels)
    assert encoded.kept is None and encoded.tokens is None
    found = []
    for question in (RED, BLUE):
        rows = batch(processor, sample((question, "yes")))
        whole = net(**rows, all_logits=True)
        rows.pop("pixel_values")
        again = net(**rows, encoded=encoded, all_logits=True)
        assert torch.equal(again.logits, whole.logits)
        found.append(again.image_kept.keep)
    assert not torch.equal(*found) and encoded.image.question is None


@torch.no_grad()
def test_evaluation_answers_each_question_about_an_image_as_alone(model):
    net, processor = model
    net.__dict__["processor"] = processor
    asked = [*QUESTIONS, "red", "blue?"]
    about = Sample("one", sample((RED, "")).images, [talk(q, "yes") for q in asked])
    questions = [Question(about, d, "generate", 4) for d in about.dialogs]
    for size in (3, 8):
        found = [text for _, text in answer(net, processor, questions, batch_size=size)]
        assert found == [net.chat(q, image=about.images[0], max_new_tokens=4) for q in asked]
    options = [replace(d, choices=["red", "blue", "yes"]) for d in about.dialogs]
    questions = [Question(about, d, "choice", 4) for d in options]
    together = [text for _, text in answer(net, processor, questions, batch_size=8)]
    assert together == [text for q in questions for _, text in answer(net, processor, [q], batch_size=1)]


@torch.no_grad()
def test_a_chat_prunes_for_each_turn_and_a_continued_cache_keeps_the_first_choice(model):
    net, processor = model
    session, image = Talk(net, processor), sample((RED, "")).images[0]
    seen = []
    inner = net.encode_features
    net.encode_features = lambda *given: seen.append(inner(*given)) or seen[-1]
    session.say(RED, [image], max_new_tokens=2)
    session.say(BLUE, max_new_tokens=2)
    assert [e.kept.question.texts for e in seen if e.kept is not None] == [(RED,), (BLUE,)]
    net.encode_features = inner
    rows = batch(processor, sample((RED, "yes")))
    first = net(**rows, use_cache=True)
    more = torch.tensor([[70, 71, 72]])
    mask = torch.ones(1, rows["input_ids"].shape[1] + 3, dtype=torch.long)
    then = net(input_ids=more, attention_mask=mask, **cache_argument(first.cache))
    whole = net(
        input_ids=torch.cat([rows["input_ids"], more], 1), pixel_values=rows["pixel_values"], attention_mask=mask,
        questions=rows["questions"],
    )  # fmt: skip
    torch.testing.assert_close(then.logits, whole.logits[:, -3:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_beams_and_batches_of_generate_have_their_own_question(model):
    net, processor = model
    some = [sample((q, "")) for q in (RED, "describe the picture.", BLUE)]
    rows = processor.collate([processor.encode_prompt(s, s.dialogs[0]) for s in some], padding_side="left")
    given = {k: rows[k] for k in ("input_ids", "attention_mask", "pixel_values", "questions")}
    out = net.generate(**given, num_beams=2, max_new_tokens=3, do_sample=False)
    for i, one in enumerate(some):
        own = processor.collate([processor.encode_prompt(one, one.dialogs[0])])
        alone = {k: own[k] for k in ("input_ids", "attention_mask", "pixel_values", "questions")}
        alone = net.generate(**alone, num_beams=2, max_new_tokens=3, do_sample=False)
        new = alone[0, own["input_ids"].shape[1] :]
        assert out[i, rows["input_ids"].shape[1] :][: len(new)].tolist() == new.tolist()


@torch.no_grad()
def test_crops_of_an_image_and_a_saved_model_have_the_question(tmp_path):
    published_builders.llava_next(tmp_path / "next")
    net, processor = zoo.load(f"dir:{tmp_path / 'next'}", "pruner=[asking]")
    text = processor.apply_chat_template(said(1, "red or blue"), add_generation_prompt=True)
    given = processor(images=[[published_builders.photo(40, 90)]], text=[text])
    kept = net(**given, questions=["red or blue"]).image_kept
    assert len(kept.tokens) > 1 and len(set(kept.question.texts)) == 1
    net.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, its = zoo.load(f"dir:{tmp_path / 'saved'}")
    assert again.asks and its.asks
    assert torch.equal(again(**given, questions=["red or blue"]).logits, net(**given, questions=["red or blue"]).logits)


# ---- training and the check ------------------------------------------------------------------------------------------


def test_gradients_flow_and_a_batch_without_an_image_trains(model):
    net, processor = model
    net.train()
    words = Sample("w", [], [Dialog([turn("user", "hi"), turn("assistant", "yes")])])
    for some in ([sample((RED, "yes")), words], [words]):
        net.zero_grad()
        net(**batch(processor, *some)).loss.backward()
        assert all(p.grad is not None for p in net.projector.parameters())


@torch.no_grad()
def test_a_teacher_that_shares_the_encoder_chooses_by_its_own_question(model, make_model):
    net, processor = model
    student, own = make_model(llm=_LLM)
    student.vision.requires_grad_(False)
    teacher = Teacher(net, frozenset({"teacher.logits"}))
    teacher.share_vision(student)
    assert teacher.same_vision
    for question in (RED, BLUE):
        theirs, rows = batch(processor, sample((question, "yes"))), batch(own, sample((question, "yes")))
        wanted = net(**theirs, all_logits=True)
        rows["teacher"] = {k: v for k, v in theirs.items() if k != "pixel_values"}
        view = teacher.outputs_for(rows, student(**{k: v for k, v in rows.items() if k != "teacher"}))
        assert torch.equal(view.logits, wanted.logits) and view.image_kept.question.texts == (question,)


def test_the_check_runs_a_pruner_with_two_questions_and_knows_the_projector(model):
    from tests.conftest import tiny_slots
    from zoo.checking.plan import Plan

    report = check(Plan(tiny_slots(pruner={"asking": {}}), vocab_size=360))
    assert report.num_image_tokens == 8
    pooled = tiny_slots(pruner={"asking": {}}, projector={"name": "resampler", "num_queries": 4, "num_heads": 2})
    with pytest.raises(ZooError, match="needs projected, but projector 'resampler', which makes new tokens, does not"):
        check(Plan(pooled, vocab_size=360))


def test_what_a_template_returns_goes_to_a_device_with_its_questions(make_model):
    model, processor = make_model(pruner={"cdpruner": {"name": "cdpruner", "relevance": "embeddings"}})
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": picture(i)}, {"type": "text", "text": text}]}]
        for i, text in enumerate(("what color?", "how many shapes are there?"))
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    given = processor.apply_chat_template(talks, padding=True, padding_side="left", **options)
    wanted = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert [asked.text for asked in given.to("cpu")["questions"]] == ["what color?", "how many shapes are there?"]
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), wanted)
