"""The experiment of `claim_vlora` on photos: Fashion-MNIST, a frozen language model that has read captions only.

A caption is a kind of clothing and its name. There is no encoder: 16 patches of 7 x 7 pixels are what the generator of
weights reads. Nothing is tuned for it but the steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.benches.claims import over
from zoo.benches.real_data import CLOTHES, patches_of
from zoo.benches.report import Row
from zoo.claims import vlora as claim_vlora
from zoo.registry import ImageFeatures

DATA = ("fashion_mnist",)
KIND = [0, 1, 0, 1, 0, 2, 0, 2, 3, 2]  # upper, long, shoe, bag
ARMS = {name: claim_vlora.ARMS[name] for name in ("qkvom, rank 4", "kv, rank 4", "16 image tokens")}
SETTING = [
    "as vlora, on 24,000 photos of Fashion-MNIST in 16 patches of pixels; captions: kind, name; 600 steps of 48",
    "all: both words right in greedy captions of 1000 photos of the dev split; guessing 0.1",
]


class Photos:
    """Patches of photos, and captions."""

    dim, grid, vocab_size, steps = 49, (4, 4), len(CLOTHES) + 4 + 2, claim_vlora.STEPS

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


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Every arm on the photos."""
    return claim_vlora.experiment(Photos(), ARMS, seed, share, show)


def judge(found: dict[str, list[float]]) -> list[Row]:
    """The frozen model unchanged to the bit; the rest is shown as it falls."""
    full, kv = (found[f"{name}, all at {Photos.steps}"] for name in ("qkvom, rank 4", "kv, rank 4"))
    exact = found["text and weights of the frozen model, same to the bit"]
    return [
        Row("vlora_clothes: named rightly, q k v o m", over(full), "", note="guessing 0.1"),
        Row("vlora_clothes: above k v", over([a - b for a, b in zip(full, kv, strict=True)]), ""),
        Row("vlora_clothes: text to the bit in every run", over(exact), "", bound=1.0),
    ]
