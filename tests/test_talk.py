"""Talking to a model, in Python and on the command line; finding one by its size."""

import io

import numpy as np
import pytest
import torch

import zoo
from tests import published_builders as build
from zoo.cli.entry import main
from zoo.composed.chat_session import Talk
from zoo.registry import ZooError
from zoo.text.markup import harmless
from zoo.vision.images.video import Video


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk") / "llava"
    build.llava(folder)
    build.photo(40, 60).save(folder / "photo.png")
    return folder, *zoo.load(f"dir:{folder}")


def test_chat_is_generate_on_the_chat_template(llava):
    folder, model, processor = llava
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red?"}]}],
        add_generation_prompt=True,
    )
    batch = processor(images=[str(folder / "photo.png")], text=text)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    expected = processor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    pieces = []
    answer = model.chat("is it red?", image=folder / "photo.png", max_new_tokens=8, stream=pieces.append)
    assert answer == expected == "".join(pieces).strip()


def test_a_list_is_not_one_image(llava):
    folder, model, _ = llava
    with pytest.raises(ZooError, match="takes one image, got a list"):
        model.chat("which is red?", image=[folder / "photo.png"] * 2)


def test_turns_are_remembered_and_images_prepared_once(llava, monkeypatch):
    folder, model, processor = llava
    talk = Talk(model)
    talk.say("is it red?", [folder / "photo.png"], max_new_tokens=4)
    prepared = []
    monkeypatch.setattr(processor, "prepare", lambda s: prepared.append(list(s)) or [])
    talk.say("and now?", max_new_tokens=4)
    assert prepared == [[]] and len(talk.shown) == 1
    assert [m["role"] for m in talk.messages] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, {"max_new_tokens": 256, "do_sample": False}),
        ({"temperature": 0.7}, {"max_new_tokens": 256, "do_sample": True}),
        ({"top_p": 0.9, "do_sample": False}, {"max_new_tokens": 256, "do_sample": False}),
        ({"top_k": 5, "temperature": 0}, {"max_new_tokens": 256, "do_sample": False}),
        ({"max_length": 40}, {"max_length": 40, "max_new_tokens": None, "do_sample": False}),
        ({"max_new_tokens": 5, "max_length": 40}, {"max_new_tokens": 5, "max_length": 40}),
        ({"generation_config": {"max_new_tokens": 5}}, {"max_new_tokens": 5, "do_sample": False}),
        ({"generation_config": {"do_sample": True, "max_length": 9}}, {"max_new_tokens": None, "do_sample": True}),
        ({"generation_config": {"top_p": 0.9}, "max_new_tokens": 5}, {"max_new_tokens": 5, "do_sample": True}),
        ({"return_dict_in_generate": True, "output_scores": True}, {"output_scores": True, "do_sample": False}),
    ],
)
def test_what_is_asked_for_reaches_generate_and_the_rest_is_greedy(llava, monkeypatch, given, wanted):
    from transformers import GenerationConfig

    folder, model, _ = llava
    if "generation_config" in given:
        given = given | {"generation_config": GenerationConfig(**given["generation_config"])}
    before, seen, run = str(given), [], type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **options: seen.append(options) or run(
        self, **{k: v for k, v in options.items() if k in ("input_ids", "attention_mask", "pixel_values")},
        max_new_tokens=2, return_dict_in_generate=bool(options.get("return_dict_in_generate")),
    ))  # fmt: skip
    assert isinstance(model.chat("is it red?", folder / "photo.png", **given), str)
    asked = seen[0] | (vars(seen[0]["generation_config"]) if "generation_config" in given else {})
    assert {name: asked.get(name) for name in wanted} == wanted and str(given) == before
    assert not ("generation_config" in given and {"max_new_tokens", "do_sample"} & seen[0].keys())


def test_one_image_may_be_given_by_itself(llava):
    folder, model, _ = llava
    photo, path = build.photo(40, 60), folder / "photo.png"
    wanted = model.chat("is it red?", photo, max_new_tokens=4)
    array, file = np.asarray(photo), lambda: io.BytesIO(path.read_bytes())
    for one in (photo, path, str(path), path.read_bytes(), array, array[None], file(), iter([path])):
        assert model.chat("is it red?", images=one, max_new_tokens=4) == wanted
    assert Talk(model).say("is it red?", file(), max_new_tokens=4) == wanted
    with pytest.raises(ZooError, match=r"nowhere\.png"):
        model.chat("is it red?", images="nowhere.png")


def test_several_answers_are_refused(llava):
    with pytest.raises(ZooError, match="one answer; num_return_sequences=3 goes to"):
        llava[1].chat("is it red?", num_return_sequences=3, do_sample=True)


def test_images_of_later_turns_are_prepared_as_in_one_prompt(tmp_path):
    """LLaVA-OneVision cuts a single image, and leaves several whole: transformers' processor gets them all at once."""
    from transformers import AutoProcessor

    build.llava_onevision(tmp_path)
    model, processor = zoo.load(f"dir:{tmp_path}", device="cpu")
    talk, photos = Talk(model), [build.photo(40, 90), build.photo(90, 40, 1)]
    talk.say("is it red?", photos[:1], max_new_tokens=2)
    assert talk.shown[0].cut.rows > 1
    talk.say("and here?", [io.BytesIO(png(photos[1]))], max_new_tokens=2)
    talk.say("sure?", max_new_tokens=2)
    theirs = AutoProcessor.from_pretrained(tmp_path)(images=[photos], text="<image><image>", return_tensors="pt")
    ours = torch.cat([picture.pixels for picture in talk.shown])
    assert torch.equal(ours, theirs["pixel_values"].flatten(0, 1))
    mixed = processor.prepare([photos[0], films(processor)])  # a video beside it does not count, as in the call
    assert mixed[0].cut.rows == processor(images=photos[:1], text="<image>")["cuts"][0].rows > 1


def png(image):
    image.save(made := io.BytesIO(), "PNG")
    return made.getvalue()


def films(processor):
    processor.videos = lambda video: None
    return Video("film.mp4")


def test_without_a_processor_it_says_so(llava):
    _, model, _ = llava
    other = type(model)(model.config, parts=None, base=None)
    with pytest.raises(ZooError, match="came without its processor"):
        other.chat("hello")


def test_the_command_answers_and_goes_on(llava, capsys, monkeypatch):
    folder, model, processor = llava
    monkeypatch.setattr("zoo.loading.build.load", lambda *a, **k: (model, processor))
    photo = str(folder / "photo.png")
    assert main(["chat", f"dir:{folder}", "--image", photo, "-q", "is it red?", "--max-new-tokens", "4"]) == 0
    one = capsys.readouterr().out
    assert one.strip() == harmless(model.chat("is it red?", image=photo, max_new_tokens=4))
    lines = iter([f"/image {photo}", "is it red?", "and blue?", "/image nowhere.png", "/new", "yes no", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", f"dir:{folder}", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(one) and "There is no file 'nowhere.png'" in said
    assert main(["chat", f"dir:{folder}", "--image", "absent.png"]) == 2


def test_answers_do_not_command_the_terminal(llava, capsys, monkeypatch):
    class Says(Talk):
        def say(self, *args, stream, **options):
            stream("a\x1b]0;t\x07b\x9b2J\rc\n\td \u05e9 \u202b")

    monkeypatch.setattr("zoo.loading.build.load", lambda *a, **k: llava[1:])
    monkeypatch.setattr("zoo.composed.chat_session.Talk", Says)
    assert main(["chat", f"dir:{llava[0]}", "-q", "is it red?"]) == 0
    assert capsys.readouterr().out == "a\\x1b]0;t\\x07b\\x9b2J\\rc\n\td \u05e9 \u202b\n"


def test_models_are_found_by_size_and_described(capsys):
    assert main(["list", "model", "*smolvlm*", "--where", "params<1B"]) == 0
    out = capsys.readouterr().out
    assert "smolvlm_256m" in out and "smolvlm_2b" not in out
    assert main(["list", "model", "scenes*", "--where=params>1B"]) == 2
    assert main(["list", "model", "--where", "parms<8B"]) == 2
    assert "Did you mean 'params'" in capsys.readouterr().err
    assert main(["info", "smolvlm_256m"]) == 0
    out = capsys.readouterr().out
    for words in (
        "256",
        "image tokens",
        "memory",
        "apache-2.0",
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        "pixel_shuffle",
    ):
        assert words in out


def test_every_named_model_fits_and_is_as_large_as_it_says():
    """The sizes that presets state, against the published numbers of parameters."""
    from zoo.checking.checker import check

    sizes = {"llava15_7b": 7.06e9, "llava15_13b": 13.35e9, "llava16_mistral_7b": 7.57e9, "smolvlm_256m": 0.256e9}
    sizes |= {"llava_onevision_05b": 0.89e9, "internvl3_1b": 0.94e9, "smolvlm_2b": 2.2e9}
    sizes |= {"qwen3_vl_2b": 2.13e9, "qwen2_vl_2b": 2.21e9, "qwen25_vl_3b": 3.75e9, "qwen3_vl_30b_a3b": 31.07e9}
    for name, wanted in sizes.items():
        walk = check(name)
        assert sum(r.parameters for r in walk.rows) == pytest.approx(wanted, rel=0.04), name
    assert check("llava15_7b").num_image_tokens == 576
    assert torch.get_default_dtype() == torch.float32
