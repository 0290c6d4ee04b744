"""Images that keep their shapes in a composed model: which parts take them, and how their rows go through these.

An encoder with `native` gives rows of unlike length, in groups of equal grids. Pruners and projector run on one group
after the other, as they would on a batch of such images, and the layout joins the rows in the order of the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.registry import Cut, ImageFeatures, Layout, Projector, UnlikeRows, ZooError

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
    if parts.projector is not None and "grid" in parts.projector.needs:
        name = parts.name_of("projector")
        message = f"projector {name!r} is made for one grid, and {rows}: take projector=identity, linear or mlp."
        return Misfit(("projector", name), "native", message)
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
        if step.kind == "pruner":
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


def marked(rows: UnlikeRows, checksums: Sequence[Tensor]) -> UnlikeRows:
    """Keep the checksum of each row's pixels, (1,), with its features."""
    marks = [torch.cat([checksums[i] for i in members]) for members in rows.members]
    return replace(rows, groups=tuple(replace(g, checksum=m) for g, m in zip(rows.groups, marks, strict=True)))


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
    for group, members, cuts in zip(rows.groups, rows.members, _cuts_of_groups(rows), strict=True):
        image = replace(about(group, members), rows=tuple(c.rows for c in cuts), cuts=cuts)
        image.row_kind = next((c.kind for c in cuts if c.kind != "image"), "image")
        for pruner in pruners:
            image = pruner(image)
        groups.append(image)
    return replace(rows, groups=tuple(groups))


def _cuts_of_groups(rows: UnlikeRows) -> list[tuple[Cut, ...]]:
    """Return the images of each group, whose rows have one grid, in the order of its rows."""
    begins: dict[int, Cut] = {}
    at = 0
    for cut in rows.cuts:
        begins[at] = cut
        at += cut.rows
    return [tuple(begins[row] for row in members if row in begins) for members in rows.members]


def projected(
    kept: UnlikeRows, projector: Projector, pruners: Sequence[Callable[[ImageFeatures], ImageFeatures]]
) -> UnlikeRows:
    """Project each group, and run the pruners behind the projector on it.

    Args:
        kept: behind the pruners in front of it; tokens sorted by their places where these are kept.
        projector: of the model, one token of one.
        pruners: behind it; what they mark, permute and merge is sorted by places, too.
    """
    groups = []
    for group in kept.groups:
        image = replace(group, tokens=projector(group))
        if pruners:
            own: dict[str, Any] = dict.fromkeys(("keep", "groups", "rank", "places", "num_patches", "patch_grid"))
            piece = replace(image, **own)
            for pruner in pruners:
                piece = pruner(piece)
            if piece.keep is not None:  # permuted
                order = piece.keep.argsort(dim=1)
                piece = replace(piece, keep=None).take(order)
            known = {name: getattr(image, name) for name in own}
            image = replace(piece, **known, grid=group.grid)
        groups.append(image)
    return replace(kept, groups=tuple(groups))


def joined(made: UnlikeRows, layout: Layout) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Lay the rows out: image tokens (S, C), which of them stay (S,), None for all, and the maps for further layers.

    Args:
        made: behind the projector.
        layout: of the model.
    """

    def laid(of: Callable[[ImageFeatures], Tensor]) -> Tensor:
        return layout(_images(made.in_order(of), made.cuts), made.cuts)  # type: ignore[arg-type]

    deep = len(made.groups[0].deep) if made.groups else 0
    tokens, *maps = (laid(of) for of in (_tokens, *(_map(k) for k in range(deep))))
    if all(group.valid is None for group in made.groups):
        return tokens, None, tuple(maps)
    return tokens, laid(_marks)[:, 0], tuple(maps)


def _tokens(image: ImageFeatures) -> Tensor:
    return image.tokens


def _marks(image: ImageFeatures) -> Tensor:
    valid = image.tokens.new_ones(image.tokens.shape[:2], dtype=torch.bool) if image.valid is None else image.valid
    return valid.unsqueeze(-1)


def _map(number: int) -> Callable[[ImageFeatures], Tensor]:
    return lambda image: image.deep[number]


def _images(rows: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """Stack the rows of each image: (R, K, C)."""
    found, at = [], 0
    for cut in cuts:
        found.append(torch.stack(list(rows[at : at + cut.rows])))
        at += cut.rows
    return found
