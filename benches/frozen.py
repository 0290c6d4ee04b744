"""`zoo bench frozen`: a frozen language model with LoRA, against transformers' LLaVA class, PEFT and Trainer.

SmolLM2-135M's sizes and a ViT-S of 64 patches, the same random weights, frozen in the data type that `zoo train` keeps
them in; LoRA on all linear layers of the LLM and the projector train. Texts are of realistic, mixed lengths.

transformers' side is padded, in the order of the data or, as its `group_by_length` does, by length; ours packs the same
samples of a step into rows. `even` has rows of one length, so that neither has padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.benches import llava
from zoo.benches.llava import IMAGE_TOKEN, SIZES, Sizes
from zoo.benches.measure import Clock, Plain, Value
from zoo.benches.peak import peak_bytes
from zoo.benches.place import StepPlace, at_least_one, chosen, torch_threads
from zoo.benches.report import Report, Row, machine
from zoo.benches.steps import Trained, plain_loop, turns_of
from zoo.registry import IGNORE_INDEX, unknown
from zoo.runs import allocator as memory
from zoo.runs.processes import start_accelerator
from zoo.settings.stage import Stage
from zoo.storage.precision import fast_products, resolve_precision
from zoo.text.batch import EncodedSample, collate, pack
from zoo.training.step import Engine

SECTIONS = ("mixed", "even", "memory")
RANK, ALPHA = 8, 16.0
TRAINED = ("projector", "adapter.lora")


@dataclass
class Options:
    sizes: str = "smollm2"  # smollm2: SmolLM2-135M and a ViT-S at 112 px | tiny
    batch: int = 8  # samples of a step
    text: int = 48  # tokens of a sample's text, in the middle; lengths are log-normal
    pack: int = 512  # longest row of several samples
    dtype: str = "bfloat16"  # of frozen weights, on both sides: bfloat16 | float32
    compile: bool = True  # also measure the compiled step; the first one takes minutes
    threads: int = 1  # of torch on the CPU
    rounds: int = 5  # turns of each variant
    steps: int = 2  # in a turn, each of other samples
    device: str = "auto"  # auto | cpu | cuda
    only: str = ""  # sections, with commas between: mixed, even, memory; empty: all

    def __post_init__(self) -> None:
        if self.sizes not in SIZES:
            raise unknown("sizes", self.sizes, SIZES)
        if self.dtype not in ("bfloat16", "float32"):
            raise unknown("dtype", self.dtype, ("bfloat16", "float32"))
        at_least_one(self, "batch", "text", "pack", "threads", "rounds", "steps")
        self.sections = chosen("section", self.only, SECTIONS)


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure what `options.only` asks for; `show` is told what is going on."""
    with torch_threads(options.threads):
        accelerator = start_accelerator(options.device)
        device = accelerator.device
        precision = resolve_precision("auto", device)
        place = StepPlace(options, Clock(device, options.threads), show, accelerator, precision)
        sizes = SIZES[options.sizes]
        report = Report("zoo bench frozen", machine=machine(device, options.threads))
        report.setting = [
            f"sizes {options.sizes}: {sizes.describe()}; LoRA of rank {RANK} on all linear layers, projector trained",
            f"frozen weights {options.dtype}, {precision} products; batch {options.batch}, texts of {options.text}",
            f"ratios of {place.clock.name} time within a round; {options.rounds} rounds, {options.steps} steps a turn",
        ]
        work = {"mixed": _mixed, "even": _even, "memory": _memory}
        for section in options.sections:
            show(f"measuring: {section}")
            report.add(*work[section](place, sizes))
        return report


def frozen_engine(
    accelerator: Any, model: Any, batch: int, precision: str, dtype: torch.dtype | None = None, compile: bool = False
) -> Engine:
    """The engine of a stage that trains projector and LoRA; frozen weights are cast to `dtype`, where it is given."""
    fast_products()
    memory.set_thresholds(memory.LARGEST, memory.KEPT)
    stage = Stage(steps=1_000_000, batch_size=batch, lr=1e-4, schedule="constant", train=list(TRAINED), compile=compile)
    engine = Engine(accelerator, model.to(accelerator.device), stage, stage.steps or 1, precision=precision)
    for weight in model.parameters():
        if dtype is not None and not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    return engine


def tuned(sizes: Sizes, dtype: torch.dtype) -> Any:
    """The model of transformers under PEFT: LoRA on the same layers, the projector trained."""
    from peft import LoraConfig, get_peft_model

    model = llava.stock(sizes, "sdpa").to(dtype)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,  # type: ignore[arg-type]  # annotated as int, used as a float
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, config)


def samples(sizes: Sizes, number: int, text: int, spread: float) -> list[EncodedSample]:
    """Samples of an image, a question and an answer, the last half of the text; lengths are log-normal."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(text), spread, number)), 8, 8 * text).astype(int)
    pixels = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = rng.integers(IMAGE_TOKEN + 1, sizes.vocab, 1 + sizes.image_tokens + length)
        ids[1 : 1 + sizes.image_tokens] = IMAGE_TOKEN
        labels = ids.copy()
        labels[: len(ids) - length // 2] = IGNORE_INDEX
        image = torch.randn(3, sizes.image_size, sizes.image_size, generator=pixels)
        made.append(EncodedSample(ids, labels, [image]))
    return made


def _groups(items: list[EncodedSample], size: int) -> list[list[EncodedSample]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _padded(group: list[EncodedSample]) -> dict[str, Tensor]:
    """A batch as a collator of transformers makes it: padded on the right."""
    batch = collate(group, pad_id=0)
    return {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "pixel_values")}


def _mixed(place: StepPlace, sizes: Sizes) -> list[Row]:
    o = place.options
    return _compare(place, sizes, samples(sizes, o.batch * o.steps, o.text, 0.6), "mixed lengths")


def _even(place: StepPlace, sizes: Sizes) -> list[Row]:
    o = place.options
    return _compare(place, sizes, samples(sizes, o.batch * o.steps, o.text, 0.0), "one length", bounds=False)


def _compare(place: StepPlace, sizes: Sizes, data: list[EncodedSample], what: str, bounds: bool = True) -> list[Row]:
    o, device, dtype = place.options, place.accelerator.device, getattr(torch, place.options.dtype)
    padded = [_padded(group) for group in _groups(data, o.batch)]
    packed = [collate(pack(g, o.pack) if bounds else g, pad_id=0) for g in _groups(data, o.batch)]
    variants: dict[str, Plain] = {"trainer": Trained(tuned(sizes, dtype), padded, place.precision, device)}
    if bounds:
        by_length = [_padded(group) for group in _groups(sorted(data, key=len), o.batch)]
        variants["grouped"] = Trained(tuned(sizes, dtype), by_length, place.precision, device)
    engine = frozen_engine(place.accelerator, _ours(sizes), o.batch, place.precision, dtype)
    variants["ours"] = turns_of(engine, packed)
    if o.compile:
        place.show("compiling")
        again = [collate(pack(g, o.pack) if bounds else g, pad_id=0, multiple_of=32) for g in _groups(data, o.batch)]
        compiled = frozen_engine(place.accelerator, _ours(sizes), o.batch, place.precision, dtype, compile=True)
        variants["compiled"] = turns_of(compiled, again)
    times = place.time(variants)
    tokens = {"trainer": padded, "grouped": by_length if bounds else [], "ours": packed, "compiled": packed}
    names = {
        "trainer": "LlavaForConditionalGeneration, PEFT, Trainer",
        "grouped": "the same, batches by length",
        "ours": "our step",
        "compiled": "our step, compiled",
    }
    rows = [
        Row(f"{what}: {names[key]}", times.milliseconds(key), " ms", note=_positions(tokens[key])) for key in variants
    ]
    rows.append(Row(f"{what}: against Trainer", times.ratio("trainer", "ours"), bound=1.3 if bounds else None))
    if o.compile:
        bound = 1.6 if bounds else None
        rows.append(Row(f"{what}: against Trainer, compiled", times.ratio("trainer", "compiled"), bound=bound))
    if bounds:
        rows.append(Row(f"{what}: against Trainer, batches by length", times.ratio("grouped", "ours")))
    return rows


def _memory(place: StepPlace, sizes: Sizes) -> list[Row]:
    """The most that tensors of a step take, weights and optimiser state included."""
    o, device, dtype = place.options, place.accelerator.device, getattr(torch, place.options.dtype)
    data = samples(sizes, o.batch, o.text, 0.6)
    theirs = tuned(sizes, dtype)
    step = plain_loop(theirs, [_padded(data)], place.precision, device).step  # the Trainer's own loop makes no more
    step()
    most = peak_bytes(step, device) + _held(theirs)
    del step, theirs
    engine = frozen_engine(place.accelerator, _ours(sizes), o.batch, place.precision, dtype)
    batch = collate(pack(data, o.pack), pad_id=0)
    engine.run(0, 0, [batch], False)
    ours = peak_bytes(lambda: engine.run(1, 1, [batch], False), device) + _held(engine.model)
    note = f"{ours / 1e6:.0f} of {most / 1e6:.0f} MB, weights and moments of AdamW included"
    return [Row("peak memory over theirs", Value.one(ours / most), bound=0.8, at_most=True, note=note)]


def _held(model: Any) -> int:
    """Bytes of weights, and of two moments of those that train."""
    return sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())


def _ours(sizes: Sizes) -> Any:
    return llava.composed(sizes, adapter=llava.LORA)


def _positions(batches: list[Any]) -> str:
    whole = sum(b["input_ids"].numel() for b in batches)
    useful = sum(int(b["attention_mask"].sum()) for b in batches)
    return f"{whole} positions, {1 - useful / whole:.0%} padding"
