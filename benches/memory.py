"""`zoo bench memory`: what `zoo check` says that a stage takes, beside what it takes.

Each recipe trains for two steps in a process of its own, on a batch whose rows are given; every allocation of torch
counts, the weights included. The estimate is made as `zoo check` makes it, of the same batch.
"""

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from zoo.benches.measure import Value
from zoo.benches.peak import in_process, peak_bytes
from zoo.benches.place import at_least_one, torch_threads
from zoo.benches.report import Report, Row, machine
from zoo.checking.memory import memory_of
from zoo.checking.plan import Plan
from zoo.composed.assembly import assemble
from zoo.composed.model import ZooModel
from zoo.model_config import ZooConfig
from zoo.registry import IGNORE_INDEX, completed, unknown
from zoo.runs.processes import start_accelerator
from zoo.settings.stage import Stage
from zoo.training.step import Engine

_VISION = {"name": "hf", "image_size": 128, "patch_size": 16, "width": 192, "depth": 4, "heads": 3}
_LLM = {"name": "hf", "hidden_size": 320, "num_layers": 8, "num_heads": 5, "intermediate_size": 864}


@dataclass(frozen=True)
class Recipe:
    """What trains, and on which rows.

    Attributes:
        llm: options that differ from `_LLM`.
        slots: adapters and projector.
        vocab: rows of the embedding.
        rows, length: of a pass.
        samples: in a row, each with its image.
        labels: in a row.
        dtype: of the weights as they are loaded.
        stage: of the recipe.
    """

    stage: dict[str, Any]
    llm: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)
    vocab: int = 50_000
    rows: int = 4
    length: int = 512
    samples: int = 1
    labels: int = 128
    dtype: str = "float32"


RECIPES = {
    "all, bf16 products": Recipe({"precision": "bf16"}),
    "packed rows, checkpointing": Recipe(
        {"precision": "bf16", "gradient_checkpointing": True}, rows=2, length=2048, samples=8, labels=1024
    ),
    "lora on bfloat16": Recipe(
        {"train": ["adapter", "projector"], "precision": "bf16"},
        {"num_layers": 12},
        {"adapter": {"lora": {"name": "lora"}}},
        vocab=100_000,
        dtype="bfloat16",
    ),
    "vlora": Recipe(
        {"train": ["adapter"], "precision": "fp32"},
        {},
        {"projector": None, "adapter": {"vlora": {"name": "vlora", "width": 128, "rank": 8}}},
        length=256,
        labels=64,
    ),
    "150k words, masters": Recipe(
        {"precision": "bf16"}, vocab=150_000, rows=2, length=1024, labels=900, dtype="bfloat16"
    ),
    "experts": Recipe(
        {"precision": "bf16", "optimizer": "adamw", "train": ["llm"]},
        {"model_type": "mixtral", "num_experts": 4, "top_k": 2, "num_layers": 4},
    ),
}


@dataclass
class Options:
    only: str = ""  # one of the recipes, by its name; empty: all
    threads: int = 1  # of torch

    def __post_init__(self) -> None:
        at_least_one(self, "threads")
        if self.only and self.only not in RECIPES:
            raise unknown("recipe", self.only, RECIPES)


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure each recipe in a process of its own."""
    report = Report("zoo bench memory", machine=machine(torch.device("cpu"), options.threads))
    report.setting = ["two steps of each recipe on the CPU; the most bytes that torch held"]
    for name in [options.only] if options.only else RECIPES:
        found = in_process("memory", name, options.threads)
        ratio = found["estimate"] / found["measured"]
        note = f"{found['estimate'] / 1e9:.3f} GB said, {found['measured'] / 1e9:.3f} GB taken; {found['how']}"
        show(f"{name}: {note}")
        report.add(Row(f"estimate over measured, {name}", Value.of([ratio]), note=note))
    return report


def measure(name: str, threads: int) -> None:
    """Print estimate and measured peak of a recipe as JSON."""
    recipe = RECIPES[name]
    with torch_threads(threads):
        found = _measured(recipe)
    print(json.dumps(found))


def _measured(recipe: Recipe) -> dict[str, Any]:
    llm = {**_LLM, **recipe.llm}
    slots: dict[str, Any] = {
        "vision": completed("vision", _VISION),
        "projector": completed("projector", {"name": "mlp"}),
        "llm": completed("llm", llm),
    } | {k: {n: completed(k, o) for n, o in v.items()} if k == "adapter" else v for k, v in recipe.slots.items()}
    stage = Stage(steps=2, warmup_ratio=0, batch_size=recipe.rows * recipe.samples, **recipe.stage)
    torch.manual_seed(0)
    shadow = _model(recipe, slots, "meta")
    batch = _batch(recipe, shadow)
    shadow.set_trainable(stage.train, stage.freeze)
    weights = sum(t.nbytes for t in [*shadow.parameters(), *shadow.buffers()])
    said = memory_of(stage, shadow, Plan(slots, device="cpu"), weights=weights, distiller=None, batch=batch)

    gc.collect()  # what is freed later would count against what the work takes

    def train() -> None:
        model = _model(recipe, slots, "cpu")  # here, since what was there before would not be seen to go
        engine = Engine(start_accelerator("cpu"), model, stage, 2)
        for number in range(2):
            engine.run(number, number, [dict(batch) for _ in range(stage.accumulate)], False)

    return {"estimate": said.total, "measured": peak_bytes(train, torch.device("cpu")), "how": said.describe()}


def _model(recipe: Recipe, slots: dict[str, Any], device: str) -> ZooModel:
    with torch.device(device):
        parts = assemble(slots, vocab_size=recipe.vocab)
        model = ZooModel(ZooConfig(slots=slots, image_token_id=recipe.vocab - 1), parts=parts)
    return model.to(getattr(torch, recipe.dtype))


def _batch(recipe: Recipe, model: ZooModel) -> dict[str, Any]:
    """Make rows of samples, each an image, text, and answers at its end."""
    each, images = recipe.length // recipe.samples, model.num_image_tokens
    ids = torch.randint(0, recipe.vocab - 1, (recipe.rows, recipe.samples, each))
    ids[:, :, :images] = recipe.vocab - 1
    labels = torch.full_like(ids, IGNORE_INDEX)
    learnt = recipe.labels // recipe.samples
    labels[:, :, -learnt:] = ids[:, :, -learnt:]
    count = recipe.rows * recipe.samples
    batch: dict[str, Any] = {"input_ids": ids.flatten(1), "labels": labels.flatten(1)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["pixel_values"] = torch.randn(count, 3, *model.vision.transform.size)  # type: ignore[union-attr]
    if not images:
        batch["images_per_row"] = [recipe.samples] * recipe.rows
    if recipe.samples > 1:
        batch["segment_ids"] = torch.arange(recipe.samples).repeat_interleave(each).expand(recipe.rows, -1).contiguous()
        batch["position_ids"] = torch.arange(each).repeat(recipe.samples).expand(recipe.rows, -1).contiguous()
    return batch
