"""Pruners in front of the encoder: the grid of patches that it is asked for, before it has weights.

Everything behind follows from the encoder's `grid`, `num_tokens` and `transform`, which `Encoder.resize` changes once:
counts of pruners, projector and layout, placeholders, adapters, positions. What is cut into crops is cut as the
encoder's own size has it (`Encoder.own_size`), and each crop is then smaller.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from zoo import registry
from zoo.registry import Encoder, Pruner, ZooError

_WIDTH = 8  # of the LLM, in counts: they do not depend on it
Grid = tuple[int, int]


def in_front(pruners: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nodes of those pruners that act in front of the encoder."""
    return {name: node for name, node in pruners.items() if getattr(registry.get("pruner", name).cls, "front", False)}


def frame_share(pruners: Mapping[str, Pruner]) -> float:
    """Return the share of a video's frames that pruners let through."""
    return math.prod(p.frame_share for p in pruners.values() if p.front)


def put_in_front(name: str, pruner: Pruner, vision: Encoder, slots: Mapping[str, Any], source: str) -> None:
    """Run the encoder on the grid that a pruner chooses.

    Args:
        name: of the pruner.
        pruner: with `front`.
        vision: the encoder; perhaps without weights.
        slots: of the model, for what an image takes behind the encoder.
        source: name of the encoder.

    Raises:
        ZooError: the encoder cannot change its size, or the pruner asks for more than it has.
    """
    own: Grid = (vision.grid[0], vision.grid[1])
    chosen = pruner.encoder_grid(own, _Behind(vision, slots))
    if not (0 < pruner.frame_share <= 1):
        raise ZooError(f"pruner {name!r} reads a share {pruner.frame_share} of a video's frames; it must be in (0, 1].")
    wanted = (int(chosen[0]), int(chosen[1]))
    if wanted == own:
        return
    if not all(1 <= few <= most for few, most in zip(wanted, own, strict=True)):
        raise ZooError(f"pruner {name!r} asks for a grid {list(wanted)}, and that of the encoder is {list(own)}.")
    before = vision.own_size, vision.own_grid
    try:
        vision.resize(wanted)
    except ZooError as error:
        raise ZooError(f"pruner {name!r} needs smaller images, and vision {source!r} cannot: {error}.") from error
    vision.own_size, vision.own_grid = before
    if tuple(vision.grid) != wanted or vision.num_tokens != math.prod(wanted):
        raise ZooError(
            f"vision {source!r} was asked for a grid {list(wanted)}, and has {vision.num_tokens} tokens on "
            f"{list(vision.grid)} after its `resize`."
        )


class _Behind:
    """What an image takes in the LLM, by the grid of the encoder: parts are built on the meta device and counted."""

    def __init__(self, vision: Encoder, slots: Mapping[str, Any]) -> None:
        self.vision, self.slots = vision, slots
        pruners, front = slots.get("pruner") or {}, in_front(slots.get("pruner") or {})
        late = {name for name in pruners if getattr(registry.get("pruner", name).cls, "behind", False)}
        self.pruners = {name: node for name, node in pruners.items() if name not in {*front, *late}}

    def __call__(self, grid: Grid, kept: int | None = None) -> int | None:
        """Count the tokens of an image at most; None: parts do not take this grid.

        Args:
            grid: of the encoder.
            kept: tokens that a pruner leaves of it; None: all.
        """
        try:
            with torch.device("meta"):
                return self._count(grid, math.prod(grid) if kept is None else kept, grid if kept is None else None)
        except Exception:  # of any kind, as in the search for fixes: the reason comes when the parts are built
            return None

    def _count(self, whole: Grid, n: int, grid: Grid | None) -> int:
        vision: dict[str, Any] = {"vision_dim": self.vision.hidden_size}
        for name, node in self.pruners.items():
            given = {**vision, "vision_depth": self.vision.depth, "grid": grid, "num_tokens": n}
            pruner = registry.build("pruner", {**node, "name": name}, **given)
            _require_grid(pruner, grid)
            n = pruner.num_tokens(n)
            if "grid" in pruner.destroys or (pruner.grid and grid):
                grid = pruner.grid if "grid" in pruner.provides else None
        if not (node := self.slots.get("projector")):
            return n
        projector = registry.build("projector", node, **vision, text_dim=_WIDTH, grid=grid, num_tokens=n)
        _require_grid(projector, grid)
        before, n = n, projector.num_tokens(n)
        if not (node := self.slots.get("layout")):
            return n
        given = {"grid": grid if n == before else projector.grid, "num_tokens": n, "text_dim": None}
        given |= {"pruned": n == before and projector.num_tokens(1) == 1, "encoder_grid": whole}
        return registry.build("layout", node, **given, image_size=self.vision.own_size).num_tokens(n)


def _require_grid(part: Any, grid: Grid | None) -> None:
    if grid is None and "grid" in part.needs:
        raise ZooError("it needs a grid")
