"""Image features as the memory that a weight generator attends to: projected, with positions, concatenated per row.

Each image of a row but the first gets a learned embedding of its number: a row with one image is then read the same
whatever the limit on images is.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.fusion.adapters.vlora.generator import init_linear
from zoo.registry import ImageFeatures, ZooError


def rows_of(image: ImageFeatures, images_per_row: Sequence[int], limit: int, who: str) -> list[range]:
    """Map each row of the LLM's batch to its rows of `image.tokens`; an empty list where the batch has no images.

    Args:
        image: features whose rows are images, or crops and frames of images (`rows`).
        images_per_row: images of each row of the batch; empty: one each.
        limit: most image rows of one sequence, crops and frames counted.
        who: name of the adapter, for messages.
    """
    views = list(image.rows or [1] * len(image.tokens))
    counts = list(images_per_row) or [1] * len(views)
    if sum(counts) != len(views):
        raise ZooError(f"adapter {who!r} was given {len(views)} images, and the rows of the batch show {counts}.")
    ends = list(accumulate(views, initial=0))
    rows = [range(ends[a], ends[b]) for a, b in pairwise(accumulate(counts, initial=0))]
    most = max(map(len, rows), default=0)
    if most > limit:
        raise ZooError(
            f"A sequence shows {most} images (crops and frames count), and adapter {who!r} reads at most {limit}: "
            f"set adapter.{who}.max_images={most}."
        )
    return rows if most else []


class ImageMemory(nn.Module):
    """Linear projection, learned positions, numbers of images; positions and numbers start as a normal of std 1."""

    def __init__(
        self,
        vision_dim: int,
        grid: tuple[int, int],
        width: int,
        max_images: int,
        std: float = 0.02,
        learned_on: tuple[int, int] | None = None,
    ) -> None:
        """Build the projection and tables.

        Args:
            vision_dim: width of the image features.
            grid: (h, w) of the patches.
            width: of the memory.
            max_images: in a row of the batch.
            std: of the projection's initial weights.
            learned_on: grid of the table of positions; None: `grid`.
        """
        super().__init__()
        self.grid, self.learned_on = tuple(grid), tuple(learned_on or grid)
        self.proj = nn.Linear(vision_dim, width)
        init_linear(self.proj, std)
        self.positions = nn.Parameter(torch.randn(prod(self.learned_on), width))
        self.numbers = nn.Parameter(torch.randn(max_images - 1, width)) if max_images > 1 else None

    def forward(self, image: ImageFeatures, rows: Sequence[range], expand: int) -> tuple[list[Tensor], Tensor | None]:
        """Build the memory of each row of the batch that has images.

        Args:
            image: tokens (M, N, D).
            rows: for each row of the batch, its rows of `image.tokens`.
            expand: copies of each row of the batch, side by side.

        Returns:
            Memories (G, S, W), one tensor for all rows with the same number of images; and for each row of the batch
            its index in the concatenated memories, one past the last for a row without images. None instead of
            indices: all rows, in order.
        """
        x = self._embed(image)  # (M, N, W)
        memories: list[Tensor] = []
        place = [-1] * len(rows)
        taken = 0
        # Rows with equally many images are read as one batch: without padding, hence without masks in the generator.
        for count in sorted({len(r) for r in rows if len(r)}):
            members = [i for i, r in enumerate(rows) if len(r) == count]
            for at, i in enumerate(members, taken):
                place[i] = at
            taken += len(members)
            shown = [k for i in members for k in rows[i]]
            some = x if shown == list(range(len(x))) else x[torch.tensor(shown, device=x.device)]  # (G * count, N, W)
            some = some.unflatten(0, (-1, count))  # (G, count, N, W)
            if count > 1 and self.numbers is not None:
                later = some[:, 1:] + self.numbers[: count - 1, None].to(x.dtype)
                some = torch.cat([some[:, :1], later], dim=1)
            memories.append(some.flatten(1, 2))  # (G, count * N, W)
        if expand == 1 and place == list(range(len(place))):
            return memories, None
        index = torch.tensor([p if p >= 0 else taken for p in place], device=x.device)
        return memories, index.repeat_interleave(expand)

    def nothing(self, rows: int) -> tuple[list[Tensor], Tensor]:
        """Return the memory of a blank image, in which every parameter takes part, and indices of rows without images.

        It gives the parameters zero gradients in a batch of text, which data parallelism waits for.
        """
        tokens = self.proj.weight.new_zeros(1, prod(self.grid), self.proj.in_features)
        memory = self.proj(tokens) + self._table()  # (1, N, W)
        return [memory], torch.ones(rows, dtype=torch.long, device=memory.device)

    def _table(self) -> Tensor:
        """Return the positions; in training plus 0 * numbers, so that `numbers` has a gradient on every rank."""
        positions: Tensor = self.positions  # (N, W)
        if self.grid != self.learned_on:
            table = positions.T.unflatten(1, self.learned_on).unsqueeze(0)  # (1, W, h, w)
            positions = F.interpolate(table, self.grid, mode="bicubic", align_corners=False)[0].flatten(1).T
        if self.numbers is None or not torch.is_grad_enabled():
            return positions
        return positions + 0 * self.numbers.sum()

    def _embed(self, image: ImageFeatures) -> Tensor:
        x = self.proj(image.tokens.to(self.proj.weight.dtype))  # (M, N, W)
        positions = self._table().to(x.dtype)
        if image.keep is not None:
            return x + positions[image.keep]
        if image.groups is not None:  # a merged token gets the mean of the positions that it was made of
            n = x.shape[1]
            went = F.one_hot(image.groups % (n + 1), n + 1)[..., :n].to(x.dtype)  # (M, N0, N), -1 is dropped
            return x + (went / went.sum(1, keepdim=True).clamp(min=1)).mT @ positions
        if x.shape[1] != len(positions):
            raise ZooError(
                f"There are positions for {len(positions)} image tokens of an image, and {x.shape[1]} were given: the "
                f"adapter was made for another resolution."
            )
        return x + positions
