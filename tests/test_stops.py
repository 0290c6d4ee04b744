"""Generation stops where answers end: at each token and text that a checkpoint, a tokenizer or a template names."""

import json

import pytest
import torch

import zoo
from tests import published_builders as build
from tests.chat_families import SHAPES, tokenizer
from tests.conftest import picture, sample
from zoo.composed.model import ZooModel
from zoo.evaluation.predict import Question, answer
from zoo.registry import ZooError
from zoo.text.stops import AnswerReader
from zoo.text.tokenizer import CHAT_TEMPLATES

PARTS = ["vision=timm", "vision.width=16", "vision.heads=2", "vision.depth=2", "vision.image_size=32"]
PARTS += ["vision.patch_size=16", "projector=linear", "llm=hf"]


def llm_folder(folder, made, ends=None, config_ends=None):
    """A tiny language model with a tokenizer, as one would download it."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(made) + 8, "max_position_embeddings": 256}
    lm = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=config_ends or made.eos_token_id))
    if ends is not None:
        lm.generation_config = GenerationConfig(eos_token_id=ends, do_sample=True, temperature=0.6)
    lm.save_pretrained(folder)
    made.save_pretrained(folder)
    if ends is None:
        (folder / "generation_config.json").unlink()
    return folder


def composed(folder, *more):
    return zoo.compose(*PARTS, f"llm.checkpoint={folder}", *more)


def says(model, ids):
    """Let a model write `ids`, whatever it is asked; a pass over several tokens begins anew."""
    at = 0

    def count(module, args, given):
        nonlocal at
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        at = 0 if tokens.shape[1] > 1 else at + 1

    def write(module, args, out):
        out = torch.zeros_like(out)
        out[..., ids[min(at, len(ids) - 1)]] = 9.0
        return out

    model.llm.lm.model.register_forward_pre_hook(count, with_kwargs=True)
    model.llm.lm.lm_head.register_forward_hook(write)
    return model


def script(made, text):
    return made(text, add_special_tokens=False)["input_ids"]


KINDS = {  # shape -> what the model writes, and how much of it comes before it stops
    "chatml on a base tokenizer": ("a red cat<|im_end|>", "\nuser\nwhere?"),
    "end not special": ("a red cat<|im_end|>", "\nuser"),
    "text ends": ("a red cat\n### end", "\n### user:\nwhere?"),
    "chatml in words": ("a red cat<|im_end|>", "\nuser"),
    "qwen 3": ("<think>\n\n</think>\n\na red cat<|im_end|>", " more"),
    "gemma": ("a red cat<end_of_turn>", " more"),
    "two ends": ("a red cat<|more|>", "<|user|>where?"),
}


@pytest.mark.parametrize("name", KINDS)
def test_chat_generate_and_evaluation_stop_at_the_end_saved_and_loaded_too(tmp_path, name):
    made = tokenizer(SHAPES[name])
    written, beyond = KINDS[name]
    ids, rest = script(made, written), script(made, written + beyond)
    model, processor = composed(llm_folder(tmp_path / "llm", made))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded, again = zoo.load(f"dir:{tmp_path / 'saved'}")
    config = model.generation_config
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.stop_strings) == (
        config.eos_token_id, config.stop_strings,
    )  # fmt: skip
    for one, its in ((model, processor), (loaded, again)):
        says(one, rest)
        streamed = []
        assert one.chat("what is it?", image=picture(), max_new_tokens=64, stream=streamed.append) == "a red cat"
        assert "".join(streamed).strip() == "a red cat"
        asked = sample(("what is it?", "x"), ("where is it?", "y"))
        questions = [Question(asked, d, "generate", 64) for d in asked.dialogs]
        assert [text for _, text in answer(one, its, questions, batch_size=2)] == ["a red cat"] * 2
        prompt = its(text="<image>\nwhat is it?", images=picture())
        out = one.generate(**prompt, max_new_tokens=64, do_sample=False)
        assert out.shape[1] - prompt["input_ids"].shape[1] == len(ids)
    # Without a processor beside it, as the Auto classes load it.
    bare = says(ZooModel.from_pretrained(tmp_path / "saved"), rest)
    assert torch.equal(bare.generate(**prompt, max_new_tokens=64, do_sample=False), out)


def test_several_questions_that_share_an_image_stop_at_a_text_too(tmp_path, monkeypatch):
    made = tokenizer(SHAPES["text ends"])
    model, processor = composed(llm_folder(tmp_path / "llm", made))
    says(model, script(made, "a red cat\n### end\n### user:\nwhere?"))
    asked = sample(("what is it?", "x"), ("where is it?", "y"))
    lengths = []
    generate = type(model.llm.lm).generate
    monkeypatch.setattr(
        type(model.llm.lm), "generate", lambda *a, **k: lengths.append(generate(*a, **k)) or lengths[-1]
    )
    questions = [Question(asked, d, "generate", 64) for d in asked.dialogs]
    assert [text for _, text in answer(model, processor, questions, batch_size=2)] == ["a red cat"] * 2
    assert all(out.shape[1] < 64 for out in lengths)


# ---- what a checkpoint states ------------------------------------------------------------------------------------


def ends_of(model):
    found = model.generation_config.eos_token_id
    assert model.llm.lm.generation_config.eos_token_id == found == model.config.eos_token_id
    return set(found) if isinstance(found, list) else {found}


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_ends_that_a_language_model_states_are_kept_on_every_road(tmp_path, where):
    made = tokenizer(SHAPES["llama 3"])
    eos, eot, head = made.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>", "<|head|>"])
    folder = llm_folder(
        tmp_path / "llm", made, **{"ends" if where == "generation_config" else "config_ends": [eos, head]}
    )
    model, processor = composed(folder)
    assert ends_of(model) == {eos, eot, head}
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded, _ = zoo.load(f"dir:{tmp_path / 'saved'}")
    assert ends_of(loaded) == {eos, eot, head}
    assert (
        ZooModel.from_pretrained(tmp_path / "saved").generation_config.eos_token_id
        == model.generation_config.eos_token_id
    )
    if where == "generation_config":
        assert (loaded.generation_config.do_sample, loaded.generation_config.temperature) == (True, 0.6)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [eos, head, eot]


def test_ends_that_mean_the_same_in_another_folder_are_kept(tmp_path):
    """A run keeps its tokenizer in its own folder and goes on from there."""
    made = tokenizer(SHAPES["llama 3"])
    eos, head = made.convert_tokens_to_ids(["<|end_of_text|>", "<|head|>"])
    made.save_pretrained(tmp_path / "run")
    folder = llm_folder(tmp_path / "llm", made, ends=[eos, head])
    model, _ = composed(folder, f"tokenizer.checkpoint={tmp_path / 'run'}")
    assert ends_of(model) == {eos, head, made.convert_tokens_to_ids("<|eot_id|>")}


def test_ends_of_another_tokenizer_are_not_taken_over(tmp_path):
    other = tokenizer(SHAPES["chatml on a base tokenizer"])
    other.save_pretrained(tmp_path / "tokenizer")
    made = tokenizer(SHAPES["llama 3"])
    folder = llm_folder(tmp_path / "llm", made, ends=[7, 9])
    model, processor = composed(folder, f"tokenizer.checkpoint={tmp_path / 'tokenizer'}")
    assert ends_of(model) == set(other.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


@pytest.mark.parametrize("where", ["generation_config", "text_config"])
def test_ends_that_a_published_model_states_are_kept_on_every_road(tmp_path, where):
    from transformers import LlavaForConditionalGeneration

    folder = tmp_path / "llava"
    build.llava(folder)
    config = json.loads((folder / "config.json").read_text())
    if where == "text_config":
        build.edit_json(folder, "config.json", text_config={**config["text_config"], "eos_token_id": [2, 5]})
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "pad_token_id": 0}))
    theirs = LlavaForConditionalGeneration.from_pretrained(folder).generation_config.eos_token_id
    model, processor = zoo.load(f"dir:{folder}")
    assert model.generation_config.eos_token_id == theirs == [2, 5]
    assert model.generation_config.stop_strings is None
    with torch.no_grad():
        model.projector.net[0].weight.add_(0.1)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded, its = zoo.load(f"dir:{tmp_path / 'saved'}")
    assert ends_of(loaded) == {2, 5}
    zoo.export(loaded, its, tmp_path / "exported")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert back.generation_config.eos_token_id == [2, 5]
    assert ends_of(zoo.load(f"dir:{tmp_path / 'exported'}")[0]) == {2, 5}


def test_a_generation_config_that_is_none_is_refused(tmp_path):
    folder = tmp_path / "llava"
    build.llava(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(zoo.ZooError, match=r"generation_config.json cannot be read"):
        zoo.load(f"dir:{folder}")


# ---- reading answers ---------------------------------------------------------------------------------------------


def test_a_stream_holds_back_what_may_become_an_end():
    processor_tokenizer = tokenizer(SHAPES["text ends"])
    from zoo.text.chat_template import ChatTemplate

    reader = AnswerReader(processor_tokenizer, ChatTemplate(processor_tokenizer))
    assert reader.visible("a cat\n", final=False) == "a cat\n"
    assert reader.visible("a cat\n## #", final=False) == "a cat\n## "
    assert reader.visible("a cat\n### en", final=False) == "a cat\n"
    assert reader.visible("a cat\n### en", final=True) == "a cat\n### en"
    assert reader.visible("a cat\n### end of", final=False) == "a cat\n"


def test_an_end_that_is_a_word_is_read_off_the_answer_and_no_further(tmp_path):
    made = tokenizer(SHAPES["qwen 2.5"])
    (mat,) = script(made, " mat")
    model, _ = composed(llm_folder(tmp_path / "llm", made, ends=[mat]))
    says(model, script(made, "a (mat): mat more"))
    streamed = []
    assert model.chat("what is it?", max_new_tokens=64, stream=streamed.append) == "a (mat):" == "".join(streamed)


def test_what_a_template_puts_before_an_answer_is_no_part_of_it():
    from zoo.text.chat_template import ChatTemplate

    made = tokenizer(SHAPES["qwen 3"])
    reader = AnswerReader(made, ChatTemplate(made))
    assert reader.visible("<think>\n", final=False) == ""
    assert reader.visible("<think>\n\n</think>\n\nred").strip() == "red"
    assert reader.visible("<think>\nhm\n</think>\n\nred") == "<think>\nhm\n</think>\n\nred"  # a thought is
    assert reader.read(script(made, "red<|im_end|> more")) == "red"


def test_options_of_sampling_without_do_sample_are_saved_as_stated(tmp_path):
    """As Vicuna's, beside which the model gets end tokens: transformers refuses to save the two together."""
    folder = tmp_path / "llava"
    build.llava(folder)
    stated = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "max_length": 4096}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    model, processor = zoo.load(f"dir:{folder}", device="cpu")
    assert model.generation_config.pad_token_id is not None
    model.save_pretrained(tmp_path / "saved")
    zoo.export(model, processor, tmp_path / "exported")
    for name in ("saved", "exported"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text()).items() >= stated.items()
    assert ZooModel.from_pretrained(tmp_path / "saved").generation_config.temperature == 0.9
    model.generation_config.max_new_tokens = -1
    for write in (model.save_pretrained, lambda to: zoo.export(model, processor, to)):
        with pytest.raises(ZooError, match=r"cannot be saved.*max_new_tokens"):
            write(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_saved_model_keeps_the_text_of_its_template(tmp_path):
    """The one of that name may be another today."""
    model, processor = zoo.compose(*PARTS, "tokenizer.chat_template=vicuna", "device=cpu", texts=["is it red? yes"])
    processor.tokenizer.chat_template = before = processor.tokenizer.chat_template.removeprefix("{{ bos_token }}")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = zoo.load(f"dir:{tmp_path}", device="cpu")[1]
    assert again.tokenizer.chat_template == before != CHAT_TEMPLATES["vicuna"][0]
