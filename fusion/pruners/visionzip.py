"""VisionZip: keep the tokens that [CLS] attends to most, and merge the others into a few evenly spaced targets.

Paper: Yang et al., arXiv:2412.04467. Scores are FasterVLM's. Of the tokens that are left over, evenly spaced ones are
targets; every other one goes to the target whose key is most alike (cosine of keys, mean over heads), and a target
becomes itself plus the mean of its group. [CLS] itself is kept as a token. Order: [CLS], kept tokens in raster order,
then the targets. Encoders without [CLS] rank by column means (`score=column_mean`), as the authors do for SigLIP.

Departures. The authors count by hand (191 tokens, 30 targets, [CLS]); we also take a share of all tokens, within which
[CLS] is counted. A target without a group stays as it is, in their code too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.fusion.pruners.topk import check_ratio, count_kept, top
from zoo.fusion.pruners.unrounded import unrounded
from zoo.registry import ImageFeatures, Preset, Pruner, ZooError, register, unknown

SCORES = {"cls": "cls_attention", "column_mean": "key_attention"}


@dataclass
class VisionZipConfig:
    keep_ratio: float = 0.25  # share of image tokens left, targets and [CLS] among them, in (0, 1]
    target_ratio: float = 0.15625  # share of targets among the tokens left, in [0, 1); 30 of 192
    dominant: int = 0  # tokens kept unmerged beside [CLS], as in the authors' scripts; 0: by the ratios
    targets: int = 0  # with `dominant`: number of targets that the other tokens are merged into
    score: str = "cls"  # cls | column_mean (any encoder; no [CLS] is kept)

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        if not 0 <= self.target_ratio < 1:
            raise ZooError(f"target_ratio must be in [0, 1), got {self.target_ratio}.")
        if self.dominant < 0 or self.targets < 0 or (self.targets and not self.dominant):
            raise ZooError(
                f"dominant and targets must not be negative, and targets needs dominant: got {self.dominant} and "
                f"{self.targets}."
            )
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)


@register("pruner", "visionzip")
class VisionZip(Pruner, nn.Module):
    """Training-free; the tokens left have no grid."""

    needs: frozenset[str] = frozenset({"cls_attention", "keys", "prefix_tokens"})
    destroys: frozenset[str] = frozenset(
        {"grid", "cls_attention", "key_attention", "keys", "next_block", "pooling_head", "text_tower"}
    )
    choices = {"score": tuple(SCORES)}  # what the check may offer beside defaults
    presets = {  # the paper counts [CLS] among the dominant tokens
        "llava15_192": Preset({"dominant": 161, "targets": 30, "score": "cls"}, "the paper's 192: 162 and 30"),
        "llava15_128": Preset({"dominant": 107, "targets": 20, "score": "cls"}, "the paper's 128: 108 and 20"),
        "llava15_64": Preset({"dominant": 53, "targets": 10, "score": "cls"}, "the paper's 64: 54 and 10"),
    }

    def __init__(self, config: VisionZipConfig, *, num_tokens: int | None = None) -> None:
        super().__init__()
        self.config = config
        if config.score != "cls":
            self.needs = frozenset({SCORES[config.score], "keys"})
        if num_tokens is not None and self.num_tokens(num_tokens) == num_tokens:
            self.destroys = frozenset()

    def counts(self, n: int) -> tuple[int, int, int]:
        """Count the tokens kept as they are, the targets, and [CLS] (0 or 1), of `n`; (n, 0, 0) keeps all."""
        cls = int(self.config.score == "cls")
        if self.config.dominant:
            kept, targets = self.config.dominant, self.config.targets
        else:
            total = count_kept(n, self.config.keep_ratio)
            cls = cls if total > 1 else 0
            targets = min(total - cls - 1, int(total * self.config.target_ratio + 0.5))
            kept = total - cls - targets
        return (kept, targets, cls) if kept + targets + cls < n else (n, 0, 0)

    def num_tokens(self, n: int) -> int:
        """Count the tokens left of `n`."""
        return sum(self.counts(n))

    def scores(self, image: ImageFeatures) -> Tensor:
        """Return the scores that tokens are ranked by, (M, N) float32."""
        scores = getattr(image, SCORES[self.config.score])
        if scores is None or image.keys is None:
            raise ZooError(f"pruner 'visionzip' with score={self.config.score} needs {', '.join(sorted(self.needs))}.")
        return scores

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Reduce the tokens (M, N, D) to num_tokens(N); `groups` maps each to the token that it was merged into."""
        m, n = image.tokens.shape[:2]
        kept, targets, cls = self.counts(n)
        if kept == n:
            return image
        keep = top(self.scores(image), kept)  # (M, K)
        assert image.keys is not None, "asked above"
        groups = torch.full((m, n), -1, dtype=torch.long, device=keep.device)
        groups.scatter_(1, keep, torch.arange(cls, cls + kept, device=keep.device).expand(m, -1))
        first = [image.prefix[:, :1].to(image.tokens.dtype)] if cls and image.prefix is not None else []
        if targets:
            rest = (groups < 0).nonzero()[:, 1].view(m, n - kept)  # (M, R), raster order
            merge = _Merge.of(_rows(image.keys.float().mean(2), rest), targets)
            groups.scatter_(1, rest, merge.group + cls + kept)

        def left(x: Tensor) -> Tensor:  # (M, N, D) -> (M, K, D)
            merged = [merge(_rows(x, rest))] if targets else []
            return torch.cat([*(first if x is image.tokens else ()), _rows(x, keep), *merged], dim=1)

        return image.made(
            left,
            grid=None,
            keep=None,
            groups=image.regrouped(groups),  # (M, N0)
            num_patches=image.num_patches or n,
            patch_grid=image.patch_grid or image.grid,
        )


class _Merge(NamedTuple):
    """How tokens (M, R, D) are merged into evenly spaced targets."""

    places: Tensor  # (G,) of the targets
    group: Tensor  # (M, R) target of each token
    weight: Tensor  # (M, R) of each token in its target, beside the target itself

    @classmethod
    def of(cls, keys: Tensor, targets: int) -> "_Merge":
        """Find the target of each token by its key (M, R, d)."""
        m, r = keys.shape[:2]
        places = torch.arange(0, r, max(1, r // targets), device=keys.device)[:targets]  # (G,)
        keys = F.normalize(keys, dim=-1)
        with unrounded(keys):
            group = (keys @ keys[:, places].transpose(1, 2)).argmax(-1)  # (M, R)
        share = torch.ones(m, r, device=keys.device)
        share[:, places] = 0  # a target is not averaged with its group: it is added with weight 1
        members = torch.zeros(m, targets, device=keys.device).scatter_add_(1, group, share).clamp(min=1)  # (M, G)
        weight = share / members.gather(1, group)  # (M, R)
        own = torch.arange(targets, device=keys.device).expand(m, -1)
        # A target keeps its own weight of 0, whatever target its key is nearest to.
        return cls(places, group.scatter(1, places.expand(m, -1), own), weight)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the targets (M, G, D)."""
        m, _, d = tokens.shape
        total = torch.zeros(m, len(self.places), d, device=tokens.device, dtype=torch.float32)
        index = self.group.unsqueeze(-1).expand(-1, -1, d)
        total = total.scatter_add(1, index, tokens.float() * self.weight.unsqueeze(-1))
        return tokens[:, self.places] + total.to(tokens.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Select the rows `index` (M, K) of (M, N, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
