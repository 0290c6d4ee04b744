"""A page of images of unlike shapes: training passes over batches of like length, of any, and padded to the largest."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from zoo.benches.measure import Clock, Value
from zoo.benches.report import Row
from zoo.composed.model import ZooModel
from zoo.loading.build import processor_for
from zoo.model_config import ZooConfig
from zoo.registry import IGNORE_INDEX, Dataset, Dialog, Sample, ZooError
from zoo.runs.batches import Batches
from zoo.runs.order import Mix, ShardPosition
from zoo.settings.stage import Stage
from zoo.text.tokenizer import train_tokenizer

SIDES = (32, 512)  # pixels, log-uniform for each side: 1 to 256 tokens
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
SLOTS: dict[str, Any] = {
    "vision": {
        "name": "qwen_vision", "model_type": "qwen3_vl", "width": 128, "heads": 2, "depth": 4, "out_width": 256,
        "min_pixels": 32 * 32, "max_pixels": 512 * 512,
    },
    "projector": {"name": "identity"},
    "layout": {"name": "native"},
    "llm": {
        "name": "hf", "model_type": "qwen3_vl_text", "hidden_size": 256, "num_layers": 6, "num_heads": 8,
        "num_kv_heads": 4, "intermediate_size": 768, "max_positions": 1024, "extra": {"rope_parameters": ROPE},
    },
}  # fmt: skip
QUESTION, ANSWER = "what is on the page, and where?", "a table of numbers, below the title"
BUCKETS, ANY, LARGEST = "batches of like length", "batches of any length", "padded to the largest of the page"


def allowed(images: int, batch: int, rounds: int) -> None:
    """Refuse pages that do not divide into rounds of whole batches.

    Raises:
        ZooError: it does not.
    """
    if images < 1 or images % batch:
        raise ZooError(f"images must be a multiple of batch={batch}, got {images}.")
    if images // batch < rounds:
        raise ZooError(f"rounds={rounds} need as many batches, and images={images} are {images // batch}.")


class Page(Dataset):
    """Noise of shapes that are drawn once, with a question and an answer each."""

    def __init__(self, images: int) -> None:
        low, high = np.log(SIDES)
        self.sides = np.exp(np.random.default_rng(0).uniform(low, high, (images, 2))).astype(int).tolist()

    def __len__(self) -> int:
        return len(self.sides)

    def get(self, index: int, epoch: int = 0) -> Sample:
        width, height = self.sides[index]
        noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        asked = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        said: list[dict[str, Any]] = [{"role": "user", "content": asked}, {"role": "assistant", "content": ANSWER}]
        return Sample(str(index), [Image.fromarray(noise)], [Dialog(said)])


def run(options: Any, clock: Clock, show: Callable[[str], None]) -> tuple[str, list[Row]]:
    """Time a pass over the page in three ways, a part of it after the other, each part in all ways."""
    tokenizer = train_tokenizer([QUESTION, ANSWER], 320, "chatml")
    ids = {"image_token_id": tokenizer.image_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = ZooModel(ZooConfig(slots=SLOTS, attention="sdpa", text_vocab_size=len(tokenizer), **ids)).train()
    processor = processor_for(model, tokenizer)
    page = Page(options.images)
    steps = options.images // options.batch
    stage = Stage(steps=steps, batch_size=options.batch)
    order = {
        buckets: Batches(
            Mix({"page": page}, {}, 0), processor, replace(stage, length_buckets=buckets), steps, ShardPosition()
        )
        for buckets in (True, False)
    }
    shares = [processor.pictures.share_of(page.get(i).images[0]) for i in range(len(page))]
    counts = [round(share * processor.num_image_tokens) for share in shares]
    words = len(processor.encode(page.get(0))) - counts[0]
    most = max(counts) + words
    ways: dict[str, Callable[[int], dict[str, Any]]] = {
        BUCKETS: lambda step: order[True][step]["batch"],
        ANY: lambda step: order[False][step]["batch"],
        LARGEST: lambda step: _padded(order[False][step]["batch"], most),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[int]] = {name: [] for name in ways}
    positions = dict.fromkeys(ways, 0)
    _seconds(model, order[True][0]["batch"], clock)  # not counted: the first pass sets up what later ones find
    for part in np.array_split(np.arange(steps), options.rounds):
        show(f"measuring: images up to {(part[-1] + 1) * options.batch} of {options.images}")
        for name, batch_of in ways.items():
            taken, real = 0.0, 0
            for step in part.tolist():
                batch = batch_of(step)
                real += int(batch["attention_mask"].sum())
                positions[name] += batch["attention_mask"].numel()
                taken += _seconds(model, batch, clock)
            seconds[name].append(taken)
            tokens[name].append(real)
    speed = {name: [n / t for n, t in zip(tokens[name], seconds[name], strict=True)] for name in ways}
    rows = []
    for name in ways:
        padding = 1 - sum(tokens[name]) / positions[name]
        note = f"{padding:.0%} of positions are padding"
        rows.append(Row(f"page, {name}", Value.of(speed[name]), unit=" tokens/s", note=note))
    for other in (LARGEST, ANY):
        ratio = Value.of([a / b for a, b in zip(speed[BUCKETS], speed[other], strict=True)])
        rows.append(Row(f"page, {BUCKETS} against {other}", ratio))
    return _described(options, counts, words), rows


def _described(options: Any, counts: list[int], words: int) -> str:
    vision, llm = SLOTS["vision"], SLOTS["llm"]
    low, middle, high = np.quantile(counts, (0, 0.5, 1)).astype(int)
    return (
        f"page: {options.images} images of {low} to {high} tokens, {middle} in the middle, and {words} of text; "
        f"{options.batch} a step, forward and backward; Qwen3-VL of {vision['depth']} x {vision['width']} and "
        f"{llm['num_layers']} x {llm['hidden_size']}"
    )


def _padded(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """Pad the rows of a batch to a length."""
    more = length - batch["input_ids"].shape[1]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {**batch, **{name: F.pad(batch[name], (0, more), value=value) for name, value in fill.items()}}


def _seconds(model: Any, batch: dict[str, Any], clock: Clock) -> float:
    """Time a pass forward and backward, with what the batch's way of padding needs."""
    names = ("input_ids", "attention_mask", "labels", "pixel_values", "cuts")
    given = {name: batch[name] for name in names}
    at = 0 if clock.name == "cpu" else 1
    before = clock.read()[at]
    model(**given).loss.backward()
    taken = clock.read()[at] - before
    model.zero_grad()
    return taken
