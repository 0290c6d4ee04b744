"""DyCoke: of every four frames of a video one stays whole, of the others what is least like an earlier one of the four.

Paper: Tao et al., arXiv:2411.15024; code: KD-TAO/DyCoke at dd74634, its first stage. A video has T frames of P tokens,
as they enter the LLM, behind the projector and a layout's pooling of frames. With m = int((1 - k) P),

    of frames 4i + 1 and 4i + 3 the m tokens stay with the smallest cosine to the same place of the frame before,
    of frame 4i + 2 the m tokens with the smallest cosine to the same place of frame 4i,

and frames 4i stay whole: of 4n frames n P + 3n m tokens are left, at least a quarter. The count depends on T and P
alone. Equal cosines are decided in favour of the first place. Nothing is merged, in spite of the paper's title. `k` is
computed as the code does, in double precision and truncated; with `keep_ratio` m is int(P keep_ratio). Images, and
videos of one frame, are returned as they are.

Departures. The code keeps frame 4i + 2 of the last four whole (`last_group=released`), drops the last of an odd number
of frames (`odd=drop`), fails on four frames or fewer, and puts the tokens of a thinned frame in the order of their
cosines (`order=released`; a model with `positions=kept` puts them back). Its positions are counted over what is left,
which is `positions=dense`. It runs with one newline for a whole video alone, and leaves other layouts unpruned without
a word; here every layout of frames is pruned. Cosines are float32, where the code's are of the tokens' data type.

The second stage is not offered: while decoding, a step reads a part of the cached keys only, chosen by the attention of
an earlier layer, and nothing is freed. Pruners between layers (`fastv`) drop such keys once, after the prompt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.changes import moved, unit
from zoo.fusion.pruners.topk import check_ratio
from zoo.registry import Cut, ImageFeatures, Preset, Pruner, ZooError, register, unknown

_CHOICES = {"order": ("raster", "released"), "last_group": ("same", "released"), "odd": ("keep", "drop")}
_WHOLE, _GONE = -1, -2  # in place of the frame that a frame is compared with


@dataclass
class DyCokeConfig:
    keep_ratio: float = 0.3  # share of the tokens kept of three in four frames, in (0, 1]
    k: float | None = None  # share removed of them, in [0, 1], as the release counts it; takes the place of keep_ratio
    order: str = "raster"  # of the tokens of a frame: raster | released, by their cosines
    last_group: str = "same"  # the third of the last four frames: same, thinned as others | released, whole
    odd: str = "keep"  # the last of an odd number of frames: keep | drop, as released

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        if self.k is not None and not 0 <= self.k <= 1:
            raise ZooError(f"k, the share removed, must be in [0, 1], got {self.k}.")
        for option, known in _CHOICES.items():
            if (value := getattr(self, option)) not in known:
                raise unknown(option, value, known)


@register("pruner", "dycoke")
class DyCoke(Pruner, nn.Module):
    """Training-free, for videos alone; the count of a video is exact and known ahead."""

    behind = ragged = per_image = True
    needs: frozenset[str] = frozenset({"grid"})  # tokens of a frame have places
    presets = {
        "as_released": Preset(
            {"k": 0.7, "order": "released", "last_group": "released", "odd": "drop"},
            "the README and the lmms-eval wrapper: LLaVA-OneVision, 32 frames",
        ),
        "builder": Preset(
            {"k": 0.3, "order": "released", "last_group": "released", "odd": "drop"},
            "the default of its model builder",
        ),
    }

    def __init__(self, config: DyCokeConfig) -> None:
        super().__init__()
        self.config = config

    def num_tokens(self, n: int) -> int:
        """Count the tokens of a frame at most, which is all."""
        return n

    def tokens_of_image(self, n: int, cut: Cut) -> int:
        """Count the tokens that an image or a video keeps, of `n` in each row: exactly."""
        if cut.kind != "frame":
            return cut.rows * n
        return sum(self.counts(cut.rows, n))

    def thinned(self, n: int) -> int:
        """Count the tokens kept of a thinned frame of `n`."""
        return int(n * self.config.keep_ratio) if self.config.k is None else int((1 - self.config.k) * n)

    def counts(self, frames: int, n: int) -> list[int]:
        """Count the tokens kept of each frame of a video, of `n`."""
        return [{_WHOLE: n, _GONE: 0}.get(i, self.thinned(n)) for i in self.references(frames)]

    def references(self, frames: int) -> list[int]:
        """Return for each frame that with which it is compared; negative: it stays whole, or goes."""
        found = []
        for t in range(frames):
            if t % 2:
                found.append(t - 1)
            elif t % 4 == 0 or (self.config.last_group == "released" and t >= frames - 2):
                found.append(_WHOLE)
            else:
                found.append(t - 2)
        if frames % 2 and frames > 1 and self.config.odd == "drop":
            found[-1] = _GONE
        return found

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Mark the tokens (T, P, C) of a video that stay; an image is returned as it is."""
        frames, n = image.tokens.shape[:2]
        released = self.config.order == "released"
        if image.row_kind != "frame" or ((counts := self.counts(frames, n)) == [n] * frames and not released):
            return image
        compared, count = (torch.tensor(x, device=image.tokens.device) for x in (self.references(frames), counts))
        order = self._unlike(image, compared).argsort(dim=1, descending=True, stable=True)  # (T, P)
        first = torch.arange(n, device=order.device) < count.unsqueeze(1)
        if released:
            return image.take(order).stay(first)
        return image.stay(torch.zeros_like(first).scatter(1, order, first))

    def scores(self, image: ImageFeatures) -> Tensor | None:
        """Return how unlike each token of a video is to that it is compared with, (T, P); None for an image."""
        if image.row_kind != "frame" or len(image.tokens) == 1:
            return None
        return self._unlike(image, torch.tensor(self.references(len(image.tokens)), device=image.tokens.device))

    def _unlike(self, image: ImageFeatures, compared: Tensor) -> Tensor:
        """Compare each token with that of the same place in the frame (T,) named: (T, P), 2 in frames that stay."""
        tokens = unit(image.tokens)
        change = moved((tokens * tokens[compared.clamp(min=0)]).sum(-1))
        return change.masked_fill((compared < 0).unsqueeze(1), 2.0)
