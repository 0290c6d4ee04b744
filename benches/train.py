"""`zoo bench train`: our training step against transformers' Llava, its Trainer, and the floor of the machine.

Everything is measured in one run, in turns. The models have the same sizes and see the same batch; ours is composed of
the parts `vision=hf`, `projector=mlp`, `llm=hf` and runs through the engine of `zoo train`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.benches import llava
from zoo.benches.flops import count_flops
from zoo.benches.llava import SIZES, Sizes
from zoo.benches.measure import Clock, Plain, Times, Value, matmul
from zoo.benches.mixed import mixed_rows
from zoo.benches.place import StepPlace, at_least_one, chosen, torch_threads
from zoo.benches.report import Report, Row, machine, short
from zoo.benches.steps import Trained, our_step, plain_loop
from zoo.benches.waiting import waiting_row
from zoo.fusion.llm.attention import resolve_attention
from zoo.registry import unknown
from zoo.runs.processes import start_accelerator
from zoo.storage.precision import autocast, resolve_precision

SECTIONS = ("step", "vocab", "mixed", "forward", "wait")


@dataclass
class Options:
    sizes: str = "sketch"  # sketch: the sizes of the first measurements; scenes_tiny: those of the default model; tiny
    batch: int = 16  # images of a step, one in each row
    length: int = 96  # positions of a row, image tokens included
    labels: int = 32  # of them, at the end of a row
    large_vocab: int = 32000  # of the second comparison with (b)
    compile: bool = True  # also measure the compiled step; the first one takes a minute
    threads: int = 1  # of torch on the CPU
    rounds: int = 9  # turns of each variant
    steps: int = 2  # in a turn
    device: str = "auto"  # auto | cpu | cuda
    only: str = ""  # sections, with commas between: step, vocab, mixed, forward, wait; empty: all

    def __post_init__(self) -> None:
        if self.sizes not in SIZES:
            raise unknown("sizes", self.sizes, SIZES)
        at_least_one(self, "batch", "labels", "threads", "rounds", "steps")
        self.sections = chosen("section", self.only, SECTIONS)


@dataclass
class TrainPlace(StepPlace):
    attention: str


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure what `options.only` asks for; `show` is told what is going on."""
    with torch_threads(options.threads):
        accelerator = start_accelerator(options.device)
        device = accelerator.device
        precision = resolve_precision("auto", device)
        products = torch.bfloat16 if precision == "bf16" else torch.float32
        clock, attention = Clock(device, options.threads), resolve_attention("auto", device, products)
        place = TrainPlace(options, clock, show, accelerator, precision, attention)
        sizes = SIZES[options.sizes]
        report = Report("zoo bench train", machine=machine(device, options.threads))
        report.setting = [
            f"sizes {options.sizes}: {sizes.describe()}",
            f"batch {options.batch} rows of {options.length} positions, {options.labels} labels each; "
            f"{precision}, {place.attention} attention",
            f"ratios of {place.clock.name} time within a round; {options.rounds} rounds, {options.steps} steps a turn",
        ]
        work = {"step": _step, "vocab": _vocab, "mixed": _mixed, "forward": _forward, "wait": _wait}
        for section in options.sections:
            show(f"measuring: {section}")
            report.add(*work[section](place, sizes))
        return report


def _variants(place: TrainPlace, sizes: Sizes) -> dict[str, Plain]:
    """(b), (c) and ours on the same batch."""
    o, device = place.options, place.accelerator.device
    plain = llava.batch(sizes, o.batch, o.length, o.labels)
    return {
        "b": plain_loop(llava.stock(sizes, place.attention), [plain], place.precision, device),
        "c": Trained(llava.stock(sizes, place.attention), [plain], place.precision, device),
        "ours": our_step(place.accelerator, llava.composed(sizes), [llava.ours_of(plain)], precision=place.precision),
    }


def _step(place: TrainPlace, sizes: Sizes) -> list[Row]:
    o, device = place.options, place.accelerator.device
    plain = llava.batch(sizes, o.batch, o.length, o.labels)
    variants = {"a": plain_loop(llava.stock(sizes), [plain], "fp32", device), **_variants(place, sizes)}
    flops = count_flops(variants["ours"].step)
    if o.compile:
        model = llava.composed(sizes)
        variants["compiled"] = our_step(
            place.accelerator, model, [llava.ours_of(plain)], precision=place.precision, compile=True
        )
        place.show("compiling")
    variants["floor"], per_step = matmul(device)
    times = place.time(variants)
    peak = Value.of([per_step / t / 1e9 for t in times.seconds("floor")])
    floor = times["floor"]
    times["floor"] = Times(*([t * flops / per_step for t in kind] for kind in (floor.cpu, floor.wall)))
    names = {
        "a": "(a) LlavaForConditionalGeneration, its defaults, plain loop",
        "b": f"(b) the same with {place.precision} and {place.attention} attention",
        "c": "(c) transformers' Trainer, as (b)",
        "ours": "our step",
        "compiled": "our step, compiled",
    }
    rows = [
        Row(name, Value.of([o.batch / t for t in times.seconds(key)]), " images/s", note=_milliseconds(times[key]))
        for key, name in names.items()
        if key in times
    ]
    rows += [
        Row("matmul peak, bf16", peak, " GF/s", note=f"{flops / 1e9:.1f} GFLOP in our step"),
        Row("against (a), not compiled", times.ratio("a", "ours"), bound=2.7),
        Row("against (b)", times.ratio("b", "ours"), bound=1.15, note=f"vocabulary {sizes.vocab}"),
        Row("against (c)", times.ratio("c", "ours"), bound=1.15, note=f"vocabulary {sizes.vocab}"),
        Row("time over the floor", times.ratio("ours", "floor")),
    ]
    if o.compile:
        rows += [
            Row("against (a), compiled", times.ratio("a", "compiled"), bound=3.6),
            Row("time over the floor, compiled", times.ratio("compiled", "floor"), bound=1.6, at_most=True),
        ]
    return rows


def _vocab(place: TrainPlace, sizes: Sizes) -> list[Row]:
    sizes = replace(sizes, vocab=place.options.large_vocab)
    times = place.time(_variants(place, sizes), steps=1)
    note = f"vocabulary {sizes.vocab}"
    return [
        Row(f"against (b), {note}", times.ratio("b", "ours"), bound=1.5, note=note),
        Row(f"against (c), {note}", times.ratio("c", "ours"), bound=1.5, note=note),
    ]


def _forward(place: TrainPlace, sizes: Sizes) -> list[Row]:
    """Both models with the same weights and all logits, no gradient; the last layer, so that both run all blocks."""
    o, device = place.options, place.accelerator.device
    sizes = replace(sizes, layer=-1)
    theirs, ours = llava.twins(sizes)
    plain = llava.batch(sizes, o.batch, o.length, o.labels)
    del plain["labels"]
    plain = {key: value.to(device) for key, value in plain.items()}
    mine = {**llava.ours_of(plain), "position_ids": None}
    theirs.to(device)
    ours.to(device)
    rows = []
    for precision in dict.fromkeys(("fp32", place.precision)):
        attention = place.attention if precision == place.precision else "sdpa"
        theirs.set_attn_implementation(attention)
        ours.llm.lm.set_attn_implementation(attention)
        assert ours.vision is not None
        ours.vision.set_attention(attention)

        def forward(model: Any, inputs: dict[str, Any], precision: str = precision) -> Tensor:
            with torch.no_grad(), autocast(precision, device):
                return model(**inputs).logits

        gap = (forward(theirs, plain).float() - forward(ours, mine).float()).abs().max().item()
        times = place.time(
            {"theirs": Plain(lambda: forward(theirs, plain)), "ours": Plain(lambda: forward(ours, mine))},
            steps=3 * o.steps,
            rounds=2 * o.rounds,
        )
        value = times.ratio("ours", "theirs")
        note = f"{precision}, {attention}; largest difference of logits {short(gap)}"
        rows.append(
            Row(
                f"forward with all logits over transformers' own, {precision}",
                value,
                bound=1.03,
                at_most=True,
                note=note,
            )
        )
    return rows


def _mixed(place: TrainPlace, sizes: Sizes) -> list[Row]:
    return mixed_rows(place, sizes)


def _wait(place: TrainPlace, sizes: Sizes) -> list[Row]:
    return [waiting_row(place, sizes)]


def _milliseconds(times: Times) -> str:
    cpu, wall = (1e3 * float(np.median(t)) for t in (times.cpu, times.wall))
    return f"{cpu:.0f} ms CPU, {wall:.0f} ms wall a step"
