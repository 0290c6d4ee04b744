"""Images that keep their shapes in a composed model: which parts take them, and how their rows go through these.

An encoder with `native` gives rows of unlike length, in groups of equal grids. Pruners and projector run on one group
after the other, as they would on a batch of such images, and the layout joins the rows in the order of the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.registry import Cut, ImageFeatures, InsidePruner, Layout, Projector, UnlikeRows, ZooError

# ---- which parts -----------------------------------------------------------------------------------------------------


class Misfit(NamedTuple):
    """Why a part has no place beside the others."""

    part: tuple[str, str]
    why: str
    message: str


def misfit_of(parts: Any) -> Misfit | None:
    """Find a part that does not take the rows of the encoder; None: all do.

    Args:
        parts: vision, pruners, projector and layout of a model.
    """
    vision, layout = parts.name_of("vision"), parts.name_of("layout")
    if parts.vision is None or not parts.vision.native:
        if parts.layout is None or not parts.layout.native:
            return None
        what = f"vision {vision!r} gives equally many tokens of each"
        message = f"layout {layout!r} joins images that keep their shapes, and {what}: leave the layout out."
        return Misfit(("layout", layout), "not native", message)
    rows = f"vision {vision!r} gives images of unlike length"
    for name, pruner in parts.pruner.items():
        if pruner.ragged or pruner.behind or pruner.per_image or pruner.front:
            what = "has one budget for several rows, or leaves a number that depends on the image"
            what = "changes the size of all images" if pruner.front else what
            return Misfit(("pruner", name), "native", f"pruner {name!r} {what}, and {rows}: it cannot be used there.")
    if parts.projector is not None and parts.vision.deep and not parts.projector.passes_deep:
        name = parts.name_of("projector")
        message = (
            f"projector {name!r} makes new tokens, and vision {vision!r} gives features for {parts.vision.deep} layers "
            "of the LLM that belong to its own: projector=identity, with an LLM of the encoder's width."
        )
        return Misfit(("projector", name), "deep", message)
    if parts.projector is not None and (parts.layout is None or not parts.layout.native):
        had = f"layout {layout!r} wants rows of one length" if layout else "no layout joins them"
        return Misfit(("layout", layout), "native", f"{rows}, and {had}: layout=native.")
    return None


def counted(parts: Any, slots: Any) -> list[dict[str, Any]]:
    """Name the parts in front of the layout that tokens of a row go through, as plain values for its counts."""
    given = {"vision_dim": parts.vision.hidden_size, "vision_depth": parts.vision.depth, "grid": None}
    found = []
    for step in parts.steps:
        sizes = {**given, "num_tokens": parts.vision.num_tokens}
        if step.kind == "pruner" and not isinstance(parts.pruner[step.name], InsidePruner):
            node = {**slots["pruner"][step.name], "name": step.name}
            found.append({"kind": "pruner", "node": node, "given": sizes})
        elif step.kind == "projector":
            sizes["text_dim"] = parts.llm.hidden_size
            found.append({"kind": "projector", "node": dict(slots["projector"]), "given": sizes})
    return found


# ---- rows ------------------------------------------------------------------------------------------------------------


def grids_of(cuts: Sequence[Cut] | None) -> list[tuple[int, int]]:
    """Return the grid of each row of images.

    Raises:
        ZooError: an image has none.
    """
    if not cuts or any(cut.patches == (0, 0) for cut in cuts):
        raise ZooError(
            "Images keep their shapes in this model, and their pixels need `cuts` with the grid of each: pass what the "
            "model's own processor returns."
        )
    return [cut.patches for cut in cuts for _ in range(cut.rows)]


def row_pixels(pixels: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Split patches (S, P) into those of each row."""
    sides = sum(h * w for h, w in grids)
    unit = len(pixels) // sides if sides else 1
    return list(pixels.split([h * w * unit for h, w in grids]))


def pruned(
    rows: UnlikeRows,
    about: Callable[[ImageFeatures, Sequence[int]], ImageFeatures],
    pruners: Sequence[Callable[[ImageFeatures], ImageFeatures]],
) -> UnlikeRows:
    """Run pruners on each group.

    Args:
        rows: the encoder's.
        about: (group, its rows of the batch) -> the group with what pruners need besides.
        pruners: in front of the projector.
    """
    groups = []
    for group, members in zip(rows.groups, rows.members, strict=True):
        image = about(group, members)
        for pruner in pruners:
            image = pruner(image)
        groups.append(image)
    return replace(rows, groups=tuple(groups))


def joined(kept: UnlikeRows, projector: Projector, layout: Layout) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Project each group and lay the rows out: image tokens (S, C), and the maps for further layers of the LLM.

    Args:
        kept: behind the pruners.
        projector: of the model.
        layout: of the model.
    """
    deep = len(kept.groups[0].deep) if kept.groups else 0
    makers: list[Callable[[ImageFeatures], Tensor]] = [projector, *(_map(k) for k in range(deep))]
    tokens, *maps = (layout(_images(kept.in_order(make), kept.cuts), kept.cuts) for make in makers)  # type: ignore[arg-type]
    return tokens, tuple(maps)


def _map(number: int) -> Callable[[ImageFeatures], Tensor]:
    return lambda image: image.deep[number]


def _images(rows: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """Stack the rows of each image: (R, K, C)."""
    found, at = [], 0
    for cut in cuts:
        found.append(torch.stack(list(rows[at : at + cut.rows])))
        at += cut.rows
    return found
