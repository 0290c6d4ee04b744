"""How images become tokens of a composed model: encoded, put where their placeholders are, handed to adapters."""

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.composed.positions import Unpruned
from zoo.registry import Adapter, Cut, Encoder, ImageFeatures, LanguageModel, Layout, Projector, Pruner, ZooError


class Encoded(NamedTuple):
    """What `encode_images` gives; without images, three times None."""

    image: ImageFeatures | None = None  # the encoder's features
    kept: ImageFeatures | None = None  # what the pruners left of them
    tokens: Tensor | None = None  # (M, K, C), laid out (S, C); None: images do not stand in the sequence

    @property
    def named(self) -> dict[str, Any]:
        """The same, as `ZooOutput` calls it."""
        return {"image": self.image, "image_kept": self.kept, "image_tokens": self.tokens}


class ImagesMixin(nn.Module):
    """Runs encoder, pruners, projector and layout, and merges what they give with the text."""

    config: Any  # ZooConfig
    device: torch.device
    vision: Encoder | None
    pruner: MutableMapping[str, Pruner]  # a ModuleDict, as `adapter` is
    projector: Projector | None
    layout: Layout | None
    llm: LanguageModel
    adapter: MutableMapping[str, Adapter]
    requested: Any
    unpruned: Unpruned | None
    num_image_tokens: int

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def _by_kind(self) -> bool:
        """Whether the encoder asks what each row of pixels is."""
        return self.vision is not None and bool(self.vision.by_kind)

    def encode_images(self, pixel_values: Tensor, cuts: Sequence[Cut] | None = None) -> Encoded:
        """Run encoder, pruners, projector and layout.

        Args:
            pixel_values: (M, 3, S, S).
            cuts: of each image, or of the images of each sample, where images have rows of their own; absent: every row
                is an image.

        Returns:
            The encoder's features, what the pruners left of them, and the image tokens (M, K, C), laid out (S, C), or
            None.
        """
        if self.vision is None:
            raise ZooError("The batch has images, but the model has no vision encoder.")
        if cuts and not isinstance(cuts[0], Cut):  # of each sample, as transformers' pipelines put batches together
            cuts = [cut for sample in cuts for cut in sample]
        if cuts is not None and sum(c.rows for c in cuts) != len(pixel_values):
            raise ZooError(f"{len(pixel_values)} rows of pixels for images of {[c.rows for c in cuts]} rows.")
        told = {"kinds": [c.kind for c in cuts for _ in range(c.rows)]} if cuts and self._by_kind else {}
        return self.encode_features(self.vision(pixel_values, need=self.requested, **told), cuts, pixel_values)

    def encode_features(
        self, image: ImageFeatures, cuts: Sequence[Cut] | None = None, pixel_values: Tensor | None = None
    ) -> Encoded:
        """Do what `encode_images` does behind the encoder: run pruners, projector and layout on its features.

        Args:
            image: the encoder's features; with a layout it is told here which rows are one image.
            cuts: of each image, where images have rows of their own.
            pixel_values: (M, 3, S, S) that they are of, for pruners that draw.
        """
        if cuts is None and self.layout is not None:
            assert self.vision is not None, "the features are an encoder's"
            cuts = [Cut(size=self.vision.transform.size)] * len(image.tokens)
        if cuts is not None and self.layout is not None:
            image.rows, image.cuts = tuple(c.rows for c in cuts), tuple(cuts)
            image.row_kind = next((c.kind for c in cuts if c.kind != "image"), "image")
        if pixel_values is not None and any(pruner.draws for pruner in self.pruner.values()):
            image.checksum = _checksum(pixel_values)
        kept = image
        for pruner in self.pruner.values():
            kept = pruner(kept)
        if self.unpruned is not None:
            kept = self.unpruned.placed(kept)
        if self.projector is None or self.layout is None:
            return Encoded(image, kept, self.projector(kept) if self.projector is not None else None)
        assert cuts is not None, "with a layout, images have cuts"
        tokens = self.layout.project(kept, self.projector, cuts)
        return Encoded(image, kept, self.layout(tokens, cuts))  # (S, C)

    def _encode(
        self, pixel_values: Tensor | None, cuts: Sequence[Cut] | None, encoded: tuple[Any, ...] | None
    ) -> Encoded:
        """Encode the images of a pass, where there are any and they are not encoded yet."""
        if encoded is not None:
            return Encoded(*encoded)
        return Encoded() if pixel_values is None else self.encode_images(pixel_values, cuts)

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        """Where tokens of images and videos stand: (B, T) bool."""
        slots = input_ids == self.image_token_id
        if self.config.video_token_id is not None:
            slots = slots | (input_ids == self.config.video_token_id)
        return slots

    def merge(self, input_ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Embed `input_ids` (B, T) and put the image tokens (M, K, C) or (S, C) where the placeholders are.

        Raises:
            ZooError: the placeholders and the image tokens are not equally many.
        """
        slots = self._placeholders(input_ids)  # (B, T)
        return self._placed(self.llm.embed(input_ids.masked_fill(slots, 0)), slots, image_tokens)

    def _placeholders_among(self, embeds: Tensor) -> Tensor:
        """Where tokens of images and videos stand among embeddings (B, T, C): (B, T) bool."""
        ids = [i for i in (self.image_token_id, self.config.video_token_id) if i is not None]
        shown = self.llm.embed(torch.tensor(ids, device=embeds.device)).to(embeds)  # (1 or 2, C)
        return (embeds.unsqueeze(-2) == shown).all(-1).any(-1)

    def _placed(self, embeds: Tensor, slots: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Put the image tokens (M, K, C) or (S, C) among the embeddings (B, T, C), where `slots` (B, T) says.

        Raises:
            ZooError: the placeholders and the image tokens are not equally many.
        """
        if not torch.compiler.is_compiling():
            self._require_filled(slots, image_tokens)
        if image_tokens is None or not _count(image_tokens):
            return embeds
        return _put(embeds, numbered(slots), image_tokens)

    def place(self, input_ids: Tensor, index: Tensor, image_tokens: Tensor) -> Tensor:
        """Embed ids (B, T), and put image token `index` (B, T) of all (M, K, C) or (S, C) where it is not negative."""
        return _put(self.llm.embed(input_ids.masked_fill(index >= 0, 0)), index, image_tokens)  # (B, T, C)

    def image_index(self, slots: Tensor, image_tokens: Tensor | None, past: int = 0) -> Tensor | None:
        """Say which image token stands in each column, counted over the batch: (B, T), -1 a word; None: no image.

        Args:
            slots: (B, T) where placeholders are.
            image_tokens: (M, K, C) or (S, C): of all placeholders, or of those from column `past` on.
            past: columns that a cache holds already.

        Raises:
            ZooError: the placeholders and the image tokens are not equally many.
        """
        have = 0 if image_tokens is None else _count(image_tokens)
        if past and int(slots[:, past:].sum()) == have:
            slots = slots & (torch.arange(slots.shape[1], device=slots.device) >= past)
        self._require_filled(slots, image_tokens)
        return numbered(slots) if have else None

    def _require_filled(self, slots: Tensor, image_tokens: Tensor | None) -> None:
        have = 0 if image_tokens is None else _count(image_tokens)
        if (found := int(slots.sum())) != have:
            each = "" if self.layout is not None else f" of {self.num_image_tokens} tokens"
            images = 0 if image_tokens is None else "laid out" if each == "" else len(image_tokens)
            raise ZooError(
                f"The batch has {found} image placeholders (id {self.image_token_id}) for {images} images{each}; "
                f"{have} are needed."
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
        """Hand the image features to the adapters that want them, with the number of images of each row.

        Args:
            image: what the pruners left of the encoder's features; None: no image.
            images_per_row: None: counted from the placeholders.
            slots: (B, T) bool, where placeholders stand; None: not known.
            expand: copies of each row that the LLM gets.
        """
        if not len(self.adapter):
            return
        if images_per_row is None and slots is not None:
            if image is None:
                images_per_row = [0] * len(slots)
            elif self.layout is not None and image.cuts is not None:
                images_per_row = self._images_of(slots, image.cuts)
            elif self.num_image_tokens:
                images_per_row = (slots.sum(1) // self.num_image_tokens).tolist()
            elif (count := len(image.rows or image.tokens)) == len(slots):
                images_per_row = [1] * len(slots)
            else:
                raise ZooError(f"{count} images for {len(slots)} rows without placeholders: pass images_per_row.")
        for adapter in self.adapter.values():
            adapter.condition(image, images_per_row or [], expand)

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
        """Zero that depends on the encoder and the projector: ranks without images then still meet in backward."""
        assert self.vision is not None, "it trains"
        pixels = torch.zeros(
            1, 3, *self.vision.transform.size, device=self.device, dtype=next(self.vision.parameters()).dtype
        )
        _, kept, tokens = self.encode_images(pixels)
        assert kept is not None, "images were given"
        return (tokens if tokens is not None else kept.tokens).sum() * 0.0


def _checksum(pixels: Tensor) -> Tensor:
    """A number for each row of pixels (M, ...), of integers alone, so that no batch and no device changes it: (M,)."""
    bits = pixels.detach().float().flatten(1).view(torch.int32)  # (M, P)
    weight = torch.arange(bits.shape[1], device=bits.device) * 0x2545F4914F6CDD1D | 1  # int64 wraps around
    return torch.stack([(row * weight).sum() for row in bits]) if len(bits) else weight[:0]


def _count(image_tokens: Tensor) -> int:
    return image_tokens.shape[:-1].numel()


def numbered(slots: Tensor) -> Tensor:
    """Count the places that are true over the batch: their numbers (B, T), elsewhere -1."""
    return (slots.flatten().cumsum(0) - 1).view_as(slots).masked_fill(~slots, -1)


def _put(embeds: Tensor, index: Tensor, image_tokens: Tensor) -> Tensor:
    """Put image token `index` (B, T) among the embeddings (B, T, C) where it is not negative."""
    flat, index = image_tokens.reshape(-1, embeds.shape[-1]).to(embeds), index.to(embeds.device)  # (M * K, C)
    return torch.where((index >= 0).unsqueeze(-1), flat[index.clamp(min=0)], embeds)
