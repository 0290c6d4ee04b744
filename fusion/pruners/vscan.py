"""VScan: half of the tokens from all over the image, half where [CLS] looks; the others merged; fewer at half depth.

Paper: arXiv:2505.22654 (TMLR 2026); its code: Tencent/SelfEvolvingAgent, VScan. Of the N tokens of an image, crop or
frame T stay, behind the projector:

    local   half of them by the [CLS] row of a shallow block, evenly over windows of the grid;
    global  the rest by the [CLS] row of the block that made the features, among those that are left;
    merge   every other token y_j joins the kept one of the largest cosine; y_i becomes the mean of itself and those.

In the LLM, behind half of the layers, a third of the image tokens goes on: those that the token in front of the answer
would attend to most in the layer behind the cut. The authors' setting for LLaVA-1.5 and NeXT is 96 tokens (of each
crop), then 32: 64 in the mean of the layers. By the same rule 192 / 64 are 128 in the mean, 288 / 96 are 192.

Departures. `windows=square` is the release's choice for encoders with [CLS]: each window gives the same number, so that
T tokens are met only where the windows divide their half (40 become 36 there), and fewer of them than windows leave the
local half empty, where the code fails. `windows=capped`, the default, is its choice for other encoders: the best of the
whole map, from each window at most its share rounded up; exactly T stay. Where windows are too small for that, the best
of what is left. Theirs are 6 x 6 of 24 x 24 patches; ours are a quarter of the shorter side, and those at the lower and
right border take what does not divide. Equal scores and cosines are decided in favour of the first token. `merge=none`
drops the others. Encoders without [CLS]: column means of both blocks (`score=column_mean`), as in their code for Qwen,
which ranks without rotation; its settings for Qwen2.5-VL, shares of .167 or .6 and then of .333 or .67 at layer 14 of
28, are options here and no presets, and one cut is made, where their code takes a list. Theirs counts positions in the
LLM anew from the cut on, which is `positions=dense`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.fusion.pruners.inside.attention_flow import attention_flow
from zoo.fusion.pruners.inside.attention_tap import AttentionInputs
from zoo.fusion.pruners.inside.dropper import Dropper, DropsInside
from zoo.fusion.pruners.scores import scores_of
from zoo.fusion.pruners.topk import check_ratio, count_kept
from zoo.registry import Cut, ImageFeatures, Preset, ZooError, register, require_at_least, unknown

WORDS = {"cls": "cls_attention", "column_mean": "key_attention"}
_CHOICES = {"score": tuple(WORDS), "windows": ("capped", "square"), "merge": ("projected", "none")}


@dataclass
class VScanConfig:
    keep_ratio: float = 0.25  # share of image tokens that enter the LLM, in (0, 1]
    num_keep: int = 0  # tokens of each image, crop or frame that enter it; 0: by keep_ratio
    local_share: float = 0.5  # share of them chosen by the shallow block, over windows, in [0, 1]
    shallow_layer: int = 0  # block of the local half, 1 the first; 0: at a quarter of the encoder's depth, 6 of CLIP-L
    windows: str = "capped"  # capped (exact counts) | square (as released for [CLS])
    window: int = 0  # side of a window in tokens; 0: a quarter of the grid's shorter side
    merge: str = "projected"  # what becomes of the others: projected (merged, behind the projector) | none (dropped)
    score: str = "cls"  # cls | column_mean (any encoder)
    llm_layer: int = 0  # first layer of the LLM with fewer tokens; 0: at half of its depth
    llm_ratio: float = 0.333  # share of its image tokens from there on, in (0, 1]; 1: all

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, num_keep=self.num_keep, shallow_layer=self.shallow_layer, window=self.window)
        require_at_least(0, llm_layer=self.llm_layer)
        if not 0 <= self.local_share <= 1:
            raise ZooError(f"local_share must be in [0, 1], got {self.local_share}.")
        if not 0 < self.llm_ratio <= 1:
            raise ZooError(f"llm_ratio must be in (0, 1], got {self.llm_ratio}.")
        for option, allowed in _CHOICES.items():
            if getattr(self, option) not in allowed:
                raise unknown(option, getattr(self, option), allowed)


@register("pruner", "vscan")
class VScan(DropsInside, nn.Module):
    """Training-free; adds no parameters."""

    behind = ragged = True
    choices = {"score": tuple(WORDS)}  # what the check may offer beside defaults
    presets = {
        "llava15_64": Preset(
            {"num_keep": 96, "shallow_layer": 6, "windows": "square", "window": 6, "score": "cls", "llm_layer": 16},
            "the release's LLaVA-1.5, and NeXT by crop: 96, then 32",
        ),
        "llava15_128": Preset(
            {"num_keep": 192, "shallow_layer": 6, "windows": "square", "window": 6, "score": "cls", "llm_layer": 16},
            "by the release's rule, 1.5 times the mean: 192, then 64",
        ),
        "llava15_192": Preset(
            {"num_keep": 288, "shallow_layer": 6, "windows": "square", "window": 6, "score": "cls", "llm_layer": 16},
            "by the release's rule, 1.5 times the mean: 288, then 96",
        ),
    }

    def __init__(self, config: VScanConfig, *, vision_depth: int = 0) -> None:
        super().__init__()
        self.config = config
        layer = config.shallow_layer or max(1, round(vision_depth / 4))
        base = WORDS[config.score]
        self.word = f"{base}@{layer}"
        if config.local_share and not config.shallow_layer and not vision_depth:
            raise ZooError("shallow_layer=0 needs the encoder's depth, which it does not state: set shallow_layer.")
        local = {self.word, "grid"} if config.local_share else set()
        self.needs = frozenset({base, *local, *({"image_tokens"} if config.llm_ratio < 1 else ())})

    # ---- before the LLM ----------------------------------------------------------------------------------------

    def count(self, n: int) -> int:
        """Count the tokens that stay of `n`; with `windows=square` the most."""
        return min(n, self.config.num_keep) or count_kept(n, self.config.keep_ratio)

    def tokens_of_image(self, n: int, cut: Cut) -> int:
        """Count the tokens that stay of all rows of an image, of `n` each."""
        return cut.rows * self.count(n)

    def scores(self, image: ImageFeatures) -> Tensor:
        """Return the scores of the global half, (M, N) float32.

        Raises:
            ZooError: the encoder did not compute them.
        """
        return scores_of(image, self.config.score, "vscan")

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Mark the tokens (M, N, C) that stay, with the others merged into them.

        Raises:
            ZooError: the grid, or scores of a block, are missing.
        """
        n = image.tokens.shape[1]
        if self.count(n) == n:
            return image
        valid = self.choose(image)
        return (image if self.config.merge == "none" else image.made(_merge(image.tokens, valid))).stay(valid)

    @torch.no_grad()
    def choose(self, image: ImageFeatures) -> Tensor:
        """Choose the tokens that stay, equally many in each row: (M, N) bool."""
        deep, n = self.scores(image), image.tokens.shape[1]
        k = self.count(n)
        local = int(k * self.config.local_share)
        first = torch.zeros_like(deep, dtype=torch.bool)
        if local:
            if image.grid is None or self.word not in image.block_attention:
                raise ZooError(f"pruner 'vscan' needs the grid and {self.word}.")
            first = self._local(image.block_attention[self.word], image.grid, local)
        more = k - local
        if not more and not bool(first.any()):  # all by windows, which are more than tokens: one stays
            more = 1
        return first | (_ranks(deep.masked_fill(first, -torch.inf)) < more)

    def _local(self, scores: Tensor, grid: tuple[int, int], most: int) -> Tensor:
        """Choose `most` tokens (fewer with `windows=square`) by scores (M, N), over windows: (M, N) bool."""
        (h, w), side = grid, self.config.window or max(1, min(grid) // 4)
        down, across = max(1, h // side), max(1, w // side)
        device = scores.device
        line = (torch.arange(h, device=device) // side).clamp(max=down - 1)
        column = (torch.arange(w, device=device) // side).clamp(max=across - 1)
        window = (line.unsqueeze(1) * across + column).flatten()  # (N,)
        rank = _ranks_within(scores, window)
        if self.config.windows == "square":
            return rank < most // (down * across)
        capped = rank < -(-most // (down * across))
        return _ranks(scores + 2.0 * capped) < most  # scores are shares of attention, at most 1

    # ---- inside the LLM ----------------------------------------------------------------------------------------

    def _cut(self, num_layers: int) -> int:
        """Return the first layer with fewer tokens; 0: there is none."""
        if self.config.llm_ratio == 1 or num_layers < 2:
            return 0
        layer = self.config.llm_layer or num_layers // 2
        if layer >= num_layers:
            raise ZooError(f"llm_layer must be below the depth of the LLM, {num_layers}, got {layer}.")
        return layer

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens in each layer, of `n` that enter the LLM."""
        cut = self._cut(num_layers) or num_layers
        return [n] * cut + [int(self._left(torch.tensor(n)))] * (num_layers - cut)

    def attach(self, llm: Any) -> None:
        """Register the dropper's hooks on the LLM."""
        if cut := self._cut(llm.num_layers):
            how: dict[str, Any] = {"reads": "behind", "votes": "turns"}
            self.drop_by(Dropper(llm, "pruner 'vscan'", [cut - 1], self._budget, _attended, **how))

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the FLOPs of ranking one prompt with `tokens` in each layer: keys, a query and its row, at the cut."""
        cut = self._cut(len(tokens))
        if not cut or self.dropper is None:
            return 0
        return 2 * tokens[cut - 1] * heads * (head_dim + 1) + self.dropper.reading_flops(tokens)

    def _budget(self, layer: int, total: Tensor) -> Tensor:
        return self._left(total)

    def _left(self, total: Tensor) -> Tensor:
        return (total.double() * self.config.llm_ratio + 0.5).long().clamp(min=1)


def _attended(given: AttentionInputs) -> Tensor:
    """Score the positions of a layer by the attention of the voters, the mean over heads: (B, L)."""
    how: dict[str, Any] = {"scaling": given.scaling, "visible": given.visible, "softcap": given.softcap}
    return attention_flow(given.query, given.key, given.votes, **how).mean(1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks in each row, 0 for the largest; of equal values the first has the smaller rank."""
    return values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _ranks_within(values: Tensor, group: Tensor) -> Tensor:
    """Ranks (M, N) of values (M, N) among those of the same group (N,), 0 for the largest."""
    order = values.argsort(dim=1, descending=True, stable=True)
    by_group = order.gather(1, group[order].argsort(dim=1, stable=True))  # group by group, the best first
    sizes = torch.bincount(group)
    place = torch.arange(len(group), device=values.device) - (sizes.cumsum(0) - sizes)[group.sort().values]
    return torch.empty_like(order).scatter(1, by_group, place.expand_as(order))


def _merge(tokens: Tensor, valid: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what averages features (M, N, D) that do not stay into those that do, equally many in each row.

    Args:
        tokens: (M, N, C) by whose cosines they join.
        valid: (M, N) those that stay.
    """
    k = int(valid[:1].sum())
    order = valid.byte().argsort(dim=1, descending=True, stable=True)  # those that stay first, each in raster order
    stays, rest = order[:, :k], order[:, k:]
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float(), dim=-1, eps=1e-8)
        alike = _rows(unit, rest) @ _rows(unit, stays).mT  # (M, N - K, K)
        into = stays.gather(1, alike.argmax(-1))  # (M, N - K), of equal cosines the first
        size = torch.ones(valid.shape, device=tokens.device).scatter_add(1, into, torch.ones_like(into).float())

    def merged(x: Tensor) -> Tensor:
        members = _rows(x, rest).float()
        total = x.float().scatter_add(1, into.unsqueeze(-1).expand_as(members), members)
        return (total / size.unsqueeze(-1)).to(x.dtype)

    return merged


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows (M, K, C) of tokens (M, N, C) at (M, K)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
