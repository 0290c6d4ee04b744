"""Prefix caching for many questions about one image: the LLM computes the image's keys and values once.

The prompt up to its last image token is the same for all questions about an image. Its keys and values are computed
once and copied to the rows of a batch. With 64 image tokens and questions of ten words this saves five sixths of the
work.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.composed.positions import put_shift, shift_of
from zoo.registry import InsidePruner

Prefix = tuple[bytes, tuple[int, ...]]  # token ids, and which images


class PrefixCache:
    """Keys and values of prefixes, by prefix.

    Args:
        model: a composed model.
        pictures: returns the encoded images of a prefix (see `zoo.evaluation.predict`).
        batch_size: prefixes in one pass of the LLM.
    """

    def __init__(self, model: Any, pictures: Any, batch_size: int) -> None:
        self.model, self.pictures, self.batch_size = model, pictures, batch_size
        self.place: dict[Prefix, tuple[int, int]] = {}  # prefix -> part and row
        self.parts: list[Any] = []

    @staticmethod
    def serves(model: Any) -> bool:
        """Whether prefixes of one length have keys and values of one length, which depend on the prefix alone.

        Not so with a pruner inside the LLM, with one whose count depends on the image or that chooses by the question,
        and with adapters; nor where the generation config states a kind of cache.
        """
        if getattr(model.generation_config, "cache_implementation", None) not in (None, "hybrid"):
            return False
        other = any(isinstance(p, InsidePruner) or p.ragged or p.behind for p in model.pruner.values())
        return bool(model.num_image_tokens) and not other and not model.asks and not len(model.adapter)

    def read(self, prefixes: Sequence[Prefix]) -> bool:
        """Compute the prefixes that are not cached yet; returns whether this LLM can be cached."""
        new = [p for p in dict.fromkeys(prefixes) if p not in self.place]
        lengths: dict[int, list[Prefix]] = {}  # prefixes of one length need no padding, which a copy would carry along
        for prefix in new:
            lengths.setdefault(len(prefix[0]), []).append(prefix)
        for some in lengths.values():
            for at in range(0, len(some), self.batch_size):
                if not self._read(some[at : at + self.batch_size]):
                    return False
        return True

    def rows(self, prefixes: Sequence[Prefix]) -> Any:
        """Return a cache with a row for each of `prefixes`, which are of one length."""
        from transformers import DynamicCache

        where = [self.place[p] for p in prefixes]
        cache = DynamicCache()
        parts = sorted({part for part, _ in where})
        start = dict(zip(parts, _starts([self.parts[p].layers[0].keys.shape[0] for p in parts]), strict=True))
        index = torch.tensor([start[part] + row for part, row in where], device=self.model.device)  # (B,)
        for number in range(len(self.parts[parts[0]].layers)):
            layers = [self.parts[p].layers[number] for p in parts]
            cache.update(_rows([x.keys for x in layers], index), _rows([x.values for x in layers], index), number)
        shifts = [shift_of(self.parts[p], len(self.parts[p].layers[0].keys)) for p in parts]
        if known := [shift for shift in shifts if shift is not None]:  # of all, or of none
            put_shift(cache, _rows(known, index))
        return cache

    def _read(self, prefixes: list[Prefix]) -> bool:
        from transformers.cache_utils import DynamicLayer

        ids = torch.stack([torch.frombuffer(bytearray(tokens), dtype=torch.int64) for tokens, _ in prefixes])
        shown = self.pictures.batch([i for _, images in prefixes for i in images])
        if shown and ("encoded" not in shown or shown["encoded"][2] is None):  # images are not in the sequence
            return False
        cache = self.model(ids.to(self.model.device), **shown, use_cache=True, run_head=False).cache
        # Sliding windows and states of linear attention cannot be cut or copied row by row as keys and values can.
        if any(type(layer) is not DynamicLayer for layer in getattr(cache, "layers", [None])):
            return False
        self.place |= {prefix: (len(self.parts), row) for row, prefix in enumerate(prefixes)}
        self.parts.append(cache)
        return True


def _starts(sizes: list[int]) -> list[int]:
    """Return where each part begins in the concatenation of all."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _rows(parts: list[Tensor], index: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[index]
