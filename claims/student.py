"""Small students in the claims of distillation: how they are built, trained beside each other, and scored.

The students of a stage train in turns on the same batches: pictures are drawn once, and the teacher looks once for all
that learn from it. Scores are those of `zoo eval`: on drawn scenes, boxes left out, or on photos of clothes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zoo.claims.experiment import Run, mean
from zoo.composed.assembly import build_distiller
from zoo.composed.outputs import DistillView
from zoo.data.scenes import QUESTIONS
from zoo.evaluation.evaluate import evaluate
from zoo.loading.build import build, load
from zoo.registry import build as part
from zoo.runs.batches import Batches
from zoo.runs.order import Mix, ShardPosition
from zoo.runs.processes import start_accelerator
from zoo.settings.config import compose
from zoo.settings.source import source_of
from zoo.settings.stage import Stage
from zoo.tasks.yes_no import yes_or_no
from zoo.teaching.teacher import Teacher, TeacherRows
from zoo.training.step import Engine

TEACHER = "scenes_tiny"
RATE: dict[str, Any] = {
    "optimizer": "muon_adamw",
    "lr": 5e-4,
    "matrix_lr": 0.005,
    "momentum": 0.9,
    "schedule": "constant",
}
FALLS: dict[str, Any] = RATE | {"schedule": "linear", "flat_ratio": 0.2, "final_ratio": 0.02}
OFF = {"answer": 0.0}


@dataclass
class Arm:
    """A student in a stage, and what it does otherwise than those beside it."""

    model: Any
    distiller: Mapping[str, Any] | None = None
    processor: Any = None  # None: that of all
    fields: dict[str, Any] = field(default_factory=dict)  # of `Stage`
    seconds: float = 0.0  # of its stages if it were alone, the teacher's where it asks it


class Shared:
    """A teacher that runs once per batch, for all students."""

    vocab_size = None  # all have the teacher's tokenizer

    def __init__(self, model: Any) -> None:
        self.teacher, self.seconds = Teacher(model), 0.0
        self.seen: DistillView | None = None

    def outputs_for(self, batch: Mapping[str, Any], student: Any) -> DistillView:
        """Return its outputs for this batch; `seen = None` begins a new step."""
        if self.seen is None:
            began = time.perf_counter()
            self.seen = self.teacher.outputs_for(batch, student)
            self.seconds = time.perf_counter() - began
        return self.seen


class Trainer:
    """Trains students beside each other, with a teacher and pictures, and scores them.

    Args:
        run: whose seed the students have, and whose share of the steps they take.
    """

    teacher_name: str
    batch_size: int
    presence: str  # kind of the questions whether something is there
    test: Any  # data set to score on
    num_test: int  # pictures of it

    def __init__(self, run: Run) -> None:
        self.run, self.seed = run, run.seed
        self.accelerator = start_accelerator("cpu")
        model, self.teachers_processor = load(self.teacher_name, device="cpu")
        self.teacher = Shared(model)

    def student(self, name: str, *words: str, pretrained: bool = False) -> tuple[Any, Any]:
        """Compose a model by name, with random weights or with its own; returns it and its processor."""
        torch.manual_seed(self.seed)
        if pretrained:
            return load(name, *words, device="cpu")
        return build(source_of(compose("load", [f"model={name}", *words]), pretrained=False), device="cpu")

    def __call__(self, arms: Sequence[Arm], data: Any, steps: int, order: int = 0, **fields: Any) -> None:
        """Run a stage on one data set for every arm; their seconds count on.

        Args:
            order: of the pictures: stages of one number see the same ones first.
            fields: of `Stage`.
        """
        steps = self.run.steps(steps)
        lanes, sources = [], {}
        for arm in arms:
            size = self.run.size(self.batch_size, 4)
            chosen = {"steps": steps, "batch_size": size, **fields, **arm.fields, "distiller": arm.distiller}
            stage = Stage(**chosen)
            node = stage.distiller_node
            distiller = build_distiller(arm.model, node) if node else None
            asks = distiller is not None and any(need.startswith("teacher.") for need in distiller.needs)
            engine = Engine(
                self.accelerator, arm.model, stage, steps, seed=self.seed, distiller=distiller,
                teacher=self.teacher if asks else None,
            )  # fmt: skip
            processor = arm.processor or self.teachers_processor
            if id(processor) not in sources:
                mix = Mix({"pictures": data}, {}, self.seed + 1000 * order)
                twins = TeacherRows(self.teachers_processor, processor) if arm.processor else None
                sources[id(processor)] = Batches(
                    mix, processor, stage, steps, ShardPosition(), text=engine.run_llm, teacher=twins
                )
            lanes.append((arm, engine, asks, id(processor)))
        for number in range(steps):
            self.teacher.seen, self.teacher.seconds = None, 0.0
            batches: dict[int, tuple[Any, float]] = {}
            for arm, engine, asks, source in lanes:
                began = time.perf_counter()
                if source not in batches:
                    batches[source] = sources[source][number]["batch"], time.perf_counter() - began
                batch, drawing = batches[source]
                before, began = self.teacher.seconds, time.perf_counter()
                engine.run(number, number, [batch], False)
                alone = time.perf_counter() - began - (self.teacher.seconds - before)
                arm.seconds += drawing + alone + (self.teacher.seconds if asks else 0.0)

    def score(self, model: Any, processor: Any = None) -> dict[str, float]:
        """Accuracy over all questions, and what is said about presence."""
        processor, limit = processor or self.teachers_processor, self.run.size(self.num_test, 4)
        rows = evaluate(model, processor, {"pictures": self.test}, limit=limit, baselines=False).predictions
        return said_of(rows, self.presence)


class Scenes(Trainer):
    """Drawn scenes, and what teaches on them."""

    teacher_name, batch_size, presence, num_test = TEACHER, 20, "exist", 100

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.basics = self.scenes(questions={"relation": 0, "point": 1})
        self.relations = self.scenes(questions={"exist": 2, "color": 1, "size": 0, "count": 3, "relation": 7, "box": 1})
        self.pairs = self.scenes(questions=dict.fromkeys(QUESTIONS, 0) | {"exist": 4}, pairs=True, grid=0)
        self.test = self.scenes(split="eval", eval_scenes=self.num_test, seed=0, questions={"box": 0})

    def scenes(self, **options: Any) -> Any:
        return part("dataset", {"name": "scenes", "seed": self.seed, "scenes": 8000, **options})


class Clothes(Trainer):
    """Fashion-MNIST as questions, in the words of the recipes, and what teaches on it."""

    teacher_name, batch_size, presence, num_test = "fashion_tiny", 64, "yes_no", 1000

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        nodes = compose("train", ["recipe=llava_mod_fashion"]).data
        self.photos = part("dataset", {**nodes.fashion_mnist, "seed": run.seed})
        self.pairs = part("dataset", {**nodes.fashion_pairs, "seed": run.seed})
        self.test = part("dataset", nodes.fashion_mnist).eval_split()


def said_of(rows: Sequence[Mapping[str, Any]], presence: str) -> dict[str, float]:
    """Accuracy over all questions and of each kind, and what is said about presence.

    Args:
        rows: predictions of `evaluate`.
        presence: the kind of question about what is there, answered by yes or no.
    """
    asked = [(yes_or_no(r["prediction"]), r["answers"][0] == "yes") for r in rows if r["kind"] == presence]
    scores = {kind: mean([_right(r) for r in rows if r["kind"] == kind]) for kind in sorted({r["kind"] for r in rows})}
    return {
        "accuracy": mean([_right(r) for r in rows]),
        **scores,
        "false positives": mean([said is True for said, there in asked if not there]),
        "false negatives": mean([said is not True for said, there in asked if there]),
        "yes": mean([said is True for said, _ in asked]),
        "valid": mean([said is not None for said, _ in asked]),
    }


def _right(row: Mapping[str, Any]) -> float:
    return row["scores"].get("accuracy", row["scores"].get("exact", 0.0))
