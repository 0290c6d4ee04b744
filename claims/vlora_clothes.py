"""The experiment of `vlora` on photos: Fashion-MNIST, a frozen language model that has read captions only.

A caption is a kind of clothing and its name. The generator of weights reads 16 patches of 7 x 7 pixels, without an
encoder. Nothing is tuned for it but the steps.
"""

from functools import partial

import torch
from torch import Tensor

from zoo.benches.real_data import CLOTHES, patches_of
from zoo.claims import vlora
from zoo.claims.experiment import Experiment, gap, in_seeds, row
from zoo.registry import ImageFeatures

KIND = [0, 1, 0, 1, 0, 2, 0, 2, 3, 2]  # upper, long, shoe, bag


class Photos:
    """Patches of photos, and captions."""

    dim, grid, vocab_size, steps = 49, (4, 4), len(CLOTHES) + 4 + 2, vlora.STEPS

    def __init__(self, seed: int) -> None:  # the photos are the same ones for every seed
        pass

    def draw(self, n: int, g: torch.Generator, split: str = "train") -> tuple[ImageFeatures, Tensor]:
        """Draw `n` photos (n, 16, 49) and captions (n, 4)."""
        patches, labels = patches_of(split, 7)
        chosen = torch.randint(len(labels), (n,), generator=g)
        label = labels[chosen]
        ends = [torch.full_like(label, self.vocab_size - 2 + i) for i in (0, 1)]
        words = [ends[0], len(CLOTHES) + torch.tensor(KIND)[label], label, ends[1]]
        return ImageFeatures(patches[chosen], self.grid), torch.stack(words, dim=1)

    def unseen(self, n: int) -> tuple[ImageFeatures, Tensor]:
        """Photos of the dev split."""
        return self.draw(n, torch.Generator().manual_seed(10_000), "dev")


FULL, KV = (f"{name}, all at {Photos.steps}" for name in ("qkvom, rank 4", "kv, rank 4"))
EXPERIMENT = Experiment(
    data=("fashion_mnist",),
    setting=(
        "as vlora, on 24,000 photos of Fashion-MNIST in 16 patches of pixels; captions: kind, name; 600 steps of 48",
        "all: both words right in greedy captions of 1000 photos of the dev split; guessing 0.1",
    ),
    measure=partial(vlora.measure, Photos, ("qkvom, rank 4", "kv, rank 4", "16 image tokens")),
    bounds=(
        in_seeds("named rightly, q k v o m", row(FULL), note="guessing 0.1"),
        in_seeds("above k v", gap(FULL, KV)),
        in_seeds("text to the bit in every run", row(vlora.SAME), 1.0),
    ),
)
