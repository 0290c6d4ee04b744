"""HiPrune: keep what a middle block of the encoder attends to most, with its neighbours, then what the last one does.

Paper: arXiv:2508.00553; its code: Danielement321/HiPrune. Scores are column means of attention: how much a patch is
attended to, over all heads and all queries ([CLS] among them), normalised over all keys. Of T tokens that are kept,

    anchors    the n = round(T alpha / 5) with the best scores in block `object_layer`,
    buffers    the four neighbours of each anchor in the grid,
    registers  of all others, those with the best scores in the block that made the features, until T are kept.

Kept tokens stay in raster order; each crop and each frame chooses among its own. The authors' settings for
LLaVA-1.5 are num_keep=192, 128 and 64 with alpha=0.1 and object_layer=9 of 24. With them at most a tenth of the tokens
come from the middle block; with alpha=0, or few tokens, this is FasterVLM with score=column_mean.

Departures. `edges=released` counts neighbours as the authors' code does, in the flat list of patches: i - 1 of the
first column is the end of the row above, and each anchor of the top (bottom) row adds the first (last) patch.
`edges=grid`, the default, takes neighbours in the grid alone. Theirs works for 24 x 24 patches; both work here for any
grid. Where anchors and buffers are more than T, the last of the anchors are left out until they fit; their code fails
there. Equal scores are decided in favour of the first token. `budget=image` is theirs: num_keep is the number of an
image, which its crops share evenly, 640 of five crops are 128 each; what does not divide, which theirs loses, goes to
the first ones. Over several images theirs divides by all of their crops; here each image has its own budget.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.fusion.pruners.keeps import KeepsSome, check_budget
from zoo.fusion.pruners.scores import scores_of
from zoo.fusion.pruners.topk import best, check_ratio
from zoo.registry import ImageFeatures, Preset, ZooError, register, require_at_least, unknown

EDGES = ("grid", "released")


@dataclass
class HiPruneConfig:
    keep_ratio: float = 0.25  # share of image tokens kept, in (0, 1]
    num_keep: int = 0  # tokens kept of each image, crop or frame; 0: by keep_ratio
    budget: str = "row"  # whose number that is: row (each crop, each frame) | image (all of its rows, in equal shares)
    alpha: float = 0.1  # share of the kept tokens that are anchors and buffers, in [0, 1]
    object_layer: int = 0  # block of the anchors, 1 the first; 0: at 9 / 24 of the encoder's depth, 9 of CLIP-L
    edges: str = "grid"  # neighbours at the border of the grid: grid (those inside) | released (wrap and clamp)

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, num_keep=self.num_keep, object_layer=self.object_layer)
        check_budget(self.budget)
        if not 0 <= self.alpha <= 1:
            raise ZooError(f"alpha must be in [0, 1], got {self.alpha}.")
        if self.edges not in EDGES:
            raise unknown("edges", self.edges, EDGES)


@register("pruner", "hiprune")
class HiPrune(KeepsSome):
    """Training-free; kept tokens stay in grid order."""

    needs: frozenset[str] = frozenset({"key_attention", "grid"})
    presets = {
        "llava15_192": Preset({"num_keep": 192, "alpha": 0.1, "object_layer": 9}, "the release's LLaVA-1.5"),
        "llava15_128": Preset({"num_keep": 128, "alpha": 0.1, "object_layer": 9}, "the release's LLaVA-1.5"),
        "llava15_64": Preset({"num_keep": 64, "alpha": 0.1, "object_layer": 9}, "the release's LLaVA-1.5"),
        "llava_next_640": Preset(
            {"num_keep": 640, "budget": "image", "alpha": 0.1, "object_layer": 9}, "its LLaVA-NeXT: of all crops"
        ),
        "llava_next_320": Preset(
            {"num_keep": 320, "budget": "image", "alpha": 0.1, "object_layer": 9}, "its LLaVA-NeXT: of all crops"
        ),
        "llava_next_160": Preset(
            {"num_keep": 160, "budget": "image", "alpha": 0.1, "object_layer": 9}, "its LLaVA-NeXT: of all crops"
        ),
    }

    def __init__(self, config: HiPruneConfig, *, vision_depth: int = 0, num_tokens: int | None = None) -> None:
        super().__init__(config, num_tokens)
        layer = config.object_layer or max(1, round(vision_depth * 9 / 24))
        self.word = f"key_attention@{layer}"
        if config.alpha == 0:
            self.needs = frozenset({"key_attention"})
        elif not config.object_layer and not vision_depth:
            raise ZooError("object_layer=0 needs the encoder's depth, which it does not state: set object_layer.")
        else:
            self.needs = frozenset({"key_attention", "grid", self.word})

    def scores(self, image: ImageFeatures) -> Tensor:
        """Return the scores of the registers, (M, N) float32.

        Raises:
            ZooError: the encoder did not compute them.
        """
        return scores_of(image, "column_mean", "hiprune")

    def choose(self, image: ImageFeatures, k: int) -> Tensor:
        """Choose anchors and buffers first, in the order of their anchors; then registers, by their scores: (M, K).

        Raises:
            ZooError: the grid, or the scores of a block, are missing.
        """
        deep = self.scores(image)
        anchors = round(k * self.config.alpha / 5)
        if not anchors:
            return best(deep, k)
        if image.grid is None or self.word not in image.block_attention:
            raise ZooError(f"pruner 'hiprune' needs the grid and {self.word}.")
        order = best(image.block_attention[self.word], anchors)  # (M, A)
        first = _around(order, image.grid, self.config.edges, k)  # (M, N)
        ranked = deep.argsort(dim=1, descending=True, stable=True)
        by_anchor = first.gather(1, ranked).argsort(dim=1, stable=True)  # registers share the last place
        return ranked.gather(1, by_anchor)[:, :k]


def _around(anchors: Tensor, grid: tuple[int, int], edges: str, most: int) -> Tensor:
    """Number the patches by the anchors that take them: (M, h * w).

    Args:
        anchors: (M, A) patches, the best first.
        grid: (h, w) of the patches.
        edges: how neighbours are counted, one of `EDGES`.
        most: patches that are taken at most. The last of the anchors are left out until they are no more.

    Returns:
        2 a for the anchor `a` itself and 2 a + 1 for its neighbours, the least if there are several; 2 A for others.
    """
    (h, w), n, count = grid, grid[0] * grid[1], anchors.shape[1]
    if edges == "grid":
        row, column = anchors // w, anchors % w
        beside = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
        inside = torch.stack([(r >= 0) & (r < h) & (c >= 0) & (c < w) for r, c in beside], dim=2)  # (M, A, 4)
        near = torch.stack([r * w + c for r, c in beside], dim=2).where(inside, n)  # n: outside of the grid
    else:
        near = torch.stack([anchors - 1, anchors + 1, anchors - w, anchors + w], dim=2).clamp(0, n - 1)
    number = 2 * torch.arange(count, device=anchors.device)
    numbers = torch.cat([number[:, None], (number + 1)[:, None].expand(-1, 4)], dim=1)  # (A, 5)
    taken = torch.cat([anchors.unsqueeze(2), near], dim=2)  # (M, A, 5)
    least = anchors.new_full((len(anchors), n + 1), 2 * count)
    least = least.scatter_reduce(1, taken.flatten(1), numbers.flatten().expand(len(anchors), -1), "amin")[:, :n]
    size = F.one_hot(least // 2, count + 1).sum(1).cumsum(1)  # (M, A + 1) patches of the first anchors
    fit = (size[:, :count] <= most).sum(1, keepdim=True)  # anchors that fit
    return least.where(least // 2 < fit, 2 * count)
