"""Parts from outside the zoo that contradict themselves: a plugin for the misfits of `zoo bench check`."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import Adapter, Encoder, ImageFeatures, ImageTransform, Projector, Pruner, register


@dataclass
class OwnConfig:
    pass


class _Pruner(Pruner, nn.Module):
    destroys = frozenset({"grid"})

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()

    def num_tokens(self, n: int) -> int:
        """Count half of the tokens."""
        return n // 2


@register("pruner", "own_half")
class Half(_Pruner):
    """Says half of the tokens, leaves five."""

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Keep five tokens of each row (M, N, D)."""
        return image.take(torch.arange(5).expand(image.tokens.shape[0], -1))


@register("pruner", "own_content")
class Content(_Pruner):
    """Keeps as many tokens as an image has above its mean."""

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Keep tokens of (M, N, D) by what they hold."""
        size = image.tokens.norm(dim=-1)
        kept = int((size > size.mean()).sum(dim=1).max())
        return image.take(size.argsort(dim=1)[:, : max(1, kept)].sort(dim=1).values)


@register("pruner", "own_wide")
class Wide(_Pruner):
    """Joins neighbours instead of leaving one of them out."""

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Make (M, N, D) to (M, N / 2, 2 D)."""
        m, n, d = image.tokens.shape
        return replace(image, tokens=image.tokens.reshape(m, n // 2, 2 * d), grid=None)


@register("pruner", "own_gridless")
class Gridless(_Pruner):
    """Leaves tokens out, and does not say that the grid is gone."""

    destroys: frozenset[str] = frozenset()

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Keep the first half of (M, N, D)."""
        half = torch.arange(image.tokens.shape[1] // 2)
        return image.take(half.expand(image.tokens.shape[0], -1))


@register("pruner", "own_raises")
class Raises(_Pruner):
    """Reads a score that it does not ask for in `needs`."""

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Look one token too far in (M, N, D)."""
        image.tokens[:, image.tokens.shape[1]]
        return image


class _Projector(Projector, nn.Module):
    def __init__(self, config: OwnConfig, *, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.net = nn.Linear(vision_dim, text_dim)

    def num_tokens(self, n: int) -> int:
        """Count all tokens."""
        return n


@register("projector", "own_short")
class Short(_Projector):
    """Forgets the last token."""

    def forward(self, image: ImageFeatures) -> Tensor:
        """Project (M, N, D) to (M, N - 1, C)."""
        return self.net(image.tokens)[:, :-1]


@register("projector", "own_narrow")
class Narrow(_Projector):
    """Takes the encoder's width for that of the language model."""

    def forward(self, image: ImageFeatures) -> Tensor:
        """Give (M, N, C / 2)."""
        return self.net(image.tokens).chunk(2, dim=-1)[0]


@register("projector", "own_unbuilt")
class Unbuilt(_Projector):
    """Looks up what is not there."""

    def __init__(self, config: OwnConfig, *, vision_dim: int, text_dim: int) -> None:
        super().__init__(config, vision_dim=vision_dim, text_dim=text_dim)
        activations: dict[str, Any] = {"gelu": nn.GELU}
        self.act = activations["swiglu"]()

    def forward(self, image: ImageFeatures) -> Tensor:
        """Project (M, N, D) to (M, N, C)."""
        return self.act(self.net(image.tokens))


@register("vision", "own_more")
class More(Encoder, nn.Module):
    """Counts patches, and gives [CLS] among them."""

    provides = frozenset({"grid"})
    hidden_size, grid, num_tokens = 8, (4, 4), 16
    transform = ImageTransform((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)

    def forward(self, pixel_values: Tensor, *, need: frozenset[str] = frozenset()) -> ImageFeatures:
        """Encode (M, 3, 32, 32) to (M, 17, 8)."""
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)  # (M, 16, 8)
        return ImageFeatures(torch.cat([tokens[:, :1], tokens], dim=1), None)


@register("adapter", "own_needy")
class Needy(Adapter, nn.Module):
    """Wants experts of a language model that has none."""

    needs = frozenset({"moe"})

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()

    def attach(self) -> None:
        """Do nothing."""

    def detach(self) -> None:
        """Do nothing."""

    def owns(self, name: str) -> bool:
        """Nothing in the language model."""
        return False
