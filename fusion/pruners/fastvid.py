"""FastVID: of each frame of a video the most salient tokens, and a few that gather what else its scene shows.

Paper: FastVID (NeurIPS 2025), arXiv:2503.11187; code: LunarShen/FastVID at a40a109, its LLaVA-OneVision version. A
video has T frames of P tokens, as they enter the LLM, behind the projector and a layout's pooling of frames.

Scenes. s(t) is the cosine of the summaries of the frames t and t + 1; the video is cut between them where s(t) < tau,
and at the c - 1 smallest s. A summary is the output of SigLIP's pooling head.

Salient tokens. Each frame has a budget of R = int(P r) tokens, f = int(R d) of them for context. It keeps the R - f
tokens to which the pooling head attends most, by scores that are pooled as the tokens are.

Context. Of a scene of n frames the last one and every p-th before it are anchors, a = ceil(n / p) of them, and each has
f n / a targets among its tokens that are not salient: those with the largest rho delta. With D(i, j) = |x(i) - x(j)| /
sqrt(C), rho(i) is exp(-mean of the 4 smallest D(i, j)^2), i included, and delta(i) the distance to the nearest token
that is denser, the largest distance of the frame where there is none. For each anchor alone, every token of the scene
that is not salient joins the target with the largest cosine, which becomes b x + (1 - b) (mean of the k that joined),
b = max(1 / (k + 1), beta). So a token of the scene goes into one target of every anchor.

Kept tokens have the places that they had, merged ones those of their target; in the code, too, which is
`positions=kept` of a model. Images are returned as they are.

Departures. Of f n tokens that a anchors do not divide evenly, the first anchors get one more (`remainder=spread`, as in
the code's version for Qwen2.5-VL), so that a video keeps T R tokens, known ahead; `remainder=floor` drops them, and the
count then depends on the scenes. A video of fewer than c frames is cut between all of them; where anchors have no room
for their targets, more frames are anchors; R is at least 1, and f may be 0. All of these fail in the code. Densities
have no noise, and everything is float32. The pooling head runs behind the encoder's last block, where it was trained;
the code puts it on the features of an earlier one. Published video models come without that head, so that the default
is `summary=mean`, the mean of a frame's tokens, with the attention that patches receive for salience; `summary=head` is
the authors'. That the Qwen version leaves out frames that are like the next is not offered.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.changes import unit
from zoo.fusion.pruners.scores import NEEDS, SCORES, scores_of
from zoo.fusion.pruners.topk import best, check_ratio
from zoo.fusion.pruners.unrounded import unrounded
from zoo.registry import Cut, ImageFeatures, Preset, Pruner, ZooError, register, require_at_least, unknown

SUMMARIES, REMAINDERS = ("head", "mean"), ("spread", "floor")
_NEIGHBOURS = 4  # of the density, a token itself among them
_FRAMES = 16  # anchor frames whose distances are held at once, (_FRAMES, P, P)


@dataclass
class FastVIDConfig:
    keep_ratio: float = 0.1  # r, share of a video's tokens kept, in (0, 1]
    scenes: int = 8  # c, least number of scenes
    similarity: float = 0.9  # tau, of the summaries of two frames, below which a scene ends
    context_ratio: float = 0.4  # d, share of the kept tokens that gather others, in [0, 1]
    stride: int = 4  # p, frames from one anchor of a scene to the next
    beta: float = 0.6  # least weight of a token that gathers others, in [0, 1]; 1: nothing is merged
    remainder: str = "spread"  # of a scene's context tokens that its anchors do not divide evenly: spread | floor
    summary: str = "mean"  # of a frame: mean, of its tokens | head (SigLIP with vision.summary=true), as released
    score: str = "auto"  # of salient tokens: probe | column_mean | cls; auto: probe with summary=head, else column_mean

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(1, scenes=self.scenes, stride=self.stride)
        for name in ("context_ratio", "beta"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ZooError(f"{name} must be in [0, 1], got {value}.")
        for name, known in (("remainder", REMAINDERS), ("summary", SUMMARIES), ("score", ("auto", *SCORES))):
            if (value := getattr(self, name)) not in known:
                raise unknown(name, value, known)


@register("pruner", "fastvid")
class FastVID(Pruner, nn.Module):
    """Training-free, for videos alone; with `remainder=spread` the count of a video is exact and known ahead."""

    behind = ragged = per_image = True
    needs: frozenset[str] = frozenset({"key_attention"})
    choices = {"summary": SUMMARIES}  # what the check may offer beside defaults
    presets = {
        "as_released": Preset(
            {"keep_ratio": 0.1, "scenes": 8, "similarity": 0.9, "context_ratio": 0.4, "stride": 4, "beta": 0.6,
             "remainder": "floor", "summary": "head", "score": "probe"},
            "its scripts for LLaVA-OneVision 7B, 32 frames, and LLaVA-Video 7B, 64 frames",
        ),
        "qwen2_5_vl": Preset(
            {"keep_ratio": 0.27, "scenes": 8, "similarity": 0.84, "context_ratio": 0.4, "stride": 4, "beta": 0.6,
             "remainder": "spread", "summary": "head", "score": "probe"},
            "its script for Qwen2.5-VL 7B, where frames above a similarity of 0.95 are left out, too",
        ),
    }  # fmt: skip

    def __init__(self, config: FastVIDConfig) -> None:
        super().__init__()
        self.config = config
        self.score = config.score
        if config.score == "auto":
            self.score = "probe" if config.summary == "head" else "column_mean"
        self.needs = frozenset({NEEDS[self.score], *(["summary"] if config.summary == "head" else [])})

    def num_tokens(self, n: int) -> int:
        """Count the tokens of a frame at most, which is all."""
        return n

    def tokens_of_image(self, n: int, cut: Cut) -> int:
        """Count the tokens that an image or a video keeps, of `n` in each row; with `remainder=floor` the most."""
        return cut.rows * (self.budget(n) if cut.kind == "frame" else n)

    def budget(self, n: int) -> int:
        """Count the tokens kept of a frame of `n`, on average over a video."""
        return max(1, int(n * self.config.keep_ratio))

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Mark the tokens (T, P, C) of a video that stay, and merge others into them; an image is returned as it is."""
        n = image.tokens.shape[1]
        if image.row_kind != "frame" or (budget := self.budget(n)) == n:
            return image
        with unrounded(image.tokens):
            return self._merged(image, budget)

    def _merged(self, image: ImageFeatures, budget: int) -> ImageFeatures:
        n = image.tokens.shape[1]
        context = int(budget * self.config.context_ratio)
        salient = torch.zeros(image.tokens.shape[:2], dtype=torch.bool, device=image.tokens.device)
        salient.scatter_(1, best(self.scores(image), budget - context), True)
        if not context:
            return image.stay(salient)
        rest = (~salient).long().argsort(dim=1, descending=True, stable=True)[:, : n - budget + context]  # (T, Q)
        tokens = _of(image.tokens, rest).float()  # (T, Q, C) that are not salient
        directions = unit(tokens)
        frames, counts, scenes = self._anchors(self._scenes(image), context, rest.shape[1])
        ranked = _by_density(tokens[frames])  # (A, Q)
        targets = [order[:count].sort().values for order, count in zip(ranked, counts, strict=True)]
        joins = [  # of the tokens of each scene, (n Q,)
            (directions[scene].flatten(0, 1) @ directions[frame, some].mT).argmax(1) if len(some) else None
            for frame, some, scene in zip(frames, targets, scenes, strict=True)
        ]
        at = torch.tensor(frames, device=rest.device).repeat_interleave(torch.tensor(counts, device=rest.device))
        places = at, torch.cat(targets)
        stays = torch.zeros_like(rest, dtype=torch.bool).index_put(places, salient.new_ones(()))

        def merged(x: Tensor) -> Tensor:  # (T, P, D), tokens or a map of their features
            own = _of(x, rest).float()
            plan = zip(frames, targets, scenes, joins, strict=True)
            values = [self._gathered(own[t, some], own[scene], into) for t, some, scene, into in plan]
            made = own.index_put(places, torch.cat(values)).to(x)
            return x.scatter(1, rest.unsqueeze(-1).expand_as(made), made)

        return image.made(merged).stay(salient.scatter(1, rest, stays))

    def scores(self, image: ImageFeatures) -> Tensor:
        """Return the scores of the salient tokens, (T, P) float32.

        Raises:
            ZooError: the encoder did not compute them.
        """
        return scores_of(image, self.score, "fastvid")

    def _scenes(self, image: ImageFeatures) -> list[range]:
        """Cut the frames of a video into scenes."""
        c = self.config
        summary = image.tokens.float().mean(1) if c.summary == "mean" else image.summary
        if summary is None:
            raise ZooError("pruner 'fastvid' with summary=head needs summary: vision.summary=true, or summary=mean.")
        g = unit(summary)
        alike = (g[1:] * g[:-1]).sum(-1)  # (T - 1,)
        cuts = alike < c.similarity
        cuts[alike.argsort(stable=True)[: c.scenes - 1]] = True
        ends = [*(cuts.nonzero().flatten() + 1).tolist(), len(g)]
        return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _anchors(self, scenes: list[range], context: int, room: int) -> tuple[list[int], list[int], list[slice]]:
        """Choose the anchor frames of all scenes, how many tokens each gets, and the frames of its scene."""
        stride = max(1, min(self.config.stride, room // context))
        found: list[tuple[int, int, slice]] = []
        for scene in scenes:
            frames = sorted(scene[::-1][::stride])
            each, more = divmod(context * len(scene), len(frames))
            more = more if self.config.remainder == "spread" else 0
            found += [(t, each + (i < more), slice(scene.start, scene.stop)) for i, t in enumerate(frames)]
        frames, counts, slices = zip(*found, strict=True)
        return list(frames), list(counts), list(slices)

    def _gathered(self, targets: Tensor, tokens: Tensor, into: Tensor | None) -> Tensor:
        """Merge tokens (n, Q, C) into the targets (K, C) that they join, `into` (n Q,)."""
        if into is None:
            return targets
        many = torch.bincount(into, minlength=len(targets)).unsqueeze(1).to(targets)  # (K, 1)
        mean = torch.zeros_like(targets).index_add(0, into, tokens.flatten(0, 1)) / many.clamp(min=1)
        own = (1 / (many + 1)).clamp(min=self.config.beta)
        return own * targets + (1 - own) * mean


def _of(x: Tensor, index: Tensor) -> Tensor:
    """Rows (T, Q, D) of (T, P, D) at (T, Q)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def _by_density(frames: Tensor) -> Tensor:
    """Rank the tokens of each frame (A, Q, C) as centres of what lies around them, the best first: (A, Q)."""
    return torch.cat(list(_ranked(frames.split(_FRAMES))))


def _ranked(parts: tuple[Tensor, ...]) -> Iterator[Tensor]:
    for x in parts:
        x = x - x.mean(1, keepdim=True)  # smaller numbers, smaller errors of rounding
        square = x.square().sum(-1)
        far = (square.unsqueeze(1) + square.unsqueeze(2) - 2 * x @ x.mT).clamp(min=0) / x.shape[-1]  # (A, Q, Q) of D^2
        far.diagonal(dim1=1, dim2=2).zero_()
        rho = (-far.topk(min(_NEIGHBOURS, far.shape[-1]), dim=-1, largest=False).values.mean(-1)).exp()  # (A, Q)
        denser = rho.unsqueeze(1) > rho.unsqueeze(2)  # [i, j]: j is denser than i
        delta = far.where(denser, far.amax((1, 2), keepdim=True)).amin(-1).sqrt()
        yield (rho * delta).argsort(dim=1, descending=True, stable=True)
