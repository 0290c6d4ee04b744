"""Records of .jsonl, .json and .csv files by number: one is read from the disk where it is needed, and no other.

Where they are is found once for all processes and kept beside each file, 16 bytes a record (`record_index`). Values are
those of the file: JSON's own, and the texts of CSV, in which an empty field is None.
"""

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.numbered_stream import Place
from zoo.data.record_file import LINES, WINDOW, parse_value, places_of
from zoo.data.record_index import RecordIndex, entries_of
from zoo.registry import ZooError
from zoo.registry.foreign import require_file

SUFFIXES = {".json", ".csv", *LINES}
LOOKED_AT = 1000  # records of the first file from which columns are known that others lack
PIECE = 1 << 16  # records
MAX_FIELD = 1 << 30  # characters of a field of CSV


class LineFiles:
    """The records of several files.

    Args:
        paths: of the files, plain UTF-8.

    Raises:
        ZooError: a file is in another encoding, or its records cannot be separated.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._indexes = [_index(path) for path in paths]
        self._headers = [_header(path, index) for path, index in zip(paths, self._indexes, strict=True)]
        self.lengths = [
            len(index) - (header is not None) for index, header in zip(self._indexes, self._headers, strict=True)
        ]

    def record(self, place: Place, columns: Iterable[str] = ()) -> dict[str, Any]:
        """Read the record at `place`.

        Args:
            place: shard and number there.
            columns: that it needs; those which other records have and this one lacks are None.

        Raises:
            ZooError: it is broken, the message names file and line; or its file has changed.
        """
        found = self._record(place)
        return found if found.keys() >= set(columns) else {**dict.fromkeys(self.columns), **found}

    @cached_property
    def columns(self) -> set[str]:
        """The columns of the first records."""
        shard = next((shard for shard, length in enumerate(self.lengths) if length), None)
        if shard is None:
            return set()
        names: set[str] = set()
        for number in range(min(LOOKED_AT, self.lengths[shard])):
            try:
                names |= self._record((shard, number)).keys()
            except ZooError:  # it is named in its turn
                continue
        return names

    def where(self, place: Place) -> str:
        """Name file and line of a record for a message."""
        shard, number = place
        return f"{self.paths[shard]}:{self._place(shard, number)[2]}"

    def _place(self, shard: int, number: int) -> tuple[int, int, int]:
        return self._indexes[shard].once(number + (self._headers[shard] is not None))

    def _record(self, place: Place) -> dict[str, Any]:
        shard, number = place
        path, header = self.paths[shard], self._headers[shard]
        start, length, line = self._place(shard, number)
        data = _read(path, self._indexes[shard], start, length)
        if header is not None:
            return _named(header, data, f"{path}:{line}")
        record = parse_value(data, f"{path}:{line}")
        if not isinstance(record, dict):
            raise ZooError(f"{path}:{line} holds a {type(record).__name__}; a record is an object with fields.")
        return record


def _read(path: Path, index: RecordIndex, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        if (about.st_size, about.st_mtime_ns) != index.state[:2]:
            raise ZooError(f"{path} has changed since it was opened: start again.")
        return os.pread(file.fileno(), length, start)


def _index(path: Path) -> RecordIndex:
    require_file(path)
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
    if not encoding.startswith("utf-8"):
        raise ZooError(f"{path} begins as {encoding.upper()}; a file that is streamed has to be UTF-8.")
    find: Callable[[], Iterator[np.ndarray]]
    find = (lambda: _csv_places(path)) if path.suffix == ".csv" else (lambda: places_of(path, path.suffix in LINES))
    return RecordIndex(path, find)


# ---- CSV -----------------------------------------------------------------------------------------------------------


def _header(path: Path, index: RecordIndex) -> list[str] | None:
    """Return the names of the columns of a CSV file; None of another."""
    if path.suffix != ".csv" or not len(index):
        return None
    start, length, line = index.once(0)
    return _unlike(_fields(_read(path, index, start, length), f"{path}:{line}"), f"{path}:{line}")


def header_of(path: Path) -> list[str]:
    """Return the names of the columns of a CSV file, without an index of its records."""
    require_file(path)
    _any_size()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _unlike(next((fields for fields in csv.reader(file) if fields), []), f"{path}:1")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ZooError(f"{path}:1 is not CSV in UTF-8: {error}.") from None


def _unlike(names: list[str], where: str) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ZooError(f"{where} names the column {twice!r} twice.")
    return names


def _named(header: list[str], data: bytes, where: str) -> dict[str, Any]:
    fields = _fields(data, where)
    if len(fields) > len(header):
        raise ZooError(f"{where} has {len(fields)} fields for {len(header)} columns; a text with a comma is quoted.")
    return {name: fields[at] or None if at < len(fields) else None for at, name in enumerate(header)}


def _fields(data: bytes, where: str) -> list[str]:
    _any_size()
    try:
        return next(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ZooError(f"{where} is not CSV in UTF-8: {error}.") from None


def _any_size() -> None:
    """Allow fields of any size, images in base64 among them: the library's limit is of the process."""
    csv.field_size_limit(MAX_FIELD)


def _csv_places(path: Path) -> Iterator[np.ndarray]:
    """Find the records of a CSV file, its header first, blank lines left out: arrays of `ENTRY`.

    Read as Latin-1, in which a character is a byte: commas, quotes and ends of lines are the same bytes in UTF-8.

    Raises:
        ZooError: a quote is not closed.
    """
    _any_size()
    with path.open("rb") as file:
        read = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0

    def lines(text: Iterable[str]) -> Iterator[str]:
        nonlocal read
        for line in text:
            read += len(line)
            yield line

    places: list[tuple[int, int, int]] = []  # start, end, line
    last, start, line = (0, 0, 1), read, 1
    with path.open(encoding="latin-1", newline="", buffering=WINDOW) as text:
        text.seek(read)
        reader = csv.reader(lines(text))
        try:
            for fields in reader:
                if fields:
                    places.append(last := (start, read, line))
                start, line = read, reader.line_num + 1
                if len(places) == PIECE:
                    yield entries_of(*np.array(places).T)
                    places = []
        except csv.Error as error:
            raise ZooError(f"{path}:{line} is not CSV: {error}.") from None
    _require_closed(path, *last)
    if places:
        yield entries_of(*np.array(places).T)


def _require_closed(path: Path, start: int, end: int, line: int) -> None:
    """Refuse a last record that a quote which is not closed has made of all that follows it."""
    with path.open("rb") as file:
        text = os.pread(file.fileno(), end - start, start).decode("latin-1")
    try:
        next(csv.reader(io.StringIO(text, newline=""), strict=True), None)
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise ZooError(f"{path}:{line} begins a quoted text that does not end.") from None
