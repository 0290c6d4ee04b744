"""Text of mixed length: random batches full of padding, batches of like length, and rows of several samples."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.benches import llava
from zoo.benches.llava import Sizes
from zoo.benches.measure import Plain, Value
from zoo.benches.report import Row
from zoo.benches.steps import our_step
from zoo.collate import EncodedSample, collate, pack
from zoo.registry import IGNORE_INDEX

if TYPE_CHECKING:
    from zoo.benches.train import Place

MEAN, LONGEST = 82, 192  # tokens; half of a random batch of 16 is then padding
STEPS = 8  # in a pass over the samples
TOLERANCE = 1e-5


def mixed_rows(place: "Place", sizes: Sizes) -> list[Row]:
    """Useful tokens per second of our step on the same samples, batched in three ways."""
    size = place.options.batch
    samples = _samples(size * STEPS, sizes.vocab)
    useful = sum(map(len, samples))
    ways = {
        "padded": _batches(samples, size),
        "buckets": _batches(sorted(samples, key=len), size),
        "packed": _packed(samples, LONGEST, useful),
    }
    passes = {}
    for name, batches in ways.items():
        model = llava.composed(sizes, images=False)
        step = our_step(place.accelerator, model, batches, precision=place.precision).step
        passes[name] = Plain(lambda step=step, n=len(batches): [step() for _ in range(n)])  # type: ignore[misc]
    times = place.time(passes, steps=1)
    take = place.clock.take
    padding = {n: 1 - useful / sum(b["input_ids"].numel() for b in batches) for n, batches in ways.items()}
    rows = [
        Row(
            f"mixed lengths: {name}",
            Value.of([useful / t for t in take(times[name])]),
            " tokens/s",
            note=f"useful tokens; {padding[name]:.0%} of positions are padding",
        )
        for name in ways
    ]
    for name in ("buckets", "packed"):
        value = Value.of([a / b for a, b in zip(take(times["padded"]), take(times[name]), strict=True)])
        rows.append(Row(f"mixed lengths: {name} against random padding", value, bound=1.9))
    gap = _largest_gap(llava.composed(sizes, images=False).to(place.accelerator.device), samples[: 2 * size])
    what = "mixed lengths: loss of a sample, packed against alone"
    rows.append(Row(what, Value(gap, gap, gap), "", bound=TOLERANCE, at_most=True, note="largest difference, fp32"))
    return rows


def _samples(number: int, vocab: int) -> list[EncodedSample]:
    """Samples with lengths drawn from a log-normal distribution, cut to [8, LONGEST]; all but the first token counts."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(MEAN) - 0.15, 0.7, number)), 8, LONGEST).astype(int)
    result = []
    for length in lengths:
        ids = rng.integers(llava.IMAGE_TOKEN + 1, vocab, length)
        labels = ids.copy()
        labels[0] = IGNORE_INDEX
        result.append(EncodedSample(ids, labels, []))
    return result


def _batches(samples: list[EncodedSample], size: int) -> list[dict[str, Any]]:
    return [collate(samples[i : i + size], pad_id=0) for i in range(0, len(samples), size)]


def _packed(samples: list[EncodedSample], length: int, useful: int) -> list[dict[str, Any]]:
    """Rows of several samples, in about as many batches as there were, so that each step learns from as many tokens."""
    rows = pack(samples, length)
    size = -(-len(rows) // STEPS)
    return _batches(rows, size)


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
    each = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    segments = inputs.get("segment_ids", torch.zeros_like(inputs["input_ids"]))[:, 1:].flatten()
    counts = labels.flatten() != IGNORE_INDEX
    return [each[counts & (segments == s)].mean().item() for s in range(int(segments.max()) + 1)]
