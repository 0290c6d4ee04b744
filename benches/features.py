"""`zoo bench features`: steps on kept features of a frozen encoder, against steps that encode the same images.

A language model of SmolLM2-135M's sizes, frozen, with LoRA of rank 8; a frozen ViT-S, whose tokens are pooled and
projected. A step decodes its JPEGs or finds their features, tokenizes, and trains; both arms see the same samples.
"""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zoo.benches import llava
from zoo.benches.frozen import frozen_engine
from zoo.benches.llava import SIZES
from zoo.benches.measure import Clock, Plain, Value
from zoo.benches.place import StepPlace, at_least_one, torch_threads
from zoo.benches.report import Report, Row, machine
from zoo.loading.build import processor_for
from zoo.registry import Dialog, Sample, unknown
from zoo.runs.kept_features import Recall, keep_features
from zoo.runs.processes import start_accelerator
from zoo.settings.schema import KEEPS, FeaturesConfig
from zoo.storage.packed_features import pack, unpack
from zoo.storage.precision import resolve_precision
from zoo.text.batch import to_device
from zoo.text.tokenizer import train_tokenizer

QUESTION, ANSWERS = "Which piece of clothing is in the picture?", ("an ankle boot", "a shirt", "a dress", "a bag")


@dataclass
class Options:
    sizes: str = "smollm2"  # smollm2: SmolLM2-135M and a ViT-S | tiny
    image_size: int = 224  # pixels a side; 256 patches of 14 at 224
    side: int = 4  # rows and columns of image tokens in the LLM
    batch: int = 16  # samples of a step
    keep: str = "bf16"  # fp32 | bf16 | fp16 | int8
    threads: int = 1  # of torch on the CPU
    rounds: int = 5  # turns of each variant
    steps: int = 2  # in a turn
    device: str = "auto"  # auto | cpu | cuda

    def __post_init__(self) -> None:
        at_least_one(self, "batch", "threads", "rounds", "steps", "image_size", "side")
        if self.sizes not in SIZES:
            raise unknown("sizes", self.sizes, SIZES)
        if self.keep not in KEEPS[1:]:
            raise unknown("dtype of kept features", self.keep, KEEPS[1:])


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure; `show` is told what is going on."""
    with torch_threads(options.threads), tempfile.TemporaryDirectory() as folder:
        accelerator = start_accelerator(options.device)
        device = accelerator.device
        precision = resolve_precision("auto", device)
        place = StepPlace(options, Clock(device, options.threads), show, accelerator, precision)
        sizes = replace(SIZES[options.sizes], image_size=options.image_size, layer=-1)
        report = Report("zoo bench features", machine=machine(device, options.threads))
        report.setting = [
            f"sizes {options.sizes}: {sizes.describe()}; {options.side**2} image tokens in the LLM",
            f"batch {options.batch} samples, {precision}, features kept in {options.keep}",
            f"ratios of {place.clock.name} time within a round; {options.rounds} rounds, {options.steps} steps a turn",
        ]
        report.add(*_rows(place, sizes, Path(folder)))
        return report


def _rows(place: StepPlace, sizes: Any, folder: Path) -> list[Row]:
    o, device = place.options, place.accelerator.device
    samples = [_sample(i) for i in range(2 * o.batch)]
    texts = [part["text"] for s in samples for m in s.dialogs[0].messages for part in m["content"] if "text" in part]
    tokenizer = train_tokenizer(texts, 320)
    pool = {"name": "pool", "target": [o.side, o.side]}
    model = llava.composed(replace(sizes, vocab=max(sizes.vocab, len(tokenizer))), projector=pool, adapter=llava.LORA)
    model.config.image_token_id = tokenizer.image_token_id
    processor = processor_for(model, tokenizer)
    engine = frozen_engine(place.accelerator, model, o.batch, place.precision)
    kept = keep_features(
        FeaturesConfig(keep=o.keep), model, processor, stage="bench", precision=place.precision, sharded=False,
        folder=folder, note=place.show,
    )  # fmt: skip
    assert kept is not None, "the encoder is frozen"
    turns = {"live": 0, "kept": 0}

    def step(name: str, prepare: Callable[[Sample], Any]) -> None:
        number, turns[name] = turns[name], turns[name] + 1
        chosen = samples[number % 2 * o.batch :][: o.batch]
        rows = [processor.encode(s, prepare(s)) for s in chosen]  # equally long: packing would save no padding
        engine.unwrapped.features = kept if name == "kept" else None
        engine.run(number, number, [processor.collate(rows)], False)

    recall = Recall(kept.store, processor)
    for _ in range(2):
        step("kept", recall)
    kept.store.flush()
    kept.store.shards.refresh()
    encoded = kept.encoded
    times = place.time(
        {"live": Plain(lambda: step("live", lambda _: None)), "kept": Plain(lambda: step("kept", recall))}
    )
    assert kept.encoded == encoded, "all is kept"
    bytes_each = kept.store.size / len(kept.store)
    pixels = to_device(processor.collate([processor.encode(samples[0])])["pixel_values"], device)
    image, _ = model.features_of(pixels)
    back = unpack(*pack(image, o.keep), image.grid).tokens.float()
    error = float((back - image.tokens.float().cpu()).norm() / image.tokens.float().norm())
    return [
        Row("step, live", times.milliseconds("live"), " ms"),
        Row("step, kept features", times.milliseconds("kept"), " ms"),
        Row("kept over live", times.ratio("kept", "live"), bound=0.6, at_most=True, note="epochs after the first"),
        Row("kept of an image", Value.one(bytes_each / 1e3), " kB", note=f"{image.tokens.shape[1]} tokens"),
        Row("error of the tokens", Value.one(100 * error), " %", note="root mean square, of theirs"),
    ]


def _sample(number: int) -> Sample:
    """A photo of 320 x 240 as JPEG, a question and an answer."""
    from PIL import Image

    rough = np.random.default_rng(number).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": f"It is {ANSWERS[number % len(ANSWERS)]}."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Sample(f"photo {number}", [file.getvalue()], [Dialog(messages)])
