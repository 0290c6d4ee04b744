"""AIM: merge image tokens that look alike before the LLM, and drop those that little attention flows to inside it.

Paper: Zhong et al., arXiv:2412.03248 (ICCV 2025). Numbers that the paper does not give (temperature 0.1, five undamped
steps, root mean square over heads) are those of the authors' code.

Inside the LLM, layer l's attention is walked along five times from a uniform start, and what reaches an image token is
its importance. At the output of layer l, from `start` on, all but a share 1 - (l - start + 1) / (stop - start) of the
image tokens go, so layer `stop` and those behind it see text alone. Text and padding are never candidates.

Where we differ from the public code: tokens are dropped, not hidden, so tokens already gone have no vote (`votes=all`
brings that back, and hides instead of dropping); no attention matrix is made and none is read from the kernel; counts
are those of each sample of a batch; a last prompt token stays even where it is an image token. The schedule is theirs
for LLMs of 28 and of 32 layers; for other depths that of 28 is scaled, which is ours. Merging acts on the encoder's
features before the projector (the public code: on projected and pooled ones for video) and measures likeness on them,
or on the keys of the attention that made them (`metric=keys`; the public code for LLaVA-1.5: on those of the last
block, down to 252 or 72 of 576). The walk is one pass over the scores in blocks of rows (`attention_walk`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from zoo.fusion.pruners.inside.attention_flow import attention_walk, walk_flops
from zoo.fusion.pruners.inside.attention_tap import Attended
from zoo.fusion.pruners.inside.dropper import Dropper, DropsInside
from zoo.fusion.pruners.inside.sequence import VOTES
from zoo.fusion.pruners.token_merging import merge, removals
from zoo.registry import ImageFeatures, ZooError, register, require_at_least, unknown

# Layers l1 and l2 by the depth of the LLM, in the authors' code: Qwen2 7B (LLaVA-OneVision), Vicuna 7B (LLaVA-1.5).
RELEASED = {28: (14, 22), 32: (13, 21)}
_MERGED_AWAY = frozenset({"grid", "key_attention", "pooling_head", "keys"})  # not known of merged tokens


@dataclass
class AIMConfig:
    merge_ratio: float = 0.25  # share of the image tokens that merging leaves, in (0, 1]; 1: none are merged
    metric: str = "tokens"  # what likeness is measured on; tokens: the features | keys: of the encoder's attention
    order: str = "released"  # of merged tokens; released: as the public code | raster: in their places
    weigh_sizes: bool = False  # means count a token as many as it was made of
    prune: bool = True  # drop tokens inside the LLM
    start: int = -1  # layer, 0 the first, at whose output the first go (l1); -1: 14 of 28, 13 of 32, else half
    stop: int = -1  # layer from which on none is left (l2); -1: 22 of 28, 21 of 32, else 11/14 of the depth
    temperature: float = 0.1  # scores are divided by it before the softmax; 1: the layer's own attention
    steps: int = 5  # of the walk
    damping: float = 0.0  # share of each step that starts anew, in [0, 1)
    heads: str = "rms"  # rms | mean: over heads
    votes: str = "alive"  # alive | text | last | all: whose attention counts; all: hides instead of dropping, slow

    def __post_init__(self) -> None:
        if not 0 < self.merge_ratio <= 1:
            raise ZooError(f"merge_ratio must be in (0, 1], got {self.merge_ratio}.")
        if not self.temperature > 0:
            raise ZooError(f"temperature must be more than 0, got {self.temperature}.")
        require_at_least(1, steps=self.steps)
        if not 0 <= self.damping < 1:
            raise ZooError(f"damping must be in [0, 1), got {self.damping}.")
        for name, allowed in (
            ("metric", ("tokens", "keys")),
            ("order", ("released", "raster")),
            ("heads", ("rms", "mean")),
            ("votes", VOTES),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.start < -1 or self.stop < -1 or (self.start >= 0 and 0 <= self.stop <= self.start):
            raise ZooError(f"stop must lie behind start, got start={self.start} and stop={self.stop}.")


@register("pruner", "aim")
class AIM(DropsInside, nn.Module):
    """Training-free; adds no parameters."""

    needs: frozenset[str] = frozenset({"image_tokens"})
    destroys: frozenset[str] = _MERGED_AWAY

    def __init__(self, config: AIMConfig) -> None:
        super().__init__()
        self.config = config
        self.needs = frozenset({"image_tokens"} if config.prune else ()) | (
            {"keys"} if config.metric == "keys" and config.merge_ratio < 1 else frozenset()
        )
        self.destroys = _MERGED_AWAY if config.merge_ratio < 1 else frozenset()

    # ---- before the LLM ----------------------------------------------------------------------------------------

    def num_tokens(self, n: int) -> int:
        """Count the tokens that merging leaves of `n`."""
        return n - sum(removals(n, self.config.merge_ratio))

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Merge the tokens (M, N, D) of each image, crop or frame to (M, K, D); there is no grid any more."""
        n, c = image.tokens.shape[1], self.config
        rounds = removals(n, c.merge_ratio)
        if not rounds:
            return image
        if c.metric == "keys" and image.keys is None:
            raise ZooError("pruner 'aim' with metric=keys needs the keys of the encoder's attention.")
        metric = image.keys.flatten(2) if c.metric == "keys" and image.keys is not None else None  # (M, N, H * d)
        tokens, group = merge(image.tokens, rounds, metric=metric, order=c.order, weigh_sizes=c.weigh_sizes)
        scores = image.cls_attention
        if scores is not None:
            scores = scores.new_zeros(tokens.shape[:2]).scatter_add(1, group, scores)  # (M, K)
        return replace(
            image,
            tokens=tokens,  # (M, K, D)
            grid=None,
            keep=None,
            groups=image.regrouped(group),  # (M, N0)
            num_patches=image.num_patches or n,
            cls_attention=scores,
            key_attention=None,
            pooling_attention=None,
            keys=None,
        )

    # ---- inside the LLM ----------------------------------------------------------------------------------------

    def schedule(self, num_layers: int) -> tuple[int, int]:
        """Return the layer at whose output the first tokens go, and the one from which on none is left."""
        first, last = RELEASED.get(num_layers, (round(num_layers / 2), round(num_layers * 22 / 28)))
        start = self.config.start if self.config.start >= 0 else min(first, max(num_layers - 2, 0))
        stop = self.config.stop if self.config.stop >= 0 else max(last, start + 1)
        if stop > num_layers:
            raise ZooError(f"stop={stop} names a layer that is not there: the LLM has {num_layers} layers.")
        if stop <= start:
            raise ZooError(f"stop must lie behind start, got start={start} and stop={stop} of {num_layers} layers.")
        return start, stop

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens that each layer sees of `n` that enter the LLM."""
        if not self.config.prune:
            return [n] * num_layers
        start, stop = self.schedule(num_layers)
        return [n] + [_left(n, layer, start, stop) for layer in range(num_layers - 1)]

    def attach(self, llm: Any) -> None:
        """Take effect in the LLM."""
        if not self.config.prune:
            return
        start, stop = self.schedule(llm.num_layers)
        after = list(range(start, min(stop, llm.num_layers - 1)))

        def budget(layer: int, total: Tensor) -> Tensor:
            return _left(total, layer, start, stop)

        hide = self.config.votes == "all"
        self.drop_by(Dropper(llm, "pruner 'aim'", after, budget, self.importance, hide))

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the products of scoring, of one prompt with `tokens` in each layer."""
        if not self.config.prune:
            return 0
        start, stop = self.schedule(len(tokens))
        after = range(start, min(stop, len(tokens) - 1))
        return sum(walk_flops(tokens[i], heads, head_dim, self.config.steps) for i in after)

    def importance(self, given: Attended) -> Tensor:
        """Score the positions of a layer: (B, L), from what flows to them along attention."""
        c = self.config
        reached = attention_walk(
            given.query,
            given.key,
            given.tokens.start(c.votes),
            scaling=given.scaling,
            steps=c.steps,
            temperature=c.temperature,
            damping=c.damping,
            visible=given.visible,
            softcap=given.softcap,
        )  # (B, H, L)
        return reached.square().mean(1).sqrt() if c.heads == "rms" else reached.mean(1)


def _left(n: Any, layer: int, start: int, stop: int) -> Any:
    """Count what is left of `n` tokens behind `layer`: whole numbers, rounded down, at least 1 before `stop`."""
    if layer < start:
        return n
    if layer >= stop - 1:
        return n * 0
    left = n * (stop - layer - 1) // (stop - start)
    return left.clamp(min=1) if isinstance(left, Tensor) else max(1, left)
