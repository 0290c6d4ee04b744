"""Whether a model of transformers can be the language model: tokens see what stands before them, and embeddings go in.

`AutoModelForCausalLM` also builds heads on encoders (BERT), whose tokens see those behind them unless the config says
`is_decoder`, and decoders taken out of encoder-decoders (BART), whose layers wait for an encoder's states.
"""

import inspect
from typing import Any

from zoo.fusion.llm.decoder import decoder_of
from zoo.registry import ZooError


def require_decoder_config(config: Any, who: str) -> None:
    """Refuse a transformers config of an encoder and a decoder together.

    Args:
        config: of the whole checkpoint.
        who: what messages call it.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ZooError(
            f"{who} is an encoder-decoder, and no causal LM: {config.model_type!r} reads its text by an encoder of its "
            "own. Take a decoder such as llama, qwen2 or mistral."
        )


def require_causal(lm: Any, who: str) -> None:
    """Refuse a model whose tokens see those behind them, or that takes no embeddings; on the meta device as well.

    Args:
        lm: the transformers model.
        who: what messages call it.
    """
    words = ((getattr(m, word, None), word) for m in lm.modules() for word in ("is_causal", "is_decoder"))
    said = {value for value, _ in words if isinstance(value, bool)}
    if getattr(lm.config, "is_decoder", None) is False and said == {False}:
        raise ZooError(
            f"{who} is a masked LM, and no causal one: in {type(lm).__name__} each token sees those behind it. Take a "
            "decoder such as llama, or say is_decoder: true where the weights were trained so (llm.extra)."
        )
    if "inputs_embeds" not in inspect.signature(type(decoder_of(lm)).forward).parameters:
        raise ZooError(
            f"{who} takes ids alone: {type(lm).__name__} has no inputs_embeds, through which image tokens go in."
        )
