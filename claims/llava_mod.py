"""Claims of LLaVA-MoD on scenes: mimic beats answers alone, preference lowers hallucination (arXiv:2408.15881).

From the weights of `llava_kd_tiny`, made short-sighted by a pruner that leaves it 4 of its 64 image tokens (with all of
them it hallucinates next to nothing), a student goes on for as many steps dense or sparse, with answers alone or with
the teacher `scenes_tiny` beside them, which sees everything; and from the sparse mimic student, on pairs about what is
in the picture and what is not, with the teacher as the reference, or on the chosen answers alone. What is asked about
absent objects is POPE's adversarial kind: most share a colour or a shape with something that is there.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.claims.student import FALLS, OFF, TEACHER, Arm, Scenes, World

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
SETTING = [
    f"student llava_kd_tiny as it ships (0.28 M) with 4 of 64 image tokens, teacher {TEACHER} (1.6 M) with all; "
    f"{GO_ON} + {PREFER} steps of 20 pictures",
    "accuracy: over all questions of 100 new pictures; false positives: yes to what is absent; valid: yes or no at all",
]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train all arms from one student."""
    world = Scenes(seed, share)
    short = ["pruner=[divprune]", "pruner.divprune.keep_ratio=0.0625"]
    student, processor = world.student("llava_kd_tiny", "adapter=[upcycle]", *short, pretrained=True)
    student.detach_only(["upcycle"])
    return compare(world, student, processor, (world.relations, GO_ON, FALLS), (world.pairs, PREFER), show)


def compare(
    world: World,
    student: Any,
    processor: Any,
    go_on: tuple[Any, int, Mapping[str, Any]],
    prefer: tuple[Any, int],
    show: Callable[[str], None],
) -> dict[str, float]:
    """Score the teacher, the student, it after going on in four ways, and the last of these after pairs, in four ways.

    Args:
        student: with `upcycle`, detached.
        processor: its own; None: the teacher's.
        go_on: data, steps, and how they are optimised.
        prefer: pairs of answers, and steps.
    """
    found: dict[str, float] = {}

    def score(name: str, model: Any, processor: Any = processor) -> None:
        scores = world.score(model, processor)
        found.update({f"{name}: {what}": scores[what] for what in SAID})
        show(f"  {name}: " + ", ".join(f"{what} {scores[what]:.3f}" for what in SAID))

    score("teacher", world.teacher.teacher.model, None)
    score("before", student)
    arms = {}
    for name, (kind, distiller) in ARMS.items():
        fields = {"train": ["projector", "llm.*.mlp.*"], "detach": ["upcycle"]}
        arms[name] = Arm(copy.deepcopy(student), distiller, processor, fields)
        if kind == "sparse":
            arms[name].fields = {"train": SPARSE}
            arms[name].model.detach_only([])
            torch.manual_seed(world.seed)
            arms[name].model.adapter["upcycle"].start()
    data, steps, rates = go_on
    world.train(list(arms.values()), data, steps, **rates)
    for name, arm in arms.items():
        score(name, arm.model)
    pairs = {}
    for name, distiller in PAIRS.items():
        weights = {} if distiller is None else OFF
        pairs[name] = Arm(copy.deepcopy(arms["sparse, mimic"].model), distiller, processor, {"loss_weights": weights})
    world.train(list(pairs.values()), *prefer, train=SPARSE, lr=1e-3)
    for name, arm in pairs.items():
        score(name, arm.model)
    return found


def judge(found: dict[str, list[float]], claim: str = "llava_mod") -> list[Row]:
    """Mimic above answers at equal steps, for both kinds; fewer false positives, answers still valid."""
    mean = {name: sum(numbers) / len(numbers) for name, numbers in found.items()}

    def row(what: str, value: float, bound: float | None = None) -> Row:
        return Row(f"{claim}: {what}", Value(value, value, value), "", bound=bound)

    rows = [
        row(f"{kind}, accuracy of mimic above answers alone",
            mean[f"{kind}, mimic: accuracy"] - mean[f"{kind}, answers: accuracy"], 0.0)
        for kind in ("dense", "sparse")
    ]  # fmt: skip
    rows.append(row("sparse above dense, both mimic", mean["sparse, mimic: accuracy"] - mean["dense, mimic: accuracy"]))
    before = mean["sparse, mimic: false positives"]
    for name in PAIRS:
        fewer = before - mean[f"{name}: false positives"]
        rows.append(row(f"{name}, fewer false positives than before", fewer, 0.0 if "kto" in name else None))
    for name in ("kto_pair", "kto_pair, anchor"):
        rows.append(row(f"{name}, share of valid answers", mean[f"{name}: valid"], 0.98))
    control = mean["chosen answers: false positives"] - mean["kto_pair, anchor: false positives"]
    rows.append(row("kto_pair with anchor, fewer false positives than chosen answers alone", control))
    theirs = mean["teacher: false positives"] - mean["kto_pair, anchor: false positives"]
    return [*rows, row("kto_pair with anchor, fewer false positives than the teacher", theirs)]
