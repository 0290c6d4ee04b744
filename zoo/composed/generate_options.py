"""Options of transformers' `generate` that a composed model takes, and those that it refuses, with reasons.

Every field of the installed `GenerationConfig` is in one of the two tables. A field of a newer transformers is refused
until it was tried; a test lists the missing ones.
"""

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from zoo.registry import ZooError, nearest

# Taken as transformers' own models take them.
SUPPORTED = frozenset(
    {
        # how long
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "early_stopping",
        # how tokens are chosen
        "do_sample", "num_beams", "num_return_sequences", "temperature", "top_k", "top_p", "top_h", "min_p",
        "typical_p", "epsilon_cutoff", "eta_cutoff",
        # what changes their scores
        "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "sequence_bias", "guidance_scale", "watermarking_config", "token_healing",
        # the cache and the passes
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
        "disable_compile",
        # what comes back
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        # special tokens
        "pad_token_id", "bos_token_id", "eos_token_id",
        # drafts
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "use_mtp", "speculation_type",
    }
)  # fmt: skip

_ELSEWHERE = "transformers moved it into code that it downloads, and no downloaded code is run here"
# Field -> why it is refused, and which of its values are refused: others mean that it is off.
REFUSED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "penalty_alpha": (f"contrastive search: {_ELSEWHERE}; sample, or use beams", lambda v: v > 0),
    "low_memory": (f"it is of contrastive search: {_ELSEWHERE}", bool),
    "dola_layers": (f"DoLa: {_ELSEWHERE}", lambda v: True),
    "num_beam_groups": (f"groups of beams: {_ELSEWHERE}; use num_beams", lambda v: v > 1),
    "diversity_penalty": (f"it is of groups of beams: {_ELSEWHERE}", lambda v: v > 0),
    "constraints": (f"constrained beams: {_ELSEWHERE}; see prefix_allowed_tokens_fn and sequence_bias", bool),
    "force_words_ids": (f"constrained beams: {_ELSEWHERE}; see prefix_allowed_tokens_fn and sequence_bias", bool),
    "decoder_start_token_id": ("it is for models with an encoder of text", lambda v: True),
    "continuous_batching_config": ("continuous batching takes prompts of text only", bool),
}
_NO_FIELDS = frozenset({"transformers_version"})  # beside attributes with an underscore

# Arguments of `generate` that transformers takes out of its keywords.
_TAKEN_OUT = frozenset({"tokenizer", "assistant_tokenizer", "trust_remote_code"})
_OURS = frozenset({"images_per_row", "cuts", "encoded", "pixel_values", "past_key_values", "cache"})
_DRAFTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def fields() -> set[str]:
    """Name the fields of the installed `GenerationConfig`."""
    from transformers import GenerationConfig

    return {n for n in vars(GenerationConfig()) if not n.startswith("_")} - _NO_FIELDS


def options_of(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Join the options of a call: the fields of its `generation_config` that are set, and its keywords."""
    named = {} if config is None else {n: v for n, v in vars(config).items() if not n.startswith("_")}
    return {n: v for n, v in (named | dict(given)).items() if v is not None and n not in _NO_FIELDS}


def shorten(config: Any, given: dict[str, Any], columns: int, own: Any = None) -> Any:
    """Take `columns` of the prompt off the lengths that include it, in keywords and a `generation_config`.

    Args:
        config: the `generation_config` of the call.
        given: its keywords, which are changed.
        columns: that the language model does not get.
        own: the model's generation config, whose lengths hold where the call states none.

    Returns:
        The `generation_config` of the call, or a copy of it with other lengths.
    """
    stated = options_of(own, {}) | options_of(config, given)
    lengths = {n: max(0, stated[n] - columns) for n in ("max_length", "min_length") if isinstance(stated.get(n), int)}
    if "max_new_tokens" in stated:  # it has precedence
        lengths.pop("max_length", None)
    if config is None:
        given |= lengths
        return None
    config = copy(config)
    for name, length in lengths.items():
        if name in given:
            given[name] = length
        else:
            setattr(config, name, length)
    return config


def check_names(lm: Any, given: Mapping[str, Any], drafts: bool = False) -> None:
    """Refuse unknown keywords, with the nearest known name.

    Args:
        lm: the language model that generates.
        given: keywords of a call.
        drafts: the call is transformers' own, to the draft model of another.
    """
    from transformers import GenerationMixin

    known = fields() | _TAKEN_OUT | _OURS
    for call in (GenerationMixin.generate, lm.forward, given.get("custom_generate")):
        known |= set(inspect.signature(call).parameters) if callable(call) else set()
    known |= {"mm_encoder_outputs"} if drafts else set()
    known -= {"self", "kwargs", "args", "model_kwargs"}
    for name in given:
        if name not in known:
            near = nearest(name, known)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ZooError(f"generate has no option named {name!r}.{hint}")


def check_rows(input_ids: Tensor, mask: Tensor | None) -> None:
    """Refuse ids that are not (B, T), and a mask that does not fit to them or pads on the right.

    Raises:
        ZooError: with the shapes.
    """
    if input_ids.dim() != 2:
        raise ZooError(f"generate takes input_ids (B, T), got {tuple(input_ids.shape)}; one prompt is input_ids[None].")
    if mask is None:
        return
    if mask.dim() != 2 or len(mask) != len(input_ids) or mask.shape[1] < input_ids.shape[1]:
        raise ZooError(
            f"generate takes an attention_mask (B, T) of the same rows and at least as many columns as input_ids "
            f"{tuple(input_ids.shape)}, got {tuple(mask.shape)}."
        )
    if not bool(mask[:, -1].all()):
        raise ZooError(
            "generate needs padding on the left: the last token of some row is padding. Set padding_side='left'."
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that no composed model supports.

    Args:
        options: of the call (`options_of`).
    """
    for name, value in options.items():
        if name in REFUSED and REFUSED[name][1](value):
            raise ZooError(f"generate({name}={value!r}) is not possible: {REFUSED[name][0]}.")
        if name in fields() - SUPPORTED - set(REFUSED):
            raise ZooError(f"generate({name}=...) is new in this transformers, and has not been tried here yet.")
    if isinstance(options.get("custom_generate"), str) or options.get("trust_remote_code"):
        raise ZooError("generate runs no downloaded code: give custom_generate a function.")
    kind = options.get("cache_implementation") or ""
    if kind == "paged":
        raise ZooError("generate(cache_implementation='paged') is not possible: it takes prompts of text only.")
    if "offloaded" in kind and not torch.accelerator.is_available():
        raise ZooError(f"generate(cache_implementation={kind!r}) is not possible: there is no device to offload from.")
    if options.get("use_cache") is False and (drafted := _drafting(options)):
        raise ZooError(
            f"generate(use_cache=False) is not possible with {drafted}: what drafts get wrong is cut off a cache."
        )


def check_parts(
    options: Mapping[str, Any], length: int, pruners: Mapping[str, Any], adapters: Mapping[str, Any]
) -> None:
    """Refuse options that parts inside the LLM do not support, for a prompt with images.

    Args:
        options: of the call (`options_of`).
        length: columns of the prompt.
        pruners: those that drop tokens inside the LLM, by name.
        adapters: by name.
    """
    read = [n for n, a in adapters.items() if a.reads_image]
    if options.get("guidance_scale", 1) != 1 and read:
        raise ZooError(
            f"generate(guidance_scale=...) is not possible beside adapter {read[0]!r}, which changes the LLM by the "
            "image: the pass without the prompt would depend on the image too."
        )
    if options.get("token_healing"):
        raise ZooError("generate(token_healing=True) decodes the prompt to text, and an image has none.")
    if not pruners:
        return
    who = f"pruner {next(iter(pruners))!r}, which chooses image tokens by the whole prompt"
    if length > (options.get("prefill_chunk_size") or length):
        raise ZooError(f"generate(prefill_chunk_size=...) is not possible with {who}.")
    kind = options.get("cache_implementation") or "dynamic"
    if kind not in ("dynamic", "offloaded", "hybrid"):  # transformers takes hybrid, which Gemma states, for dynamic
        raise ZooError(
            f"generate(cache_implementation={kind!r}) is not possible with {who} and makes the caches of later layers "
            "shorter: they have to grow one by one. Leave it out, or take 'offloaded'."
        )
    if reader := next((n for n in ("use_mtp", "speculation_type") if options.get(n)), None):
        raise ZooError(f"generate({reader}=...) is not possible with {who}: its drafts read every position of a layer.")
    shown = next((n for n in ("output_attentions", "output_hidden_states") if options.get(n)), None)
    if shown and (drafted := _drafting(options)):
        raise ZooError(f"generate({shown}=True) is not possible with {drafted} and {who}: layers differ in length.")


def _drafting(options: Mapping[str, Any]) -> str | None:
    """Name the option by which tokens are drafted, if there is one."""
    return next((n for n in _DRAFTED if options.get(n) not in (None, False)), None)
