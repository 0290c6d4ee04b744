"""The features of a frozen encoder in a folder, so that no image is encoded twice.

`<folder>/<hash>/` is of one encoder, by its weights, transform and what is asked of it: `store.json` states which, and
`shard-*.safetensors` (`zoo.storage.shards`) have for each image

    keys              (n, 16) uint8, a hash of the image's content
    rows.offsets      (n + 1,) int64, which rows are its own: one, one for each crop or frame, or, where images keep
                      their shapes, one for each token
    cuts              bytes, how it was cut, as JSON; `cuts.offsets` (n + 1,)
    tokens, ...       (S, ...) what `zoo.storage.packed_features` makes of the features

Any number of processes reads and adds: a shard has a name of its own, is written whole or not at all, and never
changes. All stores below `<folder>` together take at most `max_bytes`; a full one is only read. So is a folder that
cannot be written.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.registry import Cut, ZooError
from zoo.storage.atomic import BESIDE, WriteError, remove, write_json, writing
from zoo.storage.shards import Shards, key_of, offsets_of, write_shard

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

INDEX = "store.json"
FORMAT = 1
SHARD = 64 * 2**20  # bytes that are gathered before a shard is written
EVERY = 30.0  # seconds after which what was gathered is written, so that other processes find it
STALE = 3600.0  # seconds after which an unfinished file belongs to a process that was killed


@dataclass
class Found:
    """What is kept of an image."""

    cut: Cut
    tensors: Mapping[str, Tensor]  # name -> (R, ...)


class FeatureStore:
    """The store of one encoder, open for reading, and for adding where its folder can be written.

    Args:
        root: folder of all stores.
        about: plain values that the features are a function of, beside the image.
        max_bytes: of all stores of `root`.
        note: called with sentences for the user.

    Raises:
        ZooError: the folder does not exist and cannot be made.
    """

    def __init__(
        self,
        root: Path,
        about: Mapping[str, Any],
        max_bytes: float = float("inf"),
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        about = json.loads(json.dumps({"format": FORMAT, **about}, sort_keys=True, default=str))
        self.root, self.max_bytes, self.note = root, max_bytes, note
        self.folder = root / key_of(json.dumps(about, sort_keys=True).encode()).hex()[:16]
        self.adds = True  # as long as there is room, and the folder can be written
        self._dtypes: dict[str, str] = {}
        self._new: dict[bytes, Found] = {}  # gathered, not yet written
        self._bytes, self._since, self._written = 0, time.monotonic(), 0
        self._name = uuid.uuid4().hex[:12]  # of this process's shards
        self._lock = threading.Lock()  # a thread reads ahead while another one adds
        self._seen: int | None = None  # when the folder had changed last
        try:
            with writing(f"kept features to {str(root)!r}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._alone():
                    if not (self.folder / INDEX).is_file():
                        write_json(self.folder / INDEX, about)
            self._remove_unfinished()
        except WriteError as error:
            if not root.is_dir():
                raise
            self._only_reads(str(error))
        self.shards = Shards(self.folder, "kept features", "pt", self._leave_out)

    def __getstate__(self) -> dict[str, Any]:
        # A loader worker finds what is written; it adds nothing.
        return self.__dict__ | {"_lock": None, "_new": {}, "note": None, "adds": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock(), "note": lambda _: None}

    def __len__(self) -> int:
        return len(self.shards.where) + len(self._new)

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtypes of the encoder's tensors, by name; empty: nothing is kept yet."""
        if not self._dtypes:
            with self._lock:
                self.shards.refresh()
                places = iter(self.shards.where.values())
                if (place := next(places, None)) is not None:
                    self._dtypes = json.loads(self.shards.metadata(place)["dtypes"])
        return self._dtypes

    @property
    def size(self) -> int:
        """Bytes of all stores of the folder."""
        return sum(f.stat().st_size for f in self.root.glob("*/shard-*.safetensors"))

    def find(self, key: bytes) -> Found | None:
        """Return what is kept of an image; None: nothing."""
        with self._lock:
            if (new := self._new.get(key)) is not None:
                return new
            place = self.shards.where.get(key)
            if place is None and self._changed():
                self.shards.refresh()
                place = self.shards.where.get(key)
            return None if place is None else self._read(place)

    def add(self, key: bytes, cut: Cut, tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> None:
        """Keep the features of an image, which are written with those of others.

        Args:
            key: of the image.
            cut: how it was cut.
            tensors: (R, ...) by name, on the CPU.
            dtypes: that the encoder gave them in.
        """
        with self._lock:
            self._dtypes = self._dtypes or dict(dtypes)
            if not self.adds or key in self._new or key in self.shards.where:
                return
            # Rows of a batch are views of it, which would keep all of it in memory.
            self._new[key] = Found(cut, {name: x.clone() for name, x in tensors.items()})
            self._bytes += sum(x.nbytes for x in tensors.values())
        if self._bytes >= SHARD or time.monotonic() - self._since > EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        with self._lock:
            self._since = time.monotonic()
            if not self._new:
                return
            try:
                with writing(f"kept features to {str(self.folder)!r}"), self._alone():
                    if self.size + self._bytes > self.max_bytes:
                        self._only_reads(
                            f"The features in {str(self.root)!r} have reached features.max_gb={self.max_bytes / 1e9:g}."
                        )
                    else:
                        self._write()
            except WriteError as error:
                self._only_reads(str(error))
            self._new, self._bytes = {}, 0

    def _write(self) -> None:
        found = list(self._new.values())
        cuts = [json.dumps(asdict(f.cut)).encode() for f in found]
        tensors = {name: torch.cat([f.tensors[name] for f in found]).contiguous() for name in found[0].tensors}
        tensors |= {
            "rows.offsets": offsets_of([len(next(iter(f.tensors.values()))) for f in found]),
            "cuts": torch.frombuffer(bytearray(b"".join(cuts)), dtype=torch.uint8),
            "cuts.offsets": offsets_of([len(cut) for cut in cuts]),
        }
        file = self.folder / f"shard-{self._name}-{self._written:05d}.safetensors"
        write_shard(file, list(self._new), tensors, {"dtypes": json.dumps(self._dtypes)})
        self._written += 1
        self.shards.refresh()

    def _read(self, place: tuple[int, int]) -> Found | None:
        from safetensors import SafetensorError

        try:
            stated = json.loads(self.shards.metadata(place)["dtypes"])
            names = [*stated, *(n for n in self.shards.names(place) if n.endswith("/scale"))]
            tensors = self.shards.read(place, "rows.offsets", names)
            cut = json.loads(bytes(self.shards.read(place, "cuts.offsets", ["cuts"])["cuts"].tolist()))
        except (OSError, SafetensorError, KeyError, ValueError) as error:  # removed or changed since it was listed
            self._leave_out(ZooError(f"{str(self.shards.files[place[0]])!r} cannot be read: {error}"))
            self.shards.drop(place[0])  # one note a shard, not one for each of its images
            return None
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in cut.items()}
        return Found(Cut(**plain), tensors)

    def _changed(self) -> bool:
        try:
            now = self.folder.stat().st_mtime_ns
        except OSError:
            return False
        before, self._seen = self._seen, now
        return now != before

    def _only_reads(self, why: str) -> None:
        if self.adds:
            self.adds = False
            self.note(f"{why} Features that are kept are used, and no others are added.")

    def _leave_out(self, error: ZooError) -> None:
        self.note(f"{error} Its features are computed again.")

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(f".*{BESIDE}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    remove(path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of all stores: sizes are added up and files added by one process at a time."""
        handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks: two may add at once
                    fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
