"""The parts of a model: a base class for each kind, with every method that the zoo calls on a part of that kind.

A component derives from its kind's base and from `torch.nn.Module`: `class Mine(Pruner, nn.Module)`. What is abstract
it must have; the rest are hooks with a default, which it overrides where it has more to say. `Dataset` and `Task` are
in `zoo.registry.data_parts`. Nothing here imports torch.

Letters in shapes: B sequences, M images in the batch, N image tokens per image, K kept, T positions in the LLM, D
vision width, C LLM width, V vocabulary; `h, w` is the patch grid.

Capabilities are plain words. A part `needs` some, `provides` some and `destroys` some (an adapter may also say in
`excludes` which must not hold); the check walks the slots in the order vision -> pruner -> projector -> layout -> llm
-> adapter and keeps the set of those that hold. In use:

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

from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.registry.errors import ZooError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn import Module

    from zoo.registry.forward_pass import Pass
    from zoo.registry.values import Cut, ImageFeatures, ImageTransform, LinearHead
else:
    Module = object  # a component derives from `nn.Module` itself: nothing here imports torch


class derived:  # used as a decorator, as `property` is
    """The default of an attribute that follows from others; unlike a property, an instance may set its own."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, part: Any, owner: type | None = None) -> Any:
        return self if part is None else self.function(part)


# Not a child of ABC: FSDP gives a sharded module another class, which Python refuses where the two have unlike bases.
class Part(metaclass=ABCMeta):  # noqa: B024  # each kind has its own abstract methods
    """What parts of all kinds say of themselves: class attributes, or set in `__init__` where options decide."""

    needs: frozenset[str] = frozenset()
    """Capabilities that must hold where the part stands."""
    provides: frozenset[str] = frozenset()
    """Capabilities that hold behind it."""
    destroys: frozenset[str] = frozenset()
    """Capabilities that no longer hold behind it."""
    choices: Mapping[str, Sequence[Any]] = {}
    """Option -> values that the check may offer in place of one that does not fit. Of the class."""


class ModelPart(Part, Module):
    """A part that is a module of the composed model: of all kinds but distillers, data sets and tasks."""


class Encoder(ModelPart):
    """Pixels to features: the kind `vision`.

    `__init__(config)`: structure only under `torch.device("meta")`, with the checkpoint's weights otherwise.
    """

    hidden_size: int
    """D, of the tokens it gives."""
    grid: tuple[int, int]
    """(h, w) of its patches."""
    num_tokens: int
    """N == h * w, of one image."""
    transform: ImageTransform
    """How it wants its pixels."""
    by_kind: bool = False
    """Whether `forward` also takes `kinds`, what each row of pixels is (`Cut.kind`): it may have another tower for
    frames of videos."""
    streams: bool = False
    """Whether it can be built on the meta device and get its weights afterwards, so that no memory is taken twice. Of
    the class."""

    @abstractmethod
    def forward(self, pixel_values: Tensor, *, need: frozenset[str] = frozenset()) -> ImageFeatures:
        """Encode images.

        Args:
            pixel_values: (M, 3, S, S).
            need: words of `provides` to compute beside the tokens (M, N, D): cls_attention, keys, ...
        """

    def set_attention(self, name: str) -> None:
        """Choose the attention kernel, a name that transformers knows. Called when a model is built or changed."""

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Recompute activations in backward, or no longer. Called at the beginning of a stage."""

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(
            self, pixel_values: Tensor, *, need: frozenset[str] = frozenset(), **more: Any
        ) -> ImageFeatures: ...


class Pruner(ModelPart):
    """Fewer image tokens before the LLM; one that drops tokens inside it is an `InsidePruner`.

    `__init__(config, *, vision_dim, grid, num_tokens)`, those of them that it names.
    """

    grid: tuple[int, int] | None = None
    """(h, w) of what it leaves, where that is a grid of another size than it got."""
    inside: bool = False
    """Whether it acts inside the LLM, with the options that it has."""
    draws: bool = False
    """Whether it asks for `ImageFeatures.checksum`, to draw for each image the same in every batch."""
    concurrent: bool = False
    """As `Adapter.concurrent`, of one that acts inside the LLM."""
    shortens: bool = False
    """Whether it makes layers of the LLM shorter as it goes: what does not go with that is refused."""

    @abstractmethod
    def num_tokens(self, n: int) -> int:
        """Count what is left of `n` tokens: exactly, and before any tensor exists."""

    @abstractmethod
    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Make (M, N, D) to (M, K, D) with K == num_tokens(N). A row must not depend on other rows."""

    def scores(self, image: ImageFeatures) -> Tensor | None:
        """Give what it ranks the tokens by, (M, N), for pictures (`zoo inspect`); None: it does not rank them."""
        return None

    def aux_losses(self) -> dict[str, Tensor]:
        """Give losses of the pass that runs, asked behind the LLM: by name, weighted or not, as the config says."""
        return {}

    def attach(self, llm: LanguageModel) -> None:
        """Take effect in the LLM, which has its base weights. Called once, when the model is built."""

    def detach(self) -> None:
        """Leave the LLM as it was before `attach`."""

    def begin(self, sequence: Any) -> None:
        """Take the sequence of the pass that begins (`zoo.composed.outputs.LLMSequence`): images, padding, labels."""

    def kept(self, passed: Pass) -> list[Tensor]:
        """Say which columns each layer saw of the prompt of a pass: (B, T) bool for each; empty: all of them."""
        return []

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        """Count the image tokens that each layer sees of `n` that enter the LLM."""
        return [n] * num_layers

    def score_flops(self, tokens: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the products that scoring inside the LLM costs, of one prompt with `tokens` in each layer."""
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
    """Image tokens of the encoder's width to those of the LLM's.

    `__init__(config, *, vision_dim, text_dim, grid, num_tokens)`, those of them that it names. `grid` is None once a
    pruner destroyed it.
    """

    provides = frozenset({"image_tokens"})
    grid: tuple[int, int] | None = None
    """(h, w) of what it gives, where that is a grid of another size than it got."""

    @abstractmethod
    def num_tokens(self, n: int) -> int:
        """Count the tokens that it makes of `n`: exactly, and before any tensor exists."""

    @abstractmethod
    def forward(self, image: ImageFeatures) -> Tensor:
        """Make (M, N, D) to (M, K, C) with K == num_tokens(N)."""

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(self, image: ImageFeatures) -> Tensor: ...


class Layout(ModelPart):
    """How the rows of one image (crops, frames) become one run of image tokens; without one, each row is an image.

    `__init__(config, *, text_dim, grid, num_tokens, image_size, encoder_grid, pruned)`, those of them that it names:
    the grid and the number of tokens of one row behind the projector, the encoder's image size and grid, and whether
    those tokens are the encoder's that pruners left. `text_dim` is None where only the counts are wanted.
    """

    provides = frozenset({"image_tokens"})
    row_tokens: int | None = None
    """Tokens of a row, of a layout that only puts rows behind each other, so that token s is one of row
    s // row_tokens. Losses on image tokens need it."""
    given: Mapping[str, Any] = {}
    """What it was built with beside its options: the processor builds the same one for its counts."""
    spells: bool = False
    """Whether a video is written as words, with `spell`."""

    @abstractmethod
    def num_tokens(self, n: int) -> int:
        """Count the most that an image may take, of `n` tokens a row."""

    @abstractmethod
    def count(self, cut: Cut) -> int:
        """Count the tokens of an image that was cut so."""

    @abstractmethod
    def forward(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor:
        """Lay out the rows (M, K, C) of several images as (S, C), image behind image, S the sum of their counts."""

    def project(
        self, image: ImageFeatures, projector: Callable[[ImageFeatures], Tensor], cuts: Sequence[Cut]
    ) -> Tensor:
        """Run the projector, (M, N, D) -> (M, K, C), with what the layout does to some rows ahead of it."""
        return projector(image)

    def places(self, rows: Tensor, image: ImageFeatures, cuts: Sequence[Cut], whole: Layout) -> Tensor | None:
        """Say where the tokens stand in the runs that images would take without a pruner; None: it is not known.

        A layout with `row_tokens` need not: its rows are looked at one by one.

        Args:
            rows: (M, K) where each token of a row stood among the tokens that a row would have.
            image: what the pruners left, with `keep`, `groups`, `rank` and `places`.
            cuts: of each image.
            whole: this layout, as it would be without a pruner.

        Returns:
            (S,) for each token of `forward` its place in the run of its image, from 0.
        """
        return None

    def text(self, cut: Cut, token: str) -> str | None:
        """Write what stands in the prompt for an image, `token` once for each of its tokens; None: `count` of them."""
        return None

    def spell(self, cut: Cut, token: str) -> str:
        """Write what stands in the text for a video, with `spells`: words, and one `token` for each frame, which is
        then an image of one row.
        """
        raise NotImplementedError(f"{type(self).__name__} says `spells` and has no `spell`.")

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor: ...


class LanguageModel(ModelPart):
    """A causal LM of transformers, unmodified, and a view of its parts: the kind `llm`.

    `__init__(config, *, vocab_size)`.
    """

    lm: Any
    """The transformers model."""
    hidden_size: int
    """C."""
    num_layers: int
    """Of the decoder."""
    layers: nn.ModuleList
    """Those of the decoder, in order."""
    vocab_size: int
    """V, rows of the embedding."""
    max_positions: int | None = None
    """Most positions of a sequence; None: no limit."""
    router_aux_coef: float = 0.0
    """Weight of the balance loss of an LLM with experts, which is then among `aux_losses`."""
    streams: bool = False
    """As `Encoder.streams`."""

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed ids: (B, T) -> (B, T, C), as the model itself does, scaling included."""

    @abstractmethod
    def hidden(self, **inputs: Any) -> Any:
        """Run the decoder without the vocabulary projection; returns the transformers output (`last_hidden_state`)."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Project (..., C) to logits (..., V) exactly as the model itself does, scaling and capping included."""

    @abstractmethod
    def linear_head(self) -> LinearHead | None:
        """Give `head` in numbers; None where it does more than they say, for example with a hook on it."""

    def keywords(self) -> frozenset[str]:
        """Name what a forward pass may be given for this LLM alone, beside what every composed model gives."""
        return frozenset()

    def verify(self) -> None:
        """Compare `head` and `linear_head` with the model itself, once its weights are there.

        Raises:
            ZooError: they differ.
        """

    def aux_losses(self) -> dict[str, Tensor]:
        """Give losses of the pass that runs, asked behind the LLM: by name, weighted as the config says."""
        return {}


class Adapter(ModelPart):
    """What is attached to the LLM, and trains in its place.

    `__init__(config, *, llm, vision_dim, text_dim, grid, encoder_grid)`, those of them that it names. `llm` has its
    base weights; keep it, and modules of it, out of the children: `self.__dict__["llm"] = llm`. `grid` is None once a
    pruner destroyed it; `encoder_grid` is what `ImageFeatures.keep` and `groups` point into.
    """

    excludes: frozenset[str] = frozenset()
    """Capabilities that must not hold: it stands for them, or undoes them."""
    exclusive: Sequence[str] = ()
    """Names of modules of `llm.lm` that it wants for itself: two adapters that name the same are refused."""
    per_row: bool = False
    """Whether it changes the LLM for a whole row, so that samples must not share one."""
    losses: frozenset[str] | None = None
    """Names that `aux_losses` may give: the check then knows a weight for a loss that is not there. None: not said."""
    notes: Sequence[str] = ()
    """Sentences that the check prints: what a person may not expect of it beside these parts."""
    keeps_float32: bool = False
    """Whether its weights stay float32 where the model is loaded in, or cast to, a shorter format."""
    concurrent: bool = False
    """Whether all that it knows of a pass is in the pass (`zoo.registry.forward_pass`) and nothing on the adapter, so
    that threads may share it. Threads that share a model take turns where an adapter does not say so."""
    adds_experts: bool = False
    """Whether an LLM that it was merged into is another one than its checkpoint's: it is then saved by its sizes."""
    merged: bool = False
    """Whether it stands in the base weights now: for good, or until `unmerge` where it has that."""

    @abstractmethod
    def attach(self) -> None:
        """Take effect in the LLM given at construction. The base weights stay where checkpoints find them."""

    @abstractmethod
    def detach(self) -> None:
        """Leave the LLM bit-identical to what it was before `attach`."""

    @abstractmethod
    def owns(self, name: str) -> bool:
        """Whether the parameter `name` of `llm.lm` was added by this adapter."""

    def condition(self, image: ImageFeatures | None, images_per_row: Sequence[int], expand: int = 1) -> None:
        """Take the image features of the pass that begins.

        Args:
            image: (M, N, D), what the pruners left; None: no image.
            images_per_row: of each row of the batch.
            expand: copies of each row that the LLM gets, as for beams.
        """

    def begin(self, sequence: Any) -> None:
        """Take the sequence of the pass that begins (`zoo.composed.outputs.LLMSequence`)."""

    def aux_losses(self) -> dict[str, Tensor]:
        """Give losses of the pass that runs, asked behind the LLM: by name, weighted or not, as the config says."""
        return {}

    def start(self) -> None:
        """Begin anew from the LLM's weights. Called where it starts untrained on weights that came after it was built,
        and where a stage is the first in which it acts.
        """

    def idles(self, name: str) -> bool:
        """Whether a parameter of `llm.lm` has no effect while it is attached, so that no stage trains it."""
        return False

    @derived
    def reads_image(self) -> bool:
        """Whether it computes something else for an image."""
        return "image" in self.needs

    def merge(self) -> None:
        """Put it into the base weights, and detach; `merged` then says so.

        Raises:
            ZooError: it cannot be.
        """
        raise ZooError(f"{type(self).__name__} cannot be merged: what it adds depends on the input.")

    def unmerge(self) -> None:
        """Take it out of the base weights again, where `merge` was for one image."""

    @derived
    def can_merge(self) -> bool:
        """Whether it has a `merge`."""
        return type(self).merge is not Adapter.merge

    @derived
    def merged_for_good(self) -> bool:
        """Whether it stands in the base weights and has no `unmerge`."""
        return bool(self.merged) and type(self).unmerge is Adapter.unmerge

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Give its weights inside the LLM, by their names there: they are saved while it is detached, too."""
        return {}


class Distiller(Part):
    """A loss beside the answer loss; with a teacher, or with dense targets that the data set knows.

    `__init__(config, *, vision_dim, text_dim, vocab_size, grid)`, those of them that it names. It need not be an
    `nn.Module`: then it has `__call__` in place of `forward`.

    `needs` words: `student.image`, `student.hidden`, `student.logits`, `batch.<key>`, and of a teacher
    `teacher.response`, `teacher.visual`, `teacher.relation` (image tokens have to align for the last two),
    `teacher.pairs`, `teacher.hidden`, `teacher.logits`.
    """

    weights: Mapping[str, float] = {}
    """Loss -> factor on it now, as `begin_step` set it; a loss that is not named counts 1."""
    losses: frozenset[str] | None = None
    """Names of what it gives beside `weights`: the check then knows a weight for a loss that is not there. None: not
    said."""
    per_label: frozenset[str] = frozenset()
    """Losses that are sums already divided by `batch["num_labels"]`: means over the labels of the whole step."""
    per_image: frozenset[str] = frozenset()
    """Losses that are sums already divided by `batch["num_images"]`: means over the images of the whole step."""
    equal_widths: bool = False
    """Whether the hidden states of student and teacher have to be of one width."""
    own_reference: bool = False
    """Whether the teacher may be the student itself, as it was."""
    grid: tuple[int, int] | None = None
    """(h, w) that the targets of the data have to have."""

    def begin_step(self, step: int, steps: int) -> None:
        """Set what depends on time. Called before optimiser step `step` (from 0) of the `steps` of a stage."""

    def forward(self, student: Any, teacher: Any | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give the losses by name, those that are not 0.

        Args:
            student: `zoo.composed.outputs.Seen`: the output of the forward pass, and `llm`.
            teacher: the same of the teacher; None where there is none, or where what it said was stored: it is then in
                the batch's targets (`zoo.distill.matching.positions`).
            batch: as the model got it, with `num_labels`, `num_images`, and `vocab_size` of the shared tokens.
        """
        raise NotImplementedError

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(self, student: Any, teacher: Any | None, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
