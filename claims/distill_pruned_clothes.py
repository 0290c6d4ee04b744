"""The claim of `distill_pruned` on photographs: a student of clothes with its pruner, or pruned afterwards."""

from functools import partial

from zoo.claims import distill_pruned
from zoo.claims.experiment import Experiment
from zoo.claims.student import Clothes

EXPERIMENT = Experiment(
    data=("fashion_mnist",),
    setting=(
        "student llava_kd_fashion as it ships, teacher fashion_tiny without a pruner; 100 steps of 64 pictures",
        "pruner divprune, 49 image tokens; accuracy over the two questions about each of 1000 dev pictures",
    ),
    measure=partial(distill_pruned.measure, Clothes, "llava_kd_fashion", "photos", 100),
    bounds=distill_pruned.BOUNDS,
)
