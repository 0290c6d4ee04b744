"""Claim: a small model learns more from a large one's distributions than from the same answers once more (2410.16236).

The three stages on drawn scenes, from the weights of `llava_kd_tiny`, which sees and answers but is weak at relations:
the stages one by one, the terms one by one, and the control that the published table lacks, a second supervised pass of
the same length. Equal compute is that control with as many more steps as teacher and distiller cost, measured in the
run. From random weights the same steps leave every arm at chance, which shows nothing.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.claims.student import FALLS, RATE, TEACHER, Arm, Scenes, World

PT, SFT, FT = 60, 60, 120  # steps
KD = {"name": "llava_kd"}
# Arm -> what it starts from, and its distiller in the last stage.
STAGES: dict[str, tuple[str, Any]] = {
    "PT-SFT-SFT": ("PT", None),
    "PT-SFT-DFT": ("PT", KD),
    "DPT-SFT-SFT": ("DPT", None),
    "DPT-SFT-DFT": ("DPT", KD),
}
TERMS: dict[str, tuple[str, Any]] = {
    "PT-SFT-DFT, response": ("PT", KD | {"visual_weight": 0.0, "relation_weight": 0.0}),
    "PT-SFT-DFT, response and visual": ("PT", KD | {"relation_weight": 0.0}),
}
ARMS = STAGES | TERMS
EQUAL_COMPUTE = "PT-SFT-SFT, equal compute"
SETTING = [
    f"student llava_kd_tiny as it ships (0.28 M), teacher {TEACHER} (1.6 M); {PT} + {SFT} + {FT} steps of 20 pictures",
    "accuracy over the questions of 100 unseen scenes, boxes left out",
]
Stage = tuple[Any, int, Mapping[str, Any]]  # data, steps, and what else `World.train` takes


def three_stages(
    world: World, student: Any, stages: Sequence[Stage], arms: Mapping[str, tuple[str, Any]]
) -> tuple[dict[str, Arm], dict[str, Arm]]:
    """Train the arms through all stages, those of a stage side by side: after the second stage, and after the third."""

    def train(arms: dict[str, Arm], number: int) -> dict[str, Arm]:
        data, steps, fields = stages[number]
        world.train(list(arms.values()), data, steps, **fields)
        return arms

    first = train({"PT": Arm(student), "DPT": Arm(copy.deepcopy(student), KD)}, 0)
    second = train({name: replace(arm, distiller=None) for name, arm in first.items()}, 1)
    last = {
        name: replace(second[start], model=copy.deepcopy(second[start].model), distiller=kd)
        for name, (start, kd) in arms.items()
    }
    return second, train(last, 2)


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train every arm with one seed; accuracy of each, and seconds of the last stage."""
    world = Scenes(seed, share)
    student = world.student("llava_kd_tiny", pretrained=True)[0]
    found = {f"before, {kind}": value for kind, value in world.score(student).items()}
    stages = [
        (world.basics, PT, {"train": ["projector", "llm"], **RATE}),
        (world.relations, SFT, {"train": ["all"], **RATE}),
        (world.relations, FT, {"train": ["all"], **FALLS}),
    ]
    second, third = three_stages(world, student, stages, ARMS)
    found |= {f"{name}-SFT": world.score(arm.model)["accuracy"] for name, arm in second.items()}
    seconds = {name: arm.seconds - second[ARMS[name][0]].seconds for name, arm in third.items()}
    factor = seconds["PT-SFT-DFT"] / seconds["PT-SFT-SFT"]
    third[EQUAL_COMPUTE] = Arm(second["PT"].model)
    world.train([third[EQUAL_COMPUTE]], world.relations, round(FT * factor), train=["all"], **FALLS)
    seconds[EQUAL_COMPUTE] = third[EQUAL_COMPUTE].seconds
    for name, arm in third.items():
        scores = world.score(arm.model)
        found |= {f"{name}, {kind}": scores[kind] for kind in ("exist", "count", "relation") if kind in scores}
        found |= {name: scores["accuracy"], f"{name}, seconds of the last stage": seconds[name]}
        show(f"  {name}: {scores['accuracy']:.3f} in {seconds[name]:.0f} s")
    return found | {"steps at equal compute, times": factor}


def least(claim: str, found: Mapping[str, list[float]], *gaps: tuple[str, str, str]) -> list[Row]:
    """How far an arm is above another in every seed: (what it says, arm, the other)."""
    rows = []
    for what, above, below in gaps:
        each = [a - b for a, b in zip(found[above], found[below], strict=True)]
        value = Value(min(each), min(each), max(each))
        rows.append(Row(f"{claim}: {what}, least of the seeds", value, "", bound=0.0))
    return rows


OF_STAGES = (
    ("distilled fine-tuning over a second supervised pass", "PT-SFT-DFT", "PT-SFT-SFT"),
    ("all three stages over a second supervised pass", "DPT-SFT-DFT", "PT-SFT-SFT"),
    ("distilled pre-training over plain, then both distilled", "DPT-SFT-DFT", "PT-SFT-DFT"),
    ("distilled pre-training over plain, then both supervised", "DPT-SFT-SFT", "PT-SFT-SFT"),
)


OF_TERMS = (
    ("answers alone over a second supervised pass", "PT-SFT-DFT, response", "PT-SFT-SFT"),
    ("image tokens beside answers", "PT-SFT-DFT, response and visual", "PT-SFT-DFT, response"),
    ("relations beside both", "PT-SFT-DFT", "PT-SFT-DFT, response and visual"),
)


def judge(found: dict[str, list[float]]) -> list[Row]:
    """What distillation gains in every seed, over equal steps and over equal compute, and what each part adds."""
    equal = ("distilled fine-tuning over the control at equal compute", "PT-SFT-DFT", EQUAL_COMPUTE)
    return least("llava_kd", found, *OF_STAGES, equal, *OF_TERMS)
