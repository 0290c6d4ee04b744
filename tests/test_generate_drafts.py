"""Drafts, chunks, caches and beams of `generate`, with images, pruners and adapters: the tokens of plain decoding."""

import copy
import threading

import pytest
import torch
from transformers import StoppingCriteriaList, cache_utils

import zoo
from tests import published_builders as build
from tests.conftest import QUESTIONS, picture, tiny_slots
from tests.fusion_builders import SMALL
from tests.published_builders import CASES, photo, said
from zoo.composed.generate_options import fields
from zoo.registry import ZooError

LONG = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
# What stands in the model -> words of zoo.load, or slots.
PARTS = {
    "plain": [],
    "fastervlm": ["pruner=[fastervlm]"],
    "fastv": ["pruner=[fastv]", "pruner.fastv.layer=1", "pruner.fastv.keep_ratio=0.4"],
    "aim": ["pruner=[aim]", "pruner.aim.start=0", "pruner.aim.stop=2"],
    "pyramiddrop_dense": ["pruner=[pyramiddrop]", "positions=dense"],
    "dart": ["pruner=[dart]", "pruner.dart.layer=1", "pruner.dart.keep_ratio=0.5"],
    "sparsevlm_dense": ["pruner=[sparsevlm]", "pruner.sparsevlm.recycle=true", "positions=dense"],
    "lora": ["adapter=[lora]"],
    "mole": ["adapter=[mole]"],
    "fastv_mole": ["pruner=[fastv]", "pruner.fastv.layer=1", "adapter=[mole]"],
    "vlora": {"projector": None, "adapter": {"vlora": {"name": "vlora", **SMALL["vlora"]}}},
    "moextend": {
        "llm": {**tiny_slots()["llm"], "model_type": "mixtral", "num_experts": 4, "top_k": 2},
        "adapter": {"moextend": {"name": "moextend", "guard": True}},
    },
}
# They shorten the prompt inside the LLM.
INSIDE = {"fastv", "aim", "fastv_mole", "pyramiddrop_dense", "dart", "sparsevlm_dense"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    build.llava(folder)
    return folder


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def built(folder, make_model, made):
    """Models by their parts, each with a batch of one row and one of several."""

    def build_(name):
        if name in made:
            return made[name]
        torch.manual_seed(0)
        if isinstance(PARTS[name], dict):
            model, processor = make_model(seed=3, **PARTS[name])
            texts = [[f"<image>{QUESTIONS[0]}"], [f"<image>{QUESTIONS[0]}", QUESTIONS[1]]]
            images = [picture(1)]
        else:
            model, processor = zoo.load(f"dir:{folder}", *PARTS[name])
            cases = [
                processor.apply_chat_template(said(n, q), add_generation_prompt=True) for n, q in CASES["one image"]
            ]
            blind = processor.apply_chat_template(said(0, "what is it?"), add_generation_prompt=True)
            texts, images = [cases, [*cases, blind]], [photo(39, 50)]
        processor.tokenizer.padding_side = "left"
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(torch.randn_like(p) * 0.3) if model.part_of(n).startswith("adapter") else None
                p.mul_(2.0) if isinstance(PARTS[name], dict) and "llm" in n and p.ndim > 1 else None
        made[name] = model.eval(), [processor(images=images, text=some) for some in texts]
        return made[name]

    return build_


def said_by(model, inputs, **options):
    return model.generate(**inputs, **{**LONG, **options})


WAYS = {
    "lookup": {"prompt_lookup_num_tokens": 4},
    "longer_lookup": {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
    "language_model": {"assistant_model": "llm"},
    "another_composed_model": {"assistant_model": "other"},
    "itself": {"assistant_model": "self"},
    "early_exit": {"assistant_early_exit": 1},
}


# Every way with what looks at the prompt, two with the rest.
MANY = {"plain", "fastv", "aim", "vlora"}
PAIRS = [(name, way) for name in PARTS for way in WAYS if name in MANY or way in ("lookup", "early_exit")]


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_drafts_change_no_token(built, name, way):
    model, (one, _) = built(name)
    drafts = {"llm": lambda: copy.deepcopy(model).llm.lm, "other": lambda: copy.deepcopy(model), "self": lambda: model}
    options = {k: drafts[v]() if k == "assistant_model" else v for k, v in WAYS[way].items()}
    for penalty in (
        (1.0, 1.3) if "lookup" in way else (1.3,)
    ):  # without one it soon repeats itself, and lookups are right
        expected = said_by(model, one, repetition_penalty=penalty)
        assert torch.equal(said_by(model, one, repetition_penalty=penalty, **options), expected)
    assert torch.equal(said_by(model, one, repetition_penalty=penalty), expected)  # and nothing is left of it


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True}]
)
@pytest.mark.parametrize("name", list(PARTS))
def test_a_cache_changes_no_token(built, name, how):
    model, (_, several) = built(name)
    found = []
    for use in (True, False):
        torch.manual_seed(0)
        found.append(said_by(model, several, use_cache=use, **how))
    assert torch.equal(*found)


def test_the_kind_of_cache_that_gemma_states_is_a_growing_one(built, monkeypatch):
    model, (one, _) = built("fastv")
    expected = said_by(model, one)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "hybrid")
    assert torch.equal(said_by(model, one), expected)


@pytest.mark.parametrize(
    "how", [{"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"prefill_chunk_size": 5, "num_beams": 2}]
)
@pytest.mark.parametrize("name", list(PARTS))
def test_static_caches_and_chunks_change_no_token_or_are_refused(built, name, how):
    model, (_, several) = built(name)
    if name in INSIDE:
        with pytest.raises(ZooError, match=rf"{next(iter(how))}.* is not possible with pruner '\w+'"):
            said_by(model, several, **how)
        return
    beams = {k: v for k, v in how.items() if k == "num_beams"}
    assert torch.equal(said_by(model, several, **how), said_by(model, several, **beams))


@pytest.mark.parametrize("name", sorted(INSIDE))
def test_what_layers_of_unlike_length_cannot_do_is_refused(built, name):
    model, (one, _) = built(name)
    for options in (
        {"prompt_lookup_num_tokens": 3, "output_hidden_states": True, "return_dict_in_generate": True},
        {"use_mtp": True},
        {"speculation_type": "dflash"},
        {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    ):
        if set(options) - fields() or ("cache_config" in options and not hasattr(cache_utils, "Fp8QuantizedLayer")):
            continue
        with pytest.raises(ZooError, match=r"is not possible with"):
            said_by(model, one, **options)
    out = said_by(model, one, output_hidden_states=True, return_dict_in_generate=True)
    assert len({h.shape[1] for h in out.hidden_states[0]}) > 1
    words = {k: v for k, v in one.items() if k in ("input_ids", "attention_mask")}
    words = {k: v[:, -4:] for k, v in words.items()}
    assert torch.equal(said_by(model, words, cache_implementation="static"), said_by(model, words))


@pytest.mark.parametrize("name", ["vlora", "moextend"])
def test_guidance_is_refused_beside_an_adapter_that_reads_the_image(built, name):
    model, (one, _) = built(name)
    with pytest.raises(ZooError, match=f"guidance_scale.*beside adapter '{name}'"):
        said_by(model, one, guidance_scale=2.0)


def test_a_model_that_cannot_see_the_images_is_refused_as_an_assistant(built):
    model, (one, _) = built("plain")
    with pytest.raises(ZooError, match=r"encoders take other pixels.*other\.llm\.lm"):
        said_by(model, one, assistant_model=built("moextend")[0])
    with pytest.raises(ZooError, match="makes 4 tokens of the images, and the prompt has 16"):
        said_by(model, one, assistant_model=built("fastervlm")[0])
    with pytest.raises(ZooError, match="encoded= is of one encoder"):
        encoded = model.encode_images(one["pixel_values"])
        rest = {k: v for k, v in one.items() if k != "pixel_values"}
        said_by(model, rest, encoded=encoded, assistant_model=copy.deepcopy(model))


def test_a_composed_model_drafts_for_models_of_transformers(built, folder):
    from transformers import LlavaForConditionalGeneration

    model, (one, _) = built("plain")
    llava = LlavaForConditionalGeneration.from_pretrained(folder)
    for other, inputs in ((llava, one), (copy.deepcopy(model.llm.lm), {"input_ids": one["input_ids"][:, -6:]})):
        assert torch.equal(other.generate(**inputs, **LONG, assistant_model=model), other.generate(**inputs, **LONG))


def test_a_language_model_that_peft_has_wrapped_sees_the_images(built):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model, (one, _) = built("plain")
    wrapped = copy.deepcopy(model)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    wrapped.llm.lm = get_peft_model(wrapped.llm.lm, lora)
    assert torch.equal(said_by(wrapped, one), said_by(model, one))
    assert torch.equal(said_by(wrapped, one, prompt_lookup_num_tokens=3), said_by(model, one))
    assert torch.equal(said_by(get_peft_model(copy.deepcopy(model), lora), one), said_by(model, one))
    tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped.llm.lm = get_peft_model(copy.deepcopy(model.llm.lm), tuned)
    with pytest.raises(ZooError, match="virtual tokens of PEFT's PromptTuningConfig"):
        said_by(wrapped, one)


def test_a_model_with_another_tokenizer_drafts(built, folder):
    from transformers import LlamaForCausalLM

    model, (one, _) = built("plain")
    other = build.tokenizer(extra=("<a>", "<b>"))
    torch.manual_seed(1)
    drafts = LlamaForCausalLM(build.text_config("llama", other)).eval()
    tokenizers = {"tokenizer": model.processor.tokenizer, "assistant_tokenizer": other}
    for how in ({}, {"assistant_lookbehind": 3, "target_lookbehind": 3}):
        drafts.generation_config.update(**how)
        assert torch.equal(said_by(model, one, assistant_model=drafts, **tokenizers), said_by(model, one))
    with pytest.raises(ZooError, match=r"generate: .*different tokenizers"):
        said_by(model, one, assistant_model=drafts)


def test_words_alone_are_healed_as_in_transformers(built, folder):
    from transformers import LlavaForConditionalGeneration

    model, _ = built("plain")
    ids = model.processor.tokenizer("what color is the squ", return_tensors="pt").input_ids
    options = {"token_healing": True, "tokenizer": model.processor.tokenizer, "input_ids": ids}
    expected = LlavaForConditionalGeneration.from_pretrained(folder).generate(**options, **LONG)
    assert torch.equal(model.generate(**options, **LONG), expected)


@pytest.mark.skipif("speculation_type" not in fields(), reason="this transformers has no DFlash")
def test_a_dflash_model_drafts(built):
    from transformers import AutoModel, MuseGlimmerAssistantConfig

    model, (one, _) = built("plain")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 12, "block_size": 4, "mask_token_id": 3, "sliding_window": 512}
    torch.manual_seed(0)
    config = MuseGlimmerAssistantConfig(
        **sizes, target_layer_ids=[0, 2], pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    drafts = AutoModel.from_config(config).eval()
    assert torch.equal(said_by(model, one, assistant_model=drafts, speculation_type="dflash"), said_by(model, one))


@pytest.mark.skipif("use_mtp" not in fields(), reason="this transformers has no multi-token prediction")
def test_layers_of_multi_token_prediction_draft(make_model, tmp_path, monkeypatch):
    import json

    from safetensors.torch import load_file, save_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    model, processor = make_model()
    sizes = {"vocab_size": len(processor.tokenizer), "hidden_size": 48, "num_hidden_layers": 3, "head_dim": 12}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 16}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_mtp_layers": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **special)).save_pretrained(tmp_path)  # its third layer becomes the other
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {f"model.layers.2.{n}.weight": torch.ones(48) for n in ("enorm", "hnorm", "shared_head.norm")}
    save_file(weights | {"model.layers.2.eh_proj.weight": torch.randn(48, 96) * 0.1}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    monkeypatch.setattr(Glm4MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    model, processor = make_model(llm={"name": "hf", "checkpoint": str(tmp_path)})
    one = processor(images=[picture(1)], text=[f"<image>{QUESTIONS[0]}"])
    assert torch.equal(said_by(model, one, use_mtp=True), said_by(model, one))
    with pytest.raises(ZooError, match=r"generate: .*num_mtp_layers"):
        plain = make_model()[0]
        said_by(plain, one, use_mtp=True)


def test_threads_do_not_meet_in_a_pruned_model(folder, built):
    model, _ = built("fastv")
    processor = model.processor
    text = processor.apply_chat_template(said(1, "is it red?"), add_generation_prompt=True)
    asked = [processor(images=[photo(40, 40, seed=i)], text=[text]) for i in range(6)]
    alone = [said_by(model, one) for one in asked]
    assert len({tuple(a[0].tolist()) for a in alone}) > 1
    answers: list = [None] * len(asked)

    def ask(i):
        answers[i] = said_by(model, asked[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(answers, alone, strict=True))


def test_nothing_is_left_on_the_language_model(built):
    model, (one, _) = built("fastv")
    lm = model.llm.lm
    before = type(lm), set(lm.__dict__), lm.config.num_hidden_layers

    def stop(ids, scores, **kwargs):
        raise KeyError("no more")

    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}):
        said_by(model, one, **options)
    with pytest.raises(KeyError):
        said_by(model, one, assistant_early_exit=1, stopping_criteria=StoppingCriteriaList([stop]))
    assert (type(lm), set(lm.__dict__), lm.config.num_hidden_layers) == before
