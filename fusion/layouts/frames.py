"""Frames of a video one after the other, each with all of its tokens; an image is one row.

Video-LLaVA keeps the [CLS] token of frames, and not that of images: `cls` puts it in front of each frame's patches, run
through the same projector. A pruner of patches leaves it alone.

Paper: Lin et al., arXiv:2311.10122 (Video-LLaVA). That [CLS] stays is from the model of transformers, whose feature
selection is asked for images only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import Cut, ImageFeatures, Layout, Projector, ZooError, register


@dataclass
class FramesConfig:
    cls: bool = False  # put the [CLS] token before the patches of each video frame


@register("layout", "frames")
class Frames(Layout, nn.Module):
    """Has no parameters. With `cls` the projector must map tokens one by one, as `mlp` and `linear` do."""

    def __init__(self, config: FramesConfig, *, num_tokens: int) -> None:
        super().__init__()
        self.cls, self.tokens = config.cls, num_tokens
        self.row_tokens = None if config.cls else num_tokens
        self.needs = frozenset({"prefix_tokens"} if config.cls else ())
        self.given: dict[str, Any] = {"num_tokens": num_tokens}

    def num_tokens(self, n: int) -> int:
        """Count the tokens of an image; a video takes as many for each frame."""
        return self.tokens

    def count(self, cut: Cut) -> int:
        """Count the tokens of an image or a video with this cut."""
        return cut.rows * (self.tokens + (self.cls and cut.kind == "frame"))

    def frame_tokens(self, cut: Cut) -> int:
        """Count the tokens of a frame without its [CLS]."""
        return self.tokens

    def project(self, image: ImageFeatures, projector: Any, cuts: Sequence[Cut]) -> Any:
        """Run the projector; returns rows of each image or video (R, K, C), (R, 1 + K, C) for frames with [CLS]."""
        tokens = projector(image)  # (M, K, C)
        sizes = [c.rows for c in cuts]
        if not self.cls or all(c.kind != "frame" for c in cuts):
            return tokens.split(sizes)
        assert image.prefix is not None, "asked for in `needs`"
        on_grid = isinstance(projector, Projector) and "grid" in projector.needs
        first = None if on_grid else projector(ImageFeatures(image.prefix[:, :1], None))  # (M, 1, C)
        if first is None or first.shape[1] != 1:
            raise ZooError("layout 'frames' with cls needs a projector that takes tokens one by one: mlp or linear.")
        rows = zip(cuts, first.split(sizes), tokens.split(sizes), strict=True)
        return [torch.cat([cls, some], 1) if cut.kind == "frame" else some for cut, cls, some in rows]

    def places(self, rows: Tensor, image: ImageFeatures, cuts: Sequence[Cut], whole: Layout) -> Tensor:
        """Give the places of the tokens in the runs without a pruner, [CLS] in front of each frame's: (S,)."""
        found = []
        for cut, some in zip(cuts, rows.split([c.rows for c in cuts]), strict=True):  # (R, K)
            first = torch.arange(cut.rows, device=some.device)[:, None] * (whole.count(cut) // cut.rows)
            with_cls = self.cls and cut.kind == "frame"
            places = torch.cat([torch.zeros_like(first), some + 1], 1) if with_cls else some
            found.append((places + first).flatten())
        return torch.cat(found)

    def forward(self, tokens: Tensor | Sequence[Tensor], cuts: Sequence[Cut]) -> Tensor:
        """Join rows (M, K, C), or those of each image (R, K, C), to one sequence (S, C)."""
        return torch.cat([rows.flatten(0, 1) for rows in ([tokens] if isinstance(tokens, Tensor) else tokens)])
