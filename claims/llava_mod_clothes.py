"""The claims of `llava_mod` on photographs: a small student from random weights on Fashion-MNIST.

It learns to see and to speak from answers alone, goes on dense or sparse, with the teacher or without, and then learns
from a right and a wrong answer to "Is this a <class>?". What is asked about and not shown is any of the other classes.
"""

from zoo.claims import llava_mod
from zoo.claims.experiment import Experiment, Run
from zoo.claims.student import FALLS, RATE, Arm, Clothes

INIT, GO_ON, PREFER = 250, 150, 60  # steps


def measure(run: Run) -> None:
    """Train all arms from one student."""
    train = Clothes(run)
    student, _ = train.student("llava_mod_fashion")
    dense = Arm(student, fields={"train": ["all"], "detach": ["upcycle"], "freeze": ["adapter"]})
    train([dense], train.photos, INIT, **RATE | {"lr": 1.5e-3, "matrix_lr": 0.02})
    rates = FALLS | {"lr": 1e-3, "matrix_lr": 0.01, "order": 1}
    llava_mod.compare(train, student, None, (train.photos, GO_ON, rates), (train.pairs, PREFER))


EXPERIMENT = Experiment(
    data=("fashion_mnist",),
    setting=(
        "student llava_mod_fashion (0.26 M, sparse 0.39 M) from random weights, teacher fashion_tiny (1.1 M); "
        f"{INIT} + {GO_ON} + {PREFER} steps of 64 pictures",
        "accuracy: over the two questions about each of 1000 dev pictures; false positives: yes to what is not shown; "
        "valid: yes or no at all",
    ),
    measure=measure,
    bounds=llava_mod.BOUNDS,
)
