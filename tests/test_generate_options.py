"""Every option of transformers' `generate`: what a composed model makes of it is what LLaVA's own class makes of it."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    cache_utils,
)
from transformers.generation import MaxLengthCriteria, MinNewTokensLengthLogitsProcessor, TextStreamer, utils

import zoo
from tests import published_builders as build
from tests.published_builders import CASES, photo, said
from zoo.composed.generate_options import REFUSED, SUPPORTED, fields
from zoo.registry import ZooError
from zoo.registry.versions import cache_of

NEW = {"max_new_tokens": 6}
GREEDY = {**NEW, "do_sample": False, "repetition_penalty": 1.3}
SAMPLE = {**NEW, "do_sample": True, "temperature": 1.5}
BEAMS = {**GREEDY, "num_beams": 3}


class Later:
    """Stands among options, which are written down before there is one, for a tokenizer or a model that drafts."""


TOKENIZER, ASSISTANT, LENGTH = Later(), Later(), 1000  # a length above LENGTH: of the prompt, and so many more
# Field -> options that make it tell.
EXAMPLES = {
    "max_length": {"max_length": LENGTH + 5, "do_sample": False},
    "max_new_tokens": NEW,
    "min_length": {"max_length": LENGTH + 6, "min_length": LENGTH + 5, "eos_token_id": 7, "sequence_bias": {(7,): 9.0}},
    "min_new_tokens": {**NEW, "min_new_tokens": 4, "eos_token_id": 7, "sequence_bias": {(7,): 9.0}},
    "max_time": {**GREEDY, "max_time": 1e-9},
    "stop_strings": {**GREEDY, "stop_strings": ["c", "H"], "tokenizer": TOKENIZER},
    "early_stopping": {**BEAMS, "early_stopping": "never"},
    "do_sample": SAMPLE,
    "num_beams": BEAMS,
    "num_return_sequences": {**BEAMS, "num_return_sequences": 2},
    "temperature": {**SAMPLE, "temperature": 0.3},
    "top_k": {**SAMPLE, "top_k": 3},
    "top_p": {**SAMPLE, "top_p": 0.5},
    "top_h": {**SAMPLE, "top_h": 0.4},
    "min_p": {**SAMPLE, "min_p": 0.2},
    "typical_p": {**SAMPLE, "typical_p": 0.5},
    "epsilon_cutoff": {**SAMPLE, "epsilon_cutoff": 0.02},
    "eta_cutoff": {**SAMPLE, "eta_cutoff": 0.02},
    "repetition_penalty": {**NEW, "do_sample": False, "repetition_penalty": 2.0},
    "encoder_repetition_penalty": {**GREEDY, "encoder_repetition_penalty": 2.0},
    "length_penalty": {**BEAMS, "length_penalty": -2.0, "eos_token_id": 7, "sequence_bias": {(7,): 2.0}},
    "no_repeat_ngram_size": {**NEW, "do_sample": False, "no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {**GREEDY, "encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {**GREEDY, "bad_words_ids": [[43], [43, 156]]},
    "renormalize_logits": {**BEAMS, "renormalize_logits": True, "num_return_sequences": 3},
    "forced_bos_token_id": {**GREEDY, "forced_bos_token_id": 7},
    "forced_eos_token_id": {**GREEDY, "forced_eos_token_id": 9},
    "remove_invalid_values": {**GREEDY, "remove_invalid_values": True},
    "exponential_decay_length_penalty": {**GREEDY, "exponential_decay_length_penalty": (1, 3.0)},
    "suppress_tokens": {**GREEDY, "suppress_tokens": [43, 156]},
    "begin_suppress_tokens": {**GREEDY, "begin_suppress_tokens": [43]},
    "sequence_bias": {**GREEDY, "sequence_bias": {(55,): 9.0}},
    "guidance_scale": {**GREEDY, "guidance_scale": 2.0},
    "watermarking_config": {**GREEDY, "watermarking_config": WatermarkingConfig(bias=5.0)},
    "use_cache": {**GREEDY, "use_cache": False},
    "cache_implementation": {**GREEDY, "cache_implementation": "static"},
    "cache_config": {**GREEDY, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "max_cache_len": {**GREEDY, "cache_implementation": "static", "max_cache_len": LENGTH + 30},
    "prefill_chunk_size": {**GREEDY, "prefill_chunk_size": 7},
    "compile_config": {**GREEDY, "compile_config": CompileConfig()},
    "disable_compile": {**GREEDY, "cache_implementation": "static", "disable_compile": True},
    "output_attentions": {**GREEDY, "output_attentions": True},
    "output_hidden_states": {**GREEDY, "output_hidden_states": True, "return_dict_in_generate": True},
    "output_scores": {**BEAMS, "output_scores": True, "return_dict_in_generate": True},
    "output_logits": {**GREEDY, "output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {**GREEDY, "return_dict_in_generate": True},
    "pad_token_id": {**GREEDY, "pad_token_id": 3, "eos_token_id": 156},
    "bos_token_id": {**GREEDY, "bos_token_id": 5},
    "eos_token_id": {**GREEDY, "eos_token_id": [156, 166, 43]},
    "num_assistant_tokens": {**GREEDY, "assistant_model": ASSISTANT, "num_assistant_tokens": 2},
    "num_assistant_tokens_schedule": {
        **GREEDY, "assistant_model": ASSISTANT, "num_assistant_tokens_schedule": "heuristic_transient",
    },
    "assistant_confidence_threshold": {**GREEDY, "assistant_model": ASSISTANT, "assistant_confidence_threshold": 0.9},
    "assistant_ensemble_weight": {**GREEDY, "assistant_model": ASSISTANT, "assistant_ensemble_weight": 0.1},
}  # fmt: skip
# What transformers' LLaVA cannot do, or does in a way of its own: see test_generate_drafts.
DRAFTS = {"prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "is_assistant", "use_mtp"}
DRAFTS |= {"speculation_type", "assistant_lookbehind", "target_lookbehind", "token_healing"}
ALONE = {"assistant_model"}  # what takes one row at a time
# Older versions spread the images of a row over the beams of others, and leave them out of chunks.
KNOWS_BEAMS = hasattr(utils, "_slice_mm_encoder_output")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Transformers' model, ours from its folder, and what they are asked: one row, and several that are unlike."""
    folder = tmp_path_factory.mktemp("llava")
    reference, theirs = build.llava(folder)
    ours, mine = zoo.load(f"dir:{folder}")
    asked = {}
    for case in ("one image", "unlike samples"):
        texts = [theirs.apply_chat_template(said(n, q), add_generation_prompt=True) for n, q in CASES[case]]
        images = [photo(30 + 9 * i, 50, seed=i) for i in range(sum(n for n, _ in CASES[case]))]
        for processor in (theirs, mine):
            processor.tokenizer.padding_side = "left"
        asked[case] = (
            dict(theirs(images=images, text=texts, padding=True, return_tensors="pt")),
            mine(images=images, text=texts),
        )
    return reference, ours, asked, theirs.tokenizer


def made(options, length, ours, tokenizer):
    """Options with lengths counted from the prompt, the tokenizer, and a language model that drafts."""
    given = {TOKENIZER: tokenizer, ASSISTANT: copy.deepcopy(ours.llm.lm) if ASSISTANT in options.values() else None}
    there = {k: v - LENGTH + length if type(v) is int and v >= LENGTH else v for k, v in options.items()}
    return {k: given[v] if isinstance(v, Later) else v for k, v in there.items()}


def run(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, **options)


def same(a, b):
    """Whether two answers are equal: ids, or an output with all it holds."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "keys"):
        kept = [k for k in a if k not in ("cache", "past_key_values")]
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in kept)
    return a == b


def test_every_field_of_the_installed_config_is_taken_or_refused():
    assert not SUPPORTED & set(REFUSED)
    assert sorted(fields() - SUPPORTED - set(REFUSED)) == []


def test_every_field_that_is_taken_has_an_example():
    assert sorted(SUPPORTED - set(EXAMPLES) - DRAFTS) == []
    assert sorted((set(EXAMPLES) | DRAFTS) - SUPPORTED) == []


def test_the_page_names_what_is_refused():
    page = (Path(__file__).resolve().parents[1] / "docs" / "generate.md").read_text()
    assert [name for name in REFUSED if f"`{name}`" not in page] == []


@pytest.mark.parametrize("field", list(EXAMPLES))
def test_an_option_does_what_it_does_in_transformers(llava, field):
    reference, ours, asked, tokenizer = llava
    if field not in fields():
        pytest.skip(f"this transformers has no {field}")
    if field == "cache_config" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("a cache of this transformers is quantised by packages that are not here")
    options = EXAMPLES[field]
    attentions = field == "output_attentions"
    for case, (theirs, mine) in asked.items():
        if "unlike" in case and (ALONE & options.keys() or ("num_beams" in options and not KNOWS_BEAMS)):
            continue
        if attentions:
            options = {**options, "return_dict_in_generate": True}
            reference.set_attn_implementation("eager")
            ours.set_attention("eager")
        given = made(options, mine["input_ids"].shape[1], ours, tokenizer)
        try:
            alone = field == "prefill_chunk_size" and not KNOWS_BEAMS
            expected = run(ours, mine, **GREEDY) if alone else run(reference, theirs, **given)
            assert same(run(ours, mine, **given), expected)
            config = GenerationConfig(**{k: v for k, v in given.items() if k in fields()})
            rest = {k: v for k, v in given.items() if k not in fields()}
            assert same(run(ours, mine, generation_config=config, **rest), expected)
        finally:
            if attentions:
                reference.set_attn_implementation("sdpa")
                ours.set_attention("auto")
    if attentions:
        assert len(expected.attentions[0]) == 3 and expected.attentions[0][0].ndim == 4


def test_examples_change_the_answer(llava):
    _, ours, asked, tokenizer = llava
    _, mine = asked["one image"]
    length = mine["input_ids"].shape[1]
    moved = [
        field
        for field in ("suppress_tokens", "sequence_bias", "guidance_scale", "watermarking_config", "stop_strings",
                      "eos_token_id", "exponential_decay_length_penalty", "begin_suppress_tokens",
                      "forced_eos_token_id")
        if same(run(ours, mine, **made(EXAMPLES[field], length, ours, tokenizer)), run(ours, mine, **GREEDY))
    ]  # fmt: skip
    assert moved == []


@pytest.mark.parametrize(
    "name",
    ["default", "synthid", "beam_samples", "negative_prompt", "prefix_allowed_tokens_fn", "logits_processor",
     "stopping_criteria", "custom_generate", "drafts_sampled"],
)  # fmt: skip
def test_an_argument_does_what_it_does_in_transformers(llava, name):
    reference, ours, asked, _ = llava
    length = asked["one image"][1]["input_ids"].shape[1]

    def own_loop(model, input_ids, marks=1, **kwargs):
        return input_ids[:, :marks] if marks > 1 else type(model)._sample(model, input_ids, **kwargs)

    arguments = {
        "default": {},
        "synthid": {**SAMPLE, "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 4], ngram_len=3)},
        "beam_samples": {**SAMPLE, "num_beams": 2},
        "negative_prompt": {**GREEDY, "guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[5, 6, 7]])},
        "prefix_allowed_tokens_fn": {**BEAMS, "prefix_allowed_tokens_fn": lambda i, ids: [10, 11, 12 + len(ids) % 3]},
        "logits_processor": {
            **GREEDY, "eos_token_id": 43,
            "logits_processor": LogitsProcessorList([MinNewTokensLengthLogitsProcessor(length, 4, torch.tensor([43]))]),
        },
        "stopping_criteria": {**GREEDY, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length + 2)])},
        "custom_generate": {**GREEDY, "custom_generate": own_loop},
        "drafts_sampled": {**SAMPLE, "assistant_model": copy.deepcopy(ours.llm.lm)},
    }[name]  # fmt: skip
    theirs, mine = asked["one image"]
    assert same(run(ours, mine, **arguments), run(reference, theirs, **arguments))
    if name == "custom_generate":
        assert run(ours, mine, **arguments, marks=3).shape == (1, 3)


def test_a_streamer_gets_what_is_generated(llava, capsys):
    reference, ours, asked, tokenizer = llava
    theirs, mine = asked["one image"]
    said_by = []
    for model, inputs in ((reference, theirs), (ours, mine)):
        run(model, inputs, **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True))
        said_by.append(capsys.readouterr().out)
    assert said_by[0] == said_by[1] and said_by[0].strip()


def test_defaults_are_the_models(llava):
    reference, ours, asked, _ = llava
    theirs, mine = asked["unlike samples"]
    before = ours.generation_config
    assert before is ours.llm.lm.generation_config
    ours.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, suppress_tokens=[43])
    try:
        expected = reference.generate(**theirs, max_new_tokens=3, do_sample=False, suppress_tokens=[43])
        assert torch.equal(ours.generate(**mine), expected)
    finally:
        ours.generation_config = before


@pytest.mark.parametrize("whole", [True, False], ids=["whole_ids", "new_ids"])
def test_a_given_cache_goes_on_with_further_images(llava, whole):
    reference, ours, asked, _ = llava
    theirs, mine = asked["one image"]
    ids, rows = mine["input_ids"], []
    plain = {**NEW, "do_sample": False}  # penalties see the given ids alone, wherever the cache began
    for model, pixels in ((reference, theirs["pixel_values"]), (ours, mine["pixel_values"])):
        first = model.generate(input_ids=ids, pixel_values=pixels, **plain, return_dict_in_generate=True)
        cache = cache_of(first)
        so_far = torch.cat([first.sequences, ids[:, 2:]], 1)
        new = so_far if whole else so_far[:, cache.get_seq_length() :]
        given = {"attention_mask": torch.ones_like(so_far), "pixel_values": pixels.flip(-1), "past_key_values": cache}
        rows.append(model.generate(input_ids=new, **given, **plain)[:, new.shape[1] :])
    assert torch.equal(*rows)
    both = ours.generate(input_ids=so_far, pixel_values=torch.cat([pixels, pixels.flip(-1)]), **plain)
    assert torch.equal(both[:, so_far.shape[1] :], rows[1])


def test_unknown_words_are_refused_with_the_nearest(llava):
    _, ours, asked, _ = llava
    _, mine = asked["one image"]
    for given, near in {"max_new_token": "max_new_tokens", "attention_maks": "", "temprature": "temperature"}.items():
        with pytest.raises(ZooError, match=f"no option named '{given}'" + (f".*Did you mean '{near}'" if near else "")):
            ours.generate(**mine, **{given: 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6.*contrastive search"),
        ({"dola_layers": "low"}, "dola_layers='low'.*downloads"),
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups=2.*groups of beams"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "force_words_ids.*prefix_allowed_tokens_fn"),
        ({"cache_implementation": "paged"}, "'paged'.*text only"),
        ({"decoder_start_token_id": 1}, "decoder_start_token_id=1"),
        ({"custom_generate": "someone/repository"}, "no downloaded code"),
        ({"trust_remote_code": True}, "no downloaded code"),
        ({"max_new_tokens": 0}, "generate: .*max_new_tokens"),
        ({"cache_implementation": "sttic"}, "generate: .*cache_implementation"),
        ({"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}}, "generate: .*hqq"),
        ({"token_healing": True}, "an image has none"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, "no inputs_embeds"),
        ({"prompt_lookup_num_tokens": 3, "use_cache": False}, "use_cache"),
        ({"prompt_lookup_num_tokens": 3, "num_return_sequences": 2, "do_sample": True},
         "num_return_sequences has to be 1"),
    ],
)  # fmt: skip
def test_what_is_not_possible_is_refused_by_name(llava, options, words):
    _, ours, asked, _ = llava
    with pytest.raises(ZooError, match=f"(?s){words}"):
        ours.generate(**asked["one image"][1], **options)
