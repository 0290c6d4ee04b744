"""Read queries and keys, after rotation, from one attention layer of an unmodified decoder.

Only that layer is switched to an attention function named `zoo_scored`, which passes them to a callback and then calls
the function that the model is set to: flash stays flash.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from zoo.fusion.pruners.inside.attention_flow import attention_flow
from zoo.fusion.pruners.inside.sequence import TokenSequence, VisibilityMask
from zoo.registry import ZooError

SCORED = "zoo_scored"

# Called in each pass of a layer: query (B, H, L, d), key (B, H_kv, L, d), scaling and softcap of the scores.
Watcher = Callable[[Tensor, Tensor, float | None, float | None], None]


@dataclass
class AttentionInputs:
    """Input of a pruner's scores: a layer's queries and keys, and the positions that they belong to."""

    layer: int  # 0 the first
    query: Tensor  # (B, H, L, d), after rotation; behind the cut 0 in rows without a vote
    key: Tensor  # (B, H_kv, L, d)
    scaling: float  # of the scores
    softcap: float | None
    tokens: TokenSequence  # the positions
    window: int | None  # of the layer, None where it does not bind
    ballot: str | Tensor = "last"  # a word of `VOTES`, or one vote for each column (B, T) of the unshortened sequence

    @property
    def votes(self) -> Tensor:
        """The votes of the queries, (B, L) float32; a layer read behind the cut has queries where these are not 0."""
        return votes_of(self.ballot, self.tokens)

    @property
    def visible(self) -> VisibilityMask | None:
        """Visibility beyond causality, for `attention_flow`; None for plain causal attention."""
        plain = self.tokens.whole and not self.tokens.packed and self.window is None
        return None if plain else VisibilityMask(self.tokens, self.window)

    def voted(self) -> Tensor:
        """Return how much the voters attend to each position, the mean over heads: (B, L)."""
        options: dict[str, Any] = {"scaling": self.scaling, "visible": self.visible, "softcap": self.softcap}
        return attention_flow(self.query, self.key, self.votes, **options).mean(1)


def votes_of(ballot: str | Tensor, tokens: TokenSequence) -> Tensor:
    """Return the votes of the tokens left: (B, L) float32."""
    if isinstance(ballot, str):
        return tokens.start(ballot)
    return ballot.gather(1, tokens.column) * tokens.seen


Attended = AttentionInputs  # its earlier name, which plug-ins may import


def tap_attention(layer: nn.Module, watcher: Watcher, who: str) -> Callable[[], None]:
    """Call `watcher` in each pass of a decoder layer's attention; returns the function that undoes it.

    Args:
        who: the pruner and its model, for messages.

    Raises:
        ZooError: the layer has no attention module.
    """
    module = attention_of(layer)
    if module is None:
        raise ZooError(f"{who} finds no attention in the layers.")
    _register()
    own = module.config

    # transformers looks the function up by the config's name in every call, and this layer has its own config object.
    module.config = _ScoredConfig(own, watcher)
    return partial(setattr, module, "config", own)


def attention_of(layer: nn.Module) -> Any:
    """Return the attention module of a decoder layer, None if it has none."""
    return next((m for m in layer.modules() if hasattr(m, "config") and "Attention" in type(m).__name__), None)


class _ScoredConfig:
    """A view of an attention layer's config with another name of the attention function."""

    def __init__(self, real: Any, watch: Watcher) -> None:
        self.__dict__.update(real=real, watch=watch, _attn_implementation=SCORED)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register()  # unpickled in another process
        self.__dict__.update(state)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "real":
            raise AttributeError(name)
        return getattr(self.real, name)


def _scored(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Call the watcher, then the attention function that the model is set to."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = module.config
    config.watch(query, key, kwargs.get("scaling"), kwargs.get("softcap"))
    # "eager" is not in the registry: it is a function of the family's own module.
    homes = [sys.modules.get(c.__module__) for c in type(module).__mro__]
    own = next((f for m in homes if (f := getattr(m, "eager_attention_forward", None)) is not None), None)
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(config.real._attn_implementation, own)  # type: ignore[arg-type]
    return attend(module, query, key, value, attention_mask, **kwargs)


def _register() -> None:
    from transformers import AttentionInterface

    # No mask function of this name is needed: masks are made from the model's config, which keeps its own name.
    AttentionInterface.register(SCORED, _scored)
