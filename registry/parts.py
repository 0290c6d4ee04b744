"""The parts of a model: a base class for each kind, with every method that the zoo calls on a part of that kind.

A component derives from its kind's base and from `torch.nn.Module`: `class Mine(Pruner, nn.Module)`. What is abstract
it must have; the rest are hooks with a default, which it overrides where it has more to say. Here are the bases of what
works on images; those of the LLM, adapters and distillers are in `zoo.registry.llm_parts`, `Dataset` and `Task` in
`zoo.registry.data_parts`, what all have in common in `zoo.registry.part`. Nothing here imports torch.

Letters in shapes: B sequences, M images in the batch, N image tokens per image, K kept, T positions in the LLM, D
vision width, C LLM width, V vocabulary; `h, w` is the patch grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.registry.errors import ZooError
from zoo.registry.llm_parts import Adapter, Distiller, LanguageModel
from zoo.registry.part import ModelPart, Part, derived

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from zoo.registry.forward_pass import Pass
    from zoo.registry.values import Cut, ImageFeatures, ImageTransform

__all__ = [
    "Adapter",
    "Distiller",
    "Encoder",
    "InsidePruner",
    "LanguageModel",
    "Layout",
    "ModelPart",
    "Part",
    "Projector",
    "Pruner",
    "derived",
]


class Encoder(ModelPart):
    """Pixels to features: the kind `vision`.

    `__init__(config)`: structure only under `torch.device("meta")`, with the checkpoint's weights otherwise.
    """

    hidden_size: int
    """D, width of its tokens."""
    grid: tuple[int, int]
    """(h, w) of its patches."""
    num_tokens: int
    """N == h * w, of one image."""
    transform: ImageTransform
    """How images become its pixels."""
    depth: int = 0
    """Blocks of the whole encoder, those behind its features included; 0: not known."""
    attention_blocks: int = 0
    """Blocks, counted from the first, whose attention `need` may name, as in key_attention@9; 0: of none."""
    by_kind: bool = False
    """Whether `forward` also takes `kinds`, the `Cut.kind` of each row of pixels: it may have another tower for frames
    of videos."""
    native: bool = False
    """Whether images keep their shapes. Each row then has a grid of its own, `grid` and `num_tokens` are the most,
    pixels are the patches of all rows, one row behind the other, and `forward` takes `grids` and gives `UnlikeRows`."""
    patch_shape: tuple[int, int] = (0, 0)
    """With `native`, (patches of a token, numbers of a patch): the pixels of a row of n tokens are (n * Q, P)."""
    pictures: Mapping[str, Any] | None = None
    """Values of the image processor of transformers that makes its pixels; None: `transform` makes them."""
    deep: int = 0
    """Maps of features for layers of the LLM behind the first, in `ImageFeatures.deep`."""
    streams: bool = False
    """Whether it can be built on the meta device and get its weights afterwards, so that memory is not taken twice. A
    class attribute."""
    text_tower: int = 0
    """Weights of its text tower, once `prepare` built one."""
    lacks: Mapping[str, str] = {}
    """Capability, or that of a block (`key_attention@9`) -> why it is not given, a sentence for messages."""
    members: Mapping[str, Encoder] = {}
    """Its encoders by name, where it joins several (`zoo.vision.encoders.fused`); their weights are
    `encoders.<name>.*`."""

    @abstractmethod
    def forward(self, pixel_values: Tensor, *, need: frozenset[str] = frozenset()) -> ImageFeatures:
        """Encode images.

        Args:
            pixel_values: (M, *transform.shape): (M, 3, S, S), or (M, P) for several encoders.
            need: words of `provides` to compute beside the tokens (M, N, D): cls_attention, keys, ...; and with
                `attention_blocks` those of other blocks, which go into `ImageFeatures.block_attention`.

        With `native` it also takes `grids`, the (h, w) of each row in tokens, and returns `UnlikeRows`.
        """

    def prepare(self, need: frozenset[str]) -> None:
        """Get ready to compute `need` in `forward`. Called when a model is built, ahead of compilation."""

    def giver(self, word: str) -> str:
        """Name that one of `members` which a capability is taken from; empty: of none."""
        return ""

    def embed_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """Embed texts in the space of `ImageFeatures.patch_embeds`: (S, P) float32 for each text, S pieces of it.

        Called on an encoder that gives `text_tower`, after `prepare` with that word.
        """
        raise NotImplementedError(f"{type(self).__name__} gives `text_tower` but has no `embed_texts`.")

    def write_files(self, folder: Path) -> None:
        """Write what it needs beside its weights, a tokenizer say, into the folder of a saved model."""

    def read_files(self, folder: Path) -> None:
        """Read what `write_files` wrote. Called when a model is loaded from a folder."""

    @derived
    def own_size(self) -> tuple[int, int]:
        """(height, width) in pixels of its images before `resize`: pinpoints of a layout are multiples of it."""
        return self.transform.size

    @derived
    def own_grid(self) -> tuple[int, int]:
        """(h, w) of its patches before `resize`: what adapters learn for each patch is of this grid."""
        return self.grid

    @derived
    def token_grid(self) -> tuple[int, int] | None:
        """`grid`, where its tokens fill that; None: each image has its own, or tokens of several encoders follow."""
        apart = self.native or (bool(self.members) and "grid" not in self.provides)
        return None if apart else (self.grid[0], self.grid[1])

    def resize(self, grid: tuple[int, int]) -> None:
        """Take images of `grid` patches from now on, fewer than before.

        Changes `grid`, `num_tokens` and `transform.size`, and no weights: positions are interpolated in `forward`.
        Called when a model is built, for a pruner in front of the encoder; perhaps before weights are read.

        Raises:
            ZooError: it cannot. The default.
        """
        raise ZooError("it takes images of one size only: its class has no `resize`")

    def set_attention(self, name: str) -> None:
        """Choose the attention kernel, by its name in transformers. Called when a model is built or changed."""

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute activations in backward, or no longer. Called at the beginning of a stage."""

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(
            self, pixel_values: Tensor, *, need: frozenset[str] = frozenset(), **more: Any
        ) -> ImageFeatures: ...


class Pruner(ModelPart):
    """Fewer image tokens before the LLM; one that drops tokens inside it is an `InsidePruner`.

    `__init__(config, *, vision_dim, vision_depth, grid, num_tokens)`, those of them that it names.
    """

    grid: tuple[int, int] | None = None
    """(h, w) of the tokens kept, where they form a grid of another size than the input."""
    inside: bool = False
    """Whether it acts inside the LLM, with its options."""
    draws: bool = False
    """Whether it asks for `ImageFeatures.checksum`, to draw for each image the same in every batch."""
    concurrent: bool = False
    """As `Adapter.concurrent`, for one that acts inside the LLM."""
    shortens: bool = False
    """Whether it shortens the sequence between layers of the LLM: what is incompatible with that is refused."""
    ragged: bool = False
    """Whether rows may keep fewer tokens than `num_tokens`, with those that stay marked in `ImageFeatures.valid`."""
    behind: bool = False
    """Whether it acts behind the projector, on tokens (M, N, C) as they enter the LLM. It leaves them in place, so that
    its `num_tokens(n)` is n, and marks in `valid` those that stay. A class attribute."""
    per_image: bool = False
    """Whether `forward` gets the rows of one image at a time, crops or frames, for one budget over all of them."""
    front: bool = False
    """Whether it acts in front of the encoder, by `encoder_grid` or `frame_share`. It is then built ahead of the other
    pruners, for the encoder's own grid, and its `forward` gets what the changed encoder made. A class attribute."""
    frame_share: float = 1.0
    """Share of a video's frames that are read, in (0, 1]; asked of one with `front`."""

    def encoder_grid(self, grid: tuple[int, int], tokens: Callable[..., int | None]) -> tuple[int, int]:
        """Choose the (h, w) of patches that images are made for, of an encoder whose own is `grid`.

        Called for a pruner with `front` when the encoder is built, ahead of its weights and of all other parts. The
        encoder, its image transform and the parts behind it then have the grid that is returned.

        Args:
            grid: of the encoder.
            tokens: `tokens(grid)` counts what an image takes in the LLM, at most, if the encoder had that grid;
                `tokens(grid, kept=k)` if a pruner left k tokens of each of its rows; None: parts behind do not take it.
        """
        return grid

    @abstractmethod
    def num_tokens(self, n: int) -> int:
        """Count the tokens kept of `n`: exactly, and before any tensor exists; with `ragged` or `behind` the most."""

    def grid_of(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Return the (h, w) that it makes of a row's `grid`, where it makes a smaller one; None: `num_tokens` counts.

        Asked where images keep their shapes, so that each row has a grid of its own; `grid` in `__init__` is then None.
        """
        return None

    def tokens_of_image(self, n: int, cut: Cut) -> int:
        """Count the most tokens that an image divided as `cut` keeps in all, of `n` in each of its rows."""
        return cut.rows * self.num_tokens(n)

    @abstractmethod
    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Prune (M, N, D) to (M, K, D) with K == num_tokens(N). A row must not depend on rows of other images."""

    def scores(self, image: ImageFeatures) -> Tensor | None:
        """Return the scores that tokens are ranked by, (M, N), for pictures (`zoo inspect`); None: no ranking."""
        return None

    def aux_losses(self) -> dict[str, Tensor]:
        """Return losses of the current pass by name, weighted as configured. Called after the LLM."""
        return {}

    def attach(self, llm: LanguageModel) -> None:
        """Take effect in the LLM, which has its base weights. Called once, when the model is built."""

    def detach(self) -> None:
        """Leave the LLM as it was before `attach`."""

    def begin(self, sequence: Any) -> None:
        """Take the sequence of the pass that begins (`zoo.composed.outputs.LLMSequence`): images, padding, labels."""

    def kept(self, passed: Pass) -> list[Tensor]:
        """Return which positions of the prompt each layer of a pass kept: (B, T) bool for each; empty: all."""
        return []

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens in each layer, of `n` that enter the LLM."""
        return [n] * num_layers

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the multiplications that scoring inside the LLM costs, for one prompt with `tokens` in each layer."""
        return 0

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(self, image: ImageFeatures) -> ImageFeatures: ...


class InsidePruner(Pruner):
    """A pruner that drops tokens inside the LLM; `zoo.fusion.pruners.inside.dropper` has the hooks for it."""

    inside = True

    @abstractmethod
    def attach(self, llm: LanguageModel) -> None:
        """Take effect in the LLM, which has its base weights. Called once, when the model is built."""

    @abstractmethod
    def detach(self) -> None:
        """Leave the LLM as it was before `attach`."""


class Projector(ModelPart):
    """Image tokens of the encoder's width to image tokens of the LLM's width.

    `__init__(config, *, vision_dim, text_dim, grid, num_tokens)`, those of them that it names. `grid` is None once a
    pruner destroyed it.
    """

    provides = frozenset({"image_tokens"})
    grid: tuple[int, int] | None = None
    """(h, w) of its output, where that is a grid of another size than the input."""
    passes_deep: bool = False
    """Whether it leaves tokens as they are, so that the encoder's features for further layers of the LLM fit them."""

    @abstractmethod
    def num_tokens(self, n: int) -> int:
        """Count the tokens that it makes of `n`: exactly, and before any tensor exists."""

    @abstractmethod
    def forward(self, image: ImageFeatures) -> Tensor:
        """Project (M, N, D) to (M, K, C) with K == num_tokens(N)."""

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(self, image: ImageFeatures) -> Tensor: ...


class Layout(ModelPart):
    """How the rows of one image (crops, frames) become one run of image tokens; without one, each row is an image.

    `__init__(config, *, text_dim, grid, num_tokens, image_size, encoder_grid, pruned, counted)`, those that it names:
    the grid and the number of tokens of one row behind the projector, the encoder's image size and grid, and whether
    those tokens are the encoder's that pruners left. `text_dim` is None where only the counts are wanted.
    """

    provides = frozenset({"image_tokens"})
    row_tokens: int | None = None
    """Tokens of a row, for a layout that only concatenates rows, so that token s belongs to row s // row_tokens. Losses
    on image tokens need it."""
    given: Mapping[str, Any] = {}
    """Arguments it was built with beside its options: the processor builds the same layout for its counts."""
    overview: int = 0
    """Which row of an image that is cut shows the whole of it: the first, or -1, the last."""
    spells: bool = False
    """Whether a video is written as text, by `spell`."""
    films_as_images: bool = False
    """Whether `text` writes a video with the placeholder of images, of a layout with `native`."""
    native: bool = False
    """Whether it joins rows of unlike length, of an encoder with `native`: `forward` gets the rows of each image
    (R, K, C), `count` follows `Cut.patches`, and `__init__` may name `counted`: the nodes of the parts that tokens go
    through, as plain values. It has `advance` and `coordinates`."""

    @abstractmethod
    def num_tokens(self, n: int) -> int:
        """Count the most that an image may take, of `n` tokens a row."""

    @abstractmethod
    def count(self, cut: Cut) -> int:
        """Count the tokens of an image divided as `cut`."""

    @abstractmethod
    def forward(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor:
        """Lay out the rows (M, K, C) of several images as (S, C), image behind image, S the sum of their counts."""

    def project(
        self, image: ImageFeatures, projector: Callable[[ImageFeatures], Tensor], cuts: Sequence[Cut]
    ) -> Tensor:
        """Run the projector, (M, N, D) -> (M, K, C), after what the layout does to some rows before it."""
        return projector(image)

    def places(self, rows: Tensor, image: ImageFeatures, cuts: Sequence[Cut], whole: Layout) -> Tensor | None:
        """Return the position of each token in the sequence that its image would have without a pruner; None: unknown.

        A layout with `row_tokens` need not implement it: its rows are handled one by one.

        Args:
            rows: (M, K) position of each token among the tokens that its row would have.
            image: output of the pruners, with `keep`, `groups`, `rank` and `places`.
            cuts: of each image.
            whole: this layout, as it would be without a pruner.

        Returns:
            (S,) for each token of `forward` its position in the sequence of its image, from 0.
        """
        return None

    def advance(self, cut: Cut, axes: int, dense: bool) -> int:
        """Count the positions from the first token of an image to what follows it; with `native`.

        Args:
            cut: of the image.
            axes: of the LLM's positions.
            dense: positions of pruned images count the tokens left.
        """
        return self.count(cut)

    def pieces(self, cut: Cut) -> list[Cut]:
        """Divide an image into those that have text between them in the prompt; with `native`."""
        return [cut]

    def coordinates(self, cut: Cut, places: Tensor, axes: int, dense: bool) -> Tensor:
        """Return the positions of an image's tokens, from its first: (A, R * K); with `native`.

        Args:
            cut: of the image.
            places: (R, K) of each token in the grid of its row.
            axes: A.
            dense: positions of pruned images count the tokens left.
        """
        raise NotImplementedError(f"{type(self).__name__} sets `native` but has no `coordinates`.")

    def row_grid(self, cut: Cut) -> tuple[int, int] | None:
        """Return the grid (h, w) of a row's tokens behind `project`, where that pools them; None: not known."""
        return None

    def frame_tokens(self, cut: Cut) -> int | None:
        """Count the tokens of one frame of a video that pruners behind the projector get; None: not known.

        What `project` puts in front of these in each row, such as [CLS], stays.
        """
        return self.row_tokens

    def marks(self, rows: Tensor | Sequence[Tensor], cuts: Sequence[Cut]) -> Tensor:
        """Lay out marks of tokens as `forward` lays out the tokens: (S,) bool, true also for tokens that it adds.

        Args:
            rows: (M, K, 1) behind `project`, or (R, K, 1) of each image: 1.0 for a token that stays, else 0.0.
            cuts: of each image.
        """
        return self(rows, cuts)[:, 0] > 0.5  # type: ignore[arg-type]

    def text(self, cut: Cut, token: str) -> str | None:
        """Write an image in the prompt, with `token` once for each of its tokens; None: `count` times `token`."""
        return None

    def spell(self, cut: Cut, token: str) -> str:
        """Write a video in the text, where `spells` is true: words, and one `token` for each frame, which is then an
        image of one row.
        """
        raise NotImplementedError(f"{type(self).__name__} sets `spells` but has no `spell`.")

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor: ...
