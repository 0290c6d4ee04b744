"""HoloV: the image tokens that [CLS] attends to most, with a quota for each crop of the grid.

Paper: Zou et al., arXiv:2510.02912. The grid is cut into P crops. With a the scores of FasterVLM, S the cosines of the
m tokens of a crop and mu_i the mean of row i, crop p gets of T tokens the share c_p / sum(c):

    c_p = mean(1000 a) + alpha V_p mean(1000 a) / V,    V_p = mean over i of sum_j (S_ij - mu_i)^2 / (m - 1)

rounded down; what rounding leaves goes one each to the crops with the largest c. The tokens of a crop with the largest
a fill its quota, and kept tokens remain in raster order. Each row of the batch, a tile of a large image or a frame of a
video, is a grid of its own with its own T; with `budget=image`, as in the authors' code, T and P are those of all rows,
so that tiles, or frames, compete. They stitch tiles to one grid before they cut it; here a crop is inside of one tile.

Departures. In the authors' code (`spread=crop`) V is V_p, so that variety cancels and quotas are shares of attention;
its V_p counts the zero diagonal of S, which gives 1 / (m - 1) to a crop of equal tokens; and a crop of one token lacks
the factor 1000. By default (`spread=image`) V and the mean beside it are means over all crops, without the diagonal.
Their crops are runs of tokens, 1.5 lines of 24 (`shape=run`), ours windows as square as the grid allows. What a full
crop cannot take goes to the others, one each in the order of c, round by round; their code appends rows of zeros, which
the LLM would read as tokens. Where their code appends none, `spread=crop shape=run` keeps its set. Its order, by a
within a crop, is not offered: indices that `take` gets ascend. Their code counts positions in the LLM over what is
left, which is `positions=dense` of a model. Shares are computed in float64, and equal scores are decided in favour of
the first token. We drop before the projector, which changes nothing where variety cancels.
Encoders without [CLS]: `score`, as in FasterVLM. The paper's second half, refetching what was pruned, is not released.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.fusion.pruners.keeps import KeepsSome, check_budget
from zoo.fusion.pruners.scores import NEEDS, SCORES, check_score, scores_of
from zoo.fusion.pruners.topk import check_ratio
from zoo.registry import ImageFeatures, Preset, ZooError, register, require_at_least, unknown

SPREADS = ("image", "crop")
SHAPES = ("grid", "run")


@dataclass
class HoloVConfig:
    keep_ratio: float = 0.25  # share of image tokens kept, in (0, 1]
    num_keep: int = 0  # tokens kept of each image, crop or frame; 0: by keep_ratio. The authors' setting: 64 of 576
    budget: str = "row"  # whose number that is: row (each tile, each frame) | image (all of its rows, which compete)
    crops: int = 0  # parts that share the tokens; 0: 1024/576 of N / num_keep, the authors' 16 where 64 of 576 are kept
    alpha: float = 0.09  # weight of a crop's variety beside its attention, at least 0
    spread: str = "image"  # image: variety is compared between crops | crop: as released, where it cancels
    shape: str = "grid"  # grid: windows | run: tokens in raster order, as released (needs no grid)
    score: str = "cls"  # cls | column_mean (any encoder) | probe (SigLIP with vision.pooling_head=true)

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, num_keep=self.num_keep, crops=self.crops, alpha=self.alpha)
        check_score(self.score)
        check_budget(self.budget)
        for option, allowed in (("spread", SPREADS), ("shape", SHAPES)):
            if getattr(self, option) not in allowed:
                raise unknown(option, getattr(self, option), allowed)


@register("pruner", "holov")
class HoloV(KeepsSome):
    """Training-free; kept tokens stay in grid order."""

    needs: frozenset[str] = frozenset({"cls_attention", "grid"})
    choices = {"score": tuple(SCORES), "shape": SHAPES}  # what the check may offer beside defaults
    presets = {
        "llava15_64": Preset(
            {"num_keep": 64, "crops": 16, "alpha": 0.09, "score": "cls"},
            "the release's one budget, with the paper's variety",
        ),
        "llava15_64_released": Preset(
            {"num_keep": 64, "crops": 16, "alpha": 0.09, "spread": "crop", "shape": "run", "score": "cls"},
            "the release: runs as crops, variety cancels",
        ),
    }

    def __init__(self, config: HoloVConfig, *, num_tokens: int | None = None) -> None:
        super().__init__(config, num_tokens)
        self.needs = frozenset({NEEDS[config.score], *(["grid"] if config.shape == "grid" else [])})

    def scores(self, image: ImageFeatures) -> Tensor:
        """Return the scores that tokens of a crop are ranked by, (M, N) float32.

        Raises:
            ZooError: the encoder did not compute them.
        """
        return scores_of(image, self.config.score, "holov")

    @torch.no_grad()
    def choose(self, image: ImageFeatures, k: int) -> Tensor:
        """Choose (M, K) indices; those to be given up last come first, of each crop the same part of its quota.

        Raises:
            ZooError: `shape=grid`, and the tokens have no grid.
        """
        return self._within(image, self.scores(image), k)

    @torch.no_grad()
    def choose_of_image(self, image: ImageFeatures, total: int) -> list[Tensor]:
        """Choose `total` tokens of all rows of an image: indices (k,) of each row.

        Raises:
            ZooError: `shape=grid`, and the tokens have no grid.
        """
        rows, n = image.tokens.shape[:2]
        run = replace(image, tokens=image.tokens.flatten(0, 1)[None])  # (1, R * N, D), on the grid of a row
        order = self._within(run, self.scores(image).reshape(1, -1), total)[0]  # (total,)
        return [order[order // n == row] % n for row in range(rows)]

    def _within(self, image: ImageFeatures, scores: Tensor, k: int) -> Tensor:
        """Choose (M, K) of the tokens by scores (M, N), with a quota for each crop."""
        crops, real = self._crops(image, k)  # (P, L)
        a = 1000 * scores.double()[:, crops] * real  # (M, P, L); the factor weighs against the 1e-6 below
        c = self._crop_scores(image.tokens, a, crops, real)  # (M, P)
        w = c / (c.sum(1, True) + 1e-6)
        place = _ranks(w)
        quota = (w * k).floor().long()
        quota += place < k - quota.sum(1, True)  # at most P are left by rounding
        quota, place = quota.unsqueeze(-1), place.unsqueeze(-1)
        rank = _ranks(a.masked_fill(~real, -1.0))
        extra = 2.0 + (rank - quota) * len(crops) + place  # round by round, where crops are full
        turn = ((rank + 1) / quota.double()).where(rank < quota, extra).masked_fill(~real, torch.inf)
        return crops.flatten()[turn.flatten(1).argsort(dim=1, stable=True)[:, :k]]

    def _crop_scores(self, tokens: Tensor, a: Tensor, crops: Tensor, real: Tensor) -> Tensor:
        """Score the crops, (M, P) float64, by tokens (M, N, D) and their attention (M, P, L)."""
        m, alone = real.sum(1), real.sum(1) == 1  # (P,)
        mean = a.sum(-1) / m
        if not self.config.alpha or len(crops) == 1:
            variety = torch.zeros_like(mean)
        else:
            x = tokens.double()[:, crops]  # (M, P, L, D); autocast leaves float64 alone
            products = x @ x.mT  # (M, P, L, L)
            length = products.diagonal(dim1=-2, dim2=-1).sqrt() + 1e-6  # (M, P, L)
            pairs = real.unsqueeze(-1) & real.unsqueeze(-2)  # (P, L, L)
            others = pairs & ~torch.eye(crops.shape[1], dtype=torch.bool, device=x.device)
            cosines = products / (length.unsqueeze(-1) * length.unsqueeze(-2)) * others
            rest = (m - 1).clamp(min=1).view(-1, 1, 1)
            counted = pairs if self.config.spread == "crop" else others
            apart = (cosines - cosines.sum(-1, True) / rest).square() * counted
            variety = (apart / rest).sum((-1, -2)) / m
        if self.config.spread == "image":
            return mean + self.config.alpha * variety * (mean.mean(1, True) / (variety.mean(1, True) + 1e-6))
        return (mean + self.config.alpha * mean / (variety + 1e-6) * variety) / torch.where(alone, 1000.0, 1.0)

    def _crops(self, image: ImageFeatures, k: int) -> tuple[Tensor, Tensor]:
        """Cut tokens (M, N, D), of one or more rows on the grid.

        Returns:
            The tokens of each crop (P, L) in raster order, and which of the L are real: crops may be shorter.
        """
        n, device = image.tokens.shape[1], image.tokens.device
        p = min(n, self.config.crops or max(1, 1024 * n // (576 * k)))
        lines, columns = 1, p
        h, w = 1, n
        if self.config.shape == "grid":
            if image.grid is None:
                raise ZooError("pruner 'holov' with shape=grid needs grid; shape=run does not.")
            h, w = image.grid if p > 1 else (h, w)
            side = math.sqrt(n / p)  # of a window
            lines, columns = (min(s, max(1, round(s / side))) for s in (h, w)) if p > 1 else (1, 1)
        down, across = _parts(h, lines, device), _parts(w, columns, device)  # (lines, l), (columns, c)
        crops = down[:, None, :, None] * w + across[None, :, None, :]  # (lines, columns, l, c)
        real = (down[:, None, :, None] < h) & (across[None, :, None, :] < w)
        crops, real = (t.reshape(lines * columns, -1) for t in (crops, real))
        first = torch.arange(0, n, h * w, device=device).view(-1, 1, 1)  # of each row on the grid; of a run, one
        return (first + crops.where(real, 0)).flatten(0, 1), real.repeat(len(first), 1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, 0 for the largest; of equal values the first has the smaller rank."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _parts(n: int, parts: int, device: torch.device) -> Tensor:
    """Cut 0 .. n-1 into runs (parts, L), the first n mod parts of them one longer; n where a run is shorter."""
    least, longer = divmod(n, parts)
    i = torch.arange(parts, device=device).unsqueeze(1)
    j = torch.arange(least + (longer > 0), device=device)
    return (i * least + i.clamp(max=longer) + j).where(j < least + (i < longer), n)
