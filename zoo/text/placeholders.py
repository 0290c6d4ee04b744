"""What stands in a text for an image or a video: as many placeholders as it has tokens, and what is around them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zoo.registry import IGNORE_INDEX, Cut, ZooError
from zoo.vision.images.processors import cut_of


class PlaceholdersMixin:
    """Writes images and videos into the texts of a `ZooProcessor`, as characters and as ids."""

    tokenizer: Any
    layout: Any
    num_image_tokens: int
    image_token: str
    image_token_id: int
    video_token: str | None
    video_token_id: int
    spells: bool
    _images: dict[Cut, np.ndarray]  # ids of images that were cut alike

    def _instead(self, picture: Any, mark: str) -> str:
        """What stands in the text for an image or a video."""
        if self.layout is None:
            return self.image_token * self.num_image_tokens or mark
        cut = cut_of(picture)
        if cut.kind == "frame" and self.spells:
            frame = self._image_text(Cut(size=cut.size))
            return frame.join(self.layout.spell(cut, self.image_token).split(self.image_token))
        return self._image_text(cut)

    def _image_text(self, cut: Cut) -> str:
        """What stands for an image that was cut so: placeholders, and what the layout writes around them."""
        if (written := self.layout.text(cut, self.image_token)) is not None:
            return written
        own = cut.kind == "frame" and self.video_token_id != self.image_token_id
        return (self.video_token if own and self.video_token else self.image_token) * self.layout.count(cut)

    def _spelled(self, text: str, films: Iterator[Cut]) -> str:
        """Put words, and an image token for each frame, in the place of each video."""
        if not self.spells:
            return text
        first, *rest = text.split(self.video_token)
        return first + "".join(self.layout.spell(next(films), self.image_token) + part for part in rest)

    def _expand(self, values: np.ndarray, ids: np.ndarray | None = None, pictures: Sequence[Any] = ()) -> np.ndarray:
        """Put the tokens of each image in the place of its image token, in `values` or wherever `ids` holds one."""
        learnt = ids is not None  # labels: nothing of an image is learnt
        ids = values if ids is None else ids
        if self.layout is None:
            return np.repeat(values, np.where(ids == self.image_token_id, self.num_image_tokens, 1))
        places = np.flatnonzero((ids == self.image_token_id) | (ids == self.video_token_id))
        cuts = [c for p in pictures for c in self._marked(cut_of(p))]
        if len(places) != len(cuts):
            raise ZooError(f"The text shows {len(places)} images, and {len(cuts)} were given.")
        pieces, at = [], 0
        for place, cut in zip(places.tolist(), cuts, strict=True):
            shown = self._image_ids(cut)
            pieces += [values[at:place], np.full_like(shown, IGNORE_INDEX) if learnt else shown]
            at = place + 1
        return np.concatenate([*pieces, values[at:]]).astype(np.int64)

    def _marked(self, cut: Cut) -> list[Cut]:
        """What each image token in the text stands for: the image or video, or each frame of a video in words."""
        if cut.kind == "frame" and self.spells:
            return [Cut(size=cut.size)] * cut.rows
        return [cut]

    def _image_ids(self, cut: Cut) -> np.ndarray:
        """Ids of an image that was cut so: placeholders, and what the layout writes around them."""
        if cut not in self._images:
            if self.layout.text(cut, self.image_token) is None:
                token = self.video_token_id if cut.kind == "frame" else self.image_token_id
                self._images[cut] = np.full(self.layout.count(cut), token, dtype=np.int64)
            else:
                ids = self.tokenizer(self._image_text(cut), add_special_tokens=False)["input_ids"]
                self._images[cut] = np.array(ids, dtype=np.int64)
        return self._images[cut]


def films_of(pictures: Sequence[Any]) -> Iterator[Cut]:
    return (cut for cut in map(cut_of, pictures) if cut.kind == "frame")
