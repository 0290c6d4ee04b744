"""Answers end: what is learnt of a conversation, what a prompt asks, what ends it; over families of chat templates."""

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from tests.chat_families import SHAPES, tokenizer
from tests.conftest import picture
from zoo.registry import IGNORE_INDEX, Dialog, ImageTransform, Sample, ZooError
from zoo.text.processor import ZooProcessor
from zoo.text.stops import stops_of
from zoo.text.tokenizer import CHAT_TEMPLATES, fit_tokenizer, load_tokenizer, set_template_options

TRANSFORM = ImageTransform((32, 32), (0.5,) * 3, (0.5,) * 3)


def processor_of(name, template=None):
    made = tokenizer(SHAPES[name])
    made.chat_template = template or made.chat_template
    return ZooProcessor(fit_tokenizer(made, name), TRANSFORM, num_image_tokens=4, end_tokens=SHAPES[name].stated)


def say(role, text, images=0):
    return {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def talk(*texts, images=(), system=""):
    """Questions and answers in turn, with so many images in front of each question."""
    shown = [*images, *[0] * len(texts)]
    turns = [say("assistant", t) if i % 2 else say("user", t, shown[i // 2]) for i, t in enumerate(texts)]
    return [say("system", system), *turns] if system else turns


def sample_of(messages):
    count = sum(p["type"] == "image" for m in messages for p in m["content"])
    return Sample("s7", [picture(i) for i in range(count)], [Dialog(messages)])


CASES = {
    "one turn": talk("what is it?", "a red cat"),
    "several turns": talk("what is it?", "a red cat", "where?", "on a mat", "is it?", "I think\n\nwell"),
    "system prompt": talk("what?", "a mat", "where?", "it is here", system="be kind"),
    "image first": talk("what is it?", "a cat", "where?", "a", images=[1]),
    "several images": talk("what are these?", "cats", "and this?", "a mat", images=[2, 1]),
    "blanks around": talk(" what?\n", "\n a red cat \n", "where?", " on it"),
}


def rows_of(row):
    """What a model sees: the row, or the shared prefix with each of the blocks behind it."""
    if row.blocks is None:
        return [(row.input_ids, row.labels)]
    whole = [(row.blocks == 0) | (row.blocks == b) for b in range(1, int(row.blocks.max()) + 1)]
    return [(row.input_ids[w], row.labels[w]) for w in whole]


def pieces(tok, ids, labels):
    """The learnt text, turn by turn."""
    assert ((labels == ids) | (labels == IGNORE_INDEX)).all()
    on = np.r_[False, labels != IGNORE_INDEX, False]
    starts, stops = np.flatnonzero(~on[:-1] & on[1:]), np.flatnonzero(on[:-1] & ~on[1:])
    return [text(tok, ids[:b]).removeprefix(text(tok, ids[:a])) for a, b in zip(starts, stops, strict=True)]


def text(tok, ids):
    return tok.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SHAPES)
def test_each_answer_is_learnt_with_its_end_and_begins_where_it_is_asked_for(name, case):
    shape, messages, processor = SHAPES[name], CASES[case], processor_of(name)
    sample = sample_of(messages)
    if case == "system prompt" and shape.system == "refused":
        with pytest.raises(ZooError, match=r"'s7'.*\[system, user, assistant.*takes no system turn"):
            processor.encode(sample)
        return
    if case == "several images" and shape.splits:  # the rows of a sample share its images
        with pytest.raises(ZooError, match=r"'s7'.*renders turn 1 differently.*a dialog of its own"):
            processor.encode(sample)
        return
    row, answers = processor.encode(sample), [m["content"][-1]["text"] for m in messages if m["role"] == "assistant"]
    learnt = [piece for ids, labels in rows_of(row) for piece in pieces(processor.tokenizer, ids, labels)]
    assert len(learnt) == len(answers) and len(rows_of(row)) == (len(answers) if shape.splits else 1)
    for number, (piece, answer) in enumerate(zip(learnt, answers, strict=True)):
        followed = number < len(answers) - 1 and not shape.splits
        lead = shape.lead_between if followed and shape.lead_between is not None else shape.lead
        end = shape.between if followed and shape.between is not None else shape.end
        assert piece.startswith(lead.rstrip(" ")) and piece.endswith(end)
        assert piece[len(lead.rstrip(" ")) : len(piece) - len(end)].strip() == answer.strip()

    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            part = sample_of(messages[: i + 1])
            prompt = processor.encode_prompt(part, part.dialogs[0]).input_ids
            ids, labels = rows_of(processor.encode(part))[-1]
            assert np.array_equal(ids[: len(prompt)], prompt) and labels[len(prompt)] != IGNORE_INDEX
            if not shape.splits:
                assert np.array_equal(row.input_ids[: len(prompt)], prompt)


@pytest.mark.parametrize("name", SHAPES)
def test_what_ends_answers_is_known(name):
    shape, processor = SHAPES[name], processor_of(name)
    stops = stops_of(processor.template)
    assert stops.texts == shape.stops
    tokens = {t for t in (shape.eos, shape.end) if t.strip() not in shape.stops} | set(shape.stated)
    tokens |= {shape.between} if shape.between and shape.stops_between else set()
    assert set(stops.ids) == set(processor.tokenizer.convert_tokens_to_ids(sorted(tokens)))


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("name", ["chatml on a base tokenizer", "llama 2", "gemma"])
def test_our_templates_end_answers_on_a_tokenizer_of_others(name, template):
    made = fit_tokenizer(tokenizer(SHAPES[name]), name, template)
    processor = ZooProcessor(made, TRANSFORM, num_image_tokens=4)
    end = {"plain": "<|end|>", "chatml": "<|im_end|>", "vicuna": "</s>"}[template]
    row = processor.encode(sample_of(CASES["image first"]))
    learnt = pieces(made, row.input_ids, row.labels)
    assert [piece.strip() for piece in learnt] == [f"a cat{end}", f"a{end}"]
    assert set(stops_of(processor.template).ids) == {made.eos_token_id, made.convert_tokens_to_ids(end)}
    assert set(SHAPES[name].special) <= {t.content for t in made.added_tokens_decoder.values() if t.special}
    if template == "vicuna" and made.bos_token:
        assert row.input_ids[0] == made.bos_token_id and row.input_ids.tolist().count(made.bos_token_id) == 1


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("begins", [True, False])
def test_our_templates_begin_as_the_tokenizers_texts_do(template, begins):
    """A base model was trained with it; LLaVA's prompts have it, too."""
    made = tokenizer(SHAPES["llama 2"])
    if begins:
        first = [("<s>", made.bos_token_id)]
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=first)
    processor = ZooProcessor(fit_tokenizer(made, "llama", template), TRANSFORM, num_image_tokens=4)
    row = processor.encode(sample_of(CASES["image first"])).input_ids.tolist()
    text = processor.apply_chat_template(CASES["image first"][:1], add_generation_prompt=True)
    written = int(begins or template == "vicuna")
    assert row.count(made.bos_token_id) == text.count("<s>") == int(row[0] == made.bos_token_id) == written
    opens = {"plain": "", "chatml": "<|im_start|>user\n", "vicuna": "USER: "}[template]
    assert text.removeprefix("<s>").startswith(opens)


def test_a_tokenizer_without_an_end_takes_that_of_its_template():
    made = tokenizer(SHAPES["gemma"])
    made.eos_token = None
    assert fit_tokenizer(made, "gemma").eos_token == "<end_of_turn>"
    made = tokenizer(SHAPES["text ends"])
    made.eos_token = None
    with pytest.raises(ZooError, match="'texts' has no end-of-sequence token"):
        fit_tokenizer(made, "texts")


# ---- what is trained is what the template writes -----------------------------------------------------------------

CHATML = SHAPES["chatml on a base tokenizer"].template
CHANGES = {
    "strips thoughts": CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}"),
    "rewrites words": CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('colour', 'color') | upper }}"),
    "trims": CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"),
    "a system turn of its own": SHAPES["qwen 2.5"].template,
    "strips earlier thoughts": SHAPES["qwen 3"].template,
}
THOUGHTS = {
    "none": talk("what colour?", "red"),
    "one": talk("what colour?", "<think>\nhm\n</think>\n\nred \n"),
    "two": talk(
        "what colour?", "<think>\nhm\n</think>\n\nred", "sure?", "<think>\nwell\n</think>\n\nthe colour is red"
    ),
}


@pytest.mark.parametrize("case", THOUGHTS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_trained_is_what_the_template_writes(change, case):
    processor, sample = processor_of("qwen 3", CHANGES[change]), sample_of(THOUGHTS[case])
    row = processor.encode(sample)
    written = processor.apply_chat_template(sample.dialogs[0].messages)
    assert text(processor.tokenizer, row.input_ids) == written
    parts = pieces(processor.tokenizer, row.input_ids, row.labels)
    rest = [part.partition("<|im_end|>") for part in written.split("<|im_start|>assistant\n")[1:]]
    assert parts == ["".join(part[:2]) for part in rest]
    prompt = processor.encode_prompt(sample, sample.dialogs[0])
    assert np.array_equal(row.input_ids[: len(prompt)], prompt.input_ids)


def test_thoughts_that_only_a_prompt_opens_are_learnt_in_rows_of_their_own():
    processor = processor_of("qwen 3 thinking")
    rows = rows_of(processor.encode(sample_of(THOUGHTS["two"])))
    tok = processor.tokenizer
    learnt = [pieces(tok, ids, labels) for ids, labels in rows]
    assert learnt == [
        ["hm\n</think>\n\nred<|im_end|>"],
        ["well\n</think>\n\nthe colour is red<|im_end|>"],
    ]
    assert "hm" not in text(tok, rows[1][0])  # as a model is shown the past
    one = processor.tokenize_dialog(THOUGHTS["two"], only_last=True)  # multiple choice, preferences
    assert np.array_equal(one[0], rows[1][0]) and np.array_equal(one[1], rows[1][1])


def test_an_answer_of_which_nothing_is_written_is_refused():
    processor = processor_of("deepseek r1")
    with pytest.raises(ZooError, match=r"'s7': the chat template writes nothing of the answer '<think>hm</think>'"):
        processor.encode(sample_of(talk("what?", "<think>hm</think>")))


def test_a_template_that_looks_at_the_end_of_an_answer_is_refused():
    template = CHATML.replace("<|im_end|>", "{{ '' if m['content'].endswith('!') else '.' }}<|im_end|>")
    processor = processor_of("qwen 3", template)
    with pytest.raises(ZooError, match=r"'s7': the chat template's text depends on how an answer ends"):
        processor.encode(sample_of(talk("what?", "red!")))


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma", [say("user", "hi"), *CASES["one turn"]], "must take turns"),
        ("mistral", [say("assistant", "hi"), *CASES["one turn"]], "must take turns"),
        ("gemma 3", [say("assistant", "hi"), *CASES["one turn"]], "turns must alternate"),
    ],
)  # fmt: skip
def test_what_a_template_refuses_names_sample_and_turns(name, messages, reason):
    processor, sample = processor_of(name), sample_of(messages)
    for do in (lambda: processor.encode(sample), lambda: processor.encode_prompt(sample, sample.dialogs[0])):
        with pytest.raises(ZooError, match=f"Sample 's7': the chat template refuses the turns .*: .*{reason}"):
            do()


def test_what_a_tokenizer_refuses_names_the_sample():
    with pytest.raises(ZooError, match="Sample 's7': the tokenizer refuses the text"):
        processor_of("qwen 3").encode(sample_of(talk("what?", "half a pair: \ud83d")))


def test_a_conversation_may_begin_with_an_answer_where_the_template_allows_it():
    processor = processor_of("chatml on a base tokenizer")
    row = processor.encode(sample_of([say("assistant", "hm"), *CASES["one turn"]]))
    assert pieces(processor.tokenizer, row.input_ids, row.labels) == ["hm<|im_end|>", "a red cat<|im_end|>"]


def test_answers_between_images_are_learnt_once_where_dialogs_share_them():
    processor = processor_of("chatml on a base tokenizer")
    messages = CASES["several images"]
    sample = sample_of(messages)
    sample.dialogs.append(Dialog([*messages[:-1], say("assistant", "a cat")]))
    row = processor.encode(sample)
    assert [p for p in pieces(processor.tokenizer, row.input_ids, row.labels) if p.startswith("cats")] == [
        "cats<|im_end|>"
    ]
    assert len(pieces(processor.tokenizer, row.input_ids, row.labels)) == 3


@pytest.mark.parametrize("name", ["llava", "qwen 3", "glm 4"])
def test_a_conversation_that_ends_with_a_question_teaches_the_answers_before_it(name):
    processor = processor_of(name)
    row = processor.encode(sample_of([*CASES["one turn"], say("user", "where?")]))
    (piece,) = pieces(processor.tokenizer, row.input_ids, row.labels)
    assert piece.strip() in ("a red cat", "a red cat<|im_end|>")


def test_a_template_that_wants_a_system_turn_shows_its_end_with_one():
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    processor = processor_of("qwen 3", strict.replace("<|im_end|>", "<|im_start|>"))
    assert processor.template.closing.ends == ("<|im_start|>",)


def test_a_tokenizer_may_have_several_templates():
    template = SHAPES["qwen 2.5"].template
    processor = processor_of("qwen 2.5", {"default": template, "tool_use": "{{ messages }}"})
    row = processor.encode(sample_of(CASES["one turn"]))
    assert pieces(processor.tokenizer, row.input_ids, row.labels) == ["a red cat<|im_end|>"]


def test_variables_of_a_template_get_other_defaults_for_good(tmp_path):
    """Qwen 3 without thinking: what a prompt opens is what is trained, and a loaded processor goes on so."""
    asks = "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    asks += "<think>\n\n</think>\n\n{% endif %}{% endif %}"
    hybrid = SHAPES["qwen 3"].template.removesuffix("<|im_start|>assistant\n{% endif %}") + asks
    made = tokenizer(SHAPES["qwen 3"])
    made.chat_template = hybrid
    made = set_template_options(fit_tokenizer(made, "hybrid"), {"enable_thinking": False})
    made.save_pretrained(tmp_path)
    made = load_tokenizer(str(tmp_path))
    processor = ZooProcessor(made, TRANSFORM, num_image_tokens=4)
    row = processor.encode(sample_of(CASES["one turn"]))
    assert pieces(processor.tokenizer, row.input_ids, row.labels) == ["a red cat<|im_end|>"]
    rows = rows_of(processor.encode(sample_of(CASES["image first"])))  # earlier turns are written without a thought
    assert [pieces(processor.tokenizer, *r) for r in rows] == [["a cat<|im_end|>"], ["a<|im_end|>"]]
    assert set_template_options(made, {"enable_thinking": False}).chat_template == processor.chat_template
    opened = processor.apply_chat_template(CASES["one turn"][:1], add_generation_prompt=True, enable_thinking=True)
    assert opened.endswith("<|im_start|>assistant\n")
    for options, reason in (
        ({"enable_think": True}, "Did you mean 'enable_thinking'"),
        ({"enable_thinking": None}, "must be true, false"),
    ):
        with pytest.raises(ZooError, match=reason):
            set_template_options(made, options)
