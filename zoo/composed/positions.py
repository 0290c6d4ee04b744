"""Where image tokens stand in the LLM's sequence when pruners have left fewer of them: `positions` of a model.

`dense`: positions are counted over what is left, as FasterVLM, VisPruner and PyramidDrop release it. `kept`: each image
token has the place that it had in the prompt without a pruner, and what follows an image goes on where it would stand
there (EVS, DART). So a kept prompt computes what the whole prompt computes with the dropped tokens hidden from
attention. Tokens that are dropped between layers of the LLM keep their places with either.

Kept is the default: without training, shipped models of clothes lose a fraction of what they lose with dense positions,
those of scenes as much (`zoo bench positions`, docs/efficiency.md).

Positions are then columns and what is added to them, the shift: in front of an image token the places of its image
that are empty, behind an image those that all of it saved. `Unpruned` knows how long a run of image tokens would be and
where in it each token stood; pruners only say which tokens they left (`ImageFeatures.keep`, `groups`). Of a projector
that makes other tokens of a grid, a token stands where its corner of the grid would; one that makes as many tokens with
a pruner as without leaves no gap. A sliding window of the LLM counts the tokens that are there.

Positions with gaps go to the LLM with a mask or a cache beside them: without either, transformers takes each gap for
the border of a packed sample and lets nothing attend across it.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.composed.assembly import build_part
from zoo.fusion.layouts.crop_places import scaled
from zoo.registry import POSITIONS, Cut, ImageFeatures, Layout, ZooError, unknown

_SHIFT = "zoo_shift"  # under which a cache holds the shift of its columns


class Gaps(NamedTuple):
    """What is added to the columns around each image token, counted over the batch; both (S,) int64."""

    ahead: Tensor  # to its own
    behind: Tensor  # to all columns behind it: at the last token of a run, else 0

    def shift(self, index: Tensor, segment_ids: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Say what is added to each column: (B, T).

        Args:
            index: (B, T) which image token stands there, -1 none.
            segment_ids: (B, T) the sample of a packed row, each of which counts from 0.
            before: (B, 1) of what goes on behind a cache.
        """
        none = self.behind.new_zeros(1)  # index -1 reads the last entry
        behind, ahead = torch.cat([self.behind, none])[index], torch.cat([self.ahead, none])[index]  # (B, T)
        passed = behind.cumsum(1) - behind
        if segment_ids is not None:
            begins = torch.ones_like(index, dtype=torch.bool)
            begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
            passed = passed - (passed * begins).cummax(1).values  # it only grows: the largest is that of the last begin
        return passed + ahead if before is None else passed + ahead + before


class Unpruned:
    """The runs of image tokens of a model as they would be without its pruners.

    Args:
        parts: of the model.
        slots: that they were made of.

    Raises:
        ZooError: there is no such prompt, or nothing says where tokens stood in it.
    """

    def __init__(self, parts: Any, slots: Mapping[str, Any]) -> None:
        vision, projector = parts.vision, parts.projector
        self.patches, grid = vision.num_tokens, (vision.grid[0], vision.grid[1])
        left = next(s for s in reversed(parts.steps) if s.kind == "pruner")
        self.layout, self.whole = parts.layout, None
        given: dict[str, Any] = {"text_dim": parts.llm.hidden_size, "grid": grid, "num_tokens": self.patches}
        with torch.device("meta"):
            alone = build_part("projector", slots["projector"], vision_dim=vision.hidden_size, **given)
        self.row_tokens = alone.num_tokens(self.patches)  # of an image, crop or frame
        self.tokens = projector.num_tokens(left.tokens)  # that are left of them
        self.fixed: Tensor | None = None  # (K,) where tokens of a row stand, whatever is kept
        if not self.drops:
            return
        one_by_one = self.tokens == left.tokens and self.row_tokens == self.patches and projector.num_tokens(1) == 1
        if not one_by_one:
            grids = projector.grid, alone.grid
            if not all(grids):
                raise ZooError(
                    f"projector {slots['projector']['name']!r} makes new tokens of those that a pruner leaves, so "
                    "nothing says where they would stand without one"
                )
            self.fixed = scaled(torch.arange(math.prod(grids[0]), device="cpu"), *grids)
        if self.layout is not None:
            given = {"num_tokens": self.row_tokens, "grid": grid if self.row_tokens == self.patches else alone.grid}
            given |= {"text_dim": None, "pruned": self.row_tokens == self.patches and alone.num_tokens(1) == 1}
            given |= {"image_size": vision.transform.size, "encoder_grid": grid}
            self.whole = build_part("layout", slots["layout"], **given)
            if self.layout.row_tokens is None and type(self.layout).places is Layout.places:
                raise ZooError(
                    f"layout {slots['layout']['name']!r} does not say where its tokens would stand without a pruner "
                    "(`places`)"
                )
        self.longest = self.whole.num_tokens(self.row_tokens) if self.whole is not None else self.row_tokens

    @property
    def drops(self) -> bool:
        """Whether a row has fewer tokens than without pruners."""
        return self.tokens != self.row_tokens

    def saved(self, cut: Cut | None = None) -> int:
        """Count the places of an image that no token stands on; those of a layout by how it was cut."""
        if self.layout is None or self.whole is None:
            return max(0, self.row_tokens - self.tokens)
        if self.layout.row_tokens is not None and cut is not None:
            return cut.rows * max(0, self.row_tokens - self.tokens)
        return 0 if cut is None else max(0, self.whole.count(cut) - self.layout.count(cut))

    def placed(self, kept: ImageFeatures) -> ImageFeatures:
        """Put what the pruners left in the order of its places."""
        return kept if self.fixed is not None else kept.placed(self.patches)

    def gaps(self, kept: ImageFeatures) -> Gaps:
        """Say what is added to the columns around each token that was made of the features.

        Raises:
            ZooError: they were not made by this model.
        """
        rows = kept.places if self.fixed is None else self.fixed.to(kept.tokens.device).expand(len(kept.tokens), -1)
        if rows is None:
            raise ZooError("The encoded images do not say where their tokens stood: encode them with this model.")
        if self.layout is None or self.whole is None or self.layout.row_tokens is not None:
            counts, wholes = [rows.shape[1]] * len(rows), [self.row_tokens] * len(rows)
            places = rows.flatten()
        else:
            cuts: Sequence[Cut] = kept.cuts or ()
            counts, wholes = ([x.count(c) for c in cuts] for x in (self.layout, self.whole))
            places = self.layout.places(rows, kept, cuts, self.whole)
        return _gaps(places, counts, wholes)


def _gaps(places: Tensor, counts: Sequence[int], wholes: Sequence[int]) -> Gaps:
    """Gaps of runs of `counts` tokens that would have `wholes`, by the places (S,) of tokens in their runs."""
    many, full = (torch.tensor(list(x), device=places.device) for x in (counts, wholes))
    ends = many.cumsum(0)
    column = torch.arange(len(places), device=places.device) - (ends - many).repeat_interleave(many)
    behind = torch.zeros_like(places)
    behind[ends[many > 0] - 1] = (full - many).clamp(min=0)[many > 0]
    return Gaps(places - column, behind)


class Decided(NamedTuple):
    """How the positions of a model are counted."""

    positions: str  # kept or dense; `auto` for a model without pruners
    unpruned: Unpruned | None = None  # what places are counted by; None: what is left
    why: str = ""  # the default is not possible


def decided(parts: Any, slots: Mapping[str, Any], positions: str) -> Decided:
    """Decide how positions are counted, and by what.

    Args:
        parts: of the model.
        slots: that they were made of.
        positions: kept, dense, or auto: kept where it can be.

    Raises:
        ZooError: `kept` was asked for, and cannot be.
    """
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS)
    if not parts.pruner:
        return Decided(positions)
    if positions == "dense" or parts.projector is None:
        return Decided(positions if positions != "auto" else "kept")
    try:
        found = Unpruned(parts, slots)
        if not found.drops:
            return Decided("kept")
        limit = parts.llm.max_positions
        if (why := _without_positions(parts.llm)) is not None:
            raise ZooError(why)
        if limit is not None and found.longest > limit:
            raise ZooError(f"an image would stand on {found.longest} places, and the LLM has {limit} positions")
    except ZooError as error:
        why = str(error).rstrip(".")
        if positions == "auto":
            return Decided("dense", why=f"positions are dense: {why}.")
        raise ZooError(f"positions=kept is not possible: {why}. Set positions=dense.") from error
    return Decided("kept", found)


def _without_positions(llm: Any) -> str | None:
    """Why positions make no difference to a language model; None: they do."""
    takes = inspect.signature(type(getattr(llm, "decoder", llm.lm)).forward).parameters
    if "position_ids" in takes and not getattr(llm.lm.config.get_text_config(), "alibi", False):
        return None
    return f"{type(llm.lm).__name__} counts tokens by itself and takes no positions"


# ---- passes that go on -------------------------------------------------------------------------------------------


def shift_of(cache: Any, rows: int) -> Tensor | None:
    """What is added to the columns that go on behind a cache: (B, 1); None: nothing."""
    shift = getattr(cache, _SHIFT, None)
    if shift is None or not (past := int(cache.get_seq_length())):
        return None
    last = shift[:, min(past, shift.shape[1]) - 1, None]  # of the last column that it holds
    return last.repeat_interleave(rows // len(last), 0) if rows != len(last) else last


def put_shift(cache: Any, shift: Tensor, past: int = 0) -> None:
    """Let a cache hold what is added to its columns from `past` on, (B, T); those before are noted there already."""
    if cache is None or not hasattr(cache, "__dict__"):
        return
    if past:
        before = getattr(cache, _SHIFT, None)
        held = shift.new_zeros(len(shift), 1) if before is None else before[:, :past]
        shift = torch.cat([held, held[:, -1:].expand(-1, past - held.shape[1]), shift], 1)
    setattr(cache, _SHIFT, shift)


def whole_row(lm: Any, rows: int, columns: int, past: int) -> dict[str, Any]:
    """What a flash kernel needs to be told of a row with gaps, which it takes for packed samples."""
    if rows != 1 or not str(lm.config._attn_implementation).startswith("flash"):
        return {}
    device = next(lm.parameters()).device
    ends = {"q": columns, "k": past + columns}
    told: dict[str, Any] = {f"max_length_{x}": n for x, n in ends.items()}
    return told | {f"cu_seq_lens_{x}": torch.tensor([0, n], dtype=torch.int32, device=device) for x, n in ends.items()}
