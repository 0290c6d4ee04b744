"""Whether a mask keeps the samples of a row apart: not where a layer carries a state from one token to the next.

Recurrent layers (Mamba, RWKV), linear attention and short convolutions over positions read what lies ahead of them
whatever the mask hides, so each sample of a row, and each dialog behind an image, would begin on the state of another.
transformers' own classes reset such states at the borders of samples in some kernels of CUDA alone.
"""

from typing import Any

from torch import nn

from zoo.fusion.llm.decoder import decoder_of

_OF_PADDING = frozenset({"bloom", "openai-gpt", "xlm"})  # families that read a mask as (B, T), of padding


def carries_state(lm: Any) -> bool:
    """Whether a layer of a transformers model, on any device, carries a state from token to token."""
    if "linear_attention" in (getattr(lm.config.get_text_config(), "layer_types", None) or ()):
        return True
    # transformers marks recurrent models; it does not mark short convolutions between layers of attention (LFM2).
    return any(isinstance(m, nn.Conv1d) or getattr(m, "_is_stateful", False) for m in decoder_of(lm).modules())


def why_mixed(lm: Any) -> str:
    """Return why samples of a row would not be kept apart; empty where they are."""
    config = lm.config.get_text_config()
    if carries_state(lm):
        return f"layers of {config.model_type!r} carry a state from token to token, past any mask"
    if config.model_type in _OF_PADDING or getattr(config, "alibi", False):
        return f"{config.model_type!r} takes a mask of padding alone, none that keeps samples of a row apart"
    return ""
