"""Files that travel: configs, indexes and lists that somebody else may have written, read as plain values.

Each is a regular file (a FIFO or a device could be read for ever), of a size that such a file has, and holds no more
than text, numbers, lists and mappings. What names code or reads the environment is refused before anything acts on it.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from zoo.registry.core import refuse_code
from zoo.registry.errors import ZooError

CONFIG = 4 << 20  # bytes: of a config
INDEX = 64 << 20  # of an index of weights; 140,000 tensors in a thousand shards take 13 MB
RUN = 1 << 20  # of a run's config.yaml, which a few kilobytes are usual for


def require_file(path: Path, most: int | None = None) -> int:
    """Return the bytes of a file.

    Raises:
        ZooError: it is not there, is no regular file, or is longer than `most`.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ZooError(f"{str(path)!r} does not exist.") from error
    except OSError as error:
        raise ZooError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    return _plain_size(path, found, most)


def _plain_size(path: Path, found: os.stat_result, most: int | None) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise ZooError(f"{str(path)!r} is {kind}, where a file is needed.")
    if most is not None and found.st_size > most:
        raise ZooError(f"{str(path)!r} has {found.st_size:,} bytes; at most {most:,} are read.")
    return found.st_size


def read_text(path: Path, most: int = CONFIG) -> str:
    """Read a text file in UTF-8.

    Raises:
        ZooError: it is not there, is no regular file, is too long, or is no text.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody who writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:  # noqa: PTH123  a handle has no path
            _plain_size(path, os.fstat(handle), most)
            data = file.read(most + 1)
    except OSError as error:
        raise ZooError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ZooError(f"{str(path)!r} is no text in UTF-8: {error}.") from error


def read_json(path: Path, most: int = CONFIG) -> Any:
    """Read a JSON file.

    Raises:
        ZooError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text(path, most))
    except RecursionError as error:
        raise ZooError(f"{str(path)!r} is nested too deep.") from error
    except ValueError as error:
        if isinstance(error, ZooError):
            raise
        raise ZooError(f"{str(path)!r} is no JSON: {error}") from error


def read_run_config(path: Path) -> dict[str, Any]:
    """Read the config.yaml of a run, which holds resolved values: no alias, no tag, no interpolation, no code.

    Raises:
        ZooError: it cannot be read, or holds one of these.
    """
    import yaml
    from omegaconf._utils import get_yaml_loader

    class Plain(get_yaml_loader()):  # type: ignore[misc]
        """Aliases are refused: nine of nine of nine make a few lines fill the memory."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ZooError(f"{str(path)!r} holds the alias '*{self.peek_event().anchor}': write the value itself.")
            return super().compose_node(parent, index)

    try:
        content = yaml.load(read_text(path, RUN), Loader=Plain)
    except ZooError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ZooError(f"{str(path)!r} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise ZooError(f"{str(path)!r} cannot be read: it holds a {type(content).__name__}, not a mapping.")
    refuse_code(content, repr(str(path)))
    return content
