"""Claim: a student that is taught with its pruner on loses less to it than one that is pruned afterwards.

From the weights of `llava_kd_tiny`, at four keep ratios, with kept positions and with dense ones: `divprune` put on
afterwards; put on while the student learns from a teacher that keeps every token, compared on the cells that are left;
and put on while it learns from answers alone, which shows what is due to the teacher. All go on for as many steps, what
is pruned afterwards too.
"""

import copy
from functools import partial

from zoo.claims.experiment import Experiment, Run, gap, least_of_seeds
from zoo.claims.student import FALLS, Arm, Scenes, Trainer

RATIOS = (0.5, 0.25, 0.125, 0.0625)  # of image tokens
POSITIONS = {"kept": "", "dense": ", dense positions"}  # of the tokens that are left -> end of the names of their rows
TAUGHT, SUPERVISED, AFTER = "taught with the pruner", "supervised with the pruner", "taught, pruned afterwards"


def measure(trainer: type[Trainer], student: str, data: str, steps: int, run: Run) -> None:
    """Train all arms from the weights of a student; accuracy of each.

    Args:
        trainer: with teacher and pictures.
        student: name of a model.
        data: attribute of the trainer: what it learns from.
        steps: of every arm.
        run: takes the rows.
    """
    train, kd = trainer(run), {"name": "llava_kd"}
    whole, _ = train.student(student, pretrained=True)
    arms = {"whole": Arm(copy.deepcopy(whole), kd)}
    kinds = {f"{ratio}{rest}": (ratio, word) for word, rest in POSITIONS.items() for ratio in RATIOS}
    for kind, (ratio, word) in kinds.items():
        words = ["pruner=[divprune]", f"pruner.divprune.keep_ratio={ratio}", f"positions={word}"]
        model, processor = train.student(student, *words, pretrained=True)
        arms[f"{TAUGHT}, {kind}"] = Arm(model, kd, processor)
        arms[f"{SUPERVISED}, {kind}"] = Arm(copy.deepcopy(model), None, processor)
    train(list(arms.values()), getattr(train, data), steps, train=["all"], **FALLS)
    run.add({"whole": train.score(arms["whole"].model)["accuracy"]})
    for _, kind in run.arms({f"keep {kind}": kind for kind in kinds}):
        taught, supervised = (arms[f"{way}, {kind}"] for way in (TAUGHT, SUPERVISED))
        run.add({f"{TAUGHT}, {kind}": train.score(taught.model, taught.processor)["accuracy"]})
        run.add({f"{SUPERVISED}, {kind}": train.score(supervised.model, taught.processor)["accuracy"]})
        taught.model.load_state_dict(arms["whole"].model.state_dict())
        run.add({f"{AFTER}, {kind}": train.score(taught.model, taught.processor)["accuracy"]})


# In every seed: above pruning afterwards, and above learning from answers with the pruner on.
BOUNDS = [
    least_of_seeds(f"keep {kind}, {TAUGHT} over {other}", gap(f"{TAUGHT}, {kind}", f"{other}, {kind}"), 0.0)
    for end in POSITIONS.values()
    for other in (AFTER, SUPERVISED)
    for kind in (f"{ratio}{end}" for ratio in RATIOS)
]
EXPERIMENT = Experiment(
    setting=(
        "student llava_kd_tiny as it ships, teacher scenes_tiny without a pruner; 150 steps of 20 pictures of "
        "relations",
        "pruner divprune, 64 image tokens; accuracy over the questions of 100 unseen scenes, boxes left out",
    ),
    measure=partial(measure, Scenes, "llava_kd_tiny", "relations", 150),
    bounds=BOUNDS,
)
