"""Components from other packages and files, loaded before a config is composed; one that fails leaves the rest usable.

A plugin is an installed package with an entry point in the group `zoo.plugins`, a module by its dotted name, or a
Python file (`./my_pruner.py`). Loading it runs its code, so a plugin is only ever named by a person: on the command
line, in a recipe, in `ZOO_PLUGINS`, or by installing it. Plugins that a saved model or a run's folder lists are never
loaded on that account: the user is asked to name them; for own runs, `zoo.runs.consent` remembers. A package that
`declare`s its components, as our own folders do, costs no import of torch when names are listed.
"""

import copyreg
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from zoo.registry.errors import ZooError
from zoo.registry.packages import FILE_PLUGIN
from zoo.registry.table import names
from zoo.registry.values import KINDS

ENTRY_POINT_GROUP = "zoo.plugins"


@dataclass
class Plugin:
    """A plugin, and the outcome of loading it."""

    name: str  # as a person writes it: package, module or file
    origin: str  # installed | ZOO_PLUGINS | named
    error: str = ""  # empty: it loaded
    adds: list[str] = field(default_factory=list)  # kind/name of the components it brought
    place: str = ""  # of a file: where it lies
    content: str = ""  # of a file: its SHA-256 when it was loaded

    @property
    def ok(self) -> bool:
        return not self.error


_plugins: dict[str, Plugin] = {}


def status() -> list[Plugin]:
    """Return every plugin that was tried in this process, in order."""
    return list(_plugins.values())


def failed() -> list[Plugin]:
    """Return the plugins that raised."""
    return [p for p in _plugins.values() if not p.ok]


def loaded() -> list[str]:
    """Return the names of the plugins that loaded; a saved model lists them."""
    return [p.name for p in _plugins.values() if p.ok]


def is_loaded(name: str) -> bool:
    """Whether a plugin that a saved model lists is loaded, by its name or as a file of the same name."""
    return any(p.ok and (p.name == name or Path(p.name).name == Path(name).name) for p in _plugins.values())


def load_installed() -> list[Plugin]:
    """Load the entry points and what `ZOO_PLUGINS` names. Each is tried once per process."""
    for point in _points(tuple((place, _changed(place)) for place in sys.path)):
        name = point.dist.name if point.dist else point.name
        _load(name if name not in _plugins else f"{name}:{point.name}", "installed", point)
    load([p.strip() for p in os.environ.get("ZOO_PLUGINS", "").split(",") if p.strip()], "ZOO_PLUGINS")
    return status()


@lru_cache(maxsize=4)
def _points(_: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """The entry points of what is installed. Cached by the folders of `sys.path`: every config asks, at 4 ms each."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _changed(place: str) -> int:
    """When something was last installed in a folder or removed from it, in ns; 0: there is no such folder."""
    try:
        return Path(place).stat().st_mtime_ns
    except OSError:
        return 0


def load(wanted: Iterable[str] | Mapping[str, str], origin: str = "named") -> list[Plugin]:
    """Load modules and files; a failure is recorded, not raised.

    Args:
        wanted: names; or name -> where the file of that name lies, for one that was named in another folder.
        origin: how they came to be named.
    """
    places = wanted if isinstance(wanted, Mapping) else {}
    return [_load(name, origin, place=places.get(name, "")) for name in wanted]


def require(wanted: Iterable[str] | Mapping[str, str]) -> None:
    """Load modules and files that a person named for this command.

    Raises:
        ZooError: one of them does not load: what it raised, and in which line.
    """
    for plugin in load(wanted):
        if not plugin.ok:
            raise ZooError(f"Plugin {plugin.name!r} does not load: {plugin.error}")


def load_words(words: Iterable[str]) -> list[str]:
    """Load what `plugins=[...]` among the words of a command names, and return the other words.

    Raises:
        ZooError: one of them does not load.
    """
    words = list(words)
    values = [word.partition("=")[2] for word in words if word.startswith("plugins=")]
    names = [name.strip(" \"'") for value in values for name in value.strip("[]").split(",")]
    require(dict.fromkeys(filter(None, names)))
    return [word for word in words if not word.startswith("plugins=")]


def added() -> list[str]:
    """Return kind/name of the components of the plugins that were named by word."""
    return [word for p in _plugins.values() if p.ok and p.origin == "named" for word in p.adds]


def named() -> dict[str, str]:
    """Return name -> place of what a person named in this process, by word or in `ZOO_PLUGINS`; a module has none."""
    return {p.name: p.place for p in _plugins.values() if p.origin != "installed"}


def _is_file(name: str) -> bool:
    return name.endswith(".py") or "/" in name


def _load(name: str, origin: str, point: EntryPoint | None = None, place: str = "") -> Plugin:
    key = f"{name}={point.value}" if point else name
    if (known := _plugins.get(key)) and (known.ok or origin == "installed"):
        _note_change(known)
        return known
    if not point and _is_file(name):
        place = place or str(Path(name).expanduser().resolve())
    plugin = _plugins[key] = Plugin(name, origin, place=place, content=_content(place))
    before = _components()
    try:
        if point:
            point.load()
        elif place:
            _load_file(Path(place))
        else:
            import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may even call sys.exit: the rest must work
        first = (str(error).strip() or "no message").splitlines()[0]
        plugin.error = f"{type(error).__name__}: {first}{_line_of(error)}{_nearby(name, place, error)}"
    plugin.adds = sorted(_components() - before)
    return plugin


def _content(place: str) -> str:
    """Return the SHA-256 of a file, or nothing where there is none."""
    try:
        return sha256(Path(place).read_bytes()).hexdigest() if place else ""
    except OSError:
        return ""


def _note_change(plugin: Plugin) -> None:
    """Warn where a file is another than was loaded: models of this process, and runs, have the classes that it had."""
    if plugin.ok and plugin.content and (now := _content(plugin.place)) and now != plugin.content:
        plugin.content = now  # once for each change
        warnings.warn(
            f"The plugin {plugin.name!r} was changed since it was loaded, and this process goes on with what it "
            "loaded: start another one (a notebook: restart the kernel).",
            stacklevel=4,
        )


def _line_of(error: BaseException) -> str:
    """Return the last line of a plugin's own files that raised; empty where none ran, as for a SyntaxError."""
    frames = traceback.extract_tb(error.__traceback__)
    # What comes first is this file and importlib; what raises may be a library that the plugin calls.
    start = next((f.filename for f in frames if f.filename != __file__ and not _of_imports(f.filename)), "")
    folder = str(Path(start).parent)
    lines = [f for f in frames if start and str(Path(f.filename).parent) == folder]
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""


def _nearby(name: str, place: str, error: BaseException) -> str:
    """Return how to name a module that is in the working folder, where the command `zoo` does not look for modules."""
    top = name.partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        return ""
    beside = Path(place).parent / str(error.name).partition(".")[0] if place else None
    if beside is not None and (beside.is_dir() or beside.with_suffix(".py").is_file()):
        return f". {beside.name!r} lies beside the file, where Python does not look: set PYTHONPATH={beside.parent}"
    if error.name != top:
        return ""
    if Path(f"{top}.py").is_file():
        return f". A file is named by its path: ./{top}.py"
    found = ". It is in the working folder: install it (pip install -e .), or set PYTHONPATH=."
    return found if Path(top).is_dir() else ""


def _of_imports(filename: str) -> bool:
    return filename.startswith("<frozen importlib") or Path(filename).parent.name in ("importlib", "metadata")


def _load_file(path: Path) -> None:
    """Run a Python file as a module of its own, so that two files of the same name do not collide."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    name = f"{FILE_PLUGIN}{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:  # registering its components twice would clash with themselves
        return
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _say_where(module)


def _say_where(module: ModuleType) -> None:
    """Let instances of a file's classes be unpickled where it is not loaded: in loader workers that are spawned."""
    for cls in list(vars(module).values()):
        own = isinstance(cls, type) and cls.__module__ == module.__name__
        if own and cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__:
            cls.__reduce_ex__ = _with_place  # type: ignore[method-assign]


def _with_place(part: Any, protocol: Any) -> Any:
    made, cls = object.__reduce_ex__(part, protocol), type(part)
    module = sys.modules.get(cls.__module__)
    if module is None or not cls.__module__.startswith(FILE_PLUGIN):
        return made
    if made[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]  # the stubs lack it
        return made
    return _again, (module.__file__, cls.__module__, cls.__qualname__, *made[1][1:]), *made[2:]


def _again(place: str, module: str, name: str, *args: Any) -> Any:
    if module not in sys.modules:
        require({place: place})
    cls = attrgetter(name)(sys.modules[module])
    return cls.__new__(cls, *args)


def _components() -> set[str]:
    return {f"{kind}/{name}" for kind in KINDS for name in names(kind)}
