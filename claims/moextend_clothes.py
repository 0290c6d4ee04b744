"""The experiment of `claim_moextend` on photos: the task is Fashion-MNIST, the text stays the four permutations.

Four patches of 14 x 14 pixels stand for a photo; there is no encoder but the projector, so the task is learnt less well
than that on drawn classes, by every arm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.benches.claims import over
from zoo.benches.real_data import CLOTHES, patches_of
from zoo.benches.report import Row
from zoo.claims import moextend as claim_moextend
from zoo.claims.moextend import FULL, NEW

DATA = ("fashion_mnist",)
LOW = f"{FULL}, rate / 5"
SETTING = [
    "as moextend, the task on 24,000 photos of Fashion-MNIST in 4 patches of pixels; answers depend on the class",
    "task: share of right answers about 256 photos of the dev split; guessing 0.03",
]


class Photos(claim_moextend.World):
    """Photos in place of drawn classes."""

    num_classes, dim = len(CLOTHES), 196

    def images(self, n: int, g: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        """Draw patches (n, 4, 196) and their classes (n,)."""
        patches, labels = patches_of(split, 14)
        chosen = torch.randint(len(labels), (n,), generator=g)
        return patches[chosen], labels[chosen]

    def unseen(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Photos of the dev split."""
        return self.images(n, g, "dev")


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """New experts, and every weight at two rates."""
    return claim_moextend.experiment(Photos(seed), seed, share, show, (NEW, FULL, LOW))


def judge(found: dict[str, list[float]]) -> list[Row]:
    """The guard exact; forgetting and the task are shown as they fall."""

    def beyond(other: str, what: str) -> list[float]:
        return [a - b for a, b in zip(found[f"{NEW}, {what}"], found[f"{other}, {what}"], strict=True)]

    guard = found[f"{NEW}, text under the guard same to the bit"]
    return [
        Row("moextend_clothes: text kept beyond full fine-tuning at the same rate", over(beyond(FULL, "text")), ""),
        Row("moextend_clothes: text kept beyond full fine-tuning at a fifth of it", over(beyond(LOW, "text")), ""),
        Row("moextend_clothes: task beyond full fine-tuning at a fifth of the rate", over(beyond(LOW, "task")), ""),
        Row("moextend_clothes: text under the guard, same to the bit", over(guard), "", bound=1.0),
    ]
