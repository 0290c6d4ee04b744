"""Several encoders at once: their features on one grid, joined by channels or by tokens.

Paper: Karamcheti et al., Prismatic VLMs, arXiv:2402.07865 (section 4.2: SigLIP and DINOv2, channels joined); Tong et
al., Cambrian-1, arXiv:2406.16860 (section 3: features of several encoders interpolated to one grid).

Each encoder is a component of its own, with its own transform, and can be called by itself
(`model.vision.encoders["dino"]`). One decoded image gives each its pixels; they are one row (P,) of a batch, see
`zoo.vision.images.transform.split_row`. Features of another grid are resampled bilinearly, in float32, with
anti-aliasing where the grid becomes coarser, which Cambrian-1 goes without. What a pruner asks for besides (scores,
keys) comes from one encoder for each capability, on the same grid: scores keep their sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import (
    Encoder,
    ImageFeatures,
    ImageTransform,
    ZooError,
    build,
    completed,
    nearest,
    register,
    require_child_name,
    unknown,
)
from zoo.registry.part import OF_BLOCKS, base_of, block_of
from zoo.vision.images.transform import split_row

if TYPE_CHECKING:
    from collections.abc import Iterator

JOINS = ("channels", "tokens")
SCORES = {  # capability -> field of `ImageFeatures` with a number for each patch
    "cls_attention": "cls_attention",
    "key_attention": "key_attention",
    "pooling_head": "pooling_attention",
    "next_block": "next_attention",
}
VECTORS = {"keys": "keys", "next_block": "next_keys", "text_tower": "patch_embeds"}  # with a vector for each patch
OF_ROWS = ("prefix_tokens", "summary")
WORDS = tuple(dict.fromkeys([*SCORES, *VECTORS, *OF_ROWS]))


@dataclass
class FusedConfig:
    encoders: dict[str, Any] = field(default_factory=dict)  # name -> options of an encoder, its component as `name`
    # channels: a token has the features of all encoders at its place | tokens: each encoder has tokens of its own, in
    # channels of its own, the others zero; those of one encoder behind those of another
    join: str = "channels"
    grid: str = ""  # name of the encoder whose grid all features have; empty: the first
    # capability -> name of the encoder that it is taken from; of others, the first that has it
    gives: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.join not in JOINS:
            raise unknown("way to join encoders", self.join, JOINS)
        for name, node in self.encoders.items():
            if not re.fullmatch(r"[A-Za-z]\w*", str(name)):
                raise ZooError(f"The name of an encoder is a word of letters, digits and underscores, got {name!r}.")
            require_child_name("encoder", str(name))
            if not isinstance(node, Mapping) or not node.get("name"):
                meant = nearest(str(name), [other for other in self.encoders if other != name])
                hint = f"Did you mean {meant[0]!r}?" if meant else f"Write vision.encoders.{name}.name=hf, for example."
                raise ZooError(f"encoder {name!r} has no component. {hint}")
            if node["name"] == "fused":
                raise ZooError(f"encoder {name!r} is itself of several: list them all in one vision.encoders.")
            with _named(str(name)):
                completed("vision", node)
        if self.grid and self.grid not in self.encoders:
            raise unknown("encoder (of which the grid is kept)", self.grid, self.encoders)
        for word, name in self.gives.items():
            if word not in WORDS:
                raise unknown("capability of an encoder", word, WORDS)
            if name not in self.encoders:
                raise unknown(f"encoder (to give {word})", name, self.encoders)


@register("vision", "fused")
class Fused(Encoder, nn.Module):
    """`hidden_size` is the sum of the encoders' widths. `encoders` holds them by name, in the order of their channels.

    Attributes:
        kept: name of the encoder whose grid is kept.
        givers: capability -> name of the encoder that it is taken from.
    """

    def __init__(self, config: FusedConfig) -> None:
        super().__init__()
        if len(config.encoders) < 2:
            raise ZooError(
                f"encoders names {len(config.encoders)}, and at least two are joined: "
                "vision.encoders={a: {name: hf, ...}, b: {name: timm, ...}}."
            )
        self.join, made = config.join, {}
        for name, node in config.encoders.items():
            with _named(name):
                made[name] = build("vision", node)
                if made[name].native:
                    raise ZooError("its images keep their shapes, so it has no grid that others could share.")
        self.encoders = nn.ModuleDict(made)
        self.kept = config.grid or next(iter(made))
        self.hidden_size = sum(e.hidden_size for e in made.values())
        words = WORDS if self.join == "channels" else tuple(w for w in WORDS if w not in VECTORS)
        self.givers: dict[str, str] = {}
        for word in words:
            having = [name for name, encoder in made.items() if word in encoder.provides]
            if (asked := config.gives.get(word)) and asked not in having:
                raise ZooError(
                    f"gives.{word}={asked}: encoder {asked!r} does not provide it"
                    + (f"; {' and '.join(map(repr, having))} would." if having else ", nor does another.")
                )
            if having:
                self.givers[word] = asked or having[0]
        grid = {"grid"} if self.join == "channels" else set()
        self.provides = frozenset({*self.givers, *grid})
        self.lacks = {} if grid else {"grid": "with join=tokens an image is several grids, one behind another."}
        for name, encoder in made.items():
            for word, why in encoder.lacks.items():
                if word not in self.provides:
                    self.lacks.setdefault(word, f"{name}: {why}".replace("vision.", f"vision.encoders.{name}."))
        if self.join == "tokens":
            self.lacks |= dict.fromkeys(VECTORS, "with join=tokens a patch is several tokens.")

    @property
    def members(self) -> Mapping[str, Encoder]:  # type: ignore[override]
        return dict(self.encoders.items())  # type: ignore[arg-type]

    @property
    def _first(self) -> Encoder:
        return self.members[self.kept]

    @property
    def grid(self) -> tuple[int, int]:  # type: ignore[override]
        """(h, w) of a row of tokens; with join=tokens the grids of all encoders below one another."""
        h, w = self._first.grid
        return (h, w) if self.join == "channels" else (h * len(self.encoders), w)

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        return math.prod(self.grid)

    @property
    def transform(self) -> ImageTransform:  # type: ignore[override]
        """That of the encoder whose grid is kept, and `also` those of the others, in their order."""
        others = tuple(e.transform for name, e in self.members.items() if name != self.kept)
        return replace(self._first.transform, also=others)

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Of the encoder that gives attention of blocks; else of the one whose grid is kept."""
        return self.members[self._by_block[0] if self._by_block else self.kept].depth

    @property
    def attention_blocks(self) -> int:  # type: ignore[override]
        return min((self.members[name].attention_blocks for name in self._by_block), default=0)

    @property
    def _by_block(self) -> list[str]:
        return [self.givers[word] for word in OF_BLOCKS if word in self.givers]

    @property
    def by_kind(self) -> bool:  # type: ignore[override]
        return any(e.by_kind for e in self.members.values())

    @property
    def text_tower(self) -> int:  # type: ignore[override]
        return sum(e.text_tower for e in self.members.values())

    def giver(self, word: str) -> str:
        return self.givers.get(base_of(word), "")

    def needed_of(self, name: str, need: frozenset[str]) -> frozenset[str]:
        """Words that encoder `name` has to compute, of those that parts need."""
        return frozenset(word for word in need if self.giver(word) == name)

    def prepare(self, need: frozenset[str]) -> None:
        for name, encoder in self.members.items():
            encoder.prepare(self.needed_of(name, need))

    def embed_texts(self, texts: Sequence[str]) -> list[Tensor]:
        return self.members[self.givers["text_tower"]].embed_texts(texts)

    def write_files(self, folder: Path) -> None:
        for name, encoder in self.members.items():
            (own := folder / "encoders" / name).mkdir(parents=True, exist_ok=True)
            encoder.write_files(own)
            for empty in (own, own.parent):
                with suppress(OSError):  # it holds files
                    empty.rmdir()

    def read_files(self, folder: Path) -> None:
        for name, encoder in self.members.items():
            encoder.read_files(folder / "encoders" / name)

    def resize(self, grid: tuple[int, int]) -> None:
        """Take images of fewer patches: of `grid` where the grid is kept, the other encoders in proportion.

        Raises:
            ZooError: one of them cannot.
        """
        if self.join == "tokens":
            raise ZooError(
                "its tokens are those of several encoders (join=tokens), which have no common grid to choose"
            )
        before = self._first.grid
        for name, encoder in self.members.items():
            h, w = (max(1, round(a * b / c)) for a, b, c in zip(encoder.grid, grid, before, strict=True))
            own = encoder.own_size, encoder.own_grid
            with _named(name):
                encoder.resize(grid if name == self.kept else (h, w))
            encoder.own_size, encoder.own_grid = own

    def set_attention(self, name: str) -> None:
        for encoder in self.members.values():
            encoder.set_attention(name)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        for encoder in self.members.values():
            encoder.set_gradient_checkpointing(enable)

    def split(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Give each encoder its pixels: rows (M, P) to (M, 3, h, w) by name, in the order of `encoders`.

        Raises:
            ZooError: the rows are not those that `transform` makes.
        """
        wanted = self.transform
        if tuple(pixel_values.shape[1:]) != wanted.shape:
            raise ZooError(
                f"Rows of pixels for {len(self.encoders)} encoders have the shape {list(wanted.shape)}, those of one "
                f"behind those of another, got {list(pixel_values.shape[1:])}: the model's processor makes them."
            )
        names = [self.kept, *(name for name in self.encoders if name != self.kept)]
        found = dict(zip(names, split_row(pixel_values, wanted), strict=True))
        return {name: found[name] for name in self.encoders}

    def forward(
        self, pixel_values: Tensor, *, need: frozenset[str] = frozenset(), kinds: Sequence[str] | None = None
    ) -> ImageFeatures:
        """Run each encoder on its pixels, and join what they give.

        Args:
            pixel_values: (M, P), made by `transform`; each encoder's part is cast to its own data type.
            need: words of `provides`, and of blocks (key_attention@9), each from its giver.
            kinds: of each row, for encoders that ask for it.

        Returns:
            Tokens (M, N, D) of all encoders, D the sum of their widths; the rest from its giver, on the common grid:
            scores and vectors of patches are resampled, scores scaled to their former sum; `prefix` (M, P, D) is zero
            in the channels of other encoders; `summary` has the giver's width.
        """
        if missing := sorted(w for w in need if base_of(w) not in self.provides):
            raise ZooError(f"This encoder does not provide {missing}; it provides {sorted(self.provides)}.")
        found = {}
        for name, pixels in self.split(pixel_values).items():
            encoder = self.members[name]
            more = {"kinds": kinds} if encoder.by_kind and kinds is not None else {}
            found[name] = encoder(_as_weights(pixels, encoder), need=self.needed_of(name, need), **more)
        return self.joined(found, need)

    def joined(self, found: Mapping[str, ImageFeatures], need: frozenset[str] = frozenset()) -> ImageFeatures:
        """Join what the encoders gave, each called by itself with `needed_of` it."""
        grid = found[self.kept].grid
        assert grid is not None, "an encoder's features are on its grid"
        tokens = [_resampled(found[name].tokens, found[name].grid, grid) for name in self.encoders]  # each (M, N, D')
        known: dict[str, Any] = {"block_attention": {}}
        for word in need:
            giver = self.givers[base_of(word)]
            of = found[giver]
            if block_of(word) is not None:
                known["block_attention"][word] = self._scores(of.block_attention[word], of.grid, grid)
                continue
            if (score := SCORES.get(word)) is not None:
                known[score] = self._scores(getattr(of, score), of.grid, grid)  # (M, N)
            if (vector := VECTORS.get(word)) is not None:
                known[vector] = _resampled(getattr(of, vector), of.grid, grid)  # (M, N, ...)
            if word == "summary":
                known["summary"] = of.summary  # (M, D')
            if word == "prefix_tokens":
                assert of.prefix is not None, "the encoder was asked for it"
                known["prefix"] = self._in_its_channels(giver, of.prefix)  # (M, P, D)
        if self.join == "channels":
            return ImageFeatures(torch.cat(tokens, dim=-1), grid, **known)
        apart = [self._in_its_channels(name, t) for name, t in zip(self.encoders, tokens, strict=True)]
        return ImageFeatures(torch.cat(apart, dim=1), None, **known)  # (M, N * encoders, D)

    def _in_its_channels(self, name: str, tokens: Tensor) -> Tensor:
        """Widen tokens (M, N, D') of one encoder to (M, N, D), zero in the channels of the others."""
        widths = {n: e.hidden_size for n, e in self.members.items()}
        before = sum(width for n, width in list(widths.items())[: list(widths).index(name)])
        return F.pad(tokens, (before, self.hidden_size - before - widths[name]))

    def _scores(self, scores: Tensor, grid: Any, wanted: tuple[int, int]) -> Tensor:
        """Resample scores (M, N) with their sum kept; with join=tokens a place has them for each encoder's token."""
        if tuple(grid) != tuple(wanted):
            made = _resampled(scores[..., None], grid, wanted)[..., 0]
            scores = made * (scores.sum(1, keepdim=True) / made.sum(1, keepdim=True).clamp(min=1e-12))
        return scores if self.join == "channels" else scores.repeat(1, len(self.encoders))


@contextmanager
def _named(encoder: str) -> Iterator[None]:
    """Put the name of an encoder in front of its errors."""
    try:
        yield
    except ZooError as error:
        raise ZooError(f"encoder {encoder!r}: {error}") from error


def _as_weights(pixels: Tensor, encoder: nn.Module) -> Tensor:
    """Cast pixels to the data type of weights in 16 bits."""
    weight = next(encoder.parameters(), None)
    short = weight is not None and weight.dtype in (torch.bfloat16, torch.float16)
    return pixels.to(weight.dtype) if short else pixels  # type: ignore[union-attr]


def _resampled(values: Tensor, grid: Any, wanted: tuple[int, int]) -> Tensor:
    """Resample (M, N, ...) from one grid of patches to another, bilinearly: (M, N', ...); the same one: unchanged."""
    if tuple(grid) == tuple(wanted):
        return values
    flat = values.flatten(2).transpose(1, 2).unflatten(2, tuple(grid))  # (M, C, h, w)
    made = F.interpolate(flat.float(), tuple(wanted), mode="bilinear", align_corners=False, antialias=True)
    return made.flatten(2).transpose(1, 2).unflatten(2, values.shape[2:]).to(values.dtype)
