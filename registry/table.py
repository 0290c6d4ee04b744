"""The table of components. The dataclass of a component is its only schema: Hydra uses the same one.

Two steps keep names cheap: each folder *declares* a line per component (kind, name, module: three strings), and the
module *registers* its class when it is imported, which happens on first use.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from zoo.registry.conversion import converted, made, require_schema, unnamed_of
from zoo.registry.errors import ZooError, unknown, unknown_kind, unknown_option, wrong_value
from zoo.registry.hooks import asked_of, class_value, require_component, whole
from zoo.registry.options import Option, options_of
from zoo.registry.packages import licence_of, package_of
from zoo.registry.presets import PRESET, Preset, require_presets, written_out
from zoo.registry.source_text import line_in, options_in, presets_in, stated, summary_of
from zoo.registry.values import KINDS

T = TypeVar("T", bound=type)
_VALUES = {"null", "true", "false", "yes", "no", "on", "off", "inf", "nan"}  # to Hydra or YAML
NAMED_CHILDREN = ("pruner", "adapter")  # kinds of which a model may have several, which it holds by their names


@dataclass(frozen=True)
class Entry:
    """A registered component."""

    kind: str
    name: str
    cls: type
    config: type  # the component's own dataclass
    node: type  # the same plus `name`, as stored with Hydra

    @property
    def summary(self) -> str:
        return summary_of(Path(self.file))

    @property
    def paper(self) -> str:
        """The sentence behind `Paper:` in the module's docstring, or nothing."""
        return stated(self._doc, "Paper")

    @property
    def licence(self) -> str:
        """The sentence behind `Licence:` in the module's docstring; else that of the component's package."""
        return licence_of(self._doc, self.package)

    @property
    def _doc(self) -> str:
        return inspect.getdoc(inspect.getmodule(self.cls)) or ""

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities that the class declares; those that depend on the config are known once it is built."""
        return self._words("needs")

    @property
    def provides(self) -> frozenset[str]:
        return self._words("provides")

    @property
    def destroys(self) -> frozenset[str]:
        return self._words("destroys")

    @property
    def choices(self) -> Mapping[str, Sequence[Any]]:
        """Option -> values that the check may offer."""
        found: Mapping[str, Sequence[Any]] = class_value(self.kind, self.cls, "choices")
        return found

    @property
    def presets(self) -> Mapping[str, Preset]:
        """Name -> values of options, with their source."""
        found: Mapping[str, Preset] = class_value(self.kind, self.cls, "presets")
        return found

    @property
    def streams(self) -> bool:
        """Whether it can be built on the meta device and get its weights afterwards."""
        return bool(class_value(self.kind, self.cls, "streams"))

    def _words(self, hook: str) -> frozenset[str]:
        return capabilities(class_value(self.kind, self.cls, hook))

    @property
    def file(self) -> str:
        return inspect.getsourcefile(self.cls) or "?"

    @property
    def line(self) -> int:
        return inspect.getsourcelines(self.cls)[1]

    @property
    def package(self) -> str:
        """Name of the installed distribution that owns the component, or of its top module where there is none."""
        return package_of(self.cls.__module__)

    @property
    def options(self) -> list[Option]:
        return options_of(self.config)


EMPTY_SLOT = "_none_"  # the option behind `projector=null`: Hydra's command line cannot choose null from a group
SLOT_KINDS = tuple(kind for kind in KINDS if kind != "distiller")  # a distiller belongs to a stage, not to the run

_WITH_WEIGHTS = ("vision", "llm")  # kinds whose presets are parts with weights
_declared: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}  # kind -> name -> module
_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}


def group_of(kind: str) -> str:
    """Return the config group of a kind, also its key in the config of a run: its name, but `data` for data sets."""
    return "data" if kind == "dataset" else kind


def kind_of(group: str) -> str | None:
    """Return the kind whose members a config group holds, or None."""
    kind = "dataset" if group == "data" else group
    return kind if kind in SLOT_KINDS else None


def declare(kind: str, name: str, module: str) -> None:
    """Name the module of a component without importing it; the module registers the component on first use.

    Raises:
        ZooError: the kind is unknown, or another module has a component of that name.
    """
    if kind not in _declared:
        raise unknown_kind("kind of component", kind, KINDS)
    if name in _entries[kind]:
        _require_owner(kind, name, _entries[kind][name].cls.__module__, module)
    _require_owner(kind, name, _declared[kind].get(name), module)
    _declared[kind][name] = module


def _require_owner(kind: str, name: str, owner: str | None, module: str) -> None:
    """Refuse a name whose component is in another module than `module`."""
    if owner and owner != module:
        file = source_of(kind, name)
        at = f"{file}:{line_in(file, kind, name)}" if file else owner
        raise ZooError(f"{kind} {name!r} is taken: {owner} in {at}.")


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: make a component available under `name`, in Python and in Hydra.

    The class takes its dataclass as `config` and what the composer derives (widths, grids) as keyword-only arguments;
    it is given those that its signature names.

    Raises:
        ZooError: the kind is unknown, the name is not a plain word, is one of modules, or is taken; the class lacks a
            method of its kind, or has one that looks like a misspelt hook.
        TypeError: `__init__` does not annotate `config` with a dataclass, or that dataclass has a field `name`.
    """
    if kind not in _entries:
        raise unknown_kind("kind of component", kind, KINDS)
    if not re.fullmatch(r"[a-z0-9_]*[a-z][a-z0-9_]*", name):
        raise ZooError(f"A component's name is lower case letters, digits and underscores, got {name!r}.")
    require_word(kind, name)
    if kind in NAMED_CHILDREN:
        require_child_name(kind, name)

    def add(cls: T) -> T:
        config: Any = get_type_hints(cls.__init__).get("config")  # type: ignore[misc]
        if not isinstance(config, type) or not is_dataclass(config):
            raise TypeError(f"{cls.__qualname__}.__init__ must annotate `config` with a dataclass, got {config!r}.")
        first = list(inspect.signature(cls.__init__).parameters.values())[1]  # type: ignore[misc]
        if first.name != "config" or first.kind is first.KEYWORD_ONLY:
            raise TypeError(f"{cls.__qualname__}.__init__ must take `config` first: (self, config: ..., *, ...).")
        if "name" in {f.name for f in fields(config)}:
            raise TypeError(f"{config.__qualname__} must not have a field `name`: it holds the registry name.")
        require_component(kind, name, cls)
        require_schema(config, f"{kind} {name!r}")
        if (presets := class_value(kind, cls, "presets")) or PRESET in {f.name for f in fields(config)}:
            require_presets(presets, f"{kind} {name!r}", options_of(config))
        taken = _entries[kind].get(name)
        # The same class again is a module that was reloaded, as notebooks do.
        if taken and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ZooError(f"{kind} {name!r} is taken: {taken.cls.__qualname__} in {taken.file}:{taken.line}.")
        if not taken:
            _require_owner(kind, name, _declared[kind].get(name), cls.__module__)
        node = make_dataclass(
            config.__name__,
            [("name", str, field(default=name, kw_only=True))],
            bases=(config,),
            namespace={"__module__": config.__module__, "__doc__": config.__doc__},
        )
        _entries[kind][name] = Entry(kind, name, cls, config, node)
        return cls

    return add


def require_word(kind: str, name: str) -> None:
    """Refuse a name that overrides or YAML read as a value: `pruner=null` empties the slot.

    Raises:
        ZooError: with the name.
    """
    if name in _VALUES:
        raise ZooError(f"{kind} {name!r}: in {group_of(kind)}={name} the word is a value, not a name; choose another.")


def require_child_name(kind: str, name: str) -> None:
    """Refuse a name under which a torch module holds no child: that of an attribute of modules, such as `train`.

    Raises:
        ZooError: with the name.
    """
    from torch import nn  # listing names goes without

    if hasattr(nn.ModuleDict(), name):
        raise ZooError(f"{kind} {name!r}: every torch module has an attribute of that name; choose another.")


def names(kind: str, pattern: str = "*") -> list[str]:
    """Return the registered names of a kind that match a shell pattern, sorted. Imports nothing."""
    if kind not in _declared:
        raise unknown_kind("kind of component", kind, KINDS)
    return sorted(n for n in {*_declared[kind], *_entries[kind]} if fnmatchcase(n, pattern))


def get(kind: str, name: str) -> Entry:
    """Return the entry called `name`, importing its module where that has not happened yet."""
    if kind not in _entries:
        raise unknown_kind("kind of component", kind, KINDS)
    if name not in _entries[kind] and (module := _declared[kind].get(name)):
        try:
            import_module(module)
        except ZooError:
            raise
        except Exception as error:  # of any kind: it may be a plugin's
            reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise ZooError(f"{kind} {name!r} cannot be imported from {module}: {reason}") from error
        if name not in _entries[kind]:
            there = [n for n, e in _entries[kind].items() if e.cls.__module__ == module]
            raise unknown(f"{kind} in {module}, where it is declared to be,", name, there)
    if name not in _entries[kind]:
        raise unknown(kind, name, [*names(kind), *parts_of(kind)])
    return _entries[kind][name]


def entries() -> list[Entry]:
    """Return every component, importing all of their modules (torch, but no backend)."""
    return [get(kind, name) for kind in KINDS for name in names(kind)]


def config_of(kind: str, node: Mapping[str, Any]) -> tuple[Entry, Any]:
    """Check `node` against the schema of the component it names; the typed config is the result.

    A plain mapping may come from a downloaded file, so interpolations in it are refused.

    Raises:
        ZooError: the name or a field does not exist, a value has the wrong type, or a required one is missing.
    """
    omegaconf = sys.modules.get("omegaconf")  # not imported here: values of the right types do without it
    of_hydra = omegaconf is not None and isinstance(node, omegaconf.DictConfig)
    plain: Any = omegaconf.OmegaConf.to_container(node, resolve=True) if omegaconf and of_hydra else dict(node)
    if not of_hydra:
        refuse_code(plain, f"the config of a {kind}")
    if "name" not in plain:
        raise ZooError(f"A {kind} config needs a `name`. Available: {', '.join(names(kind))}.")
    plain = unnamed(kind, plain)
    entry = get(kind, plain["name"])
    known, owner = {f.name for f in fields(entry.node)}, f"{kind} {entry.name!r}"
    plain = written_out(plain, owner, entry.presets) if PRESET in plain else plain
    for key in plain:
        if key not in known:
            raise unknown_option(owner, str(key), entry.options)
    try:
        typed = made(entry.node, plain)
        for f in fields(entry.node):
            require_finite(getattr(typed, f.name), f.name)
    except ZooError as error:
        raise ZooError(f"{owner}: {error}") from error
    except _omegaconf_error() as error:
        key = str(error.full_key or error.key or "").partition("[")[0]
        message = (error.msg or str(error)).splitlines()[0]
        raise wrong_value(owner, key, entry.options, message) from error
    return entry, typed


def parts_of(kind: str) -> dict[str, str]:
    """Return the presets of a kind that may be named in place of a component: name -> component.

    They are those of encoders and language models, each of which is one part with its weights.
    """
    if kind not in _WITH_WEIGHTS:
        return {}
    return {preset: name for name in names(kind) for preset in source_presets(kind, name)}


def unnamed(kind: str, node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a node whose name may be a preset's (`dinov2_small`) with the component's name and the preset."""
    name = node.get("name")
    if kind not in _WITH_WEIGHTS or not isinstance(name, str) or name in names(kind):
        return node
    component = parts_of(kind).get(name)
    return node if component is None else {PRESET: name, **node, "name": component}


def _omegaconf_error() -> Any:
    """Return the base class of OmegaConf's errors; while it is not imported, a tuple of none."""
    return getattr(sys.modules.get("omegaconf.errors"), "OmegaConfBaseException", ())


def completed(kind: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node with all options of its component as plain values, checked as `config_of` does."""
    entry, _ = config_of(kind, node)
    node = unnamed(kind, node)
    whole = written_out(node, f"{kind} {entry.name!r}", entry.presets) if PRESET in node else node
    return converted(entry.node, whole)


def build(kind: str, node: Mapping[str, Any], **derived: Any) -> Any:
    """Build the component that `node` names; `derived` has what follows from other parts (widths, grids).

    A component is given the derived values that its `__init__` names, and no others.
    """
    entry, typed = config_of(kind, node)
    config = unnamed_of(typed, entry.config)
    accepted = asked_of(entry.cls)
    named = {k: v for k, v in derived.items() if k in accepted}
    for wanted in list(accepted.values())[1:]:
        of_name = wanted.kind in (wanted.POSITIONAL_OR_KEYWORD, wanted.KEYWORD_ONLY)
        if of_name and wanted.default is wanted.empty and wanted.name not in named:
            what = f"value for {entry.cls.__qualname__}.__init__ of {kind} {entry.name!r}"
            raise unknown(what, wanted.name, derived)
    return whole(kind, entry.cls(config, **named), entry.name)


def require_finite(value: Any, name: str) -> None:
    """Refuse NaN and infinities, which pass checks such as `if value < low`.

    Raises:
        ZooError: the value, or one in its lists and mappings, is NaN or infinite.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ZooError(f"{name} must be a finite number, got {value}.")
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for item in items:
        require_finite(item, name)


def refuse_code(value: Any, where: str) -> None:
    """Refuse what could name code or read the environment in a config that may come from elsewhere.

    Raises:
        ZooError: a key such as `_target_`, or a string with an interpolation.
    """
    rest = [value]  # a list in place of recursion: files may be nested deeper than Python's stack
    while rest:
        item = rest.pop()
        if isinstance(item, Mapping):
            for key in item:
                if str(key) in {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}:
                    raise ZooError(f"{where} holds {key!r}: configs name registered components, never code.")
            rest += item.values()
        elif isinstance(item, (list, tuple)):
            rest += item
        elif isinstance(item, str) and "${" in item:
            raise ZooError(f"{where} holds the interpolation {item!r}: write the value itself.")


def require_revision(revision: str | None) -> str | None:
    """Return the branch, tag or commit of a hub repository; None for the newest.

    Raises:
        ZooError: it is neither. It becomes part of a path in the hub's cache, which `..` would leave.
    """
    if not revision:
        return None
    plain = isinstance(revision, str) and re.fullmatch(r"\w[\w.+-]*(/[\w.+-]+)*", revision)
    if not plain or ".." in revision:
        raise ZooError(f"revision must be a branch, a tag or a commit, got {revision!r}.")
    return revision


def capabilities(value: Any) -> frozenset[str]:
    """Return what a class states as one of its capabilities; nothing where that depends on the config."""
    return frozenset(value) if isinstance(value, (set, frozenset, tuple, list)) else frozenset()


def module_of(kind: str, name: str) -> str:
    """Return the module that a component is declared to be in, while it is not imported; else nothing."""
    return "" if name in _entries[kind] else _declared[kind].get(name, "")


def source_of(kind: str, name: str) -> Path | None:
    """Return the file of a component; without importing it where it is only declared."""
    if entry := _entries[kind].get(name):
        return Path(entry.file)
    spec = find_spec(_declared[kind][name])
    return Path(spec.origin) if spec and spec.origin else None


def source_options(kind: str, name: str) -> list[Option]:
    """Return the options of a component without importing it: of its dataclass if that is here, else from the text."""
    if entry := _entries[kind].get(name):
        return entry.options
    file = source_of(kind, name)
    return options_in(file, kind, name) if file else []


def source_presets(kind: str, name: str) -> Mapping[str, Preset]:
    """Return the presets of a component; it is imported only where its text does not show them."""
    if (entry := _entries[kind].get(name)) is None and (file := source_of(kind, name)):
        found = presets_in(file, kind, name)
        if found is not None:
            return found
    return (entry or get(kind, name)).presets
