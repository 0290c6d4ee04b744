"""A pruner without a composed model: features of any encoder in; tokens, indices and positions out. Needs torch alone.

    prune = zoo.pruner("fastervlm", keep_ratio=0.25, grid=(24, 24))
    pruned = prune(tokens, cls_attention=scores)    # (M, 576, D) and (M, 576)
    pruned.tokens, pruned.keep, pruned.positions    # (M, 144, D), (M, 144), (M, 144)

The pruner is the registered class, and what it returns is the `ImageFeatures` that a composed model would get.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from zoo.composed.behind import run
from zoo.composed.image_path import checksum_of, numbered
from zoo.composed.positions import gaps_of
from zoo.registry import ImageFeatures, Pruner, Question, ZooError, build, get, unknown
from zoo.registry.part import block_of

POSITIONS = ("kept", "dense")
# Capabilities that are given in a field of another name.
_FIELDS = {"prefix_tokens": "prefix", "pooling_head": "pooling_attention", "text_tower": "patch_embeds"}
_FIELDS |= {"next_block": "next_keys"}  # with next_attention
_OF_TOKENS = (  # (M, N, ...)
    "cls_attention", "key_attention", "pooling_attention", "keys", "next_attention", "next_keys", "patch_embeds",
    "projected",
)  # fmt: skip


def pruner(
    name: str,
    *,
    grid: tuple[int, int] | None = None,
    num_tokens: int | None = None,
    vision_dim: int | None = None,
    vision_depth: int = 0,
    positions: str = "kept",
    **options: Any,
) -> "PrunerAlone":
    """Build a registered pruner for the features of any encoder, without a composed model.

    Args:
        name: of the pruner: `zoo list pruner`.
        grid: (h, w) of the patches; None: they have none.
        num_tokens: N of one image row; None: h * w.
        vision_dim: D; few pruners ask for it.
        vision_depth: blocks of the encoder, for pruners that choose one of them; 0: not known.
        positions: kept: each token has its position in the unpruned image, as in a model with `positions=kept` |
            dense: tokens are counted anew, in the pruner's own order.
        options: of the pruner: `zoo info pruner/<name>`.

    Raises:
        ZooError: the name or an option does not exist, a value does not fit; the pruner acts inside the LLM or in
            front of the encoder.

    Example:
        >>> prune = zoo.pruner("divprune", keep_ratio=0.5, grid=(24, 24))
    """
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS)
    get("pruner", name)  # a name that does not exist is said before what is missing beside it
    n = prod(grid) if num_tokens is None and grid is not None else num_tokens
    if n is None:
        raise ZooError(f"pruner {name!r} needs the number of image tokens: set grid=(h, w), or num_tokens.")
    if grid is not None and prod(grid) != n:
        raise ZooError(f"A grid of {grid[0]} x {grid[1]} has {prod(grid)} tokens, got num_tokens={n}.")
    part = build(
        "pruner", {"name": name, **options}, vision_dim=vision_dim, vision_depth=vision_depth, grid=grid, num_tokens=n
    )
    if part.front or "image_tokens" in part.needs:
        where = "in front of the encoder" if part.front else "between layers of the LLM"
        raise ZooError(f"pruner {name!r} acts {where}: it needs a composed model, zoo.load(...).")
    return PrunerAlone(name, part, grid, n, positions).eval()


@dataclass(frozen=True)
class Pruned:
    """What a pruner left of the images of a batch."""

    tokens: Tensor  # (M, K, D)
    positions: Tensor  # (M, K) int64 of each token, the image's first position is 0
    valid: Tensor  # (M, K) bool, the tokens that exist: all, unless the pruner keeps another number of each image
    lengths: list[int]  # positions that each image takes: N where they are kept, the number of its tokens where dense
    image: ImageFeatures  # all that is known of the tokens, for what follows

    @property
    def counts(self) -> list[int]:
        """Tokens of each image: its placeholders in a prompt."""
        counts: list[int] = self.valid.sum(1).tolist()
        return counts

    @property
    def keep(self) -> Tensor | None:
        """(M, K) index of each token in the encoder's grid; None: tokens were merged, or all are there."""
        return self.image.keep

    @property
    def groups(self) -> Tensor | None:
        """(M, N) which token each of the encoder's went into, -1 where it was dropped; None: none was merged."""
        return self.image.groups

    def expand(self, prompts: Sequence[str], token: str) -> list[str]:
        """Write the image token of prompts as often as each image has tokens.

        Args:
            prompts: with `token` once for each image, in the order of the images.
            token: `<image>`, say.

        Raises:
            ZooError: there are not as many as images.
        """
        pieces = [prompt.split(token) for prompt in prompts]
        if (found := sum(len(x) - 1 for x in pieces)) != len(self.counts):
            raise ZooError(f"The prompts have {token} {found} times, for {len(self.counts)} images.")
        counts = iter(self.counts)
        return [first + "".join(token * next(counts) + piece for piece in rest) for first, *rest in pieces]

    def position_ids(self, placeholders: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the positions of whole prompts: (B, T), for an LLM with one position per token.

        Pass them on together with a mask: transformers takes a gap in positions for the border of a packed sample where
        there is neither a mask nor a cache, and attention then stops there without a warning.

        Args:
            placeholders: (B, T) bool, `counts` true values for each image.
            attention_mask: (B, T), 0 at padding.

        Raises:
            ZooError: the placeholders and the tokens are not equally many.
        """
        return prompt_positions(self.positions[self.valid], self.counts, self.lengths, placeholders, attention_mask)


def prompt_positions(
    positions: Tensor,
    counts: Sequence[int],
    lengths: Sequence[int],
    placeholders: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return the positions of whole prompts, as `Pruned.position_ids`: (B, T).

    Args:
        positions: (S,) of the tokens of all images.
        counts, lengths: tokens of each image, and positions that it takes.
        placeholders, attention_mask: (B, T).
    """
    if (found := int(placeholders.sum())) != len(positions):
        what = f"{len(counts)} images have {len(positions)} tokens"
        raise ZooError(f"The prompts have {found} image placeholders, and {what}.")
    mask = torch.ones_like(placeholders) if attention_mask is None else attention_mask
    column = (mask.long().cumsum(1) - 1).clamp(min=0)  # (B, T)
    if not counts:
        return column
    shift = gaps_of(positions, counts, lengths).shift(numbered(placeholders))  # (B, T + 1), with what follows
    return column + shift[:, :-1].to(column.device)


class PrunerAlone(nn.Module):
    """A pruner with the shape of the images that it gets. Made by `zoo.pruner`."""

    def __init__(self, name: str, part: Pruner, grid: tuple[int, int] | None, num_tokens: int, positions: str) -> None:
        super().__init__()
        self.name, self.part, self.grid, self.positions = name, part, grid, positions
        self.num_tokens = num_tokens

    @property
    def needs(self) -> frozenset[str]:
        """What it must be given beside the tokens: cls_attention, keys, key_attention@9, ...; and `grid`."""
        return frozenset(self.part.needs)

    @property
    def kept(self) -> int:
        """K, the tokens that it leaves of an image, known beforehand; the most where that depends on the image."""
        return self.part.num_tokens(self.num_tokens)

    def forward(self, tokens: Tensor, *, pixel_values: Tensor | None = None, **known: Any) -> Pruned:
        """Prune the tokens of images.

        Args:
            tokens: (M, N, D) of the patches, row by row, without [CLS]. For a pruner with `part.behind`: (M, N, C) as
                they enter the LLM, which it leaves in place, with `Pruned.valid` for those that stay.
            pixel_values: (M, ...), for a pruner that draws for each image; without it, one draw for all.
            known: what the pruner `needs`, by its word, and further fields of `ImageFeatures`: cls_attention=(M, N),
                keys=(M, N, H, d), prefix=(M, P, D), `**{"key_attention@9": scores}`; for next_block next_keys=(M, N, C)
                and next_attention=(M, N). `rows` is the number of crops or frames of each image, for a pruner with one
                budget over all of them. `question` is a `Question`, or the LLM's embeddings (M, L, C) of what is asked
                about each image, or M texts.

        Raises:
            ZooError: something that it needs is missing, unknown, or of another shape.
        """
        if tokens.dim() != 3 or tokens.shape[1] != self.num_tokens:
            raise ZooError(f"pruner {self.name!r} was made for tokens (M, {self.num_tokens}, D), got {_shape(tokens)}.")
        image = ImageFeatures(tokens, self.grid, **self._fields(known, (tokens.shape[0], tokens.shape[1])))
        if pixel_values is not None:
            image.checksum = checksum_of(pixel_values)
        left = run(self.part, image)
        if self.positions == "kept":
            left = left.placed(self.num_tokens)
        valid = left.valid
        if valid is None:
            valid = torch.ones(left.tokens.shape[:2], dtype=torch.bool, device=left.tokens.device)
        if self.positions == "kept":
            assert left.places is not None, "set by `placed`"
            return Pruned(left.tokens, left.places, valid, [self.num_tokens] * len(valid), left)
        return Pruned(left.tokens, (valid.cumsum(1) - 1).clamp(min=0), valid, valid.sum(1).tolist(), left)

    def _fields(self, known: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
        """Return fields of `ImageFeatures`, of which none that the pruner needs is missing."""
        allowed = {f.name for f in fields(ImageFeatures)} - {"tokens", "grid", "places"}
        found: dict[str, Any] = {}
        blocks: dict[str, Tensor] = dict(known.get("block_attention", {}))
        for word, value in known.items():
            if block_of(word) is not None:
                blocks[word] = value
            elif (field := _FIELDS.get(word, word)) in allowed:
                found[field] = _asked(value, shape[0]) if field == "question" else value
            else:
                raise unknown("feature of image tokens", word, {*allowed, *_FIELDS, *self.needs} - {"grid"})
        for word, value in {**{f: found.get(f) for f in _OF_TOKENS}, **blocks}.items():
            if value is not None and tuple(value.shape[:2]) != shape:
                raise ZooError(
                    f"{word} must have a value for each of the tokens, {(*shape, '...')}, got {_shape(value)}: without "
                    "the columns of [CLS] and registers."
                )
        given = {word for word in self.needs if found.get(_FIELDS.get(word, word)) is not None} | {*blocks}
        given |= {"grid"} if self.grid is not None else set()
        missing = self.needs - given
        if "grid" in missing:
            raise ZooError(
                f"pruner {self.name!r} needs the grid of the patches: zoo.pruner({self.name!r}, grid=(h, w))."
            )
        if missing:
            raise ZooError(f"pruner {self.name!r} needs {', '.join(sorted(missing))}: pass them beside the tokens.")
        return {**found, "block_attention": blocks}


def _asked(value: Any, rows: int) -> Question | None:
    """Return what is asked about the images of `rows` prompts, each with one image."""
    prompts = torch.arange(rows)
    if isinstance(value, Tensor):
        mask = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
        return Question(prompts.to(value.device), embeds=value, mask=mask)
    if isinstance(value, (list, tuple)):
        return Question(prompts, texts=tuple(value))
    question: Question | None = value
    return question


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
