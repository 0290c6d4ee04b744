"""The comparison of `llava_kd` where words are known: `picturebook_135m` teaches ten of SmolLM2-135M's thirty layers.

The student is `picturebook_64m`: those layers as they are, with a gap behind each, and a projector that has learnt
nothing. Projector and language model learn in all three stages to name clothes, signed digits and alphabets; D is a
stage with the teacher. Controls: the student alone for as many steps, and for as many CPU seconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.claims.experiment import Bound, Experiment, Run
from zoo.claims.llava_kd import EQUAL_COMPUTE, OF_STAGES, over
from zoo.claims.smollm import loaded, scores, seconds_of_a_step, trained

TEACHER = "picturebook_135m"
STUDENT = ("model=picturebook_64m", f"tokenizer.checkpoint=model:{TEACHER}")
SETS = {"fashion_mnist": 3, "sign_digits": 2, "omniglot": 2}  # share of a batch
DATA = (
    f"data=[{','.join(SETS)}]",
    "data.fashion_mnist.yes_no=0",
    "data.sign_digits.per_image=1",
    "data.omniglot.per_image=1",
)
PT, SFT, FT, TEST = 45, 30, 45, 80  # steps; dev samples of each data set
KD = {"name": "llava_kd", "response_weight": 1.0, "visual_weight": 1.0, "relation_weight": 0.5}
ARMS = {"PT-SFT-SFT": ("PT", None), "PT-SFT-DFT": ("PT", KD), "DPT-SFT-SFT": ("DPT", None), "DPT-SFT-DFT": ("DPT", KD)}
FACTOR = "steps of the last stage at equal compute, times"


def stage(name: str, steps: int, distiller: Any = None, **fields: Any) -> dict[str, dict[str, Any]]:
    """A stage that trains projector and language model, with the teacher where a distiller asks for one."""
    taught = {} if distiller is None else {"distiller": distiller, "teacher": TEACHER}
    return {name: {"steps": steps, "train": ["projector", "llm"], "data": SETS, "lr": 3e-4, **taught, **fields}}


def begun(run: Run, distiller: Any = None) -> tuple[Path, float]:
    """Train the first two stages: the model, and CPU seconds of both."""
    name = "PT" if distiller is None else "DPT"
    slow = {"lr_scale": {"projector": 3}, "schedule": "constant"}
    first = trained(run, name, [*STUDENT, *DATA], stage("look", PT, distiller, **slow))
    second = trained(run, f"{name}-SFT", [f"model=dir:{first}", *DATA], stage("answer", SFT, schedule="constant"))
    return second, run.steps(PT) * seconds_of_a_step(first) + run.steps(SFT) * seconds_of_a_step(second)


def measure(run: Run) -> None:
    """Train the stages that arms share once, and every arm behind them; accuracy and CPU seconds of each."""
    second = {name: begun(run, kd) for name, kd in (("PT", None), ("DPT", KD))}
    wanted: dict[str, tuple[str, Any]] = {**ARMS, EQUAL_COMPUTE: ("PT", None)}
    for name, (start, distiller) in run.arms(wanted):
        base, before = second[start]
        steps = run.steps(FT)
        if name == EQUAL_COMPUTE:
            dear, cheap = (run.found[f"{arm}, seconds"] for arm in ("DPT-SFT-DFT", "PT-SFT-SFT"))
            run.add({FACTOR: max(1.0, (dear - before) / (cheap - before))})
            steps = round(steps * run.found[FACTOR])
        last = stage("go_on", steps if run.share == 1 else FT, distiller)
        folder = trained(run, name, [f"model=dir:{base}", *DATA], last)
        run.add({f"{name}, seconds": before + steps * seconds_of_a_step(folder)})
        _add(run, name, folder, DATA)


def _add(run: Run, name: str, folder: Path, data: Sequence[str]) -> None:
    found = scores(run, *loaded(folder), data, TEST, baselines=name == "PT-SFT-SFT")
    run.add({name if what == "all" else f"{name}, {what}": one for what, one in found.items()})


EXPERIMENT = Experiment(
    data=tuple(SETS),
    setting=(
        f"student picturebook_64m (ten layers of SmolLM2-135M), teacher {TEACHER} as it ships; {PT} + {SFT} + {FT} "
        "steps of 16",
        f"accuracy, mean over three data sets, {TEST} dev samples of each; seconds: CPU, of all stages and the teacher",
    ),
    measure=measure,
    bounds=[
        *(Bound(b.what, b.number, over="seeds") for b in OF_STAGES),
        over("all three stages over the control at equal compute", "DPT-SFT-DFT", EQUAL_COMPUTE),
    ],
)
