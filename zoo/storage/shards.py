"""Shards: the safetensors files of a store that grows, each with the keys of what it holds.

A shard has `keys` (n, 16) uint8, and tensors in which each key has consecutive entries: those of key i are
`[offsets[i], offsets[i + 1])`. It is written whole or not at all, so that a killed process leaves none in part, and is
never changed, so that several processes and loader workers may read while others add shards.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.registry import ZooError
from zoo.storage.atomic import written_beside
from zoo.storage.safetensors_file import listing

KEY = 16  # bytes

Place = tuple[int, int]  # which shard, and which of its keys


def key_of(*parts: bytes) -> bytes:
    """Hash parts to a key; equal keys mean equal parts."""
    whole = hashlib.blake2b(digest_size=KEY)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()


def shards_of(folder: Path) -> list[Path]:
    """Return the complete shards of a store, in order."""
    return sorted(folder.glob("shard-*.safetensors"))


def write_shard(
    file: Path, keys: Sequence[bytes], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a shard: `keys`, tensors with their offsets, and texts about them."""
    from safetensors.torch import save_file

    named = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).copy()).view(-1, KEY)
    with written_beside(file) as beside:
        save_file({"keys": named, **tensors}, beside, dict(metadata or {}) or None)


def offsets_of(counts: Sequence[int]) -> torch.Tensor:
    """Return where the entries of each key begin, and the end: (n + 1,) int64."""
    return torch.tensor([0, *counts]).cumsum(0)


def keys_of(file: Path, what: str = "a store") -> list[bytes]:
    """Return the keys of a shard.

    Raises:
        ZooError: it is not a whole shard of `what`.
    """
    from safetensors import safe_open

    known = listing([file])
    if "keys" not in known or known["keys"].shape[1:] != (KEY,):
        raise ZooError(f"{str(file)!r} is not a shard of {what}: it has no keys.")
    with safe_open(file, framework="np") as shard:
        return [row.tobytes() for row in shard.get_tensor("keys")]


class Shards:
    """The shards of a folder, open for reading.

    Args:
        folder: of the store.
        what: the store is, for messages.
        framework: of what is read: `np`, or `pt` for torch.
        damaged: called with the error of a shard that cannot be read, which is then left out; None: it is raised.
    """

    def __init__(
        self, folder: Path, what: str, framework: str = "np", damaged: Callable[[ZooError], None] | None = None
    ) -> None:
        self.folder, self.what, self.framework, self.damaged = folder, what, framework, damaged
        self.files: list[Path] = []
        self.where: dict[bytes, Place] = {}
        self._known: set[Path] = set()
        self._open: dict[int, Any] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # open files cannot be pickled; a loader worker opens them itself

    def refresh(self) -> None:
        """Find the shards that were added since."""
        for file in shards_of(self.folder):
            if file in self._known:
                continue
            self._known.add(file)
            try:
                keys = keys_of(file, self.what)
            except ZooError as error:
                if self.damaged is None:
                    raise
                self.damaged(error)
                continue
            self.where.update((key, (len(self.files), index)) for index, key in enumerate(keys))
            self.files.append(file)

    def drop(self, number: int) -> None:
        """Forget the keys of a shard that can no longer be read."""
        self.where = {key: place for key, place in self.where.items() if place[0] != number}

    def read(self, place: Place, offsets: str, names: Sequence[str]) -> dict[str, Any]:
        """Read the entries of a key.

        Args:
            place: of the key, from `where`.
            offsets: name of the tensor that has the offsets.
            names: of the tensors to read.
        """
        shard, index = self._shard(place), place[1]
        start, stop = shard.get_slice(offsets)[index : index + 2].tolist()
        return {name: shard.get_slice(name)[start:stop] for name in names}

    def names(self, place: Place) -> list[str]:
        """Return the names of the tensors beside a key."""
        return list(self._shard(place).keys())

    def metadata(self, place: Place) -> dict[str, str]:
        """Return the texts that were written with a key's shard."""
        return self._shard(place).metadata() or {}

    def _shard(self, place: Place) -> Any:
        number = place[0]
        if number not in self._open:
            from safetensors import safe_open

            self._open[number] = safe_open(self.files[number], framework=self.framework)
        return self._open[number]
