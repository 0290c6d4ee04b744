"""The comparison of `llava_mod` where words are known: `picturebook_135m` teaches ten of SmolLM2-135M's thirty layers.

A dense student learns from answers alone to name clothes and to say whether a photo shows one. From it the feed-forward
layers go on, dense or as four experts of which two run, with answers alone or with the teacher beside them; then the
sparse mimic student learns from a right and a wrong answer to each question, with the teacher as the reference, or from
the right ones alone. Controls: the students without a teacher for as many steps, and the dense one for as many seconds.
"""

from pathlib import Path
from typing import Any

from zoo.claims.experiment import Bound, Experiment, Run, gap
from zoo.claims.llava_kd_smollm import STUDENT, TEACHER
from zoo.claims.llava_mod import ARMS, BOUNDS, PAIRS, SAID
from zoo.claims.smollm import loaded, seconds_of_a_step, trained
from zoo.claims.student import OFF, said_of
from zoo.evaluation.evaluate import evaluate
from zoo.loading.build import load
from zoo.runs.data import RunData
from zoo.settings.config import compose

SET, PAIRED = "fashion_mnist", "fashion_pairs"
DATA = (f"data=[{SET},{PAIRED}]",)
PRESENCE = "yes_no"  # the kind of question about what a photo shows
INIT, GO_ON, PREFER, TEST = 50, 40, 15, 150  # steps; dev photos, two questions about each
UPCYCLE = "adapter=[upcycle]"  # every second layer, four experts
TRAINED = {"dense": ["projector", "llm.*.mlp.*"], "sparse": ["projector", "adapter.upcycle", "llm.*.mlp.*"]}
EQUAL_COMPUTE = "dense, answers, equal compute"
FACTOR = "steps at equal compute, times"


def measure(run: Run) -> None:
    """Train the student, let it go on in five ways, and the sparse mimic one from pairs, in four ways."""
    init = {"answer": {"steps": INIT, "train": ["projector", "llm"], "data": {SET: 1}, "lr": 3e-4}}
    init["answer"] |= {"lr_scale": {"projector": 3}, "schedule": "constant"}
    dense = trained(run, "init", [*STUDENT, *DATA], init)
    for name, folder in run.arms({"teacher": None, "before": dense}):
        _add(run, name, folder)
    wanted: dict[str, tuple[str, Any]] = {**ARMS, EQUAL_COMPUTE: ("dense", None)}
    for name, (kind, distiller) in run.arms(wanted):
        steps = GO_ON
        if name == EQUAL_COMPUTE:
            dear, cheap = (run.found[f"dense, {way}: seconds of a step"] for way in ("mimic", "answers"))
            run.add({FACTOR: max(1.0, dear / cheap)})
            steps = round(GO_ON * run.found[FACTOR])
        _add(run, name, _go_on(run, name, dense, kind, distiller, steps))
    sparse = _go_on(run, "sparse, mimic", dense, "sparse", ARMS["sparse, mimic"][1], GO_ON)
    for name, distiller in run.arms(PAIRS):
        stage = _stage("sparse", PREFER, PAIRED, distiller) | {"lr": 5e-5}
        if distiller is not None:
            stage["loss_weights"] = OFF
        _add(run, name, trained(run, name, [f"model=dir:{sparse}", *DATA], {"prefer": stage}))


def _go_on(run: Run, name: str, dense: Path, kind: str, distiller: Any, steps: int) -> Path:
    """Let the student go on; what is trained already is found where it was kept."""
    adapter = [UPCYCLE] if kind == "sparse" else []
    words = [f"model=dir:{dense}", *adapter, *DATA]
    return trained(run, name, words, {"go_on": _stage(kind, steps, SET, distiller)})


def _stage(kind: str, steps: int, data: str, distiller: Any) -> dict[str, Any]:
    taught = {} if distiller is None else {"distiller": distiller, "teacher": TEACHER}
    return {"steps": steps, "train": TRAINED[kind], "data": {data: 1}, "lr": 3e-4, **taught}


def _add(run: Run, name: str, folder: Path | None) -> None:
    """Add what a student answers to both questions about dev photos, or the teacher; and what a step of it took."""
    model, processor = load(TEACHER, device="cpu") if folder is None else loaded(folder)
    photos = RunData(compose("eval", ["model=scenes_tiny", f"data=[{SET}]"]).data).evaluation
    found = evaluate(model, processor, photos, limit=run.size(TEST, 2), precision="bf16", baselines=False)
    figures = said_of(found.predictions, PRESENCE)
    run.add({f"{name}: {what}": figures[what] for what in SAID})
    if folder is not None:
        run.add({f"{name}: seconds of a step": seconds_of_a_step(folder)})


EXPERIMENT = Experiment(
    data=(SET,),
    setting=(
        f"student picturebook_64m (ten layers of SmolLM2-135M), sparse 108 M; teacher {TEACHER} as it ships; "
        f"{INIT} + {GO_ON} + {PREFER} steps of 16",
        f"accuracy: over the two questions about each of {TEST} dev photos; false positives: yes to what is not shown; "
        "valid: yes or no at all; seconds: CPU",
    ),
    measure=measure,
    bounds=(
        *BOUNDS,
        Bound(
            "dense, accuracy of mimic above answers alone at equal compute",
            gap("dense, mimic: accuracy", f"{EQUAL_COMPUTE}: accuracy"),
            0.0,
        ),
    ),
)
