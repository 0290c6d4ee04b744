"""Text of mixed length: random batches full of padding, batches of like length, and rows of several samples."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.benches import llava
from zoo.benches.llava import Sizes
from zoo.benches.measure import Clock, Plain, Value
from zoo.benches.report import Row
from zoo.benches.steps import our_step, plain_loop
from zoo.registry import IGNORE_INDEX
from zoo.text.batch import EncodedSample, collate, pack

if TYPE_CHECKING:
    from zoo.benches.train import TrainPlace

MEAN, LONGEST = 82, 192  # tokens; half of a random batch of 16 is then padding
WINDOW = 32  # steps whose samples are sorted by length together, as in `zoo.runs.batches`
EVERY = 4  # of the batches of a window, in the order of their lengths, one in EVERY is timed
TOLERANCE = 1e-5
NAMES = {"padded": "random padding", "buckets": "length buckets", "packed": "packed rows"}


def mixed_rows(place: "TrainPlace", sizes: Sizes) -> list[Row]:
    """Useful tokens per second of our step on the same samples, batched in three ways.

    The LLM alone. Random padding runs through our step too, which skips the logits of padding; transformers' own Llama
    does not, and is given beside it.
    """
    size, device = place.options.batch, place.accelerator.device
    samples = _samples(size * WINDOW, sizes.vocab)
    rows = pack(samples, LONGEST)
    order = np.random.default_rng(1).permutation(len(rows))
    ways = {
        "padded": _batches(samples, size),
        "buckets": _batches(sorted(samples, key=len), size),
        "packed": _batches([rows[i] for i in order], -(-len(rows) // WINDOW)),
    }
    ways = {name: batches[::EVERY] for name, batches in ways.items()}
    useful = {name: int(sum(b["attention_mask"].sum() for b in batches)) for name, batches in ways.items()}
    useful["stock"] = useful["padded"]
    texts = [{k: b[k] for k in ("input_ids", "attention_mask", "position_ids", "labels")} for b in ways["padded"]]
    theirs = plain_loop(llava.stock(sizes, place.attention), texts, place.precision, device)
    variants: dict[str, Plain] = {"stock": Pass(theirs, len(texts))}
    for name, batches in ways.items():
        model = llava.composed(sizes, images=False)
        variants[name] = Pass(our_step(place.accelerator, model, batches, precision=place.precision), len(batches))
    times = place.time(variants, steps=1)
    speed = {name: [useful[name] / t for t in times.seconds(name)] for name in variants}
    result = [Row("mixed lengths: transformers' Llama, random padding", Value.of(speed["stock"]), " tokens/s")]
    for name, batches in ways.items():
        padding = 1 - useful[name] / sum(b["input_ids"].numel() for b in batches)
        note = f"useful tokens; {padding:.0%} of positions are padding"
        result.append(Row(f"mixed lengths: our step, {NAMES[name]}", Value.of(speed[name]), " tokens/s", note=note))
    for name in ("buckets", "packed"):
        for base, words in (("padded", "random padding"), ("stock", "transformers' Llama")):
            value = Value.of([a / b for a, b in zip(speed[name], speed[base], strict=True)])
            bound = 1.9 if (name, base) == ("packed", "padded") else None
            result.append(Row(f"mixed lengths: {NAMES[name]} against {words}", value, bound=bound))
    gap = _largest_gap(llava.composed(sizes, images=False).to(device), samples[: 2 * size])
    what = "mixed lengths: loss of a sample, packed against alone"
    result.append(Row(what, Value.one(gap), "", bound=TOLERANCE, at_most=True, note="largest difference, fp32"))
    return result


class Pass(Plain):
    """A pass over all batches as one step; one batch goes before that is not counted."""

    def __init__(self, inner: Plain, batches: int) -> None:
        self.inner, self.batches = inner, batches

    def time(self, clock: Clock, steps: int) -> tuple[float, float]:
        """Run passes; returns CPU and wall seconds of one."""
        cpu, wall = self.inner.time(clock, steps * self.batches)
        return cpu * self.batches, wall * self.batches


def _samples(number: int, vocab: int) -> list[EncodedSample]:
    """Samples of log-normal lengths, cut to [8, LONGEST]; the last two thirds of each are the answer."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(MEAN) - 0.15, 0.7, number)), 8, LONGEST).astype(int)
    result = []
    for length in lengths:
        ids = rng.integers(llava.IMAGE_TOKEN + 1, vocab, length)
        labels = ids.copy()
        labels[: max(1, length // 3)] = IGNORE_INDEX
        result.append(EncodedSample(ids, labels, []))
    return result


def _batches(samples: list[EncodedSample], size: int) -> list[dict[str, Any]]:
    return [collate(samples[i : i + size], pad_id=0) for i in range(0, len(samples), size)]


def _largest_gap(model: Any, samples: list[EncodedSample]) -> float:
    """Return the largest difference between a sample's mean loss in packed rows and alone, in float32."""
    model.eval().set_attention("sdpa")
    named = [EncodedSample(s.input_ids, s.labels, [], ids=[str(i)]) for i, s in enumerate(samples)]
    alone = {s.ids[0]: _losses(model, [s])[0] for s in named}
    gap = 0.0
    for row in pack(named, LONGEST):
        for name, loss in zip(row.ids, _losses(model, [row]), strict=True):
            gap = max(gap, abs(loss - alone[name]))
    return gap


@torch.no_grad()
def _losses(model: Any, rows: list[EncodedSample]) -> list[float]:
    """Mean loss of each sample of one row."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate(rows, pad_id=0).items()}
    out = model(**inputs, all_logits=True)
    labels = inputs["labels"][:, 1:]
    logits = out.logits[:, :-1].flatten(0, 1)
    each = F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    segments = inputs.get("segment_ids", torch.zeros_like(inputs["input_ids"]))[:, 1:].flatten()
    counts = labels.flatten() != IGNORE_INDEX
    return [each[counts & (segments == s)].mean().item() for s in range(int(segments.max()) + 1)]
