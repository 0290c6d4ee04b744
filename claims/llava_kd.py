"""Claim: a small model learns more from a large one's distributions than from the same answers once more (2410.16236).

The three stages on drawn scenes, from the weights of `llava_kd_tiny`, which sees and answers but is weak at relations:
the stages one by one, the terms one by one, and the control that the published table lacks, a second supervised pass of
the same length. Equal compute is that control with as many more steps as teacher and distiller cost, measured in the
run. From random weights the same steps leave every arm at chance, which shows nothing.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zoo.claims.experiment import Bound, Experiment, Run, gap, least_of_seeds
from zoo.claims.student import FALLS, RATE, TEACHER, Arm, Scenes, Trainer

PT, SFT, FT = 60, 60, 120  # steps
KD = {"name": "llava_kd"}
# Arm -> the stage that it starts from, and its distiller in the last stage.
ARMS: dict[str, tuple[str, Any]] = {
    "PT-SFT-SFT": ("PT", None),
    "PT-SFT-DFT": ("PT", KD),
    "DPT-SFT-SFT": ("DPT", None),
    "DPT-SFT-DFT": ("DPT", KD),
    "PT-SFT-DFT, response": ("PT", KD | {"visual_weight": 0.0, "relation_weight": 0.0}),
    "PT-SFT-DFT, response and visual": ("PT", KD | {"relation_weight": 0.0}),
}
EQUAL_COMPUTE = "PT-SFT-SFT, equal compute"
FACTOR = "steps at equal compute, times"
Stage = tuple[Any, int, Mapping[str, Any]]  # data, steps, and what else a trainer takes


def three_stages(train: Trainer, student: Any, stages: Sequence[Stage]) -> tuple[dict[str, Arm], dict[str, Arm]]:
    """Train the arms through all stages, those of a stage side by side: after the second stage, and after the third."""

    def stage(arms: dict[str, Arm], number: int) -> dict[str, Arm]:
        data, steps, fields = stages[number]
        train(list(arms.values()), data, steps, **fields)
        return arms

    first = stage({"PT": Arm(student), "DPT": Arm(copy.deepcopy(student), KD)}, 0)
    second = stage({name: replace(arm, distiller=None) for name, arm in first.items()}, 1)
    last = {
        name: replace(second[start], model=copy.deepcopy(second[start].model), distiller=kd)
        for name, (start, kd) in ARMS.items()
    }
    return second, stage(last, 2)


def measure(run: Run) -> None:
    """Train every arm; accuracy of each, and seconds of the last stage."""
    train = Scenes(run)
    student = train.student("llava_kd_tiny", pretrained=True)[0]
    run.add({f"before, {kind}": value for kind, value in train.score(student).items()})
    stages = [
        (train.basics, PT, {"train": ["projector", "llm"], **RATE}),
        (train.relations, SFT, {"train": ["all"], **RATE}),
        (train.relations, FT, {"train": ["all"], **FALLS}),
    ]
    second, third = three_stages(train, student, stages)
    run.add({f"{name}-SFT": train.score(arm.model)["accuracy"] for name, arm in second.items()})
    seconds = {name: arm.seconds - second[ARMS[name][0]].seconds for name, arm in third.items()}
    run.add({FACTOR: seconds["PT-SFT-DFT"] / seconds["PT-SFT-SFT"]})
    third[EQUAL_COMPUTE] = Arm(second["PT"].model)
    train([third[EQUAL_COMPUTE]], train.relations, round(FT * run.found[FACTOR]), train=["all"], **FALLS)
    seconds[EQUAL_COMPUTE] = third[EQUAL_COMPUTE].seconds
    for name, arm in run.arms(third):
        scores = train.score(arm.model)
        run.add({f"{name}, {kind}": scores[kind] for kind in ("exist", "count", "relation") if kind in scores})
        run.add({name: scores["accuracy"], f"{name}, seconds of the last stage": seconds[name]})


def over(what: str, arm: str, other: str) -> Bound:
    """An arm is above another in every seed."""
    return least_of_seeds(what, gap(arm, other), 0.0)


OF_STAGES = (
    over("distilled fine-tuning over a second supervised pass", "PT-SFT-DFT", "PT-SFT-SFT"),
    over("all three stages over a second supervised pass", "DPT-SFT-DFT", "PT-SFT-SFT"),
    over("distilled pre-training over plain, then both distilled", "DPT-SFT-DFT", "PT-SFT-DFT"),
    over("distilled pre-training over plain, then both supervised", "DPT-SFT-SFT", "PT-SFT-SFT"),
)
OF_TERMS = (
    over("answers alone over a second supervised pass", "PT-SFT-DFT, response", "PT-SFT-SFT"),
    over("image tokens beside answers", "PT-SFT-DFT, response and visual", "PT-SFT-DFT, response"),
    over("relations beside both", "PT-SFT-DFT", "PT-SFT-DFT, response and visual"),
)
EXPERIMENT = Experiment(
    setting=(
        f"student llava_kd_tiny as it ships (0.28 M), teacher {TEACHER} (1.6 M); {PT} + {SFT} + {FT} steps of 20 "
        "pictures",
        "accuracy over the questions of 100 unseen scenes, boxes left out",
    ),
    measure=measure,
    bounds=(
        *OF_STAGES,
        over("distilled fine-tuning over the control at equal compute", "PT-SFT-DFT", EQUAL_COMPUTE),
        *OF_TERMS,
    ),
)
