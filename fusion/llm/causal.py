"""Whether a model of transformers can be the language model: causal attention, and `inputs_embeds` as input.

`AutoModelForCausalLM` also builds heads on encoders (BERT), with bidirectional attention unless the config sets
`is_decoder`, and decoders of encoder-decoders (BART), whose layers need an encoder's states.
"""

import inspect
from typing import Any

from zoo.fusion.llm.decoder import decoder_of
from zoo.registry import ZooError


def require_decoder_config(config: Any, who: str) -> None:
    """Refuse a transformers config of an encoder-decoder.

    Args:
        config: of the whole checkpoint.
        who: name of the LLM, for messages.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ZooError(
            f"{who} is an encoder-decoder, not a causal LM: {config.model_type!r} reads its text by an encoder. Take a "
            "decoder such as llama, qwen2 or mistral."
        )


def require_causal(lm: Any, who: str) -> None:
    """Refuse a model with bidirectional attention, or one that takes no embeddings.

    Args:
        lm: the transformers model, real or on the meta device.
        who: name of the LLM, for messages.
    """
    words = ((getattr(m, word, None), word) for m in lm.modules() for word in ("is_causal", "is_decoder"))
    said = {value for value, _ in words if isinstance(value, bool)}
    if getattr(lm.config, "is_decoder", None) is False and said == {False}:
        raise ZooError(
            f"{who} is a masked LM, not a causal one: {type(lm).__name__} attends in both directions. Take a "
            "decoder such as llama, or set is_decoder: true in llm.extra if the weights were trained so."
        )
    if "inputs_embeds" not in inspect.signature(type(decoder_of(lm)).forward).parameters:
        raise ZooError(f"{who} takes ids alone: {type(lm).__name__} has no inputs_embeds, which image tokens need.")
