"""Which decoders and caches support dropping tokens between layers, and why the others do not."""

from typing import Any

from zoo.registry import ZooError

_KINDS = {"full_attention", "sliding_attention"}
# Families in which dropping gives wrong results or errors; a test covers all families of transformers.
_UNFIT = {
    **dict.fromkeys(("bloom", "mpt", "falcon"), "positions or caches that cannot be shortened"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "an output that has to be as long as its input"),
    "ctrl": "attention that cannot be read",
    **dict.fromkeys(("beam", "dory"), "positions that layers take in a form of their own"),
    "doge": "attention with its own selection of keys",
    "bert-generation": "bidirectional attention",
}


def require_family(who: str, lm: Any) -> None:
    """Refuse a language model in which tokens cannot be dropped between layers.

    Args:
        who: the pruner, for the message.
        lm: the transformers model, real or on the meta device.
    """
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    what = f"layers of kind {sorted(kinds)[0]!r}" if kinds else _UNFIT.get(config.model_type, "")
    if getattr(config, "num_kv_shared_layers", False):
        what = "layers that share a cache"
    # Settable attention goes through transformers' attention interface, where queries and keys can be read.
    if not what and not getattr(lm, "_can_set_attn_implementation", lambda: True)():
        what = "attention that cannot be read"
    if what:
        raise ZooError(f"{who} cannot drop tokens inside {config.model_type!r}, which has {what}.")


def require_cache(who: str, cache: Any) -> None:
    """Refuse a cache whose layers must have equal lengths, or that stores keys in another form."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", [])
    if odd := [x for x in layers if type(x) not in (DynamicLayer, DynamicSlidingWindowLayer)]:
        raise ZooError(
            f"{who} needs a cache whose layers grow independently and store keys unquantised, not "
            f"{type(odd[0]).__name__}: leave cache_implementation out, or set it to dynamic or offloaded."
        )
