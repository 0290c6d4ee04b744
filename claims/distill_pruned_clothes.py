"""The claim of `claim_distill_pruned` on photographs: a student of clothes with its pruner, or pruned afterwards."""

from collections.abc import Callable
from functools import partial

from zoo.claims import distill_pruned as claim_distill_pruned
from zoo.claims.student import Clothes

STUDENT, STEPS = "llava_kd_fashion", 100
DATA = ("fashion_mnist",)
SETTING = [
    f"student {STUDENT} as it ships, teacher fashion_tiny without a pruner; {STEPS} steps of 64 pictures",
    f"pruner {claim_distill_pruned.PRUNER}, 49 image tokens; accuracy over the two questions about each of 1000 dev "
    "pictures",
]
judge = partial(claim_distill_pruned.judge, claim="distill_pruned_clothes")


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train all arms with one seed."""
    world = Clothes(seed, share)
    return claim_distill_pruned.compare(world, STUDENT, world.photos, STEPS, show)
