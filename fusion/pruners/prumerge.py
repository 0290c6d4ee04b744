"""PruMerge: keep the patches that [CLS] attends to far more than to most, and merge what is like them into each.

Paper: Shang et al., arXiv:2403.15388; its code: 42Shawn/LLaVA-PruMerge. With a the attention of [CLS] in the block
behind the features, one softmax over its whole width, and k the keys of that block (`vision.next_block=true`),

    chosen  the patches with a above q3 + 1.5 (q3 - q1), q1 and q3 the quartiles of a: how many depends on the image;
    out_i   f_i + sum of a_j f_j over the 32 patches j whose k are most alike to k_i by cosine, chosen ones included;
    extra   the sum of a_j f_j over all patches that were not chosen, one more token.

PruMerge+ (`plus=true`, what its code runs) adds evenly spaced patches to the chosen ones: with K of them of N patches,
each (N / 3K)-th. Each crop and each frame is counted and chosen by itself.

`keep` names the patch that each token began with; the extra token has the place of the best patch that was not chosen.
The names of the patches that went into a token, with their weights, are not kept (`ImageFeatures.mixed`).

Departures. The quartiles are those of each image, the authors' of the whole batch (`statistic=batch`: an answer then
depends on the images beside it). Tokens are in raster order, theirs by score (`order=score`; the order counts with
`positions=dense` alone). At least `min_keep` patches are chosen: without an outlier their PruMerge leaves the extra
token, and PruMerge+ divides by zero. Evenly spaced patches are at least 2 apart, and the last patch may be one; theirs
are each patch from K = N / 6 on, so that nothing is dropped, fail from N / 3 on, and never the last patch
(`samples=released`, where it does not fail). The extra token, which is 0 where all patches are chosen, is left out
there. Where N is 32 or less their code fails; ours takes N - 1 neighbours. Their weights are raw, so that norms grow;
the paper has means of the clusters (`weights=normalised`). Equal scores and equal cosines are decided in favour of the
first patch. With `num_keep` or `keep_ratio` counts are fixed: the best patches; with `plus` half of them, and evenly
spaced ones of the others, so that no patch comes twice: what the authors train with, the 72 best beside every eighth
patch, has some of them twice and is not offered. Encoders without [CLS] are none of the paper's: `score=column_mean`
takes the column means and the keys of the block that made the features, `score=cls` the row of [CLS] and the keys of
that block; both work without `next_block`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.fusion.pruners.topk import check_ratio, count_kept
from zoo.registry import ImageFeatures, Preset, Pruner, ZooError, register, require_at_least, unknown

SCORES = {"next": "next_attention", "cls": "cls_attention", "column_mean": "key_attention"}  # -> field
NEEDS = {"next": {"next_block"}, "cls": {"cls_attention", "keys"}, "column_mean": {"key_attention", "keys"}}
_CHOICES = {"score": tuple(SCORES), "statistic": ("image", "batch"), "order": ("raster", "score")}
_CHOICES |= {"weights": ("raw", "normalised"), "samples": ("even", "released")}
_ROWS = 64  # tokens whose neighbours are looked for at once: cosines are (M, 64, N)


@dataclass
class PruMergeConfig:
    plus: bool = False  # add evenly spaced patches: PruMerge+
    keep_ratio: float = 0.0  # share of image tokens left, the extra one included; 0: as many as there are outliers
    num_keep: int = 0  # tokens left of each image, crop or frame, the extra one included; 0: by keep_ratio
    min_keep: int = 1  # patches chosen by score at least, where outliers decide
    max_keep: int = 0  # tokens left of each row at most, the extra one included; 0: all
    score: str = "next"  # next (vision.next_block=true) | cls | column_mean (any encoder)
    neighbours: int = 32  # patches that are merged into each token; 0: none
    extra: bool = True  # one more token, of the patches that were not chosen
    weights: str = "raw"  # raw: the scores, added to the token | normalised: weighted means, the token among them
    statistic: str = "image"  # quartiles: image (of each row) | batch (of all rows, as released)
    order: str = "raster"  # raster | score: as released
    samples: str = "even"  # evenly spaced patches: even | released

    def __post_init__(self) -> None:
        if self.keep_ratio:
            check_ratio(self.keep_ratio)
        require_at_least(0, num_keep=self.num_keep, max_keep=self.max_keep, neighbours=self.neighbours)
        require_at_least(1, min_keep=self.min_keep)
        for option, allowed in _CHOICES.items():
            if getattr(self, option) not in allowed:
                raise unknown(option, getattr(self, option), allowed)
        if self.max_keep and self.max_keep < self.min_keep + self.extra:
            what, least = "min_keep and the extra token" if self.extra else "min_keep", self.min_keep + self.extra
            raise ZooError(f"max_keep must be at least {what}, {least}; got {self.max_keep}.")


@register("pruner", "prumerge")
class PruMerge(Pruner, nn.Module):
    """Training-free, though its authors fine-tune with it; the number of tokens depends on the image."""

    ragged = True
    needs: frozenset[str] = frozenset({"next_block"})
    destroys: frozenset[str] = frozenset({"grid"})
    choices = {"score": tuple(SCORES)}  # what the check may offer beside defaults
    presets = {
        "llava15": Preset({"plus": False, "score": "next"}, "the paper's PruMerge, each image by itself"),
        "llava15_plus": Preset({"plus": True, "score": "next"}, "the paper's PruMerge+, each image by itself"),
        "llava15_144": Preset({"plus": True, "score": "next", "num_keep": 145}, "the release's count in training"),
        "as_released": Preset(
            {"plus": True, "score": "next", "statistic": "batch", "order": "score", "samples": "released"},
            "what the release runs: quartiles of the batch, tokens by score",
        ),
    }

    def __init__(self, config: PruMergeConfig, *, num_tokens: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.ragged = not (config.num_keep or config.keep_ratio)
        self.needs = frozenset(NEEDS[config.score])
        if num_tokens is not None and not self.ragged and self.num_tokens(num_tokens) == num_tokens:
            self.destroys = frozenset()

    def num_tokens(self, n: int) -> int:
        """Count the most tokens left of `n`; where `num_keep` or `keep_ratio` is set, all of them."""
        if self.ragged:
            return min(n, self.config.max_keep or n)
        return min(n, self.config.num_keep) or count_kept(n, self.config.keep_ratio)

    def scores(self, image: ImageFeatures) -> Tensor:
        """Return the scores that tokens are ranked by, (M, N) float32.

        Raises:
            ZooError: the encoder did not compute them.
        """
        scores: Tensor | None = getattr(image, SCORES[self.config.score])
        keys = image.next_keys if self.config.score == "next" else image.keys
        if scores is None or keys is None:
            needs = " and ".join(sorted(NEEDS[self.config.score]))
            raise ZooError(f"pruner 'prumerge' with score={self.config.score} needs {needs}.")
        return scores.float()

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Merge the tokens (M, N, D) into at most num_tokens(N); those of a row that exist are `valid`.

        Raises:
            ZooError: the encoder did not compute what tokens are chosen by.
        """
        n = image.tokens.shape[1]
        most, a = self.num_tokens(n), self.scores(image)
        if not self.ragged and most == n:
            return image
        turn, count = self._choose(a, most)
        order = turn.argsort(dim=1, stable=True)  # (M, N) chosen ones first
        place = torch.arange(most, device=a.device)
        more = (self.config.extra & (count < n)).unsqueeze(1)  # the token behind the chosen ones is the extra one
        left = image.take(order[:, :most])
        keys = image.next_keys if self.config.score == "next" else image.keys
        assert keys is not None, "asked above"
        longest = int(count.max()) if self.ragged else most
        rest = a.masked_fill(turn < n, 0.0)  # (M, N) weights of the extra token
        if self.config.weights == "normalised":
            rest = rest / rest.sum(1, True).clamp(min=torch.finfo(rest.dtype).tiny)
        valid = place < count.unsqueeze(1) + more.long()  # (M, K)
        best = (a + 2.0 * (turn < n)).gather(1, order[:, :most])  # those that are chosen, by score; then the extra one
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # a layout may have room for fewer

        def merged(x: Tensor) -> Tensor:  # (M, N, D) -> (M, K, D)
            tokens = self._merged(x, keys.flatten(2), a, order[:, : min(longest, most)])
            last = _weighted(rest.unsqueeze(1), x)  # (M, 1, D)
            values = F.pad(tokens, (0, 0, 0, most - tokens.shape[1])).to(x.dtype)
            values = torch.where((more & (place == count.unsqueeze(1))).unsqueeze(-1), last.to(values.dtype), values)
            return values.masked_fill(~valid.unsqueeze(-1), 0.0)

        made = image.made(merged)
        left = replace(left, tokens=made.tokens, deep=made.deep, mixed=True, rank=rank)
        return left.stay(valid) if self.ragged else left

    @torch.no_grad()
    def _choose(self, a: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Choose patches by their scores (M, N).

        Returns:
            Turns (M, N), in whose order tokens are: below N for chosen patches, from N on for others by their scores;
            and how many are chosen (M,).
        """
        config, n = self.config, a.shape[1]
        rank = a.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (M, N) 0 for the best
        room = most - (config.extra and 1 < most < n)  # where all are chosen, there is no extra token
        if self.ragged:
            count = self._outliers(a).clamp(min(config.min_keep, room), room)
        else:
            count = torch.full_like(rank[:, 0], room - room // 2 if config.plus else room)
        chosen = rank < count.unsqueeze(1)
        turn = rank.where(chosen, 2 * n + rank)
        if config.plus:
            places = torch.arange(n, device=a.device)
            spaced = places % self._step(count, n).unsqueeze(1) == 0 if self.ragged else torch.ones_like(chosen)
            if self.ragged and config.samples == "released":
                spaced = spaced & (places < n - 1)
            spaced = _thinned(spaced & ~chosen, room - count)
            turn = turn.where(~spaced, places + n)
            chosen, count = chosen | spaced, count + spaced.sum(1)
            turn = turn.where(~chosen, turn.argsort(dim=1, stable=True).argsort(dim=1))  # chosen ones, 0 .. count - 1
        if config.order == "raster":
            turn = torch.arange(n, device=a.device).where(chosen, turn)
        return turn, count

    def _outliers(self, a: Tensor) -> Tensor:
        """Count the outliers of each row: (M,)."""
        whole = a.flatten()[None] if self.config.statistic == "batch" else a
        q1, q3 = torch.quantile(whole, torch.tensor([0.25, 0.75], device=a.device), dim=1, keepdim=True)
        found = (whole > q3 + 1.5 * (q3 - q1)).sum(1)
        return found if self.config.statistic == "image" else (found // len(a)).expand(len(a))

    def _step(self, count: Tensor, n: int) -> Tensor:
        """How far evenly spaced patches are apart, for `count` (M,) chosen ones of `n`."""
        return (n // (3 * count)).clamp(min=1 if self.config.samples == "released" else 2)

    def _merged(self, tokens: Tensor, keys: Tensor, a: Tensor, chosen: Tensor) -> Tensor:
        """Merge into each of the chosen patches (M, K) its neighbours: (M, K, D)."""
        near = min(self.config.neighbours, tokens.shape[1] - 1)
        own = tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        if not near:
            return own
        with torch.no_grad():
            unit = F.normalize(keys.detach().float(), dim=-1)  # (M, N, C)
        out = []
        for some, self_ in zip(chosen.split(_ROWS, 1), own.split(_ROWS, 1), strict=True):
            with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
                alike = unit.gather(1, some.unsqueeze(-1).expand(-1, -1, unit.shape[-1])) @ unit.mT  # (M, k, N)
                alike = alike.scatter(2, some.unsqueeze(-1), -torch.inf)
                best = alike.argsort(dim=2, descending=True, stable=True)[:, :, :near]  # (M, k, 32)
                share = torch.zeros_like(alike).scatter(2, best, 1.0) * a.unsqueeze(1)  # (M, k, N)
            if self.config.weights == "normalised":
                share = share.scatter(2, some.unsqueeze(-1), a.gather(1, some).unsqueeze(-1))
                out.append(_weighted(share / share.sum(-1, True).clamp(min=torch.finfo(a.dtype).tiny), tokens))
            else:
                out.append(self_ + _weighted(share, tokens))
        return torch.cat(out, 1)


def _weighted(weights: Tensor, tokens: Tensor) -> Tensor:
    """Sum tokens (M, N, D) by weights (M, K, N), in float32: (M, K, D)."""
    with torch.autocast(tokens.device.type, enabled=False):
        return weights @ tokens.float()


def _thinned(some: Tensor, most: Tensor) -> Tensor:
    """Leave `most` (M,) of the marked columns (M, N) at most, evenly spaced among them."""
    number, total = some.cumsum(1), some.sum(1, keepdim=True).clamp(min=1)  # (M, N), (M, 1)
    room = most.unsqueeze(1).minimum(total)
    return some & (number * room // total > (number - 1) * room // total)
