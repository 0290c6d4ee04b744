"""Positions of image tokens in the LLM's sequence behind pruners: the setting `positions` of a model.

`dense`: positions count the tokens kept, as in the releases of FasterVLM, VisPruner and PyramidDrop. `kept`: each image
token has its position in the prompt without a pruner, and the text behind an image continues from there (EVS, DART). So
the result equals that of the unpruned prompt with the dropped tokens hidden from attention. The same holds for tokens
that are dropped between layers of the LLM: the layers behind count those left, or give them the positions that they had
(`zoo.fusion.pruners.inside.layer_arguments`).

Kept is the default: without training, shipped models of clothes lose a fraction of what they lose with dense positions,
those of scenes as much (`zoo bench positions`, docs/efficiency.md).

A position is a column plus a shift: at an image token the number of pruned tokens of its image before it, behind an
image the number of all its pruned tokens. `Unpruned` has the number of tokens that images would have, and the position
of each token among them; pruners only name the tokens kept (`ImageFeatures.keep`, `groups`). Where a projector makes
new tokens of a grid, a token has the position of its corner of the grid; a projector that makes as many tokens with a
pruner as without leaves no gap. A sliding window of the LLM counts columns, not positions.

Positions with gaps are given to the LLM together with a mask or a cache: without either, transformers takes a gap for
the border of a packed sample, and no token attends across it.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.composed.assembly import build_part
from zoo.composed.gaps import Gaps
from zoo.composed.grid_positions import GridPositions
from zoo.fusion.layouts.crop_places import scaled
from zoo.registry import POSITIONS, Cut, ImageFeatures, Layout, ZooError, unknown

_SHIFT = "zoo_shift"  # attribute of a cache that holds the shift of its columns


class Unpruned:
    """The tokens that images of a model would have without its pruners.

    Args:
        parts: of the model.
        slots: that they were made of.

    Raises:
        ZooError: there is no such prompt, or positions in it are not known.
    """

    def __init__(self, parts: Any, slots: Mapping[str, Any]) -> None:
        vision, projector = parts.vision, parts.projector
        self.patches, grid = vision.num_tokens, (vision.grid[0], vision.grid[1])
        ahead = [p for p in parts.steps if p.kind == "pruner" and not parts.pruner[p.name].behind]
        left = ahead[-1] if ahead else parts.steps[0]  # those behind the projector leave tokens in their columns
        self.layout, self.whole = parts.layout, None
        given: dict[str, Any] = {"text_dim": parts.llm.hidden_size, "grid": grid, "num_tokens": self.patches}
        with torch.device("meta"):
            alone = build_part("projector", slots["projector"], vision_dim=vision.hidden_size, **given)
        self.row_tokens = alone.num_tokens(self.patches)  # of an image, crop or frame
        self.tokens = projector.num_tokens(left.tokens)  # of these, with the pruners
        self.fixed: Tensor | None = None  # (K,) positions of a row's tokens, where they do not depend on `keep`
        if not self.drops:
            return
        one_by_one = self.tokens == left.tokens and self.row_tokens == self.patches and projector.num_tokens(1) == 1
        if not one_by_one:
            grids = projector.grid, alone.grid
            if not all(grids):
                raise ZooError(
                    f"projector {slots['projector']['name']!r} makes new tokens of those that a pruner keeps, so "
                    "their positions without a pruner are not known"
                )
            self.fixed = scaled(torch.arange(math.prod(grids[0]), device="cpu"), *grids)
        if self.layout is not None:
            given = {"num_tokens": self.row_tokens, "grid": grid if self.row_tokens == self.patches else alone.grid}
            given |= {"text_dim": None, "pruned": self.row_tokens == self.patches and alone.num_tokens(1) == 1}
            given |= {"image_size": vision.own_size, "encoder_grid": grid}
            self.whole = build_part("layout", slots["layout"], **given)
            if self.layout.row_tokens is None and type(self.layout).places is Layout.places:
                raise ZooError(
                    f"layout {slots['layout']['name']!r} has no `places`, the positions of its tokens without a pruner"
                )
        self.longest = self.whole.num_tokens(self.row_tokens) if self.whole is not None else self.row_tokens

    @property
    def drops(self) -> bool:
        """Whether a row has fewer tokens than without pruners."""
        return self.tokens != self.row_tokens

    def saved(self, cut: Cut | None = None) -> int:
        """Count the pruned tokens of an image; with a layout, of one divided as `cut`."""
        if self.layout is None or self.whole is None:
            return max(0, self.row_tokens - self.tokens)
        if self.layout.row_tokens is not None and cut is not None:
            return cut.rows * max(0, self.row_tokens - self.tokens)
        return 0 if cut is None else max(0, self.whole.count(cut) - self.layout.count(cut))

    def placed(self, kept: ImageFeatures) -> ImageFeatures:
        """Sort the tokens kept by their positions."""
        return kept if self.fixed is not None else kept.placed(self.patches)

    def gaps(self, kept: ImageFeatures) -> Gaps:
        """Return the shifts at each token that was made of the features.

        Raises:
            ZooError: they were not made by this model.
        """
        rows = kept.places if self.fixed is None else self.fixed.to(kept.tokens.device).expand(len(kept.tokens), -1)
        if rows is None:
            raise ZooError("The encoded images have no positions of their tokens: encode them with this model.")
        if self.layout is None or self.whole is None or self.layout.row_tokens is not None:
            counts, wholes = [rows.shape[1]] * len(rows), [self.row_tokens] * len(rows)
            places = rows.flatten()
        else:
            cuts: Sequence[Cut] = kept.cuts or ()
            counts, wholes = ([x.count(c) for c in cuts] for x in (self.layout, self.whole))
            places = self.layout.places(rows, kept, cuts, self.whole)
        return gaps_of(places, counts, wholes)


def gaps_of(places: Tensor, counts: Sequence[int], wholes: Sequence[int]) -> Gaps:
    """Compute the gaps of images of `counts` tokens that would have `wholes`, from the tokens' positions (S,)."""
    many, full = (torch.tensor(list(x), device=places.device) for x in (counts, wholes))
    ends = many.cumsum(0)
    column = torch.arange(len(places), device=places.device) - (ends - many).repeat_interleave(many)
    behind = torch.zeros_like(places)
    behind[ends[many > 0] - 1] = (full - many).clamp(min=0)[many > 0]
    return Gaps(places - column, behind)


class Decided(NamedTuple):
    """How the positions of a model are counted."""

    positions: str  # kept or dense; `auto` for a model without pruners
    # For kept, and for images that keep their shapes; None: positions count the tokens kept.
    unpruned: Unpruned | GridPositions | None = None
    why: str = ""  # reason where the default is not possible


def decided(parts: Any, slots: Mapping[str, Any], positions: str) -> Decided:
    """Decide how positions are counted.

    Args:
        parts: of the model.
        slots: that they were made of.
        positions: kept, dense, or auto: kept where it is possible.

    Raises:
        ZooError: `kept` was asked for, and is not possible.
    """
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS)
    if parts.layout is not None and parts.layout.native:
        return _of_grids(parts, positions)
    if not parts.pruner:
        return Decided(positions)
    if positions == "dense" or parts.projector is None:
        return Decided(positions if positions != "auto" else "kept")
    try:
        found = Unpruned(parts, slots)
        columns = any(p.behind or p.ragged for p in parts.pruner.values())  # some are left out of the sequence
        if not found.drops and not columns:
            return Decided("kept")
        limit = parts.llm.max_positions
        if (why := _without_positions(parts.llm)) is not None:
            raise ZooError(why)
        if found.drops and limit is not None and found.longest > limit:
            raise ZooError(f"an image would take {found.longest} positions, and the LLM has {limit}")
    except ZooError as error:
        why = str(error).rstrip(".")
        if positions == "auto":
            return Decided("dense", why=f"positions are dense: {why}.")
        raise ZooError(f"positions=kept is not possible: {why}. Set positions=dense.") from error
    return Decided("kept", found if found.drops else None)


def _of_grids(parts: Any, positions: str) -> Decided:
    """Decide for images that keep their shapes: their positions have the axes of the LLM, or are columns."""
    found = GridPositions(parts.layout, parts.llm.axes, positions == "dense", parts.vision.grid)
    whole = Cut(patches=parts.vision.grid)
    drops = parts.layout.count(whole) != math.prod(parts.vision.grid)
    if positions == "dense" and (ragged := next((n for n, p in parts.pruner.items() if p.ragged), "")):
        raise ZooError(
            f"positions=dense counts the tokens of an image one by one, and how many pruner {ragged!r} leaves is known "
            "behind the encoder alone, where images keep their shapes: positions=kept."
        )
    word = "kept" if positions == "auto" and parts.pruner else positions
    if parts.llm.axes == 1 and (not drops or positions == "dense"):
        return Decided(word)  # columns
    why = _without_positions(parts.llm) if drops else None
    if why is not None and positions == "auto":
        return Decided("dense", why=f"positions are dense: {why}.")
    if why is not None:
        raise ZooError(f"positions=kept is not possible: {why}. Set positions=dense.")
    return Decided(word, found)


def _without_positions(llm: Any) -> str | None:
    """Return why positions cannot be given to a language model; None: they can."""
    takes = inspect.signature(type(getattr(llm, "decoder", llm.lm)).forward).parameters
    if "position_ids" in takes and not getattr(llm.lm.config.get_text_config(), "alibi", False):
        return None
    return f"{type(llm.lm).__name__} counts tokens by itself and takes no positions"


# ---- passes that go on -------------------------------------------------------------------------------------------


def shift_of(cache: Any, rows: int) -> Tensor | None:
    """Return the shift of columns that continue a cache: (B, 1), or (A, B, 1); None: nothing."""
    shift = getattr(cache, _SHIFT, None)
    if shift is None or not (past := int(cache.get_seq_length())):
        return None
    follows = shift.shape[-1] - 1  # the last one is of what follows the prompt
    last = shift[..., follows if past >= follows else past - 1, None]  # else of the last column that it holds
    return repeated(last, rows)


def repeated(shift: Tensor, rows: int) -> Tensor:
    """Give each of `rows`, beams of fewer, the shift of its own, (B, T) or (A, B, T)."""
    return shift if rows == shift.shape[-2] else shift.repeat_interleave(rows // shift.shape[-2], -2)


def put_shift(cache: Any, shift: Tensor, past: int = 0) -> None:
    """Store the shift of a cache's columns from `past` on, behind those that it has, and of what follows.

    Args:
        cache: of the pass.
        shift: (B, T + 1), or (A, B, T + 1).
        past: columns that the cache had.
    """
    if cache is None or not hasattr(cache, "__dict__"):
        return
    if past:
        before = getattr(cache, _SHIFT, None)
        held = shift.new_zeros(*shift.shape[:-1], 1) if before is None else before[..., :past]
        missing = held[..., -1:].expand(*held.shape[:-1], past - held.shape[-1])
        shift = torch.cat([held, missing, shift], -1)
    setattr(cache, _SHIFT, shift)


def whole_row(lm: Any, rows: int, columns: int, past: int) -> dict[str, Any]:
    """Return the sequence lengths for a flash kernel, which would take a row with gaps for packed samples."""
    if rows != 1 or not str(lm.config._attn_implementation).startswith("flash"):
        return {}
    device = next(lm.parameters()).device
    ends = {"q": columns, "k": past + columns}
    sizes: dict[str, Any] = {f"max_length_{x}": n for x, n in ends.items()}
    return sizes | {f"cu_seq_lens_{x}": torch.tensor([0, n], dtype=torch.int32, device=device) for x, n in ends.items()}
