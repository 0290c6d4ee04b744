"""VisPruner: keep the image tokens that [CLS] attends to most, and of the others those that are least alike.

Paper: Zhang et al., arXiv:2412.01818 (v2; v1 is FasterVLM, whose scores these are). Of T tokens, int(T r) are those
with the best scores. The others are a list R, the best score first, that is thinned until T - int(T r) are left: its
even places are A, its odd ones B, and each a in A is compared with the most alike of B,

    c(a) = max over b in B of cos(x_a, x_b),    x: features of the encoder, before the projector.

The k = min(step, surplus) tokens of A with the largest c are dropped, and R is what is left of A together with B.
Kept tokens stay in raster order; each crop and each frame keeps the same number of its own; in their code positions in
the LLM are counted over what is left, which is `positions=dense` of a model. The authors' settings for LLaVA-1.5 are
num_keep=128, 64 and 32 with important_ratio=0.5 (0.75 for 64 tokens on MME), for LLaVA-NeXT the same of each of five
crops.

Departures. `order=released` puts R together as the authors' code does, A from the largest c down, ahead of B: one pair
that rounding swaps changes the places in all later rounds. Relative noise of 1e-6 on the features changed 13 images of
30 (576 tokens in clusters, 64 kept), each in about 25 of its 32 diverse tokens. `order=score`, the default, keeps R in
the order of scores, by the same rule otherwise; 1 image of 30 changed. An A with fewer than k tokens loses all of them;
the authors' code fails there, and gives a wrong count where N - int(T r) is odd. Equal scores and equal c are decided
in favour of the first of the list. Cosines are computed once for all rounds, in float64, and rounded to float32, so
that what kernels round differently is equal again. A feature of zeros has cosine 0 with all others, theirs NaN.
Encoders without [CLS]: `score`, as in FasterVLM.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.fusion.pruners.keeps import KeepsSome
from zoo.fusion.pruners.scores import NEEDS, SCORES, check_score, scores_of
from zoo.fusion.pruners.topk import check_ratio
from zoo.registry import ImageFeatures, Preset, ZooError, register, require_at_least, unknown

ORDERS = ("score", "released")
ROWS = 16  # images whose cosines are held at once, (ROWS, R, R)


@dataclass
class VisPrunerConfig:
    keep_ratio: float = 0.25  # share of image tokens kept, in (0, 1]
    num_keep: int = 0  # tokens kept of each image, crop or frame, as in the authors' scripts; 0: by keep_ratio
    important_ratio: float = 0.5  # share of the kept tokens that scores alone choose, in [0, 1]; 1: as fastervlm
    score: str = "cls"  # cls | column_mean (any encoder) | probe (SigLIP with vision.pooling_head=true)
    step: int = 8  # tokens dropped between two comparisons
    order: str = "score"  # of the tokens that are left, in each comparison: score | released (depends on rounding)

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, num_keep=self.num_keep)
        require_at_least(1, step=self.step)
        if not 0 <= self.important_ratio <= 1:
            raise ZooError(f"important_ratio must be in [0, 1], got {self.important_ratio}.")
        check_score(self.score)
        if self.order not in ORDERS:
            raise unknown("order", self.order, ORDERS)


@register("pruner", "vispruner")
class VisPruner(KeepsSome):
    """Training-free; kept tokens stay in grid order."""

    needs: frozenset[str] = frozenset({"cls_attention"})
    choices = {"score": tuple(SCORES)}  # what the check may offer beside defaults
    presets = {
        "llava15_128": Preset({"num_keep": 128, "important_ratio": 0.5, "score": "cls"}, "the scripts, LLaVA-1.5"),
        "llava15_64": Preset({"num_keep": 64, "important_ratio": 0.5, "score": "cls"}, "the scripts, LLaVA-1.5"),
        "llava15_32": Preset({"num_keep": 32, "important_ratio": 0.5, "score": "cls"}, "the scripts, LLaVA-1.5"),
        "llava_next_640": Preset({"num_keep": 128, "important_ratio": 0.5, "score": "cls"}, "LLaVA-NeXT, five crops"),
        "llava_next_320": Preset({"num_keep": 64, "important_ratio": 0.5, "score": "cls"}, "LLaVA-NeXT, five crops"),
        "llava_next_160": Preset({"num_keep": 32, "important_ratio": 0.5, "score": "cls"}, "LLaVA-NeXT, five crops"),
    }

    def __init__(self, config: VisPrunerConfig, *, num_tokens: int | None = None) -> None:
        super().__init__(config, num_tokens)
        self.needs = frozenset({NEEDS[config.score]})

    def scores(self, image: ImageFeatures) -> Tensor:
        """Return the scores of the important tokens, (M, N) float32."""
        return scores_of(image, self.config.score, "vispruner")

    def choose(self, image: ImageFeatures, k: int) -> Tensor:
        """Choose the important tokens, the best first, then those that are least alike: (M, K)."""
        c = self.config
        ranked = self.scores(image).argsort(dim=1, descending=True, stable=True)  # (M, N)
        important = int(k * c.important_ratio)
        keep, rest = ranked[:, :important], ranked[:, important:]
        if important < k:
            rows = zip(image.tokens.split(ROWS), rest.split(ROWS), strict=True)
            left = torch.cat([unlike(at(tokens, r), k - important, c.step, c.order) for tokens, r in rows])
            keep = torch.cat([keep, rest.gather(1, left)], dim=1)
        return keep


def at(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (M, R, D) at the places (M, R) among (M, N, D)."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


@torch.no_grad()
def unlike(tokens: Tensor, k: int, step: int = 8, order: str = "score") -> Tensor:
    """Thin lists of tokens (M, R, D), the best first, to k >= 1 each; returns their places (M, k), ascending."""
    m, r, _ = tokens.shape
    unit = F.normalize(tokens.double(), dim=-1)
    cosine = (unit @ unit.mT).float().flatten(1)  # (M, R * R)
    left = torch.arange(r, device=tokens.device).expand(m, -1)  # (M, R), fewer in each round
    while left.shape[1] > k:
        a, b = left[:, 0::2], left[:, 1::2]
        drop = min(step, left.shape[1] - k, a.shape[1])
        pairs = (a * r).unsqueeze(2) + b.unsqueeze(1)  # (M, A, B)
        nearest = cosine.gather(1, pairs.flatten(1)).view_as(pairs).amax(2)  # (M, A)
        alike = nearest.argsort(dim=1, descending=True, stable=True)
        left = torch.cat([a.gather(1, alike[:, drop:]), b], dim=1)
        if order == "score":
            left = left.sort(dim=1).values
    return left.sort(dim=1).values
