"""EVS: of a video, keep the tokens that changed most since the frame before; the first frame stays whole.

Paper: Efficient Video Sampling, arXiv:2510.14624 (v1); code: vllm/multimodal/evs.py. A video has T frames of P tokens
x(t, p), as they enter the LLM, behind the projector and a layout's pooling of frames.

    change(t, p) = 1 - cos(x(t, p), x(t - 1, p)),    change(0, p) = infinite

Of the T P tokens the K = max(P, int(T P (1 - q))) with the largest changes stay; of equal ones the earlier frame, then
the earlier place. So the number of a video is known ahead, that of a frame is not. The first frame is paid for out of
the budget: with q = 0.75 nothing else is left of four frames. Kept tokens stay in order. The count is that of double
precision, truncated, as in the code: 100 frames of 16 tokens at q = 0.9 keep 159, since 1 - 0.9 is below 0.1. With
`keep_ratio` it is int(T P keep_ratio). Images, and videos of one frame, are returned as they are.

The code gives each frame its own count in a new prompt, which is `positions=dense` of a model; `positions=kept` is what
it does for Qwen's positions of several axes.

Departures. The code computes cosines in the tokens' data type; in bfloat16 small changes are equal, and the stable
order gives them all to early frames. Here they are float32, and changes below `still` are none: what rounding makes of
a static place would decide otherwise (`still=0` is the code). `count=after_first` is the paper's count, a share 1 - q
of all frames but the first; its measure, differences of pixels, is not offered: a pruner gets no pixels.
`reference=last_kept` is ours: a token is compared with the last one of its place that stayed, so that a slow drift adds
up. The threshold at which K tokens stay is then searched, and what is left of K goes to the largest changes below it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.changes import STILL, moved, unit
from zoo.fusion.pruners.topk import check_ratio
from zoo.fusion.pruners.unrounded import unrounded
from zoo.registry import Cut, ImageFeatures, Preset, Pruner, ZooError, register, unknown

COUNTS = ("total", "after_first")
REFERENCES = ("previous", "last_kept")
_TRIES, _ROUNDS = 32, 4  # thresholds that are tried at once, and how often the search is refined


@dataclass
class EVSConfig:
    keep_ratio: float = 0.25  # share of a video's tokens kept, in (0, 1]
    q: float | None = None  # share removed, in [0, 1), as the release counts it; takes the place of keep_ratio
    count: str = "total"  # the share is of: total, all frames | after_first, those behind the first, as in the paper
    reference: str = "previous"  # compare with the frame before (previous), or with what stayed there (last_kept)
    still: float = STILL  # smaller changes are none; 0: as released, by rounding

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        if self.q is not None and not 0 <= self.q < 1:
            raise ZooError(f"q, the share removed, must be in [0, 1), got {self.q}.")
        if self.count not in COUNTS:
            raise unknown("count", self.count, COUNTS)
        if self.reference not in REFERENCES:
            raise unknown("reference", self.reference, REFERENCES)
        if self.still < 0:
            raise ZooError(f"still must not be negative, got {self.still}.")


@register("pruner", "evs")
class EVS(Pruner, nn.Module):
    """Training-free, for videos alone; the count of a video is exact and known ahead."""

    behind = ragged = per_image = True
    needs: frozenset[str] = frozenset({"grid"})  # tokens of a frame have places
    presets = {
        "nemotron_nano_v2_vl": Preset({"q": 0.7, "still": 0.0}, "the config of Nemotron-Nano-12B-v2-VL, in vLLM"),
        "vllm": Preset({"q": 0.75, "still": 0.0}, "the example of vLLM, by its code"),
        "paper": Preset({"q": 0.75, "count": "after_first"}, "the paper's count, with cosines of tokens"),
    }

    def __init__(self, config: EVSConfig) -> None:
        super().__init__()
        self.config = config

    def num_tokens(self, n: int) -> int:
        """Count the tokens of a frame at most, which is all."""
        return n

    def tokens_of_image(self, n: int, cut: Cut) -> int:
        """Count the tokens that an image or a video keeps, of `n` in each row: exactly."""
        return self.budget(cut.rows, n) if cut.kind == "frame" else cut.rows * n

    def budget(self, frames: int, n: int) -> int:
        """Count the tokens that a video of `frames` frames of `n` tokens keeps."""
        c = self.config
        share = c.keep_ratio if c.q is None else 1 - c.q
        if c.count == "after_first":
            return n + int((frames - 1) * n * share)
        return max(n, int(frames * n * share))

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Mark the tokens (T, P, C) of a video that stay; an image is returned as it is."""
        frames, n = image.tokens.shape[:2]
        keep = self.budget(frames, n)
        if image.row_kind != "frame" or keep == frames * n:
            return image
        tokens = unit(image.tokens)  # (T, P, C)
        change = self._since_kept(tokens, keep) if self.config.reference == "last_kept" else self._change(tokens)
        return image.stay(_largest(change, keep))

    def scores(self, image: ImageFeatures) -> Tensor | None:
        """Return how much each token of a video changed since the frame before, (T, P); None for an image."""
        if image.row_kind != "frame" or len(image.tokens) < 2:
            return None
        change = self._change(unit(image.tokens))
        return change.masked_fill(change.isinf(), 2.0)  # the most that a cosine makes

    def _change(self, tokens: Tensor) -> Tensor:
        change = moved((tokens[1:] * tokens[:-1]).sum(-1), self.config.still)
        return torch.cat([change.new_full((1, tokens.shape[1]), torch.inf), change])  # (T, P)

    def _since_kept(self, tokens: Tensor, keep: int) -> Tensor:
        """Return the change of each token since the last of its place that stays, infinite where it stays: (T, P)."""
        places = tokens.transpose(0, 1)  # (P, T, C)
        with unrounded(places):
            change = moved(places @ places.mT, self.config.still)  # (P, T, T): of each two frames of a place
        low, high = change.new_tensor(0.0), change.max()
        for _ in range(_ROUNDS):
            tried = torch.linspace(0, 1, _TRIES, device=tokens.device) * (high - low) + low
            found, stays = _scanned(change, tried)
            fits = stays.flatten(1).sum(1) <= keep  # (_TRIES,), the largest threshold always
            best = int(fits.long().argmax())
            low, high = tried[max(best - 1, 0)], tried[best]
        return found[best].masked_fill(stays[best], torch.inf)


def _largest(change: Tensor, keep: int) -> Tensor:
    """Choose the `keep` largest of (T, P), of equal ones the first: (T, P) bool."""
    order = change.flatten().argsort(descending=True, stable=True)[:keep]
    return (
        torch.zeros(change.numel(), dtype=torch.bool, device=change.device).index_fill(0, order, True).view_as(change)
    )


def _scanned(change: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Go through the frames of a video, once for each threshold: a token stays that changed more than it.

    Args:
        change: (P, T, T) of each two frames of a place.
        thresholds: (S,).

    Returns:
        The change of each token since the last of its place that stayed, and whether it stays: (S, T, P) each.
    """
    places, frames, _ = change.shape
    last = torch.zeros(len(thresholds), places, dtype=torch.long, device=change.device)
    place = torch.arange(places, device=change.device)
    found, stays = [change.new_full(last.shape, torch.inf)], [torch.ones_like(last, dtype=torch.bool)]
    for t in range(1, frames):
        found.append(change[place, t, last])  # (S, P)
        stays.append(found[-1] > thresholds.unsqueeze(1))
        last = last.masked_fill(stays[-1], t)
    return torch.stack(found, 1), torch.stack(stays, 1)
