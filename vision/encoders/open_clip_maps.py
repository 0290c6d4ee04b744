"""The ResNet of open_clip (`RN50` and its like) as an encoder: a map of it, ahead of its attention pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.vision.encoders.map_runner import MapRunner, stage_index


class ResNetMapRunner(MapRunner):
    """Runs open_clip's `ModifiedResNet` up to `stage`: 1 is the stem, 2 to 5 its four layers.

    Raises:
        ZooError: there is no such stage, or `norm` is asked for.
    """

    def __init__(self, tower: Any, stage: int, norm: bool, size: tuple[int, int], name: str) -> None:
        super().__init__()
        if norm:
            raise ZooError(f"{name!r} is a ResNet without a final norm: norm must be false.")
        layers = [f"layer{i}" for i in range(1, 5)]
        self.tower, self.name, self.index = tower, name, stage_index(stage, 5, name)
        self.stage = self.index + 1
        for layer in layers[self.index :]:
            setattr(tower, layer, nn.Identity())
        tower.attnpool = nn.Identity()
        last = getattr(tower, layers[self.index - 1])[-1].conv3 if self.index else tower.conv3
        self.hidden_size = last.out_channels
        self.lacks |= dict.fromkeys(("key_attention", "keys"), self.NO_SCORES)
        self.measure(size)
        self.patch = (round(size[0] / self.grid[0]), round(size[1] / self.grid[1]))

    def map(self, pixel_values: Tensor) -> Tensor:
        found: dict[str, list[Tensor]] = self.tower.forward_intermediates(
            pixel_values, indices=[self.index], intermediates_only=True
        )
        return found["image_intermediates"][0]

    def set_attention(self, name: str) -> None:
        """Do nothing: there is none."""

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Do nothing: open_clip cannot recompute these activations."""
