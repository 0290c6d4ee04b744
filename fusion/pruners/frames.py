"""Read fewer frames of a video, at full size: the control of pruners for videos, at as many tokens.

Frames are chosen as without it, and of these a share, evenly from the first one. Images are left as they are.

Source: "fewer frames" beside "smaller frames" as controls of video pruning, as in arXiv:2510.07143 for images (ours).
"""

from dataclasses import dataclass

from torch import nn

from zoo.fusion.pruners.topk import check_ratio
from zoo.registry import ImageFeatures, Pruner, register


@dataclass
class FewerFramesConfig:
    keep_ratio: float = 0.25  # share of a video's frames, in (0, 1]


@register("pruner", "frames")
class FewerFrames(Pruner, nn.Module):
    """Training-free; takes effect where videos are read, in the processor."""

    front = True

    def __init__(self, config: FewerFramesConfig) -> None:
        super().__init__()
        check_ratio(config.keep_ratio)
        self.frame_share = config.keep_ratio

    def num_tokens(self, n: int) -> int:
        """Count the tokens of a frame or an image: all."""
        return n

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Return the features (M, N, D) of the frames that were read as they are."""
        return image
