"""What every part promises: the kinds, one protocol for each, and the values that flow between the slots.

Letters in shapes: B sequences, M images in the batch, N image tokens per image, K kept, T positions in the LLM, D
vision width, C LLM width, V vocabulary; `h, w` is the patch grid. Nothing here imports torch, so that names and
configs stay cheap.

Capabilities are plain words. A part `needs` some, `provides` some and `destroys` some (an adapter may also say in
`excludes` which must not hold, and `per_row = True` if samples must not share a row); the check walks the slots in the
order vision -> pruner -> projector -> layout -> llm -> adapter and keeps the set of those that hold. In use:

    grid            tokens fill an (h, w) grid row by row        given by encoders, destroyed by dropping tokens
    cls_attention   the [CLS] row of one layer's attention       given by encoders that have a [CLS] token
    key_attention   how much each patch is looked at             given by encoders whose scores are q.k and no more
    pooling_head    the row of a learnt pooling head             given by SigLIP with `pooling_head=true`
    keys            keys of the layer's attention                given by encoders whose scores are q.k and no more
    prefix_tokens   [CLS] and register tokens of the layer       given by encoders that have them
    image_tokens    images stand in the LLM's sequence           given by projectors
    moe             the LLM's feed-forward layers are experts    given by some LLMs
    dense           they are not                                 given by the others
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from zoo.registry.errors import RecordError

KINDS = ("vision", "pruner", "projector", "layout", "llm", "adapter", "distiller", "dataset", "task")
MANY = frozenset({"pruner", "adapter", "dataset", "task"})  # slots that hold several members, keyed by name

IGNORE_INDEX = -100  # a label that does not count, as everywhere in transformers


@dataclass(frozen=True)
class Cut:
    """How an image, or a video, became the rows that the encoder sees."""

    rows: int = 1
    kind: str = "image"  # image | crop | frame
    size: tuple[int, int] = (0, 0)  # (height, width) in pixels before it was cut
    grid: tuple[int, int] = (1, 1)  # rows and columns of crops, an overview aside
    times: tuple[float, ...] = ()  # of frames, in seconds
    duration: float = 0.0  # of the video, in seconds


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
    keys: Tensor | None = None  # (M, N, H, d) of the attention that made the tokens; None unless a part needs them
    # (M, N0) for each token of the encoder's own grid, which of the tokens it went into, -1 where it was dropped. Set
    # by a pruner that merges, in place of `keep`.
    groups: Tensor | None = None
    num_patches: int | None = None  # N0; None: as many as there are tokens
    patch_grid: tuple[int, int] | None = None  # (h, w) of the encoder's own grid; None: `grid`
    rank: Tensor | None = None  # (M, N) in which order a pruner chose the tokens, 0 first; None: it says none

    def take_best(self, order: Tensor) -> ImageFeatures:
        """Keep some of the tokens, and remember in which order they were chosen: a layout may have room for fewer.

        Args:
            order: (M, K) indices of tokens, the one to be given up last first. Those kept stand in the order of tokens.
        """
        keep = order.sort(dim=1)
        return replace(self.take(keep.values), rank=keep.indices)

    def take(self, keep: Tensor) -> ImageFeatures:
        """Keep some of the tokens, and what is known of each of them; the grid is gone.

        Args:
            keep: (M, K) indices of tokens, ascending in each row.
        """
        of_tokens = ("cls_attention", "key_attention", "pooling_attention", "keys")
        known: dict[str, Any] = {n: _at(getattr(self, n), keep) for n in of_tokens if getattr(self, n) is not None}
        n = self.tokens.shape[1]
        if self.groups is None:
            known["keep"] = keep if self.keep is None else self.keep.gather(1, keep)  # (M, K)
        else:
            places = keep.new_full((keep.shape[0], n), -1)
            known["groups"] = self.regrouped(places.scatter(1, keep, keep.new_ones(keep.shape).cumsum(1) - 1))
        known |= {"num_patches": self.num_patches or n, "patch_grid": self.patch_grid or self.grid}
        return replace(self, tokens=_at(self.tokens, keep), grid=None, rank=None, **known)

    def regrouped(self, groups: Tensor) -> Tensor:
        """Follow the encoder's tokens through a merge: (M, N0), what a pruner that merges returns as `groups`.

        Args:
            groups: (M, N) for each of the tokens that are left here, which one it goes into, -1 where it is dropped.
        """
        nowhere = groups.new_full((groups.shape[0], 1), -1)
        if self.groups is not None:
            return _at(_cat(groups, nowhere), self.groups % (groups.shape[1] + 1))  # -1 is the last column
        if self.keep is None:
            return groups
        return nowhere.repeat(1, self.num_patches or groups.shape[1]).scatter(1, self.keep, groups)


def _cat(*parts: Tensor) -> Tensor:
    import torch

    return torch.cat(parts, dim=1)


def _at(values: Tensor, index: Tensor) -> Tensor:
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
    # Who resamples, pillow or torchvision: they round differently, by a step or two of a byte. torchvision is what
    # transformers' image processors use, Pillow what timm's and open_clip's transforms do. Padding is always Pillow's.
    resample_by: str = "pillow"


# An image as a data set may give it: a path, encoded bytes, an array (h, w, 3) uint8, a PIL image, or a function that
# returns one of these; decoded by `zoo.vision.images.decode.open_image`, as late as possible.
ImageSource = Any


@dataclass
class Dialog:
    """One conversation about the images of a sample.

    `messages` are chat turns: `{"role": "system" | "user" | "assistant", "content": [part, ...]}` with parts
    `{"type": "text", "text": ...}` and `{"type": "image"}`; image parts stand for the sample's images in order.
    For evaluation the last assistant turn is held back and compared.
    """

    messages: list[dict[str, Any]]
    kind: str = ""  # row of the score table ("exist", "count"); empty: the data set's name
    task: str = ""  # name of the task that scores it; empty: the one asked for
    answers: list[str] = field(default_factory=list)  # all accepted answers; empty: the last assistant turn
    choices: list[str] = field(default_factory=list)  # for multiple choice
    meta: dict[str, Any] = field(default_factory=dict)  # plain values, written beside predictions
    # chosen | rejected: one of a pair of answers to the same prompt, the rejected dialog behind its chosen one. Their
    # last turns are compared; a rejected one is never learnt, and nothing is asked of it in evaluation.
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
    """A number that carries how far it can be trusted."""

    value: float
    n: int  # samples behind it
    stderr: float  # standard error of the mean; 0.0 where n < 2


class Part(Protocol):
    """What all parts of a model declare. Class attributes, or set in `__init__` where they depend on the config."""

    needs: frozenset[str]
    provides: frozenset[str]
    destroys: frozenset[str]


@runtime_checkable
class Vision(Protocol):
    """`__init__(config)`: structure only under `torch.device("meta")`, with the checkpoint's weights otherwise.

    An encoder with `by_kind = True` is also told, in `kinds`, what each row is (`Cut.kind`): it may run another tower
    for frames of videos.
    """

    hidden_size: int  # D, of the tokens it gives
    grid: tuple[int, int]
    num_tokens: int  # N == h * w
    provides: frozenset[str]
    transform: ImageTransform

    def __call__(self, pixel_values: Tensor, *, need: frozenset[str] = frozenset()) -> ImageFeatures:
        """Encode (M, 3, S, S) pixels; what `need` names (cls_attention, keys, ...) is computed as well."""


@runtime_checkable
class Pruner(Protocol):
    """`__init__(config, *, vision_dim, grid, num_tokens)`, any of them. Inside the LLM: `InsidePruner` as well."""

    def num_tokens(self, n: int) -> int: ...

    def __call__(self, image: ImageFeatures) -> ImageFeatures: ...


@runtime_checkable
class InsidePruner(Protocol):
    """What a pruner that drops tokens inside the LLM has beside `Pruner`; see `zoo.fusion.pruners.inside.dropper`."""

    def attach(self, llm: Any) -> None:
        """Take effect in the LLM, which has its base weights."""

    def detach(self) -> None:
        """Leave the LLM as it was before `attach`."""

    def begin(self, sequence: Any) -> None:
        """Take the `LLMSequence` of the next forward pass: where images, padding and labels are."""

    def kept(self) -> list[Tensor]:
        """Say which columns each layer saw of the last prompt: (B, T) bool for each layer."""

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens that each layer sees of `n` that enter the LLM."""


@runtime_checkable
class Projector(Protocol):
    """`__init__(config, *, vision_dim, text_dim, grid)`, any of them. `grid` is None once a pruner destroyed it."""

    def num_tokens(self, n: int) -> int: ...

    def __call__(self, image: ImageFeatures) -> Tensor:
        """Give (M, K, C) with K == num_tokens(N)."""


class LinearHead(NamedTuple):
    """A vocabulary projection in numbers: `cap * tanh(scale * (x @ weight.T + bias) / cap)`, for losses in one pass."""

    weight: Tensor  # (V, C)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None  # None: no tanh


@runtime_checkable
class Layout(Protocol):
    """How the rows of one image (crops, frames) become one run of image tokens; without one, each row is an image.

    A layout may have `project(image, projector, cuts)`, called in place of the projector, for what it does to some rows
    ahead of it; and `needs` words of the encoder.

    `__init__(config, *, text_dim, grid, num_tokens, image_size, encoder_grid, pruned)`, any of them: the grid and the
    number of tokens of one row behind the projector, the encoder's image size and grid, and whether those tokens are
    the encoder's that pruners left. `text_dim` is None where only the counts are wanted.
    """

    def num_tokens(self, n: int) -> int:
        """The most that an image may take, of `n` tokens a row."""

    def count(self, cut: Cut) -> int:
        """Tokens of an image that was cut so."""

    def __call__(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor:
        """Lay out the rows (M, K, C) of several images as (S, C), image behind image, S the sum of their counts."""

    # row_tokens: int, tokens of a row, of a layout that only puts rows behind each other, so that token s is one of row
    # s // row_tokens; losses on image tokens need it
    # def text(self, cut, token) -> str: what stands in the prompt for an image, where that is more than `token`s
    # def spell(self, cut, token) -> str: with `spells = True`, what stands in the text for a video: words, and one
    # `token` for each frame, which is then an image of one row


@runtime_checkable
class LanguageModel(Protocol):
    """`__init__(config, *, vocab_size)`: a causal LM of transformers, unmodified, and a view of its parts."""

    lm: nn.Module  # the transformers model
    hidden_size: int  # C
    num_layers: int
    vocab_size: int
    max_positions: int | None  # None: no limit
    provides: frozenset[str]

    @property
    def layers(self) -> nn.ModuleList: ...

    def hidden(self, **inputs: Any) -> Any:
        """Run the decoder without the vocabulary projection; returns the transformers output (`last_hidden_state`)."""

    def head(self, hidden: Tensor) -> Tensor:
        """Project (..., C) to logits (..., V) exactly as the model itself does, scaling and capping included."""

    def linear_head(self) -> LinearHead | None:
        """`head` in numbers; None where it does more than they say, for example with a hook on it."""


@runtime_checkable
class Adapter(Protocol):
    """`__init__(config, *, llm, vision_dim, text_dim, grid, encoder_grid)`, any of them; `llm` has its base weights.

    An adapter may also have `begin(sequence)`, called before each pass with the LLM's sequence (zoo.composed.outputs);
    `reads_image`, whether it computes something else for an image (without it: whether it needs `image`);
    `start()`, called where it starts untrained on weights that were loaded after it was built; and `idles(name)`:
    whether a parameter of `llm.lm` has no effect while it is attached, so that no stage trains it. One that `merge()`
    can put into the base weights says so by `merged`, for good, or until `unmerge()` where there is one.
    `grid` is None once a pruner destroyed it; `encoder_grid` is what `ImageFeatures.keep` and `groups` point into.
    `keeps_float32` says that its weights stay float32 where the model is loaded in, or cast to, a shorter format.
    `notes` are sentences that the check prints: what a person may not expect of it beside these parts.
    `exclusive` are names of modules of `llm.lm` that it wants for itself: two adapters that name the same are refused.
    `losses` are the names that `aux_losses` may give: the check then knows a weight for a loss that is not there.

    `concurrent = True` says that all it knows of a pass is in the pass (`zoo.registry.forward_pass`) and nothing on the
    adapter, so that threads may share it. Threads that share a model take turns where an adapter does not say so.
    """

    def attach(self) -> None:
        """Take effect in the LLM given at construction. The base weights stay where checkpoints find them."""

    def detach(self) -> None:
        """Leave the LLM bit-identical to what it was before `attach`."""

    def owns(self, name: str) -> bool:
        """Whether the parameter `name` of `llm.lm` was added by this adapter."""

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """Take the encoder's features before a forward pass; rows of the LLM's batch are repeated `expand` times."""

    def aux_losses(self) -> dict[str, Tensor]:
        """Losses of the pass that runs, asked behind the LLM; by name, weighted or not as the config says."""


@runtime_checkable
class Distiller(Protocol):
    """A loss beside the answer loss; with a teacher, or with dense targets that the data set knows.

    `needs` words: `student.image`, `student.hidden`, `batch.<key>`, and of a teacher `teacher.response`,
    `teacher.visual`, `teacher.relation` (image tokens have to align for the last two), `teacher.hidden`,
    `teacher.logits`; derived keywords of `__init__`: vision_dim, text_dim, vocab_size, grid.

    A distiller may also have: `weights`, loss -> factor on it now, set by `begin_step(step, steps)`, which is called
    before each optimiser step; `per_label` and `per_image`, names of losses that are sums already divided by
    `batch["num_labels"]` and `batch["num_images"]`, so that they are means over the whole step; `equal_widths`, whether
    the hidden states of student and teacher have to be of one width; `losses`, names of what it gives beside `weights`.

    `student` and `teacher` are `zoo.composed.outputs.Seen`: the output of the forward pass and `llm`. `teacher` is None
    where what it said was stored: it is then in the batch's targets (see `zoo.distill.matching.positions`).
    """

    def __call__(self, student: Any, teacher: Any | None, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...


@runtime_checkable
class Dataset(Protocol):
    """`__init__(config)`. Randomness is a function of (config.seed, epoch, index) and of nothing else."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return sample `index`; cheap to call in a loader worker, images still undecoded."""

    # def place(self, index: int) -> str: file and line of a sample, for messages, where there is such a place


@runtime_checkable
class StreamingDataset(Protocol):
    """A data set whose length is not known. One thread of each process reads it, in order.

    It may also have `order(name, size, place)`, a `zoo.data.stream_order.StreamOrder` in which processes read what they
    need alone and loader workers make samples of rows by `sample(row, number)`.
    """

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Sample | RecordError]:
        """Yield the samples of an epoch from number `start` on; the same whoever asks.

        A record that cannot be read is yielded as the error, and counts: a generator that raises is at its end.
        """


@runtime_checkable
class Task(Protocol):
    """`__init__(config)`. Turns predictions into numbers; knows nothing of models."""

    mode: str  # generate: free text, greedy; choice: the likeliest of `dialog.choices`
    max_new_tokens: int

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        """Metric name -> value of one prediction, each in [0, 1].

        Names that begin with an underscore are no metrics: counts of any size that `summarise` needs again.
        """

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """The table's numbers from the rows of `score`; the mean of each metric unless the metric is no mean."""
