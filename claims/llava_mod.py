"""Claims of LLaVA-MoD on scenes: mimic beats answers alone, preference lowers hallucination (arXiv:2408.15881).

From the weights of `llava_kd_tiny`, made short-sighted by a pruner that leaves it 4 of its 64 image tokens (with all of
them it hallucinates next to nothing), a student goes on for as many steps dense or sparse, with answers alone or with
the teacher `scenes_tiny` beside them, which sees everything; and from the sparse mimic student, on pairs about what is
in the picture and what is not, with the teacher as the reference, or on the chosen answers alone. What is asked about
absent objects is POPE's adversarial kind: most share a colour or a shape with something that is there.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from zoo.claims.experiment import Bound, Experiment, Run, gap, row
from zoo.claims.student import FALLS, OFF, TEACHER, Arm, Scenes, Trainer

GO_ON, PREFER = 120, 80  # steps
SPARSE = ["projector", "adapter.upcycle", "llm.*.mlp.*"]
MIMIC = {"name": "llava_mod"}
PREFERENCE = {"name": "llava_mod", "objective": "preference"}
ARMS: dict[str, tuple[str, Any]] = {
    "dense, answers": ("dense", None),
    "dense, mimic": ("dense", MIMIC),
    "sparse, answers": ("sparse", None),
    "sparse, mimic": ("sparse", MIMIC),
}
PAIRS: dict[str, Any] = {
    "kto_pair": PREFERENCE,
    "dpo": PREFERENCE | {"loss": "dpo"},
    "kto_pair, anchor": PREFERENCE | {"anchor": 1.0},
    "chosen answers": None,  # the control: no teacher, no rejected answer
}
SAID = ("accuracy", "false positives", "false negatives", "yes", "valid")


def measure(run: Run) -> None:
    """Train all arms from one student."""
    train = Scenes(run)
    short = ["pruner=[divprune]", "pruner.divprune.keep_ratio=0.0625"]
    student, processor = train.student("llava_kd_tiny", "adapter=[upcycle]", *short, pretrained=True)
    student.detach_only(["upcycle"])
    compare(train, student, processor, (train.relations, GO_ON, FALLS), (train.pairs, PREFER))


def compare(
    train: Trainer, student: Any, processor: Any, go_on: tuple[Any, int, Mapping[str, Any]], prefer: tuple[Any, int]
) -> None:
    """Score the teacher, the student, it after going on in four ways, and the last of these after pairs, in four ways.

    Args:
        train: with the teacher; its run takes the rows.
        student: with `upcycle`, detached.
        processor: its own; None: the teacher's.
        go_on: data, steps, and how they are optimised.
        prefer: pairs of answers, and steps.
    """

    def score(arms: Mapping[str, Arm]) -> None:
        for name, arm in train.run.arms(arms):
            scores = train.score(arm.model, arm.processor)
            train.run.add({f"{name}: {what}": scores[what] for what in SAID})

    score({"teacher": Arm(train.teacher.teacher.model), "before": Arm(student, processor=processor)})
    arms = {}
    for name, (kind, distiller) in ARMS.items():
        fields = {"train": ["projector", "llm.*.mlp.*"], "detach": ["upcycle"]}
        arms[name] = Arm(copy.deepcopy(student), distiller, processor, fields)
        if kind == "sparse":
            arms[name].fields = {"train": SPARSE}
            arms[name].model.detach_only([])
            torch.manual_seed(train.seed)
            arms[name].model.adapter["upcycle"].start()
    data, steps, rates = go_on
    train(list(arms.values()), data, steps, **rates)
    score(arms)
    pairs = {}
    for name, distiller in PAIRS.items():
        weights = {} if distiller is None else OFF
        pairs[name] = Arm(copy.deepcopy(arms["sparse, mimic"].model), distiller, processor, {"loss_weights": weights})
    train(list(pairs.values()), *prefer, train=SPARSE, lr=1e-3)
    score(pairs)


def _fewer(what: str, other: str, arm: str = "kto_pair, anchor", at_least: float | None = None) -> Bound:
    """An arm says yes to what is absent less often than another."""
    return Bound(what, gap(f"{other}: false positives", f"{arm}: false positives"), at_least)


def _mimic(kind: str) -> Bound:
    """Mimic is above answers alone at equal steps."""
    arms = f"{kind}, mimic: accuracy", f"{kind}, answers: accuracy"
    return Bound(f"{kind}, accuracy of mimic above answers alone", gap(*arms), 0.0)


BOUNDS = (
    _mimic("dense"),
    _mimic("sparse"),
    Bound("sparse above dense, both mimic", gap("sparse, mimic: accuracy", "dense, mimic: accuracy")),
    *(
        _fewer(f"{arm}, fewer false positives than before", "sparse, mimic", arm, 0.0 if "kto" in arm else None)
        for arm in PAIRS
    ),
    *(Bound(f"{arm}, share of valid answers", row(f"{arm}: valid"), 0.98) for arm in ("kto_pair", "kto_pair, anchor")),
    _fewer("kto_pair with anchor, fewer false positives than chosen answers alone", "chosen answers"),
    _fewer("kto_pair with anchor, fewer false positives than the teacher", "teacher"),
)
EXPERIMENT = Experiment(
    setting=(
        f"student llava_kd_tiny as it ships (0.28 M) with 4 of 64 image tokens, teacher {TEACHER} (1.6 M) with all; "
        f"{GO_ON} + {PREFER} steps of 20 pictures",
        "accuracy: over all questions of 100 new pictures; false positives: yes to what is absent; valid: yes or no "
        "at all",
    ),
    measure=measure,
    bounds=BOUNDS,
)
