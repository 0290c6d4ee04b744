"""JSON records of a file, held as one block of bytes, and the line where each of them begins.

A list of a million dicts is copied page by page into every loader worker, because counting references writes to it. One
`bytes` object and two arrays of numbers are shared as they are; a record is parsed when it is asked for.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.absent import absent
from zoo.registry import ZooError


class RecordFile:
    """The records of a `.json` (one list), `.jsonl` or gzipped file, by index."""

    def __init__(self, path: Path) -> None:
        """Read the file; a broken record is found when it is asked for.

        Raises:
            ZooError: the file does not exist or is no such file.
        """
        self.path = path
        text = _read(path)
        suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
        if suffix == ".json":
            pieces = _pieces_of_list(path, text)
        elif suffix in {".jsonl", ".ndjson"}:
            pieces = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        else:
            raise ZooError(f"{path} is no file of records: allowed are .json, .jsonl and the same with .gz.")
        encoded = [piece.encode() for _, piece in pieces]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._lines = np.array([number for number, _ in pieces], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Parse a record.

        Raises:
            ZooError: it is broken; the message names file and line.
        """
        try:
            record = json.loads(self._block[self._ends[index] : self._ends[index + 1]])
        except (ValueError, RecursionError) as error:
            raise ZooError(f"{self.where(index)} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ZooError(f"{self.where(index)} holds a {type(record).__name__}; a record is an object with fields.")
        return record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """Name the place of a record for a message: `file:line`."""
        return f"{self.path}:{self._lines[index]}"


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.json*")) if path.parent.is_dir() else []
        raise absent(path, f"That folder has: {', '.join(near)}." if near else "") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ZooError(f"{path} cannot be read: {error}") from None


def _pieces_of_list(path: Path, text: str) -> list[tuple[int, str]]:
    """Cut the elements of one JSON list out of its text, each with the number of the line where it begins."""
    decoder, pieces, line, counted = json.JSONDecoder(), [], 1, 0

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at = skip(0)
    if text[at : at + 1] != "[":
        raise ZooError(f"{path}:1 must begin with '[': a .json file holds one list of records.")
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ZooError(f"{path}:{getattr(error, 'lineno', line)} is no JSON: {error}") from None
        pieces.append((line, text[at:end]))
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise ZooError(f"{path}:{line} is no JSON: ',' or ']' must follow a record.")
    return pieces
