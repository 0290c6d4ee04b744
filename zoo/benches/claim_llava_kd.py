"""Claim: a small model learns more from a large one's distributions than from the same answers once more (2410.16236).

The three stages on drawn scenes, from the weights of `llava_kd_tiny`, which sees and answers but is weak at relations:
the stages one by one, the terms one by one, and the control that the published table lacks, a second supervised pass of
the same length. Equal compute is that control with as many more steps as teacher and distiller cost, measured in the
run. From random weights the same steps leave every arm at chance, which shows nothing.
"""

import copy
from collections.abc import Callable
from typing import Any

from zoo.benches.claim_student import FALLS, RATE, TEACHER, Arm, World
from zoo.benches.measure import Value
from zoo.benches.report import Row

PT, SFT, FT = 60, 60, 120  # steps
KD = {"name": "llava_kd"}
# Arm -> what it starts from, and its distiller in the last stage.
ARMS: dict[str, tuple[str, Any]] = {
    "PT-SFT-SFT": ("PT", None),
    "PT-SFT-DFT": ("PT", KD),
    "PT-SFT-DFT, response": ("PT", KD | {"visual_weight": 0.0, "relation_weight": 0.0}),
    "PT-SFT-DFT, response and visual": ("PT", KD | {"relation_weight": 0.0}),
    "DPT-SFT-SFT": ("DPT", None),
    "DPT-SFT-DFT": ("DPT", KD),
}
EQUAL_COMPUTE = "PT-SFT-SFT, equal compute"
SETTING = [
    f"student llava_kd_tiny as it ships (0.28 M), teacher {TEACHER} (1.6 M); {PT} + {SFT} + {FT} steps of 20 pictures",
    "accuracy over the questions of 100 unseen scenes, boxes left out",
]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train every arm with one seed; accuracy of each, and seconds of the last stage."""
    world = World(seed, share)
    student = world.student("llava_kd_tiny", pretrained=True)[0]
    found = {f"before, {kind}": value for kind, value in world.score(student).items()}
    first = {"PT": Arm(student), "DPT": Arm(copy.deepcopy(student), KD)}
    world.train(list(first.values()), world.basics, PT, train=["projector", "llm"], **RATE)
    second = {name: Arm(arm.model) for name, arm in first.items()}
    world.train(list(second.values()), world.relations, SFT, train=["all"], **RATE)
    found |= {f"{name}-SFT": world.score(arm.model)["accuracy"] for name, arm in second.items()}
    third = {name: Arm(copy.deepcopy(second[start].model), kd) for name, (start, kd) in ARMS.items()}
    world.train(list(third.values()), world.relations, FT, train=["all"], **FALLS)
    factor = third["PT-SFT-DFT"].seconds / third["PT-SFT-SFT"].seconds
    third[EQUAL_COMPUTE] = Arm(second["PT"].model)
    world.train([third[EQUAL_COMPUTE]], world.relations, round(FT * factor), train=["all"], **FALLS)
    for name, arm in third.items():
        scores = world.score(arm.model)
        found |= {f"{name}, {kind}": scores[kind] for kind in ("exist", "count", "relation") if kind in scores}
        found |= {name: scores["accuracy"], f"{name}, seconds of the last stage": arm.seconds}
        show(f"  {name}: {scores['accuracy']:.3f} in {arm.seconds:.0f} s")
    return found | {"steps at equal compute, times": factor}


def judge(found: dict[str, list[float]]) -> list[Row]:
    """What distillation gains in every seed, over equal steps and over equal compute, and what each part adds."""

    def least(what: str, above: str, below: str) -> Row:
        gaps = [a - b for a, b in zip(found[above], found[below], strict=True)]
        value = Value(min(gaps), min(gaps), max(gaps))
        return Row(f"llava_kd: {what}, least of the seeds", value, "", bound=0.0)

    return [
        least("distilled fine-tuning over a second supervised pass", "PT-SFT-DFT", "PT-SFT-SFT"),
        least("the same at equal compute", "PT-SFT-DFT", EQUAL_COMPUTE),
        least("all three stages over a second supervised pass", "DPT-SFT-DFT", "PT-SFT-SFT"),
        least("distilled pre-training over plain, then both distilled", "DPT-SFT-DFT", "PT-SFT-DFT"),
        least("distilled pre-training over plain, then both supervised", "DPT-SFT-SFT", "PT-SFT-SFT"),
        least("answers alone over a second supervised pass", "PT-SFT-DFT, response", "PT-SFT-SFT"),
        least("image tokens beside answers", "PT-SFT-DFT, response and visual", "PT-SFT-DFT, response"),
        least("relations beside both", "PT-SFT-DFT", "PT-SFT-DFT, response and visual"),
    ]
