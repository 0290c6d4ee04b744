"""The output of a composed model, the LLM's sequence as parts inside it read it, and a distiller's view of both."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from zoo.registry import ImageFeatures
from zoo.registry.forward_pass import Pass
from zoo.registry.versions import with_old_cache_name

LOSS_ALONE = {"all_logits": False, "use_cache": False}  # options of a pass of which only the loss is used


@with_old_cache_name
@dataclass
class ZooOutput(ModelOutput):
    """The output of a forward pass: first the fields of transformers' own classes, in their order, then further ones.

    Attributes:
        loss: sum of `losses`; None without labels.
        logits: (B, T, V), or those of the positions that `logits_to_keep` names; None where they were not asked for.
        cache: keys and values of the layers; `past_key_values` is the same, by its older name.
        hidden_states, attentions, router_logits: of each layer, where they were asked for.
        losses: by name: `answer`, the auxiliary losses of adapters and of the LLM.
        last_hidden_state: (B, T, C), before the vocabulary projection.
        labels: (B, T) of the loss; shorter than the input's where tokens were dropped inside the LLM.
        image: the encoder's features before pruning.
        image_kept: the features after pruning.
        image_tokens: (M, K, C) as inserted in the sequence.
        passed: the pass of this output: its `LLMSequence` after the parts inside the LLM, what they kept and how they
            routed. `pruner.kept(out.passed)` and `adapter.usage(out.passed)` read it.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None
    losses: dict[str, Tensor] | None = None
    last_hidden_state: Tensor | None = None
    labels: Tensor | None = None
    image: ImageFeatures | None = None
    image_kept: ImageFeatures | None = None
    image_tokens: Tensor | None = None
    passed: Pass | None = None

    @property
    def sequence(self) -> Any:
        """The `LLMSequence` of the pass; None where the LLM did not run."""
        return None if self.passed is None else self.passed.sequence

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields of transformers' classes, for `return_dict=False` and for indices such as `out[0]`."""
        return tuple(self[name] for name in self if name not in _OURS)


_OURS = frozenset({"losses", "last_hidden_state", "labels", "image", "image_kept", "image_tokens", "passed"})


@dataclass
class LLMSequence:
    """The LLM's sequence of one forward pass, for parts that act inside it; they may replace `labels`.

    A pruner inside the LLM reads where image tokens and padding are, and shortens `labels` along with the hidden
    states.
    """

    image_mask: Tensor | None  # (B, T) bool; None where embeddings were given
    attention_mask: Tensor | None  # (B, T)
    position_ids: Tensor | None  # (B, T)
    labels: Tensor | None  # (B, T)
    segment_ids: Tensor | None = None  # (B, T) which sample of a packed row, -1 at padding; see `zoo.text.batch`
    block_ids: Tensor | None = None  # (B, T) which dialog of the sample, 0 the shared prefix, -1 at padding
    columns: Tensor | None = None  # (B, K) original column of each hidden state kept, -1 padding; None: all, in order
    pair_ids: Tensor | None = None  # (B, T) which of a pair's answers a token belongs to, -1 none; see `zoo.text.batch`
    # (B, T + 1) of the columns and of what follows, see `zoo.composed.gaps`; (A, B, T + 1) with several axes; None:
    # nothing is added to `position_ids`
    shift: Tensor | None = None
    drafts: int = 0  # columns at the end, behind the prompt, that are guesses of assisted decoding
    dense: bool = False  # positions behind a layer that drops tokens count those left (`positions` of the model)
    axes: Tensor | None = None  # (A, B, T) positions of an LLM that has several axes, instead of `position_ids`
    deep: Any = None  # features for layers of the LLM behind the first (`zoo.fusion.llm.deep.DeepFeatures`)

    def image_index(self) -> Tensor | None:
        """Return the image token, counted over the batch, at each column kept: (B, K), -1 for text.

        Also -1 for image tokens that are hidden from the LLM (`keep_range` of a stage).
        """
        if self.image_mask is None:
            return None
        index = self.image_mask.flatten().cumsum(0).view_as(self.image_mask) - 1  # (B, T)
        shown, mask = self.image_mask, self.attention_mask
        if mask is not None and mask.shape == shown.shape:
            shown = shown & (mask != 0)
        return self._of_kept(index.masked_fill(~shown, -1))

    def pairs(self) -> Tensor | None:
        """Return which of a pair's answers each column kept belongs to: (B, K), -1 none."""
        return None if self.pair_ids is None else self._of_kept(self.pair_ids)

    def _of_kept(self, index: Tensor) -> Tensor:
        """Gather (B, T) at the columns kept: (B, K), -1 at padding."""
        if self.columns is None:
            return index
        return index.gather(1, self.columns.clamp(min=0)).masked_fill(self.columns < 0, -1)


class DistillView:
    """What a distiller gets of a model: the output of its forward pass, and the LLM whose head makes logits of it."""

    def __init__(self, out: ZooOutput, llm: Any) -> None:
        self.out, self.llm = out, llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.out, name)

    @property
    def image_index(self) -> Tensor | None:
        return self.out.sequence.image_index() if self.out.sequence is not None else None


Seen = DistillView  # its earlier name, for plug-ins
