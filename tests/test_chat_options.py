"""Every option of `apply_chat_template`: as transformers' LlavaProcessor does it on the same messages, or refused."""

import base64
import inspect
import io

import pytest
import torch

import zoo
from tests import published_builders as build
from tests.published_builders import ASK, LLAVA_CHAT
from tests.test_processor_options import same
from zoo.registry import Dialog, Sample, ZooError

# LLaVA's way, with the answers marked, tools and documents shown, and a variable of its own.
MARKED = (
    "{% if tools %}TOOLS: {{ tools | tojson }} {% endif %}{% if documents %}READ: {{ documents[0].text }} {% endif %}"
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if shout %}{{ '!' }}{% endif %}"
    "{% if m.tool_calls %}CALLS {{ m.tool_calls[0].function.name }} {% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Processors of transformers and ours."""
    folder = tmp_path_factory.mktemp("chat_options") / "llava"
    _, theirs = build.llava(folder)
    return theirs, zoo.load(f"dir:{folder}")[1]


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def text(words):
    return {"type": "text", "text": words}


def talk(*images, question=ASK, answer="yes"):
    """A question about images, and an answer."""
    content = [*[{"type": "image", "image": image} for image in images], text(question)]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": [text(answer)]}]


IMAGES = [build.photo(30 + 9 * i, 50, seed=i) for i in range(3)]
FOLDED = {"padding": True}
CALLS = {
    "the text": [{}, {"add_generation_prompt": True}, {"chat_template": MARKED, "add_generation_prompt": True}],
    "tokens": [{"tokenize": True, "return_tensors": "pt"}],
    "all": [{"tokenize": True, "return_dict": True, "return_tensors": t} for t in ("pt", "np")]
    + [{"tokenize": True, "return_dict": True, "return_tensors": None, "processor_kwargs": {"padding": False}}],
    "continued": [
        {"continue_final_message": True},
        {"continue_final_message": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
        {"continue_final_message": "content", "chat_template": MARKED},
    ],
    "call options": [
        {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": more}
        for more in (
            {"padding": "max_length", "max_length": 90}, {"padding": True, "pad_to_multiple_of": 32},
            {"return_offsets_mapping": True}, {"images_kwargs": {"do_normalize": False}}, {"add_special_tokens": False},
            {"truncation": True, "max_length": 60},
        )
    ],
    "by themselves": [
        {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": "max_length", "max_length": 90}
    ],
    "marked": [
        {
            "chat_template": MARKED, "return_assistant_tokens_mask": True, "tokenize": True, "return_dict": True,
            "return_tensors": t, "processor_kwargs": more,
        }
        for t, more in (
            ("pt", {"padding": True}), ("pt", {"padding": "max_length", "max_length": 90}), ("np", {"padding": True}),
            (None, {"padding": False}),
        )
    ],
    "variables": [{"chat_template": MARKED, "shout": True}, {"chat_template": MARKED, "shout": False}],
    "tools": [{"chat_template": MARKED, "tools": [{"type": "function", "function": {"name": "look"}}]}],
    "documents": [{"chat_template": MARKED, "documents": [{"title": "a", "text": "blue"}]}],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_an_option_does_what_it_does_in_transformers(llava, name):
    theirs, ours = llava
    several = [talk(IMAGES[0]), talk(), talk(IMAGES[1], IMAGES[2], question="yes no", answer="two")]
    for conversation in (several[0], several):
        for options in CALLS[name]:
            given = dict(options)
            if given.get("tokenize") and len(conversation) == 3:  # our rows are padded where nobody says otherwise
                given["processor_kwargs"] = FOLDED | given.get("processor_kwargs", {})
                given["processor_kwargs"].pop("padding") if "padding" in given else None
            wanted = theirs.apply_chat_template(json_safe(conversation), **given)
            got = ours.apply_chat_template(conversation, **given)
            if isinstance(wanted, (str, list)):
                assert got == wanted
            elif isinstance(wanted, torch.Tensor):
                assert torch.equal(got, wanted)
            else:
                same(got, wanted)


def json_safe(conversation):
    """A copy: transformers writes into the messages that it is given."""
    if isinstance(conversation, dict):
        return {k: json_safe(v) for k, v in conversation.items()}
    return [json_safe(c) for c in conversation] if isinstance(conversation, list) else conversation


MESSAGES = {
    "two texts": [{"role": "user", "content": [text("yes"), text("no")]}],
    "an image behind": [{"role": "user", "content": [text("yes"), {"type": "image", "image": IMAGES[0]}]}],
    "a system turn": [{"role": "system", "content": [text("be brief")]}, *talk(IMAGES[0])],
    "image_url": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "PATH"}}, text(ASK)]}
    ],
    "path": [{"role": "user", "content": [{"type": "image", "path": "PATH"}, text(ASK)]}],
    "base64": [{"role": "user", "content": [{"type": "image", "base64": "BASE64"}, text(ASK)]}],
    "a tool call": [
        *talk(IMAGES[0])[:1],
        {"role": "assistant", "content": [], "tool_calls": [{"type": "function", "function": {"name": "look"}}]},
    ],
    "an absent content": [*talk(IMAGES[0])[:1], {"role": "assistant", "content": None, "tool_calls": None}],
}  # fmt: skip


@pytest.mark.parametrize("template", [LLAVA_CHAT, MARKED], ids=["published", "marked"])
@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_shown_as_transformers_shows_them(llava, tmp_path, name, template):
    theirs, ours = llava
    (tmp_path / "a.png").write_bytes(png(IMAGES[0]))
    places = {"PATH": str(tmp_path / "a.png"), "BASE64": base64.b64encode(png(IMAGES[0])).decode()}

    def placed(value):
        if isinstance(value, dict):
            return {k: placed(v) for k, v in value.items()}
        return (
            [placed(v) for v in value]
            if isinstance(value, list)
            else places.get(value, value)
            if isinstance(value, str)
            else value
        )

    messages = placed(MESSAGES[name])
    if name == "an absent content":  # these templates walk through it
        template = "{% for m in messages %}{{ m.role }}{{ 'says' if m.content else 'is silent' }}{% endfor %}<image>"
    options = {"chat_template": template, "add_generation_prompt": True}
    assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(json_safe(messages), **options)
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    same(ours.apply_chat_template(messages, **options), theirs.apply_chat_template(json_safe(messages), **options))


def test_plain_contents_and_images_beside_the_messages(llava):
    """What transformers' processor loses without a word: strings in a template of parts."""
    _, ours = llava
    typed, plain = (
        talk(IMAGES[0]),
        [{"role": "user", "content": f"<image>{ASK}"}, {"role": "assistant", "content": "yes"}],
    )
    wanted = ours.apply_chat_template(typed)
    assert ours.apply_chat_template(plain) == wanted and ASK in wanted
    options = {"tokenize": True, "return_dict": True}
    whole = ours.apply_chat_template(typed, **options)
    bare = [{**typed[0], "content": [{"type": "image"}, text(ASK)]}, typed[1]]
    for given in ({"images": [IMAGES[0]]}, {"images": IMAGES[0]}, {"processor_kwargs": {"images": [IMAGES[0]]}}):
        same(ours.apply_chat_template(bare, **options, **given), whole)
    same(ours.apply_chat_template([bare, bare], **options, images=[[IMAGES[0]], [IMAGES[0]]]),
         ours.apply_chat_template([typed, typed], **options))  # fmt: skip
    assert typed[0]["content"][0]["image"] is IMAGES[0]  # messages stay as they were


def test_the_template_that_is_set_is_the_one_that_is_used(llava):
    import copy

    _, ours = copy.deepcopy(llava)
    ours.chat_template = MARKED
    assert ours.tokenizer.chat_template == ours.chat_template == MARKED
    assert ours.apply_chat_template(talk(IMAGES[0])) == ours.apply_chat_template(talk(IMAGES[0]), chat_template=MARKED)
    ours.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    assert ours.apply_chat_template(talk(IMAGES[0])) == f"user: <image>\n{ASK}assistant: yes"
    ours.tokenizer.chat_template = {"default": MARKED, "short": "{{ messages[0].role }}"}
    assert ours.apply_chat_template(talk(IMAGES[0]), chat_template="short") == "user"


REFUSED = [
    ({"load_audio_from_video": True}, "'load_audio_from_video' is not taken: the model takes no sound"),
    ({"sanitize_control_tokens": True, "tokenize": True}, "'sanitize_control_tokens' is not taken"),
    ({"tools": [{"name": "a"}]}, "'tools' is not taken: the chat template does not show them"),
    ({"documents": [{"text": "a"}]}, "'documents' is not taken: the chat template does not show them"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "'continue_final_message' is not taken"),
    ({"return_assistant_tokens_mask": True}, "it comes with tokenize=True and return_dict=True"),
    (
        {"return_assistant_tokens_mask": True, "tokenize": True, "return_dict": True},
        "the chat template has no {% generation %} block",
    ),
    ({"enable_thinking": False}, "No variable of the chat template or option of the call named 'enable_thinking'"),
    ({"paddin": True, "tokenize": True}, "named 'paddin'. Did you mean 'padding'"),
    ({"padding": True}, "tokenize=False gives the text, which the option 'padding' does not change"),
    ({"tokenize": True, "images": IMAGES[:1]}, "Images are given in the messages and in images="),
    ({"tokenize": True, "processor_kwargs": {"truncation": True, "max_length": 20}}, "cuts the images of text 0"),
    ({"continue_final_message": "reasoning_content"}, "The chat template refuses the messages: continue_final_message"),
]


def test_what_is_not_done_is_refused_by_name(llava):
    _, ours = llava
    for options, words in REFUSED:
        with pytest.raises(ZooError) as found:
            ours.apply_chat_template(talk(IMAGES[0]), **options)
        assert words in str(found.value)
    for message, words in (
        ({"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, "has type 'audio'; allowed: image, video"),
        ({"role": "user", "content": [text("<image>")]}, "A text part holds the image token"),
        ({"role": "user", "content": ["yes"]}, "A message part must be a mapping with a type, got 'yes'"),
        ({"role": "user", "content": [{"type": "image", "base64": "%"}, text("a")]}, "base64 that cannot be decoded"),
        (
            {"role": "user", "content": [text(5)]},
            "of type 'text' must hold a string as 'text', got {'type': 'text', 't",
        ),
        ({"role": "user", "content": [{"type": "text", "content": "a"}]}, "must hold a string as 'text'"),
        (
            {"role": "user", "content": text("a")},
            "must be a text or a list of parts, got {'type': 'text', 'text': 'a'}",
        ),
    ):
        with pytest.raises(ZooError) as found:
            ours.apply_chat_template([message], tokenize=True)
        assert words in str(found.value)


def test_messages_of_another_form_are_described(llava):
    """By the template's call, and by samples of data sets, whose name is said."""
    _, ours = llava
    with pytest.raises(ZooError, match="A conversation is a list of messages, got a mapping"):
        ours.apply_chat_template({"role": "user", "content": "a"})
    with pytest.raises(ZooError, match="text is an empty list"):
        ours(text=[])
    answer, content = {"role": "assistant", "content": "yes"}, "must be a text or a list of parts, got None"
    for messages, words in (
        ([{"content": "a"}, answer], r"message 0: A message must be a mapping with role and content, got \{'content'"),
        ([{"role": "user", "content": None}, answer], f"message 0: The content of a message {content}"),
        (
            [{"role": "user", "content": "a"}, {**answer, "content": [text(5)]}],
            "message 1: A message part of type 'text'",
        ),
        ([{"role": "user", "content": "a"}, "yes"], "message 1: A message must be a mapping"),
    ):
        for encode in (ours.encode, lambda one: ours.encode_prompt(one, one.dialogs[0])):
            with pytest.raises(ZooError, match=f"Sample 's', {words}"):
                encode(Sample("s", [], [Dialog(messages)]))
    with pytest.raises(ZooError, match="Sample 's' has no dialog"):
        ours.encode(Sample("s", [], []))


def test_no_argument_of_the_installed_transformers_is_left_out(llava):
    theirs, ours = llava
    known = set(inspect.signature(ours.apply_chat_template).parameters)
    assert set(inspect.signature(theirs.apply_chat_template).parameters) <= known
