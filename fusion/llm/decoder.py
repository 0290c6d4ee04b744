"""Where things are in a language model of transformers: its decoder, and what generates."""

from typing import Any

from zoo.registry import ZooError


def decoder_of(lm: Any) -> Any:
    """Give a language model without its vocabulary projection."""
    if (base := lm.base_model) is not lm:
        return base
    # Some families name as their base what stands around them in a larger model (Llama 4).
    table = lm.get_input_embeddings()
    return next((m for m in lm.children() if any(inner is table for inner in m.modules())), base)


def generator_of(lm: Any) -> Any:
    """Give the model whose `generate` is transformers' own: the language model, or what PEFT has wrapped.

    Raises:
        ZooError: there is none, or what wraps it does more than change layers.
    """
    from transformers import GenerationMixin

    inner = lm
    if not isinstance(lm, GenerationMixin) and hasattr(lm, "get_base_model"):
        inner = lm.get_base_model()
    if not isinstance(inner, GenerationMixin):
        raise ZooError(f"{type(lm).__name__} does not generate as models of transformers do.")
    if inner is not lm and getattr(lm.active_peft_config, "is_prompt_learning", False):
        raise ZooError(
            f"generate does not know the virtual tokens of PEFT's {type(lm.active_peft_config).__name__}, which stand "
            "before a prompt: use an adapter that changes layers."
        )
    return inner
