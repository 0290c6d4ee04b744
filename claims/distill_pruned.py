"""Claim: a student that is taught with its pruner on loses less to it than one that is pruned afterwards.

From the weights of `llava_kd_tiny`, at four keep ratios: `divprune` put on afterwards; put on while the student learns
from a teacher that keeps every token, compared on the cells that are left; and put on while it learns from answers
alone, which shows what is due to the teacher. All go on for as many steps, what is pruned afterwards too.
"""

import copy
from collections.abc import Callable
from typing import Any

from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.claims.student import FALLS, Arm, Scenes, World

STUDENT, PRUNER, STEPS = "llava_kd_tiny", "divprune", 150
RATIOS = (0.5, 0.25, 0.125, 0.0625)  # of image tokens
TAUGHT, SUPERVISED, AFTER = "taught with the pruner", "supervised with the pruner", "taught, pruned afterwards"
WAYS = (TAUGHT, SUPERVISED, AFTER)
SETTING = [
    f"student {STUDENT} as it ships, teacher scenes_tiny without a pruner; {STEPS} steps of 20 pictures of relations",
    f"pruner {PRUNER}, 64 image tokens; accuracy over the questions of 100 unseen scenes, boxes left out",
]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train all arms with one seed."""
    world = Scenes(seed, share)
    return compare(world, STUDENT, world.relations, STEPS, show)


def compare(world: World, student: str, data: Any, steps: int, show: Callable[[str], None]) -> dict[str, float]:
    """Train all arms from the weights of the student of that name; accuracy of each."""
    kd = {"name": "llava_kd"}
    whole, _ = world.student(student, pretrained=True)
    arms = {"whole": Arm(copy.deepcopy(whole), kd)}
    for ratio in RATIOS:
        words = [f"pruner=[{PRUNER}]", f"pruner.{PRUNER}.keep_ratio={ratio}"]
        model, processor = world.student(student, *words, pretrained=True)
        arms[f"{TAUGHT}, {ratio}"] = Arm(model, kd, processor)
        arms[f"{SUPERVISED}, {ratio}"] = Arm(copy.deepcopy(model), None, processor)
    world.train(list(arms.values()), data, steps, train=["all"], **FALLS)
    found = {"whole": world.score(arms["whole"].model)["accuracy"]}
    for ratio in RATIOS:
        taught, supervised = (arms[f"{way}, {ratio}"] for way in (TAUGHT, SUPERVISED))
        found[f"{TAUGHT}, {ratio}"] = world.score(taught.model, taught.processor)["accuracy"]
        found[f"{SUPERVISED}, {ratio}"] = world.score(supervised.model, taught.processor)["accuracy"]
        taught.model.load_state_dict(arms["whole"].model.state_dict())
        found[f"{AFTER}, {ratio}"] = world.score(taught.model, taught.processor)["accuracy"]
        show(f"  {ratio}: " + ", ".join(f"{way} {found[f'{way}, {ratio}']:.3f}" for way in WAYS))
    return found


def judge(found: dict[str, list[float]], claim: str = "distill_pruned") -> list[Row]:
    """At every ratio, in every seed: above pruning afterwards, and above learning from answers with the pruner on."""
    rows = []
    for other in (AFTER, SUPERVISED):
        for ratio in RATIOS:
            pairs = zip(found[f"{TAUGHT}, {ratio}"], found[f"{other}, {ratio}"], strict=True)
            gaps = [a - b for a, b in pairs]
            what = f"{claim}: keep {ratio}, {TAUGHT} over {other}, least of the seeds"
            rows.append(Row(what, Value(min(gaps), min(gaps), max(gaps)), "", bound=0.0))
    return rows
