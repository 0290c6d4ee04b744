"""Find the decoder of a transformers language model, and the model whose `generate` runs."""

from typing import Any

from zoo.registry import ZooError


def decoder_of(lm: Any) -> Any:
    """Return a language model's decoder: the model without its vocabulary projection."""
    if (base := lm.base_model) is not lm:
        return base
    # Some families state the prefix of a larger model as theirs (Llama 4): look for the child with the embedding.
    table = lm.get_input_embeddings()
    return next((m for m in lm.children() if any(inner is table for inner in m.modules())), base)


def generator_of(lm: Any) -> Any:
    """Return the model whose `generate` is transformers' own: the language model, or the one inside PEFT's wrapper.

    Raises:
        ZooError: it does not generate, or PEFT adds virtual tokens.
    """
    from transformers import GenerationMixin

    inner = lm
    if not isinstance(lm, GenerationMixin) and hasattr(lm, "get_base_model"):
        inner = lm.get_base_model()
    if not isinstance(inner, GenerationMixin):
        raise ZooError(f"{type(lm).__name__} does not generate as models of transformers do.")
    if inner is not lm and getattr(lm.active_peft_config, "is_prompt_learning", False):
        raise ZooError(
            f"generate does not support the virtual tokens of PEFT's {type(lm.active_peft_config).__name__}: use an "
            "adapter that changes layers."
        )
    return inner
