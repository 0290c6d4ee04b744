"""How images become tokens of a composed model: encoded, inserted at their placeholders, passed to adapters."""

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.composed import behind, native
from zoo.composed.grid_positions import GridPositions
from zoo.composed.inputs import Inputs
from zoo.composed.positions import Unpruned
from zoo.composed.question import QuestionMixin
from zoo.registry import (
    Adapter,
    Cut,
    Encoder,
    ImageFeatures,
    LanguageModel,
    Layout,
    Projector,
    Pruner,
    Question,
    UnlikeRows,
    ZooError,
)


class Encoded(NamedTuple):
    """Output of `encode_images`; without images, None for each."""

    image: Any = None  # the encoder's features: ImageFeatures, or UnlikeRows of images that keep their shapes
    kept: Any = None  # the features after pruning
    tokens: Tensor | None = None  # (M, K, C), laid out (S, C); None: images are not in the sequence
    valid: Tensor | None = None  # (M, K) or (S,) bool, which of the tokens stay, see `left_out`; None: all
    deep: tuple[Tensor, ...] = ()  # (S, C) of the same tokens, for layers of the LLM behind the first

    @property
    def named(self) -> dict[str, Any]:
        """The first three, under the names of `ZooOutput`."""
        return {"image": self.image, "image_kept": self.kept, "image_tokens": self.tokens}


class ImagesMixin(QuestionMixin):
    """Runs encoder, pruners, projector and layout, and inserts their tokens in the text."""

    config: Any  # ZooConfig
    device: torch.device
    vision: Encoder | None
    pruner: MutableMapping[str, Pruner]  # a ModuleDict, as `adapter` is
    projector: Projector | None
    layout: Layout | None
    llm: LanguageModel
    adapter: MutableMapping[str, Adapter]
    requested: Any
    unpruned: Unpruned | GridPositions | None
    num_image_tokens: int
    steps: Sequence[Any]
    projected_grid: tuple[int, int] | None  # of the tokens of a row behind the projector

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def _by_kind(self) -> bool:
        """Whether the encoder takes the kind of each row of pixels."""
        return self.vision is not None and bool(self.vision.by_kind)

    def encode_images(
        self, pixel_values: Tensor, cuts: Sequence[Cut] | None = None, given: Inputs | None = None
    ) -> Encoded:
        """Run encoder, pruners, projector and layout.

        Args:
            pixel_values: (M, 3, S, S), (M, P) for several encoders, or patches (S, P) of images that keep their
                shapes; cast to the encoder's data type.
            cuts: of each image, or of the images of each sample, where images have rows of their own; absent: every row
                is an image.
            given: the inputs of the pass, for parts that need the question.

        Returns:
            The encoder's features, these after pruning, and the image tokens (M, K, C), laid out (S, C), or None. Where
            parts need the question and it is not known, the encoder's features alone: a pass that is given them as
            `encoded` goes on from there.
        """
        if self.vision is None:
            raise ZooError("The batch has images, but the model has no vision encoder.")
        if cuts and not isinstance(cuts[0], Cut):  # of each sample, as transformers' pipelines put batches together
            cuts = [cut for sample in cuts for cut in sample]
        if cuts is not None and not self.vision.native and sum(c.rows for c in cuts) != len(pixel_values):
            raise ZooError(f"{len(pixel_values)} rows of pixels for images of {[c.rows for c in cuts]} rows.")
        image, pixel_values = self.features_of(pixel_values, cuts)
        question = self._question(given, cuts, image) if given is not None else None
        return self.encode_features(image, cuts, pixel_values, question)

    def features_of(self, pixel_values: Tensor, cuts: Sequence[Cut] | None = None) -> tuple[Any, Tensor]:
        """Run the encoder alone: its features, with all that parts behind it need, and the pixels that it was given.

        Args:
            pixel_values: (M, 3, S, S), or patches (S, P), cast to the encoder's data type.
            cuts: of each image, where images have rows of their own.
        """
        assert self.vision is not None, "there are images"
        weight = next(self.vision.parameters(), None)
        short = weight is not None and weight.dtype in (torch.bfloat16, torch.float16)  # processors make float32
        if weight is not None and short and not self.vision.members:  # else each has its own data type
            pixel_values = pixel_values.to(weight.dtype)
        if self.vision.native:
            unlike: Any = self.vision(pixel_values, need=self.requested, grids=native.grids_of(cuts))
            return replace(unlike, cuts=tuple(cuts or ())), pixel_values
        more = {"kinds": [c.kind for c in cuts for _ in range(c.rows)]} if cuts and self._by_kind else {}
        return self.vision(pixel_values, need=self.requested, **more), pixel_values

    def _features_of_rows(self, rows: UnlikeRows, pixels: Tensor | None, question: Question | None) -> Encoded:
        """Run pruners, projector and layout on rows of unlike length: `encode_features` for these."""
        if pixels is not None and any(pruner.draws for pruner in self.pruner.values()):
            patches = native.row_pixels(pixels, native.grids_of(rows.cuts))
            rows = native.marked(rows, [checksum_of(row[None]) for row in patches])
        if self.asks and question is None:
            return Encoded(rows)
        ahead, later = self._before_and_behind

        def about(group: ImageFeatures, members: Sequence[int]) -> ImageFeatures:
            if question is None:
                return group
            return replace(group, question=question.picked(torch.tensor(members, device=group.tokens.device)))

        kept = native.pruned(rows, about, [partial(self._pruned, p) for p in ahead])
        if self.unpruned is not None:
            kept = kept.mapped(self.unpruned.placed)
        if self.projector is None:
            return Encoded(rows, kept)
        assert self.layout is not None, "the check has seen to it"
        made = native.projected(kept, self.projector, [partial(behind.run, p) for p in later])
        tokens, valid, deep = native.joined(made, self.layout)
        if later:  # for what reads which tokens stay
            marked = zip(kept.groups, made.groups, strict=True)
            kept = replace(kept, groups=tuple(replace(group, valid=m.valid) for group, m in marked))
        return Encoded(rows, kept, tokens, valid, deep)

    def encode_features(
        self,
        image: ImageFeatures | UnlikeRows,
        cuts: Sequence[Cut] | None = None,
        pixel_values: Tensor | None = None,
        question: Question | None = None,
    ) -> Encoded:
        """Run pruners, projector and layout on the encoder's features: `encode_images` without its first step.

        Args:
            image: the encoder's features; a layout's grouping of rows into images is set on it.
            cuts: of each image, where images have rows of their own.
            pixel_values: (M, 3, S, S), or (S, P), of the features, for pruners that draw at random.
            question: what is asked about the images, for parts that need it; without it their features are not pruned.
        """
        if isinstance(image, UnlikeRows):
            return self._features_of_rows(image, pixel_values, question)
        if cuts is None and self.layout is not None:
            assert self.vision is not None, "the features are an encoder's"
            cuts = [Cut(size=self.vision.transform.size)] * len(image.tokens)
        if cuts is not None and self.layout is not None:
            image.rows, image.cuts = tuple(c.rows for c in cuts), tuple(cuts)
            image.row_kind = next((c.kind for c in cuts if c.kind != "image"), "image")
        if pixel_values is not None and any(pruner.draws for pruner in self.pruner.values()):
            image.checksum = checksum_of(pixel_values)
        if self.asks and question is None:
            return Encoded(image)
        kept = replace(image, question=question)
        ahead, later = self._before_and_behind
        for pruner in ahead:
            kept = behind.run(pruner, self._projected(pruner, kept))
        if self.unpruned is not None:
            kept = self.unpruned.placed(kept)
        elif kept.valid is not None and kept.keep is not None and self.config.positions == "kept":
            kept = kept.placed(kept.num_patches or kept.tokens.shape[1])
        if self.projector is None:
            return Encoded(image, kept)
        made = behind.project(self._as_projected(kept), self.projector, self.layout, cuts)
        if later:
            in_order, grid = self.config.positions == "kept", self.projected_grid
            made = behind.prune(made, later, kept, grid, self.layout, cuts, in_order)
            if isinstance(made.marks, Tensor) and made.marks.shape == kept.tokens.shape[:2]:
                kept = replace(kept, valid=made.marks)
        return Encoded(image, kept, *behind.laid_out(made, self.layout, cuts))

    def _pruned(self, pruner: Pruner, image: ImageFeatures) -> ImageFeatures:
        return behind.run(pruner, self._projected(pruner, image))

    def _projected(self, pruner: Pruner, image: ImageFeatures) -> ImageFeatures:
        """Add the tokens behind the projector, for a pruner that compares those."""
        if "projected" not in pruner.needs:
            return image
        assert self.projector is not None, "the check has seen to it"
        with torch.no_grad():
            return replace(image, projected=self.projector(self._as_projected(image)))

    def _as_projected(self, image: ImageFeatures) -> ImageFeatures:
        """Cast tokens of another data type to that of the projector, which trains in float32 beside a frozen encoder.

        Autocast does so itself.
        """
        weight = next(self.projector.parameters(), None) if self.projector is not None else None
        if weight is None or torch.is_autocast_enabled(weight.device.type) or weight.dtype == image.tokens.dtype:
            return image
        return replace(image, tokens=image.tokens.to(weight.dtype))

    def _question(
        self, given: Inputs, cuts: Sequence[Cut] | None, image: ImageFeatures | UnlikeRows
    ) -> Question | None:
        """Return what a pass asks about its images; None where no part needs it, or it is not known."""
        if not self.asks:
            return None
        first = image.groups[0] if isinstance(image, UnlikeRows) else image
        rows, tokens = image.num_rows if isinstance(image, UnlikeRows) else len(first.tokens), first.tokens
        with torch.autocast(tokens.device.type, enabled=False):
            return self.question_of(given, cuts, rows, tokens.device)

    @property
    def _before_and_behind(self) -> tuple[list[Pruner], list[Pruner]]:
        """Pruners in front of the projector, and behind it."""
        later = [p for p in self.pruner.values() if p.behind]
        return [p for p in self.pruner.values() if not p.behind], later

    def _encode(self, given: Inputs, asked: bool = True) -> Encoded:
        """Encode the images of a pass, where there are any and they are not encoded yet.

        Args:
            given: the inputs of the pass.
            asked: whether image tokens are needed; else an unknown question leaves the encoder's features alone.

        Raises:
            ZooError: a part needs the question, and it is not known.
        """
        if given.encoded is not None:
            found = Encoded(*given.encoded)
            if found.image is not None and found.kept is None:  # what is kept depends on the question
                cuts = found.image.cuts or (given.cuts if self.layout is not None else None)
                found = self.encode_features(found.image, cuts, None, self._question(given, cuts, found.image))
        elif given.pixel_values is None:
            return Encoded()
        else:
            found = self.encode_images(given.pixel_values, given.cuts, *([given] if self.asks else []))
        if asked and found.image is not None and found.kept is None:
            asking = next(s.name for s in self.steps if "question" in s.needs)
            raise ZooError(
                f"{asking!r} chooses image tokens by the question, and this pass has none: pass input_ids, or "
                "questions=[...], a text for each row."
            )
        return found

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        """Return where placeholders of images and videos are: (B, T) bool."""
        slots = input_ids == self.image_token_id
        if self.config.video_token_id is not None:
            slots = slots | (input_ids == self.config.video_token_id)
        return slots

    def merge(self, input_ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Embed `input_ids` (B, T) and replace placeholders by the image tokens (M, K, C) or (S, C).

        Raises:
            ZooError: the placeholders and the image tokens are not equally many.
        """
        slots = self._placeholders(input_ids)  # (B, T); their ids may have no row in the embedding, so 0 is embedded
        return self._placed(self.llm.embed(input_ids.masked_fill(slots, 0)), slots, image_tokens)

    def _placeholders_among(self, embeds: Tensor) -> Tensor:
        """Return where embeddings (B, T, C) are those of a placeholder: (B, T) bool."""
        ids = [i for i in (self.image_token_id, self.config.video_token_id) if i is not None]
        shown = self.llm.embed(torch.tensor(ids, device=embeds.device)).to(embeds)  # (1 or 2, C)
        return (embeds.unsqueeze(-2) == shown).all(-1).any(-1)

    def _placed(self, embeds: Tensor, slots: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Insert the image tokens (M, K, C) or (S, C) in the embeddings (B, T, C), where `slots` (B, T) is true.

        Raises:
            ZooError: the placeholders and the image tokens are not equally many.
        """
        if not torch.compiler.is_compiling():  # counting placeholders depends on data, and would break the graph
            self._require_filled(slots, image_tokens)
        if image_tokens is None or not _count(image_tokens):
            return embeds
        return _put(embeds, numbered(slots), image_tokens)

    def place(self, input_ids: Tensor, index: Tensor, image_tokens: Tensor) -> Tensor:
        """Embed ids (B, T), and insert image token `index` (B, T) of (M, K, C) or (S, C) where it is not negative."""
        return _put(self.llm.embed(input_ids.masked_fill(index >= 0, 0)), index, image_tokens)  # (B, T, C)

    def image_index(self, slots: Tensor, image_tokens: Tensor | None, past: int = 0) -> Tensor | None:
        """Return the image token of each column, counted over the batch: (B, T), -1 for text; None: no image.

        Args:
            slots: (B, T) where placeholders are.
            image_tokens: (M, K, C) or (S, C): of all placeholders, or of those from column `past` on.
            past: columns in the cache.

        Raises:
            ZooError: the placeholders and the image tokens are not equally many.
        """
        count = 0 if image_tokens is None else _count(image_tokens)
        if past and int(slots[:, past:].sum()) == count:  # the images of this turn only: the cache has the others
            slots = slots & (torch.arange(slots.shape[1], device=slots.device) >= past)
        self._require_filled(slots, image_tokens)
        return numbered(slots) if count else None

    def _require_filled(self, slots: Tensor, image_tokens: Tensor | None) -> None:
        count = 0 if image_tokens is None else _count(image_tokens)
        if (found := int(slots.sum())) != count:
            each = "" if self.layout is not None else f" of {self.num_image_tokens} tokens"
            images = 0 if image_tokens is None else "laid out" if each == "" else len(image_tokens)
            raise ZooError(
                f"The batch has {found} image placeholders (id {self.image_token_id}) for {images} images{each}; "
                f"{count} are needed."
            )

    @property
    def inside_pruners(self) -> dict[str, Pruner]:
        """Pruners that drop tokens inside the LLM, by name."""
        return {n: p for n, p in self.pruner.items() if p.inside}

    @property
    def inside_llm(self) -> list[Adapter | Pruner]:
        """Parts that act inside the LLM: adapters and pruners."""
        return [*self.adapter.values(), *self.inside_pruners.values()]

    def _condition(
        self,
        image: ImageFeatures | None,
        images_per_row: Sequence[int] | None,
        slots: Tensor | None,
        expand: int = 1,
    ) -> None:
        """Pass the image features to the adapters, with the number of images of each row.

        Args:
            image: the features after pruning; None: no image.
            images_per_row: None: counted from the placeholders.
            slots: (B, T) bool, where placeholders are; None: not known.
            expand: copies of each row in the LLM's batch.
        """
        if not len(self.adapter):
            return
        if images_per_row is None and slots is not None:
            images_per_row = self._images_per_row(image, slots)
        for adapter in self.adapter.values():
            adapter.condition(image, images_per_row or [], expand)

    def _images_per_row(self, image: ImageFeatures | None, slots: Tensor) -> list[int]:
        """Count the images of each row by the placeholders (B, T)."""
        if image is None:
            return [0] * len(slots)
        if self.layout is not None and image.cuts is not None:
            return self._images_of(slots, image.cuts)
        if self.num_image_tokens:
            return (slots.sum(1) // self.num_image_tokens).tolist()
        if (count := len(image.rows or image.tokens)) == len(slots):
            return [1] * len(slots)  # prompts without placeholders: adapters alone take the image
        raise ZooError(f"{count} images for {len(slots)} rows without placeholders: pass images_per_row.")

    def _images_of(self, slots: Tensor, cuts: Sequence[Cut]) -> list[int]:
        """Count the images of each row by their placeholders, whose number differs from image to image."""
        assert self.layout is not None, "each image has as many tokens without one"
        rest, rows = list(cuts), []
        for found in slots.sum(1).tolist():
            before = len(rest)
            while found > 0 and rest:
                found -= self.layout.count(rest.pop(0))
            rows.append(before - len(rest))
        return rows

    def _vision_trains(self) -> bool:
        parts = (self.vision, self.projector, self.layout)
        return any(p.requires_grad for part in parts if part is not None for p in part.parameters())

    def _touch_vision(self) -> Tensor:
        """Return a zero that depends on encoder and projector: DDP's all-reduce then has gradients of every rank."""
        assert self.vision is not None, "it trains"
        shape, cuts = (1, *self.vision.transform.shape), None
        if self.vision.native:  # an image of one token
            shape, cuts = self.vision.patch_shape, [Cut(patches=(1, 1))]
        pixels = torch.zeros(shape, device=self.device, dtype=next(self.vision.parameters()).dtype)
        encoded = self.encode_images(pixels, cuts)
        if encoded.kept is None and encoded.image is not None:
            encoded = self.encode_features(encoded.image, cuts, pixels, self.no_question(pixels.device))
        kept, tokens = encoded.kept, encoded.tokens
        assert kept is not None, "images were given"
        if tokens is None:
            assert isinstance(kept, ImageFeatures), "rows of unlike length have a projector"
            tokens = kept.tokens
        return sum((x.sum() for x in encoded.deep), tokens.sum()) * 0.0


def checksum_of(pixels: Tensor) -> Tensor:
    """Compute a checksum of each row of pixels (M, ...) in integers, equal in every batch and on every device: (M,)."""
    bits = pixels.detach().float().flatten(1).view(torch.int32)  # (M, P)
    weight = torch.arange(bits.shape[1], device=bits.device) * 0x2545F4914F6CDD1D | 1  # int64 wraps around
    return torch.stack([(row * weight).sum() for row in bits]) if len(bits) else weight[:0]


def _count(image_tokens: Tensor) -> int:
    return image_tokens.shape[:-1].numel()


def numbered(slots: Tensor) -> Tensor:
    """Number the true positions over the batch: (B, T), elsewhere -1."""
    return (slots.flatten().cumsum(0) - 1).view_as(slots).masked_fill(~slots, -1)


def _put(embeds: Tensor, index: Tensor, image_tokens: Tensor) -> Tensor:
    """Replace embeddings (B, T, C) by image token `index` (B, T) where it is not negative."""
    # Without boolean indexing, whose shape depends on data and would break a compiled graph.
    flat, index = image_tokens.reshape(-1, embeds.shape[-1]).to(embeds), index.to(embeds.device)  # (M * K, C)
    return torch.where((index >= 0).unsqueeze(-1), flat[index.clamp(min=0)], embeds)
