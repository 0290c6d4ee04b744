"""Claims of LLaVA-MoD on scenes: mimic beats answers alone, preference lowers hallucination (arXiv:2408.15881).

A student of 0.27 M parameters learns to see, then copies `scenes_tiny` (dense to dense). From there, at equal steps, it
goes on dense or sparse, with answers alone or with the teacher beside them; and from the sparse mimic student, on pairs
about what is in the picture and what is not, with the teacher as the reference, or on the chosen answers alone. What is
asked about absent objects is POPE's adversarial kind: most share a colour or a shape with something that is there.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.data.scenes import QUESTIONS
from zoo.engine import Engine, build_distiller
from zoo.evaluate import evaluate
from zoo.loader import Batches, Mix, Place
from zoo.loading import build, load
from zoo.processes import start_accelerator
from zoo.registry import build as part
from zoo.stage import Stage
from zoo.tasks.yes_no import yes_or_no
from zoo.teacher import Teacher

TEACHER = "scenes_tiny"
LOOK, COPY, GO_ON, PREFER = 400, 300, 120, 60  # steps
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
SETTING = [
    f"student 0.27 M, teacher {TEACHER} 1.6 M; {LOOK} steps to see, {COPY} dense to dense, then {GO_ON}, then {PREFER}",
    "accuracy: over all questions of 100 new pictures; false positives: yes to what is absent; valid: yes or no at all",
]


class World:
    """The student, its teacher, and the pictures."""

    def __init__(self, seed: int, share: float) -> None:
        from zoo.config import compose

        self.seed, self.share = seed, share
        self.accelerator = start_accelerator("cpu")
        self.teacher, _ = load(TEACHER, device="cpu")
        torch.manual_seed(seed)
        cfg = compose("load", ["model=scenes_tiny", "adapter=upcycle", *SIZES, f"tokenizer.checkpoint=model:{TEACHER}"])
        self.model, self.processor = build(cfg, pretrained=False, device="cpu")
        self.basics = self.scenes(questions={"relation": 0, "point": 1})
        self.mixed = self.scenes()
        asked = dict.fromkeys(QUESTIONS, 0) | {"exist": 4}
        self.pairs = self.scenes(questions=asked, pairs=True, grid=0)
        self.test = self.scenes(split="eval", eval_scenes=100, seed=0)

    def scenes(self, **options: Any) -> Any:
        return part("dataset", {"name": "scenes", "seed": self.seed, "scenes": 8000, **options})

    def train(self, model: Any, data: Any, steps: int, **fields: Any) -> None:
        """Run a stage on one data set."""
        steps = max(2, round(steps * self.share))
        stage = Stage(steps=steps, batch_size=20 if self.share == 1 else 4, momentum=0.9, **fields)
        batches = Batches(Mix({"scenes": data}, {}, self.seed), self.processor, stage, steps, Place())
        node = stage.distiller_node
        distiller = build_distiller(model, node) if node else None
        needs: frozenset[str] = getattr(distiller, "needs", frozenset())
        teacher = Teacher(self.teacher, needs) if any(n.startswith("teacher.") for n in needs) else None
        engine = Engine(self.accelerator, model, stage, steps, seed=self.seed, distiller=distiller, teacher=teacher)
        for number in range(steps):
            engine.run(number, number, [batches[number]["batch"]], False)

    def score(self, model: Any) -> dict[str, float]:
        """Accuracy over all questions, and what is said about presence."""
        limit = None if self.share == 1 else 4
        rows = evaluate(model, self.processor, {"scenes": self.test}, limit=limit, baselines=False).predictions
        right = [r["scores"].get("accuracy", r["scores"].get("exact")) for r in rows if r["kind"] != "box"]
        exist = [(yes_or_no(r["prediction"]), r["answers"][0] == "yes") for r in rows if r["kind"] == "exist"]
        absent = [said is True for said, there in exist if not there]
        present = [said is not True for said, there in exist if there]
        return {
            "accuracy": _mean([r for r in right if r is not None]),
            "false positives": _mean(absent),
            "false negatives": _mean(present),
            "valid": _mean([said is not None for said, _ in exist]),
        }


SIZES = [
    "vision.width=64",
    "vision.depth=1",
    "vision.heads=2",
    "llm.hidden_size=64",
    "llm.num_layers=2",
    "llm.num_heads=2",
]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train all arms from one student."""
    world = World(seed, share)
    muon: dict[str, Any] = {"optimizer": "muon_adamw", "lr": 1.5e-3, "schedule": "constant"}
    dense = {"name": "dense", "weights": [1, 1, 1, 0.5, 0.5, 0.5, 0.5]}
    off = {"answer": 0.0}
    student = world.model
    world.train(student, world.basics, LOOK, train=["vision"], loss_weights=off, distiller=dense, **muon)
    world.train(
        student, world.mixed, COPY, train=["all"], freeze=["adapter"], detach=["upcycle"], loss_weights=off,
        distiller=MIMIC, **muon,
    )  # fmt: skip
    found = {f"after dense to dense: {k}": v for k, v in world.score(student).items()}
    arms = {}
    for name, (kind, distiller) in ARMS.items():
        arm = arms[name] = copy.deepcopy(student)
        detach = ["upcycle"] if kind == "dense" else []
        if kind == "sparse":
            arm.detach_only([])
            torch.manual_seed(seed)
            arm.adapter["upcycle"].start()
        train = SPARSE if kind == "sparse" else ["projector", "llm.*.mlp.*"]
        world.train(arm, world.mixed, GO_ON, train=train, detach=detach, distiller=distiller, lr=1e-3)
        found |= {f"{name}: {k}": v for k, v in world.score(arm).items()}
        show(f"  {name}: {found[f'{name}: accuracy']:.3f}")
    for name, distiller in PAIRS.items():
        arm = copy.deepcopy(arms["sparse, mimic"])
        weights = {} if distiller is None else off
        world.train(arm, world.pairs, PREFER, train=SPARSE, loss_weights=weights, distiller=distiller, lr=1e-4)
        found |= {f"{name}: {k}": v for k, v in world.score(arm).items()}
        show(f"  {name}: false positives {found[f'{name}: false positives']:.3f}, valid {found[f'{name}: valid']:.3f}")
    return found


def judge(found: dict[str, list[float]]) -> list[Row]:
    """Mimic above answers at equal steps, for both kinds; fewer false positives, answers still valid."""
    mean = {name: sum(numbers) / len(numbers) for name, numbers in found.items()}

    def row(what: str, value: float, bound: float | None = None) -> Row:
        return Row(f"llava_mod: {what}", Value(value, value, value), "", bound=bound)

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
    return [*rows, row("kto_pair with anchor, fewer false positives than chosen answers alone", control)]


def _mean(values: list[Any]) -> float:
    return sum(map(float, values)) / max(1, len(values))
