"""Pruners behind the projector: they get rows of image tokens as they enter the LLM, and mark those that stay.

Such a pruner takes what the projector and a layout's pooling of frames made, (M, N, C), with the scores of the encoder
that still belong to these tokens. It changes no count: its tokens stay in their columns, some of them with new values,
and `zoo.composed.left_out` takes the columns of the others out of the sequence.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.registry import Cut, ImageFeatures, Layout, Projector, Pruner, ZooError

Rows = Tensor | Sequence[Tensor]  # (M, K, C); or of each image (R, K, C)


class Projected(NamedTuple):
    """The rows of a batch behind the projector, with marks of those that stay."""

    rows: Rows
    marks: Rows | None = None  # bool (M, K), or of each image (R, K); None: all stay


def run(pruner: Pruner, image: ImageFeatures) -> ImageFeatures:
    """Run a pruner, one image after the other where it has one budget for all rows of an image."""
    if not pruner.per_image:
        return pruner(image)
    sizes = image.rows or (1,) * len(image.tokens)
    cuts = image.cuts or tuple(Cut(rows=n, kind=image.row_kind) for n in sizes)
    parts, at = [], 0
    for cut in cuts:
        alone = replace(image.picked(slice(at, at + cut.rows)), rows=(cut.rows,), cuts=(cut,), row_kind=cut.kind)
        parts.append(pruner(alone))
        at += cut.rows
    return replace(ImageFeatures.joined(parts), rows=image.rows, cuts=image.cuts, row_kind=image.row_kind)


def project(kept: ImageFeatures, projector: Projector, layout: Layout | None, cuts: Sequence[Cut] | None) -> Projected:
    """Run the projector, with what the layout does beside it, on features and on the marks of a ragged pruner."""

    def through(image: ImageFeatures, run: Callable[[ImageFeatures], Tensor]) -> Rows:
        return run(image) if layout is None or cuts is None else layout.project(image, run, cuts)

    rows = through(kept, projector)
    if kept.valid is None:
        return Projected(rows)
    return Projected(rows, _bool(through(_channel(kept, kept.valid), _same)))


def prune(
    projected: Projected,
    pruners: Iterable[Pruner],
    kept: ImageFeatures,
    grid: tuple[int, int] | None,
    layout: Layout | None,
    cuts: Sequence[Cut] | None,
    in_order: bool,
) -> Projected:
    """Run the pruners behind the projector.

    Args:
        projected: the rows.
        kept: the features that they were made of, for scores.
        grid: of a row; of rows that the layout pools, the layout's.
        layout: of the model.
        cuts: of each image, where there is a layout.
        in_order: put tokens that a pruner permuted back into their places.
    """
    given = _pieces(projected, kept, grid, layout, cuts)
    pieces = given
    for pruner in pruners:
        pieces = [run(pruner, piece) for piece in pieces]
    for piece, before in zip(pieces, given, strict=True):
        if piece.tokens.shape != before.tokens.shape:
            raise ZooError(
                f"A pruner behind the projector made {list(piece.tokens.shape)} of tokens {list(before.tokens.shape)}: "
                "it leaves them in place, and `image.stay(valid)` marks those that stay."
            )
    if in_order:
        pieces = [_in_order(piece) for piece in pieces]
    pieces = _all_valid(pieces)
    if isinstance(projected.rows, Tensor):
        return Projected(pieces[0].tokens, pieces[0].valid)
    pieces = [_with_first(piece, rows) for piece, rows in zip(pieces, projected.rows, strict=True)]
    return Projected([p.tokens for p in pieces], [p.valid for p in pieces if p.valid is not None] or None)


def laid_out(projected: Projected, layout: Layout | None, cuts: Sequence[Cut] | None) -> tuple[Tensor, Tensor | None]:
    """Join the rows to the sequence of image tokens (S, C), with marks (S,); without a layout (M, K, C) and (M, K)."""
    rows, marks = projected
    if layout is None or cuts is None:
        assert isinstance(rows, Tensor) and (marks is None or isinstance(marks, Tensor)), "one row is an image"
        return rows, marks
    tokens = layout(rows, cuts)  # type: ignore[arg-type]  # a list where `project` made one
    if marks is None:
        return tokens, None
    shown = marks.unsqueeze(-1).to(tokens) if isinstance(marks, Tensor) else [m.unsqueeze(-1).to(tokens) for m in marks]
    return tokens, layout.marks(shown, cuts)


# ---- rows as features --------------------------------------------------------------------------------------------


def _pieces(
    projected: Projected,
    kept: ImageFeatures,
    grid: tuple[int, int] | None,
    layout: Layout | None,
    cuts: Sequence[Cut] | None,
) -> list[ImageFeatures]:
    """Describe the rows as features: one of all rows, or one of each image where a layout made them unlike."""
    nothing: dict[str, Any] = dict.fromkeys(("keep", "groups", "rank", "places", "num_patches", "patch_grid", "valid"))
    if isinstance(projected.rows, Tensor):
        known = rescored(kept, grid, projected.rows.shape[1])
        marks: Any = projected.marks
        of_images = {"rows": kept.rows, "cuts": kept.cuts, "row_kind": kept.row_kind}
        return [replace(known, **nothing | of_images | {"tokens": projected.rows, "grid": grid, "valid": marks})]
    assert layout is not None and cuts is not None, "rows of each image are a layout's"
    merged = _means(windows(kept.grid, grid))
    pooled = {name: layout.project(_channel(kept, x), merged, cuts) for name, x in _scores(kept).items()}
    found, at = [], 0
    for i, (cut, rows) in enumerate(zip(cuts, projected.rows, strict=True)):
        first = _first(rows, layout, cut)
        rows = rows[:, first:]
        alike = rows.shape[1] == kept.tokens.shape[1]
        known = kept.picked(slice(at, at + cut.rows))
        known = known if alike else _without_scores(known)
        scores = {name: x[i][:, first:, 0] for name, x in pooled.items() if x[i].shape[1] == first + rows.shape[1]}
        more = _as_fields(scores)
        more |= {"rows": (cut.rows,), "cuts": (cut,), "row_kind": cut.kind, "tokens": rows}
        more["grid"] = grid if alike else layout.row_grid(cut)
        more["valid"] = None if projected.marks is None else projected.marks[i][:, first:]
        found.append(replace(known, **nothing | more))
        at += cut.rows
    return found


def _scores(image: ImageFeatures) -> dict[str, Tensor]:
    names = ("cls_attention", "key_attention", "pooling_attention")
    return {n: x for n in names if (x := getattr(image, n)) is not None} | image.block_attention


def _as_fields(scores: dict[str, Tensor]) -> dict[str, Any]:
    words = {name: x for name, x in scores.items() if "@" in name}
    return {name: x for name, x in scores.items() if name not in words} | {"block_attention": words}


def windows(grid: tuple[int, int] | None, into: tuple[int, int] | None) -> tuple[int, int]:
    """Return the sides of the windows that divide a grid evenly `into` a smaller one; (1, 1): there are none."""
    if grid is None or into is None or grid[0] % into[0] or grid[1] % into[1]:
        return 1, 1
    return grid[0] // into[0], grid[1] // into[1]


def rescored(image: ImageFeatures, grid: tuple[int, int] | None, n: int) -> ImageFeatures:
    """Describe the `n` tokens of each row that a projector made: by the scores of the patches, by their means in the
    windows that it merged, or without.
    """
    if n == image.tokens.shape[1]:
        return image
    merged = _means(windows(image.grid, grid))
    scores = {name: merged(_channel(image, x))[..., 0] for name, x in _scores(image).items()}
    return replace(_without_scores(image), **_as_fields({k: x for k, x in scores.items() if x.shape[1] == n}))


def _means(sides: tuple[int, int]) -> Callable[[ImageFeatures], Tensor]:
    """Return what takes the mean of windows of a row's grid."""

    def run(image: ImageFeatures) -> Tensor:
        if sides == (1, 1) or image.grid is None:
            return image.tokens
        maps = image.tokens.transpose(1, 2).unflatten(2, image.grid)
        return F.avg_pool2d(maps, sides).flatten(2).transpose(1, 2)

    return run


def _without_scores(image: ImageFeatures) -> ImageFeatures:
    """Leave out what was known of single tokens, of which a projector or a layout made others."""
    none: dict[str, Any] = dict.fromkeys(("cls_attention", "key_attention", "pooling_attention", "keys"))
    none |= dict.fromkeys(("next_attention", "next_keys"))
    return replace(image, **none, block_attention={})


def _channel(image: ImageFeatures, values: Tensor) -> ImageFeatures:
    """Return features of one channel (M, N, 1), which layouts and poolings treat as they treat tokens."""
    one = values.unsqueeze(-1).float()
    prefix = None if image.prefix is None else one.new_ones(*image.prefix.shape[:2], 1)
    return replace(image, tokens=one, prefix=prefix)


def _same(image: ImageFeatures) -> Tensor:
    return image.tokens


def _bool(rows: Rows) -> Rows:
    return rows[..., 0] > 0.5 if isinstance(rows, Tensor) else [x[..., 0] > 0.5 for x in rows]


def _all_valid(parts: list[ImageFeatures]) -> list[ImageFeatures]:
    """Mark all tokens of those without marks, where others have some."""
    if all(p.valid is None for p in parts):
        return parts
    ones = [p.tokens.new_ones(p.tokens.shape[:2]).bool() for p in parts]
    return [p if p.valid is not None else replace(p, valid=one) for p, one in zip(parts, ones, strict=True)]


def _first(rows: Tensor, layout: Layout, cut: Cut) -> int:
    """Count the tokens that a layout put in front of each frame's (R, K, C), which pruners leave alone."""
    n = layout.frame_tokens(cut) if cut.kind == "frame" else None
    return 0 if n is None else max(0, rows.shape[1] - n)


def _with_first(image: ImageFeatures, rows: Tensor) -> ImageFeatures:
    """Put the tokens that rows (R, K, C) have in front of those of a pruner back there."""
    first = rows[:, : rows.shape[1] - image.tokens.shape[1]]
    if not first.shape[1]:
        return image
    stays = first.new_ones(first.shape[:2], dtype=torch.bool)
    valid = None if image.valid is None else torch.cat([stays, image.valid], 1)
    return replace(image, tokens=torch.cat([first, image.tokens], 1), valid=valid)


def _in_order(image: ImageFeatures) -> ImageFeatures:
    """Put tokens into the places that `keep` (M, N), a permutation, names for them."""
    if image.keep is None:
        return image
    order = image.keep.argsort(dim=1)
    valid = None if image.valid is None else image.valid.gather(1, order)
    tokens = image.tokens.gather(1, order.unsqueeze(-1).expand_as(image.tokens))
    return replace(image, tokens=tokens, valid=valid, keep=None)
