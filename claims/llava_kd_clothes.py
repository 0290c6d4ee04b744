"""The claim of `llava_kd` on photographs and from random weights: stages and terms of LLaVA-KD on Fashion-MNIST.

Everything trains in every stage, on the same 24,000 photos, mirrored and moved. Equal compute is the control with as
many more steps in its last stage as make the seconds of all three distilled stages, measured in the run.
"""

from zoo.claims.experiment import Experiment, Run
from zoo.claims.llava_kd import EQUAL_COMPUTE, OF_STAGES, OF_TERMS, over, three_stages
from zoo.claims.student import FALLS, RATE, Arm, Clothes

PT, SFT, FT = 200, 200, 250  # steps
FAST = {"lr": 1.5e-3, "matrix_lr": 0.02}  # the rates of recipe llava_kd_fashion
FACTOR = "steps of the last stage at equal compute, times"


def measure(run: Run) -> None:
    """Train every arm; accuracy and seconds of each."""
    train = Clothes(run)
    stages = [
        (train.photos, steps, {"train": ["all"], "order": order, **rate, **FAST})
        for order, (steps, rate) in enumerate(((PT, RATE), (SFT, RATE), (FT, FALLS | {"flat_ratio": 0.4})))
    ]
    second, third = three_stages(train, train.student("llava_kd_fashion")[0], stages)
    before, control = second["PT"].seconds, third["PT-SFT-SFT"].seconds
    run.add({FACTOR: (third["DPT-SFT-DFT"].seconds - before) / (control - before)})
    third[EQUAL_COMPUTE] = Arm(second["PT"].model, seconds=before)
    train([third[EQUAL_COMPUTE]], train.photos, round(FT * run.found[FACTOR]), **stages[-1][-1])
    for name, arm in run.arms({"teacher": Arm(train.teacher.teacher.model), **third}):
        scores = train.score(arm.model)
        run.add({f"{name}, {kind}": scores[kind] for kind in ("name", "yes_no")})
        run.add({name: scores["accuracy"], f"{name}, seconds": arm.seconds})


EXPERIMENT = Experiment(
    data=("fashion_mnist",),
    setting=(
        "student llava_kd_fashion (0.26 M) from random weights, teacher fashion_tiny (1.1 M); "
        f"{PT} + {SFT} + {FT} steps of 64 pictures",
        "accuracy over the two questions about each of 1000 dev pictures; seconds: of all stages and of the teacher "
        "asked",
    ),
    measure=measure,
    bounds=(
        *OF_STAGES,
        over("all three stages over the control at equal compute", "DPT-SFT-DFT", EQUAL_COMPUTE),
        *OF_TERMS,
    ),
)
