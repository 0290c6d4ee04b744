"""The claim of `claim_llava_kd` on photographs and from random weights: stages and terms of LLaVA-KD on Fashion-MNIST.

Everything trains in every stage, on the same 24,000 photos, mirrored and moved. Equal compute is the control with as
many more steps in its last stage as make the seconds of all three distilled stages, measured in the run.
"""

from collections.abc import Callable

from zoo.benches.report import Row
from zoo.claims.llava_kd import ARMS, EQUAL_COMPUTE, OF_STAGES, OF_TERMS, least, three_stages
from zoo.claims.student import FALLS, RATE, Arm, Clothes

PT, SFT, FT = 200, 200, 250  # steps
FAST = {"lr": 1.5e-3, "matrix_lr": 0.02}  # the rates of recipe llava_kd_fashion
DATA = ("fashion_mnist",)
SETTING = [
    "student llava_kd_fashion (0.26 M) from random weights, teacher fashion_tiny (1.1 M); "
    f"{PT} + {SFT} + {FT} steps of 64 pictures",
    "accuracy over the two questions about each of 1000 dev pictures; seconds: of all stages and of the teacher asked",
]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train every arm with one seed; accuracy and seconds of each."""
    world = Clothes(seed, share)
    stages = [
        (world.photos, steps, {"train": ["all"], "order": order, **rate, **FAST})
        for order, (steps, rate) in enumerate(((PT, RATE), (SFT, RATE), (FT, FALLS | {"flat_ratio": 0.4})))
    ]
    second, third = three_stages(world, world.student("llava_kd_fashion")[0], stages, ARMS)
    before, control = second["PT"].seconds, third["PT-SFT-SFT"].seconds
    factor = (third["DPT-SFT-DFT"].seconds - before) / (control - before)
    third[EQUAL_COMPUTE] = Arm(second["PT"].model, seconds=before)
    world.train([third[EQUAL_COMPUTE]], world.photos, round(FT * factor), **stages[-1][-1])
    found: dict[str, float] = {}
    for name, arm in {"teacher": Arm(world.teacher.teacher.model), **third}.items():
        scores = world.score(arm.model)
        found |= {f"{name}, {kind}": scores[kind] for kind in ("name", "yes_no")}
        found |= {name: scores["accuracy"], f"{name}, seconds": arm.seconds}
        show(f"  {name}: {scores['accuracy']:.3f} in {arm.seconds:.0f} s")
    return found | {"steps of the last stage at equal compute, times": factor}


def judge(found: dict[str, list[float]]) -> list[Row]:
    """What distillation gains in every seed, over equal steps and over equal compute, and what each part adds."""
    equal = ("all three stages over the control at equal compute", "DPT-SFT-DFT", EQUAL_COMPUTE)
    return least("llava_kd_clothes", found, *OF_STAGES, equal, *OF_TERMS)
