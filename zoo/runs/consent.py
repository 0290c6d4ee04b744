"""Remember which plugins the user named for a run, on the machine where the run was started.

A plugin is code, and the folder of a run may come from elsewhere, so that plugins are never loaded for its config.yaml
alone. Starting a run notes their names outside of the folder: in the user's state folder, under the path of the run and
a random number that the run holds. A folder that was copied, or that replaced another one, has no note, and its plugins
must be named again.
"""

import hashlib
import os
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from zoo.registry import ZooError, plugins
from zoo.registry.foreign import read_json, read_text
from zoo.storage.atomic import write_json, write_text

ID = "run.id"  # file in the folder of a run


def remember(run: Path, named: Mapping[str, str]) -> str | None:
    """Note the plugins of a run that starts.

    Args:
        run: its folder.
        named: name of a plugin -> where its file lies; empty for a module.

    Returns:
        A note for the user if the names could not be stored, so that resuming will ask for them; else None.
    """
    if not named:
        return None
    number = secrets.token_hex(16)
    write_text(run / ID, number + "\n")
    note = _note(run, number)
    try:
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(note, {"run": str(run.resolve()), "plugins": dict(named)})
    except OSError as error:
        return f"Resuming this run will ask for its plugins: {str(note.parent)!r} cannot be written ({error.strerror})."
    return None


def agreed(run: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Return name -> place of the plugins to load for a run that is resumed.

    Args:
        run: its folder.
        wanted: the names in its config.yaml.

    Raises:
        ZooError: one was named neither when the run was started here, nor for this process.
    """
    absent = [name for name in wanted if not plugins.is_loaded(name)]
    known = _noted(run) if absent else {}
    if unknown := [name for name in absent if name not in known]:
        raise ZooError(
            f"The run {str(run)!r} asks for the plugins {', '.join(map(repr, unknown))}. That is code, and this run "
            "was not started with it here. If you trust it, name it: "
            f"zoo train resume={shlex.quote(str(run))} plugins=[{','.join(unknown)}]."
        )
    return {name: known[name] for name in absent}


def forget(run: Path) -> None:
    """Remove the note of a finished run."""
    with suppress(OSError, ZooError):
        _note(run, _number(run)).unlink(missing_ok=True)


def _noted(run: Path) -> dict[str, str]:
    try:
        found = read_json(_note(run, _number(run)))["plugins"]
        return {str(name): str(place) for name, place in found.items()}
    except (ZooError, KeyError, TypeError, AttributeError):
        return {}


def _number(run: Path) -> str:
    number = read_text(run / ID, 100).strip()
    # The file may come from elsewhere, and its content becomes part of a path's key.
    if not re.fullmatch(r"[0-9a-f]{32}", number):
        raise ZooError(f"{str(run / ID)!r} does not hold the number of a run.")
    return number


def _note(run: Path, number: str) -> Path:
    """Return the path of a run's note in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if Path(state).is_absolute() else Path("~/.local/state").expanduser()
    # The path alone would trust a folder that was moved there; the number alone, a copy of the folder.
    key = hashlib.sha256(f"{run.resolve()}\n{number}".encode()).hexdigest()
    return root / "zoo" / "runs" / f"{key[:40]}.json"
