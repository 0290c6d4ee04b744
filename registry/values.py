"""What flows between parts: features of images, samples, scores; and the kinds of parts.

Letters in shapes: B sequences, M images in the batch, N image tokens per image, K kept, T positions in the LLM, D
vision width, C LLM width, V vocabulary; `h, w` is the patch grid. Nothing here imports torch, so that names and
configs stay cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.registry.errors import ZooError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MODEL_SLOTS = ("vision", "pruner", "projector", "layout", "llm", "adapter")  # in the order of the flow
KINDS = (*MODEL_SLOTS, "distiller", "dataset", "task")
MANY = frozenset({"pruner", "adapter", "dataset", "task"})  # slots that hold several members, keyed by name
SINGLE_SLOTS = tuple(slot for slot in MODEL_SLOTS if slot not in MANY)

POSITIONS = ("auto", "kept", "dense")  # of image tokens that pruners left, see `zoo.composed.positions`
IGNORE_INDEX = -100  # a label that does not count, as everywhere in transformers

# Fields of `ImageFeatures` with a value for each token.
_OF_TOKENS = (
    "cls_attention", "key_attention", "pooling_attention", "keys", "next_attention", "next_keys", "patch_embeds",
    "projected", "valid",
)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How an image, or a video, was divided into the rows that the encoder gets."""

    rows: int = 1
    kind: str = "image"  # image | crop | frame
    size: tuple[int, int] = (0, 0)  # (height, width) in pixels before it was cut
    grid: tuple[int, int] = (1, 1)  # rows and columns of crops, an overview aside
    times: tuple[float, ...] = ()  # of frames in seconds; of a row of several frames their mean
    duration: float = 0.0  # of the video, in seconds
    # (h, w) of the tokens that the encoder gives for each row, where images keep their shapes; (0, 0): the encoder's
    patches: tuple[int, int] = (0, 0)
    interval: float = 0.0  # of a video, seconds from a row to the next by the frames shown and the length
    starts: tuple[float, ...] = ()  # of rows of several frames, of the first one in seconds


@dataclass(frozen=True)
class Asked:  # not a tuple, of which transformers' `BatchFeature.to` makes another
    """What a prompt asks about its images: the last turn of the user before the first answer behind an image."""

    text: str  # of the turn, without images
    ids: tuple[int, ...] | None = None  # its tokens by the LLM's tokenizer; None: not tokenized
    images: int | None = None  # of the prompt; None: counted from placeholders


@dataclass
class Question:
    """What is asked about the images of a batch, for each row of features; parts that need `question` get it."""

    prompts: Tensor  # (M,) int64, which prompt of the batch a row belongs to; rows of one prompt share the question
    texts: tuple[str, ...] | None = None  # M; None where they are not known
    ids: Tensor | None = None  # (M, L) tokens by the LLM's tokenizer; None where they are not known
    mask: Tensor | None = None  # (M, L) bool, False behind the end of a question
    embeds: Tensor | None = None  # (M, L, C) the LLM's input embeddings of them, without gradient
    text_embeds: Tensor | None = None  # (M, S, P) float32 by the encoder's text tower, of S pieces; None unless needed
    text_mask: Tensor | None = None  # (M, S) bool, False behind the last piece

    def picked(self, rows: Tensor | slice) -> Question:
        """Select rows."""
        texts = self.texts
        if texts is not None:
            texts = texts[rows] if isinstance(rows, slice) else tuple(texts[i] for i in rows.tolist())
        return replace(self, texts=texts, **{name: x[rows] for name, x in self._tensors().items()})

    @staticmethod
    def joined(parts: Sequence[Question]) -> Question:
        """Join the rows of several of one batch."""
        texts = None if any(p.texts is None for p in parts) else tuple(t for p in parts for t in p.texts or ())
        names = parts[0]._tensors()
        whole = {name: _cat(*(getattr(p, name) for p in parts), dim=0) for name in names}
        return replace(parts[0], texts=texts, **whole)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if hasattr(x := getattr(self, f.name), "shape")}


@dataclass
class ImageFeatures:
    """What flows from the encoder through the pruners to the projector; a part returns a new one."""

    tokens: Tensor  # (M, N, D) patch tokens in row-major order, no [CLS]
    grid: tuple[int, int] | None  # (h, w) with h * w == N; None once tokens were dropped
    cls_attention: Tensor | None = None  # (M, N) float32, mean over heads; None unless a part needs it
    prefix: Tensor | None = None  # (M, P, D) [CLS] and register tokens; None unless a part needs them
    keep: Tensor | None = None  # (M, N) index of each token in the encoder's own grid; None: all in order, or merged
    # How rows belong together where an image is several crops or a video several frames: the number of rows of each
    # image, and what they are. None: every row is one image.
    rows: tuple[int, ...] | None = None
    row_kind: str = "image"  # image | crop | frame
    cuts: tuple[Cut, ...] | None = None  # the same in full, one for each image
    key_attention: Tensor | None = None  # (M, N) float32, mean over heads and queries; None unless a part needs it
    pooling_attention: Tensor | None = None  # (M, N) float32, of the pooling head; None unless a part needs it
    summary: Tensor | None = None  # (M, D) output of the pooling head; None unless a part needs it
    keys: Tensor | None = None  # (M, N, H, d) of the attention that made the tokens; None unless a part needs them
    # (M, N0) for each token of the encoder's own grid, which of the tokens it went into, -1 where it was dropped. Set
    # by a pruner that merges, in place of `keep`.
    groups: Tensor | None = None
    num_patches: int | None = None  # N0; None: as many as there are tokens
    patch_grid: tuple[int, int] | None = None  # (h, w) of the encoder's own grid; None: `grid`
    rank: Tensor | None = None  # (M, N) in which order a pruner chose the tokens, 0 first; None: not known
    checksum: Tensor | None = None  # (M,) int64 of the pixels of each row; None unless a part draws
    # (M, N) position of each token in the encoder's own grid; ascending, all different. See `placed`.
    places: Tensor | None = None
    patch_embeds: Tensor | None = None  # (M, N, P) float32 in the space of `text_tower`; None unless a part needs them
    projected: Tensor | None = None  # (M, N, C) behind the projector, without gradient; None unless a part needs them
    question: Question | None = None  # what is asked about the images; None unless a part needs it
    # Attention of other blocks than the one that made the tokens, each (M, N) float32, by the word that a part needs:
    # key_attention@9. Empty unless a part needs it.
    block_attention: dict[str, Tensor] = field(default_factory=dict)
    # (M, N) bool, which of the tokens exist, where a pruner leaves rows of unequal counts: the others are padding, and
    # the model takes their columns out of the sequence. None: all.
    valid: Tensor | None = None

    # Of the block behind the features, heads not split; None unless a part needs them (next_block): attention of [CLS],
    # (M, N) float32, and keys (M, N, C).
    next_attention: Tensor | None = None
    next_keys: Tensor | None = None
    # Whether tokens have parts of other patches added, with weights: `keep` is then the patch that each began with.
    mixed: bool = False
    # (M, N, C) of each map of features that is added to the tokens behind a layer of the LLM, the first layer first;
    # whatever is done to the tokens, drop or merge, is done to them (`maps`).
    deep: tuple[Tensor, ...] = ()

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """The tokens, and the features for further layers of the LLM: (M, N, D) each."""
        return self.tokens, *self.deep

    def made(self, change: Callable[[Tensor], Tensor], **known: Any) -> ImageFeatures:
        """Make the tokens of a pruner that merges, from the tokens and from each map for a further layer alike.

        Where they are fewer, what was known of each token is left out.

        Args:
            change: (M, N, D) -> (M, K, D), the same weighted sums whatever D is.
            known: what else is new.
        """
        tokens = change(self.tokens)
        if tokens.shape[1] != self.tokens.shape[1]:
            known = {**dict.fromkeys((*_OF_TOKENS, "rank", "places")), "block_attention": {}, **known}
        return replace(self, tokens=tokens, deep=tuple(change(x) for x in self.deep), **known)

    def stay(self, valid: Tensor, tokens: Tensor | None = None) -> ImageFeatures:
        """Keep some of the tokens where their number differs from row to row: the others become padding, in place.

        Args:
            valid: (M, N) bool, the tokens that stay.
            tokens: (M, N, D) new values of them; None: as they are.
        """
        valid = valid if self.valid is None else valid & self.valid
        return replace(self, valid=valid, tokens=self.tokens if tokens is None else tokens)

    def picked(self, rows: Tensor | slice) -> ImageFeatures:
        """Select rows, of all that is known of them; how they belong to images is left out."""
        tensors = {f.name: x for f in fields(self) if hasattr(x := getattr(self, f.name), "shape")}
        picked: dict[str, Any] = {name: x[rows] for name, x in tensors.items()}
        picked["block_attention"] = {word: scores[rows] for word, scores in self.block_attention.items()}
        picked["question"] = None if self.question is None else self.question.picked(rows)
        picked["deep"] = tuple(x[rows] for x in self.deep)
        return replace(self, **picked, rows=None, cuts=None, row_kind="image")

    @staticmethod
    def joined(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Join the rows of several; what they have in common is taken from the first."""
        if len(parts) == 1:
            return parts[0]
        if any(p.valid is not None for p in parts):  # those without it have no padding
            parts = [p if p.valid is not None else p.stay(p.tokens.new_ones(p.tokens.shape[:2]).bool()) for p in parts]
        if any(p.keep is not None for p in parts):  # those without it are in order
            parts = [p if p.keep is not None else replace(p, keep=_indices(p.tokens, p.tokens.shape[1])) for p in parts]
        first = parts[0]
        tensors = [f.name for f in fields(first) if hasattr(getattr(first, f.name), "shape")]
        whole: dict[str, Any] = {name: _cat(*(getattr(p, name) for p in parts), dim=0) for name in tensors}
        words = first.block_attention
        whole["block_attention"] = {w: _cat(*(p.block_attention[w] for p in parts), dim=0) for w in words}
        whole["deep"] = tuple(_cat(*maps, dim=0) for maps in zip(*(p.deep for p in parts), strict=True))
        if first.question is not None:
            whole["question"] = Question.joined([p.question for p in parts if p.question is not None])
        for name in ("rows", "cuts"):
            known = [getattr(p, name) for p in parts]
            whole[name] = None if any(x is None for x in known) else tuple(x for some in known for x in some)
        return replace(first, **whole)

    def take_best(self, order: Tensor) -> ImageFeatures:
        """Keep some of the tokens, and the order in which they were chosen: a layout may have room for fewer.

        Args:
            order: (M, K) indices of tokens, most important first. The tokens kept stay in grid order.
        """
        keep = order.sort(dim=1)
        return replace(self.take(keep.values), rank=keep.indices)

    def take(self, keep: Tensor) -> ImageFeatures:
        """Keep some of the tokens, and what is known of each of them; the grid is gone.

        Args:
            keep: (M, K) indices of tokens, ascending in each row.
        """
        known: dict[str, Any] = {n: _gather(getattr(self, n), keep) for n in _OF_TOKENS if getattr(self, n) is not None}
        n = self.tokens.shape[1]
        if self.groups is None:
            known["keep"] = keep if self.keep is None else self.keep.gather(1, keep)  # (M, K)
        else:
            places = keep.new_full((keep.shape[0], n), -1)
            known["groups"] = self.regrouped(places.scatter(1, keep, keep.new_ones(keep.shape).cumsum(1) - 1))
        known["block_attention"] = {word: _gather(scores, keep) for word, scores in self.block_attention.items()}
        known |= {"num_patches": self.num_patches or n, "patch_grid": self.patch_grid or self.grid}
        known["deep"] = tuple(_gather(x, keep) for x in self.deep)
        return replace(self, tokens=_gather(self.tokens, keep), grid=None, rank=None, **known)

    def regrouped(self, groups: Tensor) -> Tensor:
        """Follow the encoder's tokens through a merge: (M, N0), what a pruner that merges returns as `groups`.

        Args:
            groups: (M, N) for each of the tokens that are left here, which one it goes into, -1 where it is dropped.
        """
        nowhere = groups.new_full((groups.shape[0], 1), -1)
        if self.groups is not None:
            return _gather(_cat(groups, nowhere), self.groups % (groups.shape[1] + 1))  # -1 is the last column
        if self.keep is None:
            return groups
        return nowhere.repeat(1, self.num_patches or groups.shape[1]).scatter(1, self.keep, groups)

    def placed(self, n: int) -> ImageFeatures:
        """Find the position of each token in the encoder's own grid (`places`), and sort the tokens by it.

        A merged token gets the position of the middle one of its patches, counted row by row; a token made of no
        patch, such as [CLS], the first free position. Positions are unique.

        Args:
            n: tokens of the encoder's own grid.

        Raises:
            ZooError: there are fewer tokens without `keep` or `groups` to identify them; or more.
        """
        k = self.tokens.shape[1]
        if self.groups is not None and k <= n:
            places = _middle_patches(self.groups, k)
        elif self.keep is not None:
            places = self.keep
        elif k == n:
            return replace(self, places=_indices(self.tokens, n))
        else:
            raise ZooError(
                f"An image has {k} tokens of {n} and neither `keep` nor `groups`, so their positions in the encoder's "
                "grid are not known and cannot be kept. A pruner sets them by `image.take(...)`; or set "
                "positions=dense."
            )
        if self.grid is not None:  # a smaller grid, in its own order
            return replace(self, places=places)
        places, order = places.sort(dim=1, stable=True)  # (M, K)
        of_tokens = ("tokens", "keep", "rank", *_OF_TOKENS)
        moved: dict[str, Any] = {x: _gather(getattr(self, x), order) for x in of_tokens if getattr(self, x) is not None}
        moved["block_attention"] = {word: _gather(scores, order) for word, scores in self.block_attention.items()}
        moved["deep"] = tuple(_gather(x, order) for x in self.deep)
        if self.groups is not None:
            now = _cat(order.argsort(dim=1), order.new_full((len(order), 1), -1))  # (M, K + 1): -1 stays -1
            moved["groups"] = _gather(now, self.groups % (k + 1))
        return replace(self, places=places, **moved)


def _indices(like: Tensor, n: int) -> Tensor:
    """0 .. n-1 for each row of (M, ...): (M, n)."""
    import torch

    return torch.arange(n, device=like.device).expand(len(like), n)


def _middle_patches(groups: Tensor, k: int) -> Tensor:
    """The middle patch of each of `k` tokens, by `groups` (M, N0): (M, K); without a patch, the first free place."""
    dropped = groups % (k + 1)  # -1 is the last
    members = groups.new_zeros(len(groups), k + 1).scatter_add(1, dropped, groups.new_ones(groups.shape))[:, :k]
    by_token = dropped.argsort(dim=1, stable=True)  # (M, N0) patches token by token, row by row within each
    middle = members.cumsum(1) - members + (members - 1).clamp(min=0) // 2
    places = by_token.gather(1, middle.clamp(max=groups.shape[1] - 1))  # (M, K)
    empty = members == 0
    taken = groups.new_zeros(len(groups), groups.shape[1] + 1)
    taken = taken.scatter(1, places.masked_fill(empty, groups.shape[1]), 1)[:, :-1]
    free = taken.argsort(dim=1, stable=True)  # the free places first
    return free.gather(1, (empty.cumsum(1) - 1).clamp(min=0)).where(empty, places)


def _cat(*parts: Tensor, dim: int = 1) -> Tensor:
    import torch

    return torch.cat(parts, dim=dim)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows (M, K, ...) of (M, N, ...) at (M, K)."""
    wide = index.view(*index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])  # (M, K, ...)
    return values.gather(1, wide)


@dataclass(frozen=True)
class ImageTransform:
    """How an encoder wants its pixels: what `zoo.vision.images.transform` does with a decoded image."""

    size: tuple[int, int]  # (height, width) in pixels
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    resample: str = "bicubic"  # nearest | bilinear | bicubic | lanczos
    fit: str = "crop"  # crop: shortest side to size, then centre; squash: both sides; pad: longest side, mean colour
    # Library that resamples, pillow or torchvision: they round differently, by 1 or 2 of 255. transformers' image
    # processors use torchvision, the transforms of timm and open_clip Pillow. Padding always uses Pillow.
    resample_by: str = "pillow"
    also: tuple[ImageTransform, ...] = ()  # of further encoders, which get pixels of their own from the same image

    @property
    def each(self) -> tuple[ImageTransform, ...]:
        """Of every encoder by itself, this one first."""
        return (replace(self, also=()), *self.also)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels of one row: (3, h, w); (P,) where several encoders have theirs one behind the other."""
        if not self.also:
            return 3, *self.size
        return (sum(3 * t.size[0] * t.size[1] for t in self.each),)

    @staticmethod
    def stated(values: Mapping[str, Any]) -> ImageTransform:
        """Read it from plain values, as `dataclasses.asdict` and JSON leave it."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return ImageTransform(**{**plain, "also": tuple(ImageTransform.stated(v) for v in plain.get("also", ()))})


# An image as a data set may give it: a path, encoded bytes, an array (h, w, 3) uint8, a PIL image, or a function that
# returns one of these; decoded by `zoo.vision.images.decode.open_image`, as late as possible.
ImageSource = Any


@dataclass
class Dialog:
    """One conversation about the images of a sample.

    `messages` are chat turns: `{"role": "system" | "user" | "assistant", "content": [part, ...]}` with parts
    `{"type": "text", "text": ...}` and `{"type": "image"}`; the n-th image part means the sample's n-th image.
    For evaluation the last assistant turn is held back and compared.
    """

    messages: list[dict[str, Any]]
    kind: str = ""  # row of the score table ("exist", "count"); empty: the data set's name
    task: str = ""  # name of the task that scores it; empty: the one asked for
    answers: list[str] = field(default_factory=list)  # all accepted answers; empty: the last assistant turn
    choices: list[str] = field(default_factory=list)  # for multiple choice
    meta: dict[str, Any] = field(default_factory=dict)  # plain values, written beside predictions
    # chosen | rejected: one of a pair of answers to the same prompt, the rejected dialog behind its chosen one. Their
    # last turns are compared; the rejected one is never a target of the answer loss, and evaluation skips it.
    preference: str = ""


@dataclass
class Sample:
    """Some images and what is said about them. Several dialogs are independent of each other and share the images."""

    id: str
    images: list[ImageSource]
    dialogs: list[Dialog]
    targets: dict[str, np.ndarray] = field(default_factory=dict)  # dense targets, one row per image: (images, ...)
    data: str = ""  # name of its data set in the run; noted where it is read
    where: str = ""  # its place there, for messages: file and line, row or member


@dataclass
class Score:
    """A metric with its uncertainty."""

    value: float
    n: int  # samples behind it
    stderr: float  # standard error of the mean; 0.0 where n < 2


class LinearHead(NamedTuple):
    """A vocabulary projection in numbers: `cap * tanh(scale * (x @ weight.T + bias) / cap)`, for losses in one pass."""

    weight: Tensor  # (V, C)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None  # None: no tanh


_OF_PARTS = ("Part", "Pruner", "InsidePruner", "Projector", "Layout", "LanguageModel", "Adapter", "Distiller")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Names that were here when parts had protocols: their base classes."""
        from zoo.registry import data_parts, parts

        if name == "Vision":
            return parts.Encoder
        if name in _OF_PARTS:
            return getattr(parts, name)
        if name in ("Dataset", "StreamingDataset", "Task"):
            return getattr(data_parts, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
