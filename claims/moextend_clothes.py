"""The experiment of `moextend` on photos: the task is Fashion-MNIST, the text stays the four permutations.

Four patches of 14 x 14 pixels represent a photo; the projector is the only encoder, so the task is learnt less well
than that on drawn classes, by every arm.
"""

from functools import partial

import torch
from torch import Tensor

from zoo.benches.real_data import CLOTHES, patches_of
from zoo.claims import moextend
from zoo.claims.experiment import Experiment, gap, in_seeds, row
from zoo.claims.moextend import FULL, GUARD, LOW, NEW


class Photos(moextend.Task):
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


EXPERIMENT = Experiment(
    data=("fashion_mnist",),
    setting=(
        "as moextend, the task on 24,000 photos of Fashion-MNIST in 4 patches of pixels; answers depend on the class",
        "task: share of right answers about 256 photos of the dev split; guessing 0.03",
    ),
    measure=partial(moextend.measure, Photos, (NEW, FULL, LOW)),
    bounds=(
        in_seeds("text kept beyond full fine-tuning at the same rate", gap(f"{NEW}, text", f"{FULL}, text")),
        in_seeds("text kept beyond full fine-tuning at a fifth of it", gap(f"{NEW}, text", f"{LOW}, text")),
        in_seeds("task beyond full fine-tuning at a fifth of the rate", gap(f"{NEW}, task", f"{LOW}, task")),
        in_seeds("text under the guard, same to the bit", row(f"{NEW}, {GUARD}"), 1.0),
    ),
)
