"""SparseVLM, SparseVLM+: keep the image tokens that words attend to which are about the image.

Paper: Zhang et al., arXiv:2410.04417 (ICML 2025); code of its versions 1.0, 1.5 and 2.0 (SparseVLM+). Raters are the
text tokens behind the first image token whose share of the image's similarity to the text (softmax over the text of
products of embeddings, at the LLM's input) is above the mean share. At the output of some layers image tokens are
ranked by the attention that the raters pay them there, the mean over raters and heads, over all keys; the best stay.
`recycle` merges the best 30 % of the others into a tenth as many, by density peaks clustering. Training-free.

`plus` divides attention by what rotary positions do to a row of ones, since it falls with distance whatever the tokens
are, and takes the mean over the heads with the largest sums of it. `counts=rank` keeps `rank_scale` times the rank of
the raters' attention and `rank_bias` more, as version 1.0; the rank of such a matrix is the number of raters, mostly.

Where we differ from the public code: rows of attention are computed beside the fused kernel, where it takes the whole
matrix L x L in every layer that cuts; batches, padding, several images (one set) and turns (raters are text in front
of the first answer) work; a merged token takes the place of its cluster's centre, where it follows those kept;
ties go to the first, where noise decides; a cut may drop nothing, where one token goes at least (`as_released`). `plus`
takes half of the heads (`as_released`: 14), and its divisor is at least a tenth of that at distance 0: it crosses zero
at distance 1707 for heads of 128, and the order of tokens beyond would be turned around. Versions 1.0 and 1.5 number
positions anew, which is `positions=dense` of a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.density_peaks import cluster_means, density_peaks
from zoo.fusion.pruners.inside.attention_flow import BLOCK, attention_flow, attention_rows
from zoo.fusion.pruners.inside.attention_tap import AttentionInputs
from zoo.fusion.pruners.inside.dropper import Choice, Dropper, DropsInside, LayerCut
from zoo.fusion.pruners.inside.raters import count_in, raters
from zoo.fusion.pruners.topk import check_ratio
from zoo.registry import Preset, ZooError, register, unknown

RELEASED = (2, 6, 15)  # layers after which tokens go, of 32
_RECYCLED, _MERGED = 0.3, 0.1  # shares of the dropped tokens that are merged, and into how many


@dataclass
class SparseVLMConfig:
    keep_ratio: float = 0.19  # share of the image tokens left behind the last cut, in (0, 1]; others keep its roots
    after: list[int] = field(default_factory=list)  # layers (from 0) whose output is cut; empty: 2, 6, 15 of 32, scaled
    ratios: list[float] = field(default_factory=list)  # of the tokens that entered, by cut; empty: by keep_ratio
    num_keep: list[int] = field(default_factory=list)  # numbers instead, by cut
    recycle: bool = False  # merge some of the dropped tokens, beside those kept
    plus: bool = False  # SparseVLM+: correct attention for distance, and choose heads
    counts: str = "table"  # table (the options above) | rank (of the raters' attention)
    rank_scale: float = 9.0  # tokens kept for each unit of rank
    rank_bias: float = 6.0  # tokens kept beside
    as_released: bool = False  # one token goes at each cut at least; 14 heads and no least divisor with plus

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        if self.counts not in ("table", "rank"):
            raise unknown("counts", self.counts, ("table", "rank"))
        if any(a >= b for a, b in pairwise([-1, *self.after])):
            raise ZooError(f"after must ascend from 0 on, got {list(self.after)}.")
        if any(not 0 < b <= a for a, b in pairwise([1.0, *self.ratios])):
            raise ZooError(f"ratios must be in (0, 1] and must not grow, got {list(self.ratios)}.")
        if any(b < 0 or b > a for a, b in pairwise([math.inf, *self.num_keep])):
            raise ZooError(f"num_keep must be at least 0 and must not grow, got {list(self.num_keep)}.")
        cuts = len(self.after) or len(RELEASED)
        for name in ("ratios", "num_keep"):
            if (given := getattr(self, name)) and len(given) != cuts:
                raise ZooError(f"{name} must have one value for each cut, {cuts}, got {list(given)}.")
        if self.ratios and self.num_keep:
            raise ZooError("ratios and num_keep exclude each other.")
        if self.plus and (self.recycle or self.counts == "rank"):
            raise ZooError("plus has no recycling and no counts by rank.")


@register("pruner", "sparsevlm")
class SparseVLM(DropsInside, nn.Module):
    """Adds no parameters, and changes nothing before the LLM."""

    presets = {
        "llava15_192": Preset(
            {"after": [2, 6, 15], "num_keep": [300, 200, 110], "recycle": True, "as_released": True},
            "version 1.5 of the release, its table for 192 tokens of LLaVA-1.5, 32 layers",
        ),
        "llava15_128": Preset(
            {"after": [2, 6, 15], "num_keep": [303, 110, 36], "recycle": True, "as_released": True},
            "version 1.5 of the release, its table for 128 tokens of LLaVA-1.5, 32 layers",
        ),
        "llava15_96": Preset(
            {"after": [2, 6, 15], "num_keep": [238, 48, 26], "recycle": True, "as_released": True},
            "version 1.5 of the release, its table for 96 tokens of LLaVA-1.5, 32 layers",
        ),
        "llava15_64": Preset(
            {"after": [2, 6, 15], "num_keep": [66, 30, 17], "recycle": True, "as_released": True},
            "version 1.5 of the release, its table for 64 tokens of LLaVA-1.5, 32 layers",
        ),
        "plus_llava15_192": Preset(
            {"after": [2, 6, 15], "num_keep": [300, 200, 118], "plus": True, "as_released": True},
            "version 2.0 of the release (SparseVLM+), its table for 192 tokens of LLaVA-1.5",
        ),
        "plus_llava15_128": Preset(
            {"after": [2, 6, 15], "num_keep": [238, 108, 60], "plus": True, "as_released": True},
            "version 2.0 of the release (SparseVLM+), its table for 128 tokens of LLaVA-1.5",
        ),
        "plus_llava15_96": Preset(
            {"after": [2, 6, 15], "num_keep": [246, 54, 28], "plus": True, "as_released": True},
            "version 2.0 of the release (SparseVLM+), its table for 96 tokens of LLaVA-1.5",
        ),
        "plus_llava15_64": Preset(
            {"after": [2, 6, 15], "num_keep": [66, 34, 20], "plus": True, "as_released": True},
            "version 2.0 of the release (SparseVLM+), its table for 64 tokens of LLaVA-1.5",
        ),
        "v1_llava15_192": Preset(
            {"after": [2, 6, 15, 19], "counts": "rank", "rank_scale": 13.5, "rank_bias": 0.0, "recycle": True},
            "version 1.0 of the release: 192 tokens of LLaVA-1.5, as set for MME",
        ),
        "v1_llava15_128": Preset(
            {"after": [2, 6, 15, 19], "counts": "rank", "rank_scale": 9.0, "rank_bias": 6.0, "recycle": True},
            "version 1.0 of the release: 128 tokens of LLaVA-1.5, as set for POPE",
        ),
        "v1_llava15_64": Preset(
            {"after": [2, 6, 15, 19], "counts": "rank", "rank_scale": 0.8, "rank_bias": 0.0, "recycle": True},
            "version 1.0 of the release: 64 tokens of LLaVA-1.5, as set for TextVQA",
        ),
    }

    def __init__(self, config: SparseVLMConfig) -> None:
        super().__init__()
        self.config = config

    # ---- counts ------------------------------------------------------------------------------------------------

    def cuts(self, num_layers: int) -> dict[int, float]:
        """Return the number, or the share in (0, 1], of tokens kept, by the layer whose output is cut."""
        c = self.config
        if c.keep_ratio == 1 and not c.ratios and not c.num_keep and c.counts == "table":
            return {}
        after = c.after or [min(round(num_layers * layer / 32), num_layers - 2) for layer in RELEASED]
        shares = [c.keep_ratio ** ((i + 1) / len(after)) for i in range(len(after))]
        # In an LLM of few layers cuts may coincide: the last of them holds.
        return {
            layer: share for layer, share in zip(after, c.num_keep or c.ratios or shares, strict=True) if layer >= 0
        }

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens in each layer, of `n` that enter the LLM; with `counts=rank` the most."""
        cuts, counts = self.cuts(num_layers), [n]
        for layer in range(num_layers - 1):
            left = counts[-1]
            if layer in cuts and left and self.config.counts == "table":
                kept = min(int(self._budget(cuts[layer], torch.tensor(n))), max(0, left - self.config.as_released))
                left = kept + (_recycled(left - kept)[1] if self.config.recycle else 0)
            counts.append(left)
        return counts

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the FLOPs of choosing in one prompt with `tokens` in each layer, as if half of the text rated."""
        depth = len(tokens)
        left = [t - tokens[0] for t in tokens]
        n = next((n for n in range(tokens[0]) if [m - n for m in self.tokens_per_layer(n, depth)] == left), 0)
        text, counts, cuts = tokens[0] - n, self.tokens_per_layer(n, depth), self.cuts(depth)
        total = 2 * n * text * heads * head_dim
        for layer in cuts:
            total += 2 * (text // 2) * tokens[layer] * heads * (head_dim + 1)
            chosen = _recycled(counts[layer] - counts[layer + 1])[0] if self.config.recycle else 0
            total += 2 * chosen**2 * heads * head_dim
        return total if cuts else 0

    def attach(self, llm: Any) -> None:
        """Register the dropper's hooks on the LLM."""
        cuts = self.cuts(llm.num_layers)
        how: dict[str, Any] = {"choose": self._choose, "votes": raters}
        self.drop_by(Dropper(llm, "pruner 'sparsevlm'", list(cuts), partial(self._budget_of, cuts), self._rate, **how))

    def _budget_of(self, cuts: Mapping[int, float], layer: int, total: Tensor) -> Tensor:
        return self._budget(cuts[layer], total)

    def _budget(self, kept: float, total: Tensor) -> Tensor:
        if self.config.num_keep:
            return total.clamp(max=int(kept))
        return (total.double() * kept + 0.5).long().clamp(min=1)

    # ---- scores ------------------------------------------------------------------------------------------------

    def _rate(self, given: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
        """Score the positions of a layer by the attention of the raters: (B, L); by rank, with the budget."""
        with torch.autocast(given.query.device.type, enabled=False):
            return self._corrected(given) if self.config.plus else self._plain(given)

    def _plain(self, given: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
        """Score by attention, the mean over heads: (B, L)."""
        how: dict[str, Any] = {"scaling": given.scaling, "visible": given.visible, "softcap": given.softcap}
        scores = attention_flow(given.query, given.key, given.votes, **how).mean(1)
        if self.config.counts == "table":
            return scores
        votes, counts = given.votes, given.tokens.count()
        rows = votes.ne(0).any(0).nonzero()[:, 0]
        seen = attention_rows(given.query, given.key, rows, votes.shape[1], **how).mean(1)  # (B, R, L)
        for b, sample in counts.nonzero().tolist():
            mine = given.tokens.segment[b] == sample
            block = seen[b][votes[b, rows].ne(0) & mine[rows]][:, mine & given.tokens.image[b] & given.tokens.seen[b]]
            rank = int(torch.linalg.matrix_rank(block))
            whole = rank == block.shape[1]  # only then does nothing go, in version 1.0
            kept = int(rank * self.config.rank_scale + self.config.rank_bias)
            counts[b, sample] = block.shape[1] if whole else min(kept, block.shape[1] - 1)
        return scores, counts

    def _corrected(self, given: AttentionInputs) -> Tensor:
        """Score by attention divided by what rotation does to ones, of the heads with the largest sums: (B, L)."""
        query, votes, tokens = given.query, given.votes, given.tokens
        heads, length = query.shape[1], query.shape[2]
        by_distance, total = self._of_ones(given), query.new_zeros(len(query), heads, length, dtype=torch.float32)
        for rows in votes.ne(0).any(0).nonzero()[:, 0].split(BLOCK):
            how: dict[str, Any] = {"scaling": given.scaling, "visible": given.visible, "softcap": given.softcap}
            p = attention_rows(query, given.key, rows, length, **how)  # (B, H, R, L)
            apart = (tokens.place[:, rows, None] - tokens.place[:, None]).clamp(min=0)  # (B, R, L)
            total += (p * votes[:, None, rows, None] / by_distance[apart][:, None]).sum(2)
        # The heads are those of each sample of a row: S of them.
        mine = tokens.segment[:, None] == torch.arange(tokens.count().shape[1], device=query.device)[:, None]
        sums = total @ (mine & (tokens.image & tokens.seen)[:, None]).float().transpose(1, 2)  # (B, H, S)
        many = min(heads, 14) if self.config.as_released else max(1, heads // 2)
        best = sums.argsort(dim=1, descending=True, stable=True)[:, :many]
        chosen = torch.zeros_like(sums).scatter(1, best, 1 / many)  # (B, H, S)
        return (total * chosen.gather(2, tokens.segment[:, None].expand_as(total))).sum(1)

    def _of_ones(self, given: AttentionInputs) -> Tensor:
        """Return the score of two rows of ones by their distance, after rotation: (D,)."""
        assert self.dropper is not None, "the dropper calls it"
        dim, frequencies = given.query.shape[-1], self.dropper.arguments.frequencies(given.layer)
        if frequencies is None:  # positions are not rotations: nothing falls with distance
            return given.query.new_ones(int(given.tokens.place.max()) + 1, dtype=torch.float32)
        distance = torch.arange(int(given.tokens.place.max()) + 1, device=given.query.device)
        turned = (distance[:, None] * frequencies.float()).cos().sum(1)
        ones = (2 * turned + dim - 2 * len(frequencies)) / dim**0.5
        return ones if self.config.as_released else ones.clamp(min=0.1 * dim**0.5)

    # ---- choice ------------------------------------------------------------------------------------------------

    def _choose(self, cut: LayerCut) -> Tensor | Choice:
        """Keep the best, and with `recycle` rows made of others, in the places of the centres of their clusters."""
        tokens, budget = cut.tokens, cut.budget
        assert cut.scores is not None and budget is not None, "the dropper calls it behind a scored layer"
        image = tokens.image & tokens.seen
        if self.config.as_released:
            budget = torch.minimum(budget, count_in(image, tokens.segment, budget.shape[1]) - 1).clamp(min=0)
        keep = tokens.choose(cut.scores, budget, cut.copies)
        if not self.config.recycle:
            return keep
        dropped, hidden = image & ~keep, cut.hidden.clone()
        for b, sample in count_in(dropped, tokens.segment, budget.shape[1]).nonzero().tolist():
            index = (dropped[b] & (tokens.segment[b] == sample)).nonzero()[:, 0]
            chosen, count = _recycled(len(index))
            index = index[cut.scores[b, index].argsort(descending=True, stable=True)[:chosen]]
            centres, cluster = density_peaks(cut.hidden[b, index], count)
            keep[b, index[centres]] = True
            hidden[b, index[centres]] = cluster_means(cut.hidden[b, index], cluster, count)
        return Choice(keep, hidden)


def _recycled(dropped: int) -> tuple[int, int]:
    """Count which of the dropped tokens are merged, and into how many."""
    chosen = int(_RECYCLED * dropped) + 1 if dropped else 0
    return chosen, int(_MERGED * chosen) + 1 if dropped else 0
