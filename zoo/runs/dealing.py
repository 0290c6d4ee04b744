"""Deal the samples of a step to processes and passes so that each costs about the same, and none waits for another.

The cost of a sample is in tokens of the LLM: those of its text and its images, and what the encoder adds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from zoo.registry import RecordError, Sample, ZooError
from zoo.settings.stage import Stage

CHARACTERS = 4  # of a token of text, about
IMAGE = 250.0  # cost of an image whose number of tokens depends on it


def deal(costs: np.ndarray, parts: int) -> np.ndarray:
    """Return the samples in the order of the parts that they are dealt to, equally many to each.

    From the costliest on, `parts` samples at a time, the costliest of them to the part that has the least so far: sums
    are alike, and so are the lengths in a part's k-th place, which padding makes equal. A function of the costs alone.

    Args:
        costs: (S,), S a multiple of `parts`.
        parts: processes times passes.

    Returns:
        (S,) indices: those of part 0, in ascending order, then those of part 1, ...
    """
    loads, dealt = np.zeros(parts), np.empty((parts, len(costs) // parts), dtype=np.int64)
    for turn, samples in enumerate(np.argsort(-costs, kind="stable").reshape(-1, parts)):
        takers = np.argsort(loads, kind="stable")
        dealt[takers, turn] = samples
        loads[takers] += costs[samples]
    return np.sort(dealt, axis=1).ravel()


def require_even(stage: Stage, world: int) -> int:
    """Return into how many parts of equal size a step's samples are divided: processes times passes.

    Raises:
        ZooError: they cannot be.
    """
    parts = world * stage.accumulate
    if stage.batch_size % parts:
        raise ZooError(
            f"batch_size={stage.batch_size} does not split evenly over {world} processes with "
            f"accumulate={stage.accumulate}; allowed are multiples of {parts}."
        )
    return parts


def cost_of(sample: Sample | RecordError, image: float = IMAGE, share: Callable[[Any], float] | None = None) -> float:
    """Estimate the cost of a sample from its text and its images; 0 if it is broken.

    Args:
        sample: of a data set.
        image: cost of an image, or of the largest.
        share: which share of that an image costs; None: all of it.
    """
    if isinstance(sample, RecordError):
        return 0.0
    parts = (m["content"] for d in sample.dialogs for m in d.messages)
    text = sum(len(c) if isinstance(c, str) else sum(len(p.get("text", "")) for p in c) for c in parts)
    shown = len(sample.images) if share is None else sum(map(share, sample.images))
    return text / CHARACTERS + image * shown


def image_cost(model: Any, tokens: int) -> float:
    """Return the cost of an image: its tokens in the LLM, and its patches by the encoder's share of parameters.

    Args:
        model: composed, with the parameters that train set: a frozen encoder has no backward pass, two thirds of it.
        tokens: of an image in the sequence; 0: not the same for all images.
    """
    vision = model.vision
    if vision is None or (not tokens and not vision.num_tokens):
        return IMAGE
    share = _size(vision) / max(1, _size(model.llm))
    trains = any(p.requires_grad for p in vision.parameters())
    return (tokens or IMAGE) + (vision.num_tokens or 0) * share * (1.0 if trains else 1 / 3)


def _size(part: Any) -> int:
    return sum(p.numel() for p in part.parameters())
