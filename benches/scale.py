"""`zoo bench scale`: what the recipes of real sizes hold and send on 8, 64 and 512 devices, and torch's own estimate.

Nothing is measured on a device: the figures are those of `zoo check scale.devices=N`, of the stage of each recipe that
needs most, with the sizes of its published parts written out, since no checkpoint is read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zoo.benches.device_models import LLM, SIZES, made_on
from zoo.benches.llava import Sizes, composed
from zoo.benches.measure import Value
from zoo.benches.place import chosen
from zoo.benches.report import Report, Row, machine
from zoo.benches.scale_torch import by_torch
from zoo.checking.checker import check
from zoo.checking.devices import OnDevice, on_device
from zoo.checking.plan import Plan, plan_from
from zoo.registry import ZooError
from zoo.settings.config import compose
from zoo.settings.parallel import ParallelConfig
from zoo.settings.scale import Devices
from zoo.settings.stage import Stage

CLIP_L = [
    "vision.checkpoint=", "vision.model_type=clip", "vision.image_size=336", "vision.patch_size=14",
    "vision.width=1024", "vision.depth=24", "vision.heads=16", "vision.mlp_ratio=4.0",
]  # fmt: skip
SIGLIP = [
    "vision.checkpoint=", "vision.model_type=siglip", "vision.image_size=378", "vision.patch_size=14",
    "vision.width=1152", "vision.depth=27", "vision.heads=16", "vision.mlp_ratio=3.7361111",
]  # fmt: skip
VICUNA = [
    "llm.checkpoint=", "llm.model_type=llama", "llm.hidden_size=4096", "llm.num_layers=32", "llm.num_heads=32",
    "llm.intermediate_size=11008", "llm.max_positions=4096", "llm.tie_embeddings=false", "tokenizer.vocab_size=32000",
]  # fmt: skip
QWEN_3B = [
    "llm.checkpoint=", "llm.model_type=qwen2", "llm.hidden_size=2048", "llm.num_layers=36", "llm.num_heads=16",
    "llm.num_kv_heads=2", "llm.intermediate_size=11008", "llm.max_positions=32768", "llm.tie_embeddings=true",
    "tokenizer.vocab_size=151936",
]  # fmt: skip
# Recipe -> the stage that needs most, and the sizes of its parts.
RECIPES: dict[str, tuple[str, list[str]]] = {
    "llava_qwen2_3b": ("sft", [*SIGLIP, *QWEN_3B]),
    "mole_7b": ("instruct", [*CLIP_L, *VICUNA]),
    "pool_7b": ("instruct", ["vision.checkpoint=", *VICUNA]),
    "vlora_7b": ("finetune", [*CLIP_L, *VICUNA]),
}
TWINS = {  # sizes that are compared with torch's estimate, and whether layers are computed twice
    "0.5B": (SIZES["full"]["05b"], False),
    "7B": (SIZES["full"]["7b"], True),
    "34B": (Sizes(336, 14, 1024, 24, 16, -2, 7168, 60, 56, 20480, 64000, text_kv_heads=8), True),
    "tiny": (SIZES["tiny"]["7b"], False),
}
SECTIONS = ("recipes", "torch")


@dataclass
class Options:
    devices: str = "8,64,512"  # with commas between
    recipe: str = ""  # with commas between; empty: all
    sizes: str = "0.5B,7B,34B"  # that are compared with torch's estimate, which takes minutes: 0.5B, 7B, 34B, tiny
    only: str = ""  # sections, with commas between: recipes, torch; empty: both

    def __post_init__(self) -> None:
        self.sections = chosen("section", self.only, SECTIONS)
        self.recipes = chosen("recipe", self.recipe, RECIPES)
        self.twins = chosen("sizes", self.sizes, TWINS)
        try:
            self.counts = [Devices(devices=int(word)).devices for word in self.devices.split(",")]
        except ValueError as error:
            raise ZooError(f"devices is numbers with commas between, got {self.devices!r}: {error}") from None


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Compute what `options.only` asks for."""
    report = Report("zoo bench scale", machine=machine(torch.device("cpu"), torch.get_num_threads()))
    scale = Devices(devices=8)
    report.setting = [
        f"devices of {scale.memory:.0f} GB and {scale.tflops:.0f} TFLOP/s, {scale.node} in a machine, "
        f"{scale.within:.0f} GB/s between them and {scale.between:.0f} GB/s from a machine to others; FSDP2"
    ]
    if "recipes" in options.sections:
        for name in options.recipes:
            for devices in options.counts:
                show(f"computing: {name} on {devices} devices")
                report.add(*_rows(name, devices))
    if "torch" in options.sections:
        for name in options.twins:
            for devices in options.counts[:2]:
                show(f"computing: {name} on {devices} devices, by both")
                report.add(twin_row(name, devices))
    return report


def _rows(name: str, devices: int) -> Iterator[Row]:
    stage, words = RECIPES[name]
    scale = Devices(devices=devices)
    found = _of_recipe(name, stage, words, scale)
    held = {k: getattr(found, k) for k in ("weights", "gathered", "gradients", "optimizer", "activations", "logits")}
    note = ", ".join(f"{k} {size / 1e9:.2f}" for k, size in held.items())
    at = f"{name}, stage {stage}, {devices} devices"
    rows, positions = found.rows
    yield Row(
        f"{at}: memory", Value.one(found.total / 1e9), " GB", note=f"{note}; {found.passes} x {rows} x {positions}"
    )
    operations, network = found.seconds(scale)
    sent = ", ".join(f"{k} {size / 1e9:.1f} GB" for k, (size, _) in found.sent.items())
    notes = "; ".join([f"{operations:.2f} s of operations, {network:.2f} s of network ({sent})", *found.notes])
    yield Row(
        f"{at}: a step", Value.one(max(operations, network)), " s", note=f"bound by {found.bound(scale)}; {notes}"
    )


def _of_recipe(name: str, stage: str, words: list[str], scale: Devices) -> OnDevice:
    cfg = compose("check", [f"recipe={name}", *words])
    plan = plan_from(cfg)
    plan.stages = {stage: plan.stages[stage]}
    with made_on("cpu", torch.bfloat16):  # checkpoints are in 16 bits
        report = check(plan, fixes=0)
        return report.stages[0].spread(scale, ParallelConfig(shard="fsdp2"), None, -1)


def twin_row(name: str, devices: int, tensor: int = 1) -> Row:
    """Compare both estimates of a model whose LLM and projector train."""
    sizes, again = TWINS[name]
    stage = Stage(steps=1, batch_size=4 * devices // tensor, gradient_checkpointing=again, precision="bf16")
    plan = Plan(slots={})

    def model() -> Any:
        with made_on("meta", torch.bfloat16):
            made: Any = composed(sizes, llm=LLM)
        made.vision.requires_grad_(False)
        return made

    ours = on_device(stage, model(), plan, Devices(devices=devices, tensor=tensor), ParallelConfig(shard="fsdp2"))
    theirs = by_torch(model(), stage, plan, devices, samples=4, tensor=tensor)
    parts = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in theirs.items() if size >= 1e7)
    note = f"{ours.total / 1e9:.3f} GB; torch: {parts}"
    what = f"{name} on {devices} devices: memory of a device over torch's estimate"
    return Row(what, Value.one(ours.total / theirs["Total"]), "x", note=note)
