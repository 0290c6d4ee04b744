"""Write images and videos into texts: a placeholder for each of their tokens, with the text that a layout adds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zoo.registry import IGNORE_INDEX, Cut, ZooError
from zoo.text.token_cache import TokenCache
from zoo.vision.images.processors import cut_of


class PlaceholdersMixin:
    """Writes images and videos into the texts of a `ZooProcessor`, as characters and as token ids."""

    tokenizer: Any
    layout: Any
    num_image_tokens: int
    image_token: str
    image_token_id: int
    video_token: str | None
    video_token_id: int
    spells: bool
    unpruned: dict[str, Any] | None
    left_out: dict[str, Any] | None
    _leaves: Any  # the pruner that leaves out placeholders, for its count; None: all stay, or the count is not known
    _whole: Any  # the layout without pruners
    _images: TokenCache  # token ids by the cut of an image

    def _instead(self, picture: Any, mark: str) -> str:
        """Write the text that replaces the token of an image or a video."""
        if self.layout is None:
            return self.image_token * self.num_image_tokens or mark
        cut = cut_of(picture)
        if cut.kind == "frame" and self.spells:
            frame = self._image_text(Cut(size=cut.size))
            return frame.join(self.layout.spell(cut, self.image_token).split(self.image_token))
        return self._image_text(cut)

    def _image_text(self, cut: Cut) -> str:
        """Write the text of an image with this cut: placeholders, and text that the layout writes around them."""
        film = cut.kind == "frame" and self.layout.native and not self.layout.films_as_images
        token = self.video_token if film else None
        if (written := self.layout.text(cut, token or self.image_token)) is not None:
            return written
        own = cut.kind == "frame" and self.video_token_id != self.image_token_id
        return (self.video_token if own and self.video_token else self.image_token) * self.layout.count(cut)

    def _expand_videos(self, text: str, films: Iterator[Cut]) -> str:
        """Replace each video token by words, with an image token for each frame."""
        if not self.spells:
            return text
        first, *rest = text.split(self.video_token)
        return first + "".join(self.layout.spell(next(films), self.image_token) + part for part in rest)

    def _expand(self, values: np.ndarray, ids: np.ndarray | None = None, pictures: Sequence[Any] = ()) -> np.ndarray:
        """Expand each image token to the tokens of its image, in `values`, at the places where `ids` has one."""
        learnt = ids is not None  # labels: image tokens are not learned
        ids = values if ids is None else ids
        if self.layout is None:
            return np.repeat(values, np.where(ids == self.image_token_id, self.num_image_tokens, 1))
        places = np.flatnonzero((ids == self.image_token_id) | (ids == self.video_token_id))
        cuts = [c for p in pictures for c in self._cuts_per_token(cut_of(p))]
        if len(places) != len(cuts):
            raise ZooError(f"The text shows {len(places)} images, and {len(cuts)} were given.")
        pieces, at = [], 0
        for place, cut in zip(places.tolist(), cuts, strict=True):
            shown = self._image_ids(cut)
            pieces += [values[at:place], np.full_like(shown, IGNORE_INDEX) if learnt else shown]
            at = place + 1
        return np.concatenate([*pieces, values[at:]]).astype(np.int64)

    def gap_of(self, ids: np.ndarray, pictures: Sequence[Any]) -> int:
        """Count the positions that the images of a row take beyond their tokens, where these keep their places.

        Negative where a pruner leaves out placeholders, whose number it knows, and positions are counted anew, and
        where positions have rows and columns.

        Args:
            ids: (T,), image tokens expanded.
            pictures: the images, where a layout makes them unlike long.
        """
        if self.left_out is not None and self.left_out["dense"]:
            return -self.fewer_of(ids, pictures)
        if self.unpruned is None:
            return 0
        if self.layout is None:
            images = int((ids == self.image_token_id).sum()) // self.num_image_tokens
            return images * (int(self.unpruned["num_image_tokens"]) - self.num_image_tokens)
        cuts = (c for p in pictures for c in self._cuts_per_token(cut_of(p)))
        if self.layout.native:
            alone = [piece for cut in cuts for piece in self.layout.pieces(cut)]
            return sum(self.layout.advance(c, **self.unpruned) - self.layout.count(c) for c in alone)
        return sum(max(0, self._whole.count(c) - self.layout.count(c)) for c in cuts)

    def fewer_of(self, ids: np.ndarray, pictures: Sequence[Any]) -> int:
        """Count the placeholders of a row that no token fills, as far as it is known ahead: see `gap_of`."""
        if self._leaves is None:
            return 0
        if self.layout is None:
            n = self.num_image_tokens
            return int((ids == self.image_token_id).sum()) // n * self._fewer(n, Cut()) if n else 0
        return sum(self._fewer(self._row_tokens(cut), cut) for cut in map(cut_of, pictures))

    def _row_tokens(self, cut: Cut) -> int | None:
        """Count the tokens of each row that reach a pruner behind the projector; None: it is not known."""
        found: int | None = self.layout.frame_tokens(cut) if cut.kind == "frame" else self.layout.row_tokens
        return found

    def _fewer(self, n: int | None, cut: Cut) -> int:
        return 0 if n is None else max(0, cut.rows * n - self._leaves.tokens_of_image(n, cut))

    def _cuts_per_token(self, cut: Cut) -> list[Cut]:
        """Return a cut for each image token of an image or video: itself, or one per frame of a video in words."""
        if cut.kind == "frame" and self.spells:
            return [Cut(size=cut.size)] * cut.rows
        return [cut]

    def _image_ids(self, cut: Cut) -> np.ndarray:
        """Token ids of an image with this cut: placeholders, and text that the layout writes around them."""
        known: np.ndarray | None = self._images.get(cut)
        if known is None:
            if self.layout.text(cut, self.image_token) is None:
                token = self.video_token_id if cut.kind == "frame" else self.image_token_id
                known = np.full(self.layout.count(cut), token, dtype=np.int64)
            else:
                ids = self.tokenizer(self._image_text(cut), add_special_tokens=False)["input_ids"]
                known = np.array(ids, dtype=np.int64)
            self._images.put(cut, known, len(known))
        return known


def films_of(pictures: Sequence[Any]) -> Iterator[Cut]:
    return (cut for cut in map(cut_of, pictures) if cut.kind == "frame")
