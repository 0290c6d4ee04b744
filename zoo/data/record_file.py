"""JSON records of a file, kept as one block of bytes with the offsets of each record, or on the disk.

A list of a million dicts would be copied page by page into every loader worker, since reference counts are written. One
`bytes` object and three arrays are shared between processes; a record is parsed when it is taken. The file is in memory
once, beside a window of some MB in which records are located, however many of them share a line. A file of `ON_DISK`
bytes or more that is plain UTF-8 is not in memory at all: see `record_index`.

Files may be UTF-8, UTF-16 or UTF-32, with or without a byte order mark, also in the middle of joined files; lines end
in LF, CR or both; a `.jsonl` may hold a list and a `.json` lines; a comma may follow the last record. Anything
ambiguous is an error with file, line and reason.
"""

import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.absent import absent
from zoo.data.record_index import RecordIndex, entries_of, plain_lines
from zoo.registry import ZooError
from zoo.registry.foreign import require_file

WINDOW = 1 << 20  # bytes decoded at a time; more for longer records
BLANK = re.compile(rb"(?:[ \t\r\n]|\xef\xbb\xbf)*")
LINE = re.compile(rb"[^\r\n]+")
LINES = {".jsonl", ".ndjson"}
ON_DISK = 1 << 27  # bytes from which a file stays on the disk
NEAR_THE_END = 16  # characters: a parse error this close to the end of a window may come from its cut


class RecordFile:
    """The records of a `.json` (one list), `.jsonl` or gzipped file, by index."""

    def __init__(self, path: Path) -> None:
        """Read the file and locate its records; a broken record is reported when it is taken, if possible.

        Raises:
            ZooError: the file does not exist, has another format, or its list cannot be split into records.
        """
        self.path = path
        suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
        if suffix not in {".json", *LINES}:
            other = f" Data set hf reads it: data.hf.path={path}." if suffix in {".csv", ".parquet", ".arrow"} else ""
            raise ZooError(f"{path} is not a file of records: allowed are .json, .jsonl and the same with .gz.{other}")
        lines = suffix in LINES
        self._source: _InMemory | _OnDisk
        self._source = _OnDisk(path, lines) if _stays_on_disk(path) else _InMemory(path, lines)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Parse a record.

        Raises:
            ZooError: it is broken; the message names file and line.
        """
        piece = self._source.piece(index)
        try:
            text = piece.decode()
            record = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            place = self.where(index, error.lineno - 1)
            raise ZooError(f"{place} is not JSON: {self._reason(index, error, text)}") from None
        except UnicodeDecodeError as error:
            raise ZooError(f"{self.where(index)}: {_no_utf8(error)}") from None
        except (ValueError, RecursionError) as error:
            raise ZooError(f"{self.where(index)} is not JSON: {_said(error)}.") from None
        if not isinstance(record, dict):
            raise ZooError(f"{self.where(index)} holds a {type(record).__name__}; a record is an object with fields.")
        return record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int, below: int = 0) -> str:
        """Name the place of a record for a message: `file:line`, and which it is where several share the line."""
        line, number = self._source.line(index), len(self)
        shared = any(self._source.line(i) == line for i in (index - 1, index + 1) if 0 <= i < number)
        return f"{self.path}:{line + below}" + (f", record {index + 1}" if shared else "")

    def beside(self, what: str, key: str) -> Path | None:
        """Name a file beside this one for what was made of it in its present state; None: it is not large.

        Args:
            what: word of the file's name.
            key: on what it depends besides the records.
        """
        if not isinstance(self._source, _OnDisk):
            return None
        state, mark = (hashlib.sha256(str(x).encode()).hexdigest()[:12] for x in (self._source.state, key))
        return self.path.with_name(f".{self.path.name}.zoo-{what}-{state}-{mark}")

    def _reason(self, index: int, error: json.JSONDecodeError, text: str) -> str:
        cut = index == len(self) - 1 and _is_cut(error, text)
        return f"{_said(error)} at column {error.colno}." + " The file may have been cut off there." * cut


class _InMemory:
    """The bytes of a file and the places of its records in them."""

    def __init__(self, path: Path, as_lines: bool) -> None:
        self._block = _read(path)
        starts, ends, lines = _located(path, self._block, as_lines)
        self._starts, self._ends = (np.frombuffer(some or b"", dtype=np.int64) for some in (starts, ends))
        self._lines = np.frombuffer(lines or b"", dtype=np.int32)

    def __len__(self) -> int:
        return len(self._lines)

    def piece(self, index: int) -> bytes:
        return self._block[self._starts[index] : self._ends[index]]

    def line(self, index: int) -> int:
        return int(self._lines[index])


class _OnDisk:
    """A file that is read record by record, by an index beside it."""

    def __init__(self, path: Path, as_lines: bool) -> None:
        self._path = path
        self._open: Any = None
        self._index = RecordIndex(path, lambda: places_of(path, as_lines))
        self.state = self._index.state

    def __len__(self) -> int:
        return len(self._index)

    def piece(self, index: int) -> bytes:
        if self._open is None:
            file = self._path.open("rb")
            self._index.require_same(file.fileno())
            self._open = file
        start, length, _ = self._index[range(len(self))[index]]
        return os.pread(self._open.fileno(), length, start)

    def line(self, index: int) -> int:
        return self._index[range(len(self))[index]][2]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


def places_of(path: Path, as_lines: bool) -> Iterator[np.ndarray]:
    """Find the records of a file of plain UTF-8: arrays of `ENTRY`.

    Raises:
        ZooError: its list cannot be split into records.
    """
    if _form(path, _head(path), as_lines)[0] == "lines":
        yield from plain_lines(path, _behind_blanks)
    else:
        yield entries_of(*_located(path, _read(path), as_lines))


def _stays_on_disk(path: Path) -> bool:
    """Whether a file is large, and its bytes are those of its text."""
    if path.suffix == ".gz" or not path.is_file() or path.stat().st_size < ON_DISK:
        return False
    return json.detect_encoding(_head(path)[:4]).startswith("utf-8")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2 * WINDOW)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, and refuse duplicate keys: either value could be meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_FINDER = json.JSONDecoder()
_UNPACKED = 200  # largest compression ratio of gzip files; that of texts is about 10
_BESIDE = 1 << 28  # unpacked bytes allowed for files of any ratio


def parse_value(data: bytes, where: str) -> Any:
    """Parse JSON of one value by the rules of records: no key twice, no endless nesting.

    Raises:
        ZooError: it is broken; the message begins with `where`.
    """
    try:
        return _DECODER.decode(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ZooError(f"{where}: {_no_utf8(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{where} is not JSON: {_said(error)}.") from None


def _read(path: Path) -> bytes:
    """Read a file, unpacked and converted to UTF-8."""
    packed = path.suffix == ".gz"
    try:
        size = require_file(path) if path.exists() else 0
        most = size * _UNPACKED + _BESIDE if packed else size
        with gzip.open(path) if packed else path.open("rb") as file:
            data = file.read(most + 1) if packed else file.read()
        if packed and len(data) > most:
            raise ZooError(
                f"{path} unpacks to more than {_UNPACKED} times its {size:,} bytes: it is not a file of records."
            )
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.json*")) if path.parent.is_dir() else []
        raise absent(path, f"That folder has: {', '.join(near)}." if near else "") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ZooError(f"{path} cannot be read: {error}") from None
    encoding = json.detect_encoding(data[:4])
    if encoding.startswith("utf-8"):
        return data
    decoder, found = codecs.getincrementaldecoder(encoding)(), bytearray()
    try:
        for at in range(0, len(data), WINDOW):
            found += decoder.decode(data[at : at + WINDOW], final=at + WINDOW >= len(data)).encode()
    except UnicodeError as error:
        raise ZooError(f"{path} begins as {encoding.upper()} and cannot be read on: {error}") from None
    return bytes(found)


def _located(path: Path, data: bytes, lines: bool) -> tuple["array[int]", "array[int]", "array[int]"]:
    """Starts, ends and lines of all records."""
    places = array("q"), array("q"), array("i")
    for place in _places(path, data, lines):
        for some, value in zip(places, place, strict=True):
            some.append(value)
    return places


def _places(path: Path, data: bytes, lines: bool) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and line of each record."""
    form, at = _form(path, data, lines)
    if form == "lines":
        yield from _lines(data)
    else:
        yield from _elements(path, data, at + (form == "list"), "]" if form == "list" else "")


def _form(path: Path, data: bytes, lines: bool) -> tuple[str, int]:
    """Return how records are joined, by the beginning of a file: list, lines or values; and where they begin."""
    at = _behind_blanks(data, 0)
    first = data[at : at + 1]
    if first == b"[":
        return "list", at
    if lines or first == b"":
        return "lines", at
    if first != b"{":
        raise ZooError(
            f"{path}:{_line(data, at)} must begin with '[' or '{{': a file of records is one list, or lines."
        )
    return ("lines" if _is_whole(data[at : at + WINDOW].splitlines()[0]) else "values"), at


def _lines(data: bytes) -> Iterator[tuple[int, int, int]]:
    line, counted = 1, 0
    mark = b"\n" if b"\n" in data else b"\r"
    for found in LINE.finditer(data):
        start, end = _behind_blanks(data, found.start()), found.end()
        if start >= end:
            continue
        line += data.count(mark, counted, start)
        counted = start
        yield start, end, line


def _elements(path: Path, data: bytes, at: int, close: str) -> Iterator[tuple[int, int, int]]:
    """Yield the values of a list, up to the bracket that closes it; without one, values that follow one another."""
    line, counted, number = 1, 0, 0
    text, offset, until, size = "", 0, 0, WINDOW  # decoded window, offset in it, byte of its end, its size
    at = _behind_blanks(data, at)
    while data[at : at + 1] != close.encode() or not close:
        line, counted = line + data.count(b"\n", counted, at), at
        if at >= len(data):
            if close:
                raise ZooError(
                    f"{path}:{line} is not JSON: the file ends before its list is closed; it may be cut off."
                )
            return
        if offset >= len(text):
            text, offset, until = _decoded(path, data, at, size), 0, min(at + size, len(data))
        try:
            _, end = _FINDER.raw_decode(text, offset)
            cut = end == len(text) and text[end - 1] not in '}]"'
        except json.JSONDecodeError as error:
            cut = _is_cut(error, text) or error.pos >= len(text) - NEAR_THE_END
            if not cut or until == len(data):
                below, column = text.count("\n", offset, error.pos), error.pos - text.rfind("\n", 0, error.pos)
                reason = f"{_said(error)} at column {column}, in record {number + 1}."
                hint = " The file may have been cut off there." if _is_cut(error, text) else ""
                raise ZooError(f"{path}:{line + below} is not JSON: {reason}{hint}") from None
        except (ValueError, RecursionError) as error:
            raise ZooError(f"{path}:{line} is not JSON: {_said(error)}, in record {number + 1}.") from None
        if cut and until < len(data):  # the record may continue behind the window: decode a larger one
            size = size * 2 if offset == 0 else WINDOW
            offset = len(text)
            continue
        last = at + len(text[offset:end].encode())
        yield at, last, line
        number, size, at = number + 1, WINDOW, _behind_blanks(data, last)
        if close and data[at : at + 1] == b",":
            at = _behind_blanks(data, at + 1)
        elif close and at < len(data) and data[at : at + 1] != close.encode():
            line += data.count(b"\n", counted, at)
            raise ZooError(f"{path}:{line} is not JSON: ',' or ']' must follow a record; it is record {number}.")
        offset = end + len(data[last:at].decode())
    rest = _behind_blanks(data, at + 1)
    if rest < len(data):
        shown = data[rest : rest + 20].decode(errors="replace")
        raise ZooError(f"{path}:{_line(data, rest)}: {shown!r} follows the list of records. Join lists into one.")


def _decoded(path: Path, data: bytes, at: int, size: int) -> str:
    try:
        return codecs.utf_8_decode(data[at : at + size], "strict", at + size >= len(data))[0]
    except UnicodeDecodeError as error:
        raise ZooError(f"{path}:{_line(data, at + error.start)}: {_no_utf8(error)}") from None


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a JSON text is only truncated, not wrong."""
    return error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip())


def _said(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg.removesuffix(" at")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it has a number of thousands of digits" if "digits" in str(error) else str(error)


def _no_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"the byte 0x{error.object[error.start]:02x} is not UTF-8. Save the file as UTF-8; convert one in Latin-1 by "
        "iconv -f LATIN1 -t UTF-8."
    )


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _behind_blanks(data: bytes, at: int) -> int:
    return BLANK.match(data, at).end()  # type: ignore[union-attr]  # the pattern matches the empty text too


def _line(data: bytes, at: int) -> int:
    return 1 + data.count(b"\n", 0, at)
