"""AIM: merge similar image tokens before the LLM, and drop those that receive little attention inside it.

Paper: Zhong et al., arXiv:2412.03248 (ICCV 2025). Numbers that the paper does not give (temperature 0.1, five undamped
steps, root mean square over heads) are those of the authors' code.

Inside the LLM, importance is a PageRank of layer l's attention: five steps from a uniform start. At the output of
layer l, from `start` on, all but a share 1 - (l - start + 1) / (stop - start) of the image tokens are dropped, so that
layer `stop` and later ones process text alone. Text and padding are never candidates.

Where we differ from the public code: tokens are dropped, not masked, so dropped tokens have no vote (`votes=all` masks
as the public code does), and those left keep their positions with either word of `positions`, as masked ones do; no
attention matrix is materialised or read from the kernel; counts are those of each sample of a batch; a last prompt
token stays even where it is an image token. The schedule is that of the public code
for LLMs of 28 and of 32 layers; for other depths that of 28 is scaled, which is ours. Merging acts on the encoder's
features before the projector (the public code: on projected and pooled ones for video) and measures similarity on them,
or on the keys of the attention that made them (`metric=keys`; the public code for LLaVA-1.5: on those of the last
block, down to 252 or 72 of 576). The walk is one pass over the scores in blocks of rows (`attention_flow`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.inside.attention_flow import attention_flow, walk_flops
from zoo.fusion.pruners.inside.attention_tap import AttentionInputs
from zoo.fusion.pruners.inside.dropper import Dropper, DropsInside
from zoo.fusion.pruners.inside.sequence import VOTES
from zoo.fusion.pruners.token_merging import merge, removals
from zoo.registry import ImageFeatures, Preset, ZooError, register, require_at_least, unknown

# Layers l1 and l2 by the depth of the LLM, in the authors' code: Qwen2 7B (LLaVA-OneVision), Vicuna 7B (LLaVA-1.5).
RELEASED = {28: (14, 22), 32: (13, 21)}
# Not of merged tokens.
_MERGED_AWAY = frozenset({"grid", "key_attention", "pooling_head", "keys", "next_block", "text_tower"})


@dataclass
class AIMConfig:
    merge_ratio: float = 0.25  # share of the image tokens left by merging, in (0, 1]; 1: no merging
    metric: str = "tokens"  # features for the similarity: tokens | keys (of the encoder's attention)
    order: str = "released"  # of merged tokens: released (as the public code) | raster
    weigh_sizes: bool = False  # weight merged tokens by how many source tokens they contain (ToMe)
    prune: bool = True  # drop tokens inside the LLM
    start: int = -1  # layer (from 0) after which dropping starts (l1); -1: 14 of 28, 13 of 32, else half of the depth
    stop: int = -1  # first layer without image tokens (l2); -1: 22 of 28, 21 of 32, else 11/14 of the depth
    temperature: float = 0.1  # divides attention scores before the softmax; 1: the layer's own attention
    steps: int = 5  # PageRank steps along attention, at least 1
    damping: float = 0.0  # share of each step that restarts from the uniform start, in [0, 1)
    heads: str = "rms"  # average over heads: rms | mean
    votes: str = "alive"  # queries whose attention counts: alive | text | last | turns | all (masks; slow)

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
            raise ZooError(f"stop must be greater than start, got start={self.start} and stop={self.stop}.")


@register("pruner", "aim")
class AIM(DropsInside, nn.Module):
    """Training-free; adds no parameters."""

    needs: frozenset[str] = frozenset({"image_tokens"})
    destroys: frozenset[str] = _MERGED_AWAY
    presets = {
        "onevision_video": Preset(
            {"merge_ratio": 0.25, "metric": "tokens", "start": 14, "stop": 22}, "LLaVA-OneVision-7B, frames of 196"
        ),
        "onevision_video_merged": Preset(
            {"merge_ratio": 0.25, "metric": "tokens", "prune": False}, "the same without dropping"
        ),
        "llava15_252": Preset(
            {"merge_ratio": 0.4375, "metric": "keys", "start": 13, "stop": 21}, "LLaVA-1.5, 2.22 TFLOPs"
        ),
        "llava15_72": Preset(
            {"merge_ratio": 0.125, "metric": "keys", "start": 13, "stop": 21}, "LLaVA-1.5, 1.00 TFLOPs"
        ),
    }

    def __init__(self, config: AIMConfig) -> None:
        super().__init__()
        self.config = config
        self.needs = frozenset({"image_tokens"} if config.prune else ()) | (
            {"keys"} if config.metric == "keys" and config.merge_ratio < 1 else frozenset()
        )
        self.destroys = _MERGED_AWAY if config.merge_ratio < 1 else frozenset()

    # ---- before the LLM ----------------------------------------------------------------------------------------

    def num_tokens(self, n: int) -> int:
        """Count the tokens left of `n` by merging."""
        return n - sum(removals(n, self.config.merge_ratio))

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Merge the tokens (M, N, D) of each image, crop or frame to (M, K, D), which have no grid."""
        n, c = image.tokens.shape[1], self.config
        rounds = removals(n, c.merge_ratio)
        if not rounds:
            return image
        if c.metric == "keys" and image.keys is None:
            raise ZooError("pruner 'aim' with metric=keys needs the keys of the encoder's attention.")
        metric = image.keys.flatten(2) if c.metric == "keys" and image.keys is not None else None  # (M, N, H * d)
        metric = image.tokens if metric is None and image.deep else metric  # not of features for further layers
        maps, group = merge(torch.cat(image.maps, -1), rounds, metric=metric, order=c.order, weigh_sizes=c.weigh_sizes)
        tokens, *deep = maps.split([x.shape[-1] for x in image.maps], dim=-1)
        scores = image.cls_attention
        if scores is not None:
            # Attention to a merged token is the sum over what it contains: the softmax's mass is kept.
            scores = scores.new_zeros(tokens.shape[:2]).scatter_add(1, group, scores)  # (M, K)
        return replace(
            image,
            tokens=tokens,  # (M, K, D)
            deep=tuple(deep),
            grid=None,
            keep=None,
            groups=image.regrouped(group),  # (M, N0)
            num_patches=image.num_patches or n,
            patch_grid=image.patch_grid or image.grid,
            rank=None,
            cls_attention=scores,
            key_attention=None,
            pooling_attention=None,
            keys=None,
            next_attention=None,
            next_keys=None,
            patch_embeds=None,
            projected=None,
            block_attention={},
        )

    # ---- inside the LLM ----------------------------------------------------------------------------------------

    def schedule(self, num_layers: int) -> tuple[int, int]:
        """Return the layer after which dropping starts, and the first layer without image tokens."""
        first, last = RELEASED.get(num_layers, (round(num_layers / 2), round(num_layers * 22 / 28)))
        start = self.config.start if self.config.start >= 0 else min(first, max(num_layers - 2, 0))
        stop = self.config.stop if self.config.stop >= 0 else max(last, start + 1)
        if stop > num_layers:
            raise ZooError(f"stop={stop} exceeds the {num_layers} layers of the LLM.")
        if stop <= start:
            raise ZooError(
                f"stop must be greater than start, got start={start} and stop={stop} of {num_layers} layers."
            )
        return start, stop

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens in each layer, of `n` that enter the LLM."""
        if not self.config.prune:
            return [n] * num_layers
        start, stop = self.schedule(num_layers)
        return [n] + [_left(n, layer, start, stop) for layer in range(num_layers - 1)]

    def attach(self, llm: Any) -> None:
        """Register the dropper's hooks on the LLM."""
        if not self.config.prune:
            return
        start, stop = self.schedule(llm.num_layers)
        after = list(range(start, min(stop, llm.num_layers - 1)))
        votes, budget = self.config.votes, partial(_budget, start, stop)
        how: dict[str, Any] = {"hide": votes == "all", "votes": votes, "renumbers": False}
        self.drop_by(Dropper(llm, "pruner 'aim'", after, budget, self.importance, **how))

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the FLOPs of scoring one prompt with `tokens` in each layer."""
        if not self.config.prune:
            return 0
        start, stop = self.schedule(len(tokens))
        after = range(start, min(stop, len(tokens) - 1))
        return sum(walk_flops(tokens[i], heads, head_dim, self.config.steps) for i in after)

    def importance(self, given: AttentionInputs) -> Tensor:
        """Score the positions of a layer by the PageRank of its attention: (B, L)."""
        c = self.config
        reached = attention_flow(
            given.query,
            given.key,
            given.votes,
            scaling=given.scaling,
            steps=c.steps,
            temperature=c.temperature,
            damping=c.damping,
            visible=given.visible,
            softcap=given.softcap,
        )  # (B, H, L)
        return reached.square().mean(1).sqrt() if c.heads == "rms" else reached.mean(1)


def _budget(start: int, stop: int, layer: int, total: Tensor) -> Any:
    return _left(total, layer, start, stop)


def _left(n: Any, layer: int, start: int, stop: int) -> Any:
    """Count the tokens left of `n` after `layer`: rounded down, at least 1 before `stop`."""
    if layer < start:
        return n
    if layer >= stop - 1:
        return n * 0
    left = n * (stop - layer - 1) // (stop - start)
    return left.clamp(min=1) if isinstance(left, Tensor) else max(1, left)
