"""Base classes of the language model and of what works on it: adapters and distillers. Nothing here imports torch.

Letters in shapes: see `zoo.registry.parts`, which also has these names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.registry.errors import ZooError
from zoo.registry.part import ModelPart, Part, derived

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from zoo.registry.values import ImageFeatures, LinearHead


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
    """Longest sequence, in positions; None: no limit."""
    axes: int = 1
    """Axes of its positions: with several, `hidden` and `lm` take `position_ids` (A, B, T), and (B, T) for text."""
    mixes_rows: str = ""
    """Why several samples or dialogs in a row would not be kept apart; empty: the mask of a row does."""
    router_aux_coef: float = 0.0
    """Weight of the balance loss of an LLM with experts; `aux_losses` returns that loss."""
    streams: bool = False
    """As `Encoder.streams`."""

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed ids: (B, T) -> (B, T, C), as the model itself does, scaling included."""

    @abstractmethod
    def hidden(self, **inputs: Any) -> Any:
        """Run the decoder without the vocabulary projection; returns the transformers output (`last_hidden_state`)."""

    def take_deep(self, count: int) -> None:
        """Add the features of a pass (`zoo.fusion.llm.deep`) behind its first `count` layers. Called once, when the
        model is built.

        Raises:
            ZooError: it cannot. The default.
        """
        raise ZooError(f"{type(self).__name__} has no `take_deep`: its layers take no further features of images")

    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the decoder's final norm to hidden states of any layer, (..., C); the same where it has none."""
        for parent in self.lm.modules():
            inside = dict(parent.named_children())
            if any(module is self.layers for module in inside.values()):
                found = [m for m in inside.values() if "norm" in type(m).__name__.lower()]
                return found[-1](hidden) if found else hidden  # the last: some norm the embeddings, too
        return hidden

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Project (..., C) to logits (..., V) exactly as the model itself does, scaling and capping included."""

    @abstractmethod
    def linear_head(self) -> LinearHead | None:
        """Return the parameters of `head` for fused losses; None if it is hooked, wrapped or sharded."""

    def keywords(self) -> frozenset[str]:
        """Name the arguments that this LLM's forward takes beside those that every composed model passes."""
        return frozenset()

    def verify(self) -> None:
        """Compare `head` and `linear_head` with the model itself. Called once its weights are loaded.

        Raises:
            ZooError: they differ.
        """

    def aux_losses(self) -> dict[str, Tensor]:
        """Return losses of the current pass by name, weighted as configured. Called after the LLM."""
        return {}


class Adapter(ModelPart):
    """New weights attached to the LLM, which train in place of its own.

    `__init__(config, *, llm, vision_dim, text_dim, grid, encoder_grid, own_grid)`, those that it names. `llm` has its
    base weights; keep it, and modules of it, out of the children: `self.__dict__["llm"] = llm`. `grid` is None once a
    pruner destroyed it; `encoder_grid` is the grid that `ImageFeatures.keep` and `groups` index, `own_grid` the one
    that the encoder has without a pruner in front of it.
    """

    excludes: frozenset[str] = frozenset()
    """Capabilities that must not hold: it replaces them, or undoes them."""
    exclusive: Sequence[str] = ()
    """Names of modules of `llm.lm` that no other adapter may change: two adapters that name the same are refused."""
    per_row: bool = False
    """Whether it changes the LLM for a whole row, so that samples must not be packed into one."""
    losses: frozenset[str] | None = None
    """Names that `aux_losses` may return, so that the check refuses a weight for any other. None: not declared."""
    notes: Sequence[str] = ()
    """Sentences that the check prints: what may surprise beside these parts."""
    keeps_float32: bool = False
    """Whether its weights stay float32 where the model is loaded in, or cast to, a shorter format."""
    concurrent: bool = False
    """Whether all state of a pass is in the pass (`zoo.registry.forward_pass`) and not on the adapter, so that threads
    may run it at once. With an adapter that does not set it, threads that share a model take turns."""
    adds_experts: bool = False
    """Whether merging it changes the LLM's architecture, so that the LLM is saved with its own config."""
    merged: bool = False
    """Whether it is in the base weights now: for good, or until `unmerge` where it has one."""

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
            image: (M, N, D), output of the pruners; None: no image.
            images_per_row: of each row of the batch.
            expand: copies of each row in the LLM's batch, as for beams.
        """

    def begin(self, sequence: Any) -> None:
        """Take the sequence of the pass that begins (`zoo.composed.outputs.LLMSequence`)."""

    def aux_losses(self) -> dict[str, Tensor]:
        """Return losses of the current pass by name, weighted as configured. Called after the LLM."""
        return {}

    def start(self) -> None:
        """Initialise again from the LLM's weights. Called where they were loaded after it was built, and before the
        first stage in which it acts.
        """

    def options_now(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options `node` as a saved model states them, which holds this adapter's weights."""
        return dict(node)

    def passes_first(self) -> int:
        """Say over how many batches of a stage `calibrate` has to run the model, ahead of the first stage in which the
        adapter acts; 0: none.
        """
        return 0

    def calibrate(self, passes: Sequence[Callable[[], None]]) -> None:
        """Initialise from data: each of `passes` runs the model on a batch, without gradients, the same in every
        process. Called after `start`.
        """

    def begin_stage(self, steps: int) -> None:
        """Set what depends on the number of optimiser steps of a stage in which the adapter is attached."""

    def end_step(self, step: int) -> None:
        """Take notice of optimiser step `step` (from 0) of a stage, while its gradients are still there."""

    def run_state(self) -> dict[str, Tensor]:
        """Return tensors that a resumed run needs beside the weights, to be read and written in place."""
        return {}

    def idles(self, name: str) -> bool:
        """Whether a parameter of `llm.lm` is fixed, or has no effect, while it is attached, so that no stage trains
        it.
        """
        return False

    @derived
    def reads_image(self) -> bool:
        """Whether its output depends on the image."""
        return "image" in self.needs

    def merge(self) -> None:
        """Add it to the base weights, detach, and set `merged`.

        Raises:
            ZooError: it cannot be merged.
        """
        raise ZooError(f"{type(self).__name__} cannot be merged: it has no `merge`.")

    def unmerge(self) -> None:
        """Restore the base weights, where `merge` was for one image."""

    @derived
    def can_merge(self) -> bool:
        """Whether it has a `merge`."""
        return type(self).merge is not Adapter.merge

    @derived
    def merged_for_good(self) -> bool:
        """Whether it is in the base weights and has no `unmerge`."""
        return bool(self.merged) and type(self).unmerge is Adapter.unmerge

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return its weights inside the LLM, by their names there: they are saved while it is detached, too."""
        return {}

    def write_files(self, folder: Path) -> None:
        """Write files of its own beside the weights of a saved model, in a format of others."""


# Words that a distiller may need, beside `batch.<key>`.
OF_DISTILLERS = (
    "student.image", "student.prefix", "student.hidden", "student.logits", "teacher.response", "teacher.visual",
    "teacher.relation", "teacher.pairs", "teacher.hidden", "teacher.logits",
)  # fmt: skip


class Distiller(Part):
    """A loss beside the answer loss; with a teacher, or with dense targets of the data set.

    `__init__(config, *, vision_dim, text_dim, vocab_size, grid)`, those of them that it names. It need not be an
    `nn.Module`: then it has `__call__` in place of `forward`.

    `needs` words: `student.image`, `student.prefix` ([CLS] and registers, as `image.prefix`), `student.hidden`,
    `student.logits`, `batch.<key>`, and of a teacher `teacher.response`, `teacher.visual`, `teacher.relation` (image
    tokens have to align for the last two), `teacher.pairs`, `teacher.hidden`, `teacher.logits`.
    """

    weights: Mapping[str, float] = {}
    """Loss -> its current factor, as `begin_step` set it; 1 for losses that are not named."""
    losses: frozenset[str] | None = None
    """Names of its losses beside those of `weights`, so that the check refuses a weight for any other. None: not
    declared."""
    per_label: frozenset[str] = frozenset()
    """Losses that are sums already divided by `batch["num_labels"]`: means over the labels of the whole step."""
    per_image: frozenset[str] = frozenset()
    """Losses that are sums already divided by `batch["num_images"]`: means over the images of the whole step."""
    equal_widths: bool = False
    """Whether the hidden states of student and teacher must have the same width."""
    own_reference: bool = False
    """Whether the teacher may be the student itself, with its weights from before the stage."""
    live_only: str = ""
    """Why a stored teacher cannot give what its options ask for, for a message; empty: it can."""
    grid: tuple[int, int] | None = None
    """(h, w) that the data's targets must have."""

    def begin_step(self, step: int, steps: int) -> None:
        """Set what depends on time. Called before optimiser step `step` (from 0) of the `steps` of a stage."""

    def forward(self, student: Any, teacher: Any | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the losses by name, those that are not 0.

        Args:
            student: `zoo.composed.outputs.DistillView`: the output of the forward pass, and `llm`. Its sequence is not
                as long as the teacher's where one has fewer image tokens; the `labels` of both are the same ones.
            teacher: the same of the teacher; None without one, and where its outputs were stored: they are then in the
                batch's targets (`zoo.distill.matching.positions`).
            batch: as the model got it, with `num_labels`, `num_images`, and `vocab_size` of the shared tokens.
        """
        raise NotImplementedError

    if TYPE_CHECKING:  # `nn.Module` has it

        def __call__(self, student: Any, teacher: Any | None, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
