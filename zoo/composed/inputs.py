"""The inputs of a forward pass: the keywords of `ZooModel.forward` as one value.

A composed model takes the keywords of transformers' own vision-language classes; others are refused by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor

from zoo.registry import Cut, ZooError, unknown

# Keywords of transformers' classes that a composed model does not take, and what to do instead.
_ELSEWHERE = {
    "vision_feature_layer": "the encoder's layer belongs to the model: set vision.layer when it is composed",
    "vision_feature_select_strategy": "which tokens of the encoder are used belongs to the model",
    "image_sizes": "the model's own processor returns how images were cut, as `cuts`: use zoo.load's processor",
    "mm_encoder_outputs": "pass the output of `encode_images`, as `encoded`",
    "shift_labels": "labels are shifted here: pass them as `labels`, (B, T) like the ids",
    "num_labels": "it is called num_items_in_batch, as in transformers",
}


@dataclass
class Inputs:
    """The keywords of `ZooModel.forward`, which documents them; its steps pass this value on."""

    input_ids: Tensor | None = None  # (B, T)
    pixel_values: Tensor | None = None  # (M, 3, S, S)
    attention_mask: Tensor | None = None  # (B, T); (B, past + T) with a cache
    position_ids: Tensor | None = None  # (B, T)
    cache: Any = None
    inputs_embeds: Tensor | None = None  # (B, T, C)
    labels: Tensor | None = None  # (B, T)
    logits_to_keep: int | Tensor = 0
    num_items_in_batch: Tensor | float | None = None
    use_cache: bool | None = None
    output_hidden_states: bool | None = None
    output_attentions: bool | None = None
    segment_ids: Tensor | None = None  # (B, T)
    block_ids: Tensor | None = None  # (B, T)
    pair_ids: Tensor | None = None  # (B, T)
    images_per_row: Sequence[int] | None = None
    cuts: Sequence[Cut] | None = None
    encoded: tuple[Any, ...] | None = None
    questions: Sequence[Any] | None = None  # str or Asked
    all_logits: bool = True
    run_head: bool = True
    more: dict[str, Any] = field(default_factory=dict)  # further arguments of this LLM
    # Where columns were left out (`zoo.composed.left_out`): T before, which of them are here, shift of their positions.
    length: int = 0
    columns: Any = None  # Columns
    shift: Tensor | None = None  # (B, T)

    @property
    def past(self) -> int:
        """Columns in the cache."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def goes_on(self) -> bool:
        """Whether the cache has the beginning of the sequence, whose images adapters are conditioned on."""
        return self.past > 0


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the cache, given by either of its two names.

    Raises:
        ZooError: two caches, or something else.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ZooError("cache and past_key_values are two names of one argument, and both were given.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ZooError(f"cache must be a cache of transformers, such as DynamicCache(), got {type(cache).__name__}.")
    return cache


def further(given: Mapping[str, Any], takes: frozenset[str], forward: Callable[..., Any]) -> dict[str, Any]:
    """Return those of the further keywords that the LLM takes.

    Args:
        given: keywords that `forward` does not name.
        takes: names that this LLM takes.
        forward: the model's, for the names that it takes itself.

    Raises:
        ZooError: a keyword that neither takes, with the nearest name or with what to do instead.
    """
    for name, value in given.items():
        if name in _ELSEWHERE and value is not None:
            raise ZooError(f"A composed model takes no {name}: {_ELSEWHERE[name]}.")
        if name not in takes and name not in _ELSEWHERE:
            own = frozenset(signature(forward).parameters) - {"self", "kwargs"}
            raise unknown("keyword of the model's forward", name, takes | own)
    return {name: value for name, value in given.items() if name in takes}
