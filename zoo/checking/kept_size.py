"""What `features.keep` takes of a disk, for notes of `zoo check`. The time it saves depends on the rest of a step."""

from collections.abc import Mapping
from typing import Any

from zoo.runs.data import RunData
from zoo.settings.stage import Stage
from zoo.text.sizes import size_text

BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.5}  # of a number, the scales of int8 included
PASSES = 2  # over the same samples, from which on keeping is proposed
_DRAWN = ("flip", "crop", "shift")  # options of data that change a picture as it is drawn


def kept_note(cfg: Any, frozen: Mapping[str, Stage], vision: Any, data: RunData) -> list[str]:
    """Say what the features of a frozen encoder take, where they are kept, or would be found again.

    Args:
        cfg: of the run.
        frozen: stages that do not train the encoder.
        vision: the encoder; None: there is none.
        data: of the run.
    """
    if vision is None or vision.native or not frozen:  # a native encoder's images have sizes of their own
        return []
    sets = {name: one for name, one in data.all.items() if not one.is_stream and _read(name, frozen, data)}
    samples = sum(len(one) for one in sets.values())
    if not samples:
        return []
    keep = cfg.features.keep
    bits = BITS["bf16" if keep == "live" else keep]
    each = vision.num_tokens * vision.hidden_size * bits / 8
    takes = f"about {size_text(each)}B an image, {size_text(each * samples)}B for {samples:,} samples of one image"
    if keep != "live":
        room = cfg.features.max_gb
        full = f"; features.max_gb={room:g}: the rest is encoded in each pass" if each * samples > 1e9 * room else ""
        return [f"features.keep={keep} takes {takes}{full}."]
    changed = any(cfg.data[name].get(option) for name in sets for option in _DRAWN)
    seen = {name: sum(_seen(name, stage, data) for stage in frozen.values()) for name in sets}
    again = [name for name, one in sets.items() if seen[name] >= PASSES * len(one)]
    if changed or not again:
        return []
    of = "" if len(again) == len(sets) else f" of data {', '.join(map(repr, again))}"
    times = sum(seen[name] for name in again) / sum(len(sets[name]) for name in again)
    comes = f"the encoder is frozen and encodes each image{of} {times:.0f} times"
    return [f"{comes}: features.keep=bf16 would keep it, {takes}."]


def _read(name: str, frozen: Mapping[str, Stage], data: RunData) -> bool:
    return any(stage.data.get(name) if stage.data else name in data.training for stage in frozen.values())


def _seen(name: str, stage: Stage, data: RunData) -> float:
    """Samples of a data set that a stage reads."""
    mixed = data.all if stage.data else data.training
    sizes = {
        other: 0 if one.is_stream else len(one)
        for other, one in mixed.items()
        if not stage.data or stage.data.get(other)
    }
    parts = dict(stage.data) if stage.data else sizes  # without weights every sample comes equally often
    whole = stage.steps * stage.batch_size if stage.steps else (stage.epochs or 0) * sum(sizes.values())
    return whole * parts.get(name, 0) / max(1e-9, sum(parts.values()))
