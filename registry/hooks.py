"""Hold a component to the base class of its kind: misspelt hooks, missing methods, classes without a base.

A class that does not derive from its base is completed: the hooks that it lacks are put on it, with their defaults. It
is not wrapped or replaced, so pickles, copies, subclasses and names of weights stay as they were.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

from zoo.registry.data_parts import Dataset, Records, StreamingDataset, Task
from zoo.registry.errors import ZooError
from zoo.registry.parts import (
    Adapter,
    Distiller,
    Encoder,
    InsidePruner,
    LanguageModel,
    Layout,
    ModelPart,
    Part,
    Projector,
    Pruner,
)

BASES: dict[str, type[Part]] = {
    "vision": Encoder,
    "pruner": Pruner,
    "projector": Projector,
    "layout": Layout,
    "llm": LanguageModel,
    "adapter": Adapter,
    "distiller": Distiller,
    "dataset": Records,
    "task": Task,
}
# Kinds of several forms, the special ones first.
_FORMS: dict[str, tuple[type[Part], ...]] = {
    "pruner": (InsidePruner, Pruner),
    "dataset": (Dataset, StreamingDataset, Records),
}
_CALLED = frozenset({"vision", "pruner", "projector", "layout", "distiller"})  # kinds whose parts are called
_CUTOFF = 0.8  # of difflib's ratio: num_token, excludes_, aux_loss; not `scale` for `start`
_REQUIRED = object()  # of an attribute that has no default
P = TypeVar("P")


def base_of(kind: str, cls: type) -> type[Part]:
    """Return the base class of a component; for a class without one, the base whose methods it has."""
    known = [base for base in _FORMS.get(kind, (BASES[kind],)) if base in cls.__mro__]
    if known:
        return known[0]
    if kind == "pruner" and (hasattr(cls, "attach") or hasattr(cls, "begin")):
        return InsidePruner
    if kind == "dataset":
        return StreamingDataset if hasattr(cls, "stream") else Dataset
    return BASES[kind]


def asked_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class; where `__init__` hands on `**kwargs`, those of the class behind it as well."""
    asked = dict(inspect.signature(cls).parameters)
    for base in [c for c in cls.__mro__ if "__init__" in vars(c)]:
        found = dict(list(inspect.signature(vars(base)["__init__"]).parameters.items())[1:])
        if base.__module__.partition(".")[0] != "torch":
            asked |= {name: parameter for name, parameter in found.items() if name not in asked}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()):
            break
    return asked


@cache
def hooks_of(base: type[Part]) -> dict[str, Any]:
    """Return the public members of a base: name -> its default, or `_REQUIRED`."""
    found: dict[str, Any] = {}
    for cls in reversed([c for c in base.__mro__ if issubclass(c, Part)]):
        found |= dict.fromkeys(vars(cls).get("__annotations__", ()), _REQUIRED)
        found |= vars(cls)
    return {n: v for n, v in found.items() if not n.startswith("_")}


def require_component(kind: str, name: str, cls: type) -> None:
    """Refuse a class that lacks a method of its kind, or has one that looks like a misspelt hook.

    Raises:
        ZooError: with file and line, what is needed, and the nearest name.
    """
    base = base_of(kind, cls)
    _require_base(kind, name, cls)
    mine = _own_classes(cls)
    own = {n: v for c in mine for n, v in vars(c).items() if not n.startswith("_")}
    ours = [c for c in reversed(cls.__mro__) if c not in mine and c.__module__.partition(".")[0] == "zoo"]
    hooks = {n: v for c in ours for n, v in vars(c).items() if not n.startswith("_")} | hooks_of(base)
    for attribute, value in own.items():
        if attribute in hooks:
            continue
        alike = [n for n, v in hooks.items() if n not in own and _is_method(v) == _is_method(value)]
        if near := get_close_matches(attribute, alike, n=1, cutoff=_CUTOFF):
            raise ZooError(
                f"{kind} {name!r}: {cls.__qualname__}.{attribute} ({_where(value, cls)}) looks like a misspelt hook. "
                f"Did you mean {near[0]!r}? What is the class's own begins with an underscore, or has another name."
            )
    if cls.__new__ is object.__new__:  # else `__new__` may return another class, which is checked when it is built
        _require_methods(kind, name, cls, base)
    _require_forms(kind, name, cls, base, own)
    if base not in cls.__mro__ and not _is_module(cls):
        # At registration, not when built: a loader worker unpickles an instance and never builds one.
        _complete(kind, cls, base, cls)


def whole(kind: str, part: P, name: str = "") -> P:
    """Check that a part has every hook of its kind, and give a class without our base the defaults; return the part.

    Raises:
        ZooError: an attribute without a default is missing, a hook has another form or is hidden by a child module, or
            an attribute looks like a misspelt hook.
    """
    cls: Any = type(part)
    base = base_of(kind, cls)
    set_by_init: dict[str, Any] = getattr(part, "__dict__", {})
    if _is_module(cls) and "_modules" not in set_by_init:
        raise ZooError(
            f"{kind} {name!r}: {cls.__qualname__}.__init__ ({_where(cls, cls)}) calls no super().__init__()."
        )
    _require_forms(kind, name, cls, base, set_by_init)
    _refuse_misspelt(kind, name, cls, base, set_by_init)
    modules = set_by_init.get("_modules") or {}
    if taken := next((n for n in modules if n in hooks_of(base) and hasattr(cls, n)), None):
        raise ZooError(
            f"{kind} {name!r}: {cls.__qualname__} ({_where(cls, cls)}) keeps a module as {taken!r}, which is the name "
            "of a hook: give it another."
        )
    if base not in cls.__mro__:
        _require_methods(kind, name, cls, base)
        _complete(kind, cls, base, part)
    for hook, default in hooks_of(base).items():
        if default is _REQUIRED and not hasattr(part, hook):
            raise ZooError(
                f"{kind} {name!r}: {cls.__qualname__} ({_where(cls, cls)}) sets no {hook!r}, which every {kind} has: "
                f"{base.__annotations__.get(hook, 'a value')}."
            )
    return part


def _complete(kind: str, cls: Any, base: type[Part], having: Any) -> None:
    """Set on a class the hooks that it lacks, or that an instance of it lacks.

    A module is completed by its instance: a child module may have the name of a hook, and a class attribute hides it.
    """
    for hook, default in hooks_of(base).items():
        if getattr(default, "__isabstractmethod__", False):  # of a pruner inside the LLM: a plain one does nothing
            default = hooks_of(BASES[kind]).get(hook, default)
        if default is not _REQUIRED and not hasattr(having, hook):
            setattr(cls, hook, default)
    base.register(cls)  # isinstance(part, Pruner) then holds for it too


def class_value(kind: str, cls: type, hook: str) -> Any:
    """Return the value of a hook of the class; where it sets none, the default of the base."""
    return getattr(cls, hook, getattr(base_of(kind, cls), hook, None))


def _require_methods(kind: str, name: str, cls: type, base: type[Part]) -> None:
    if kind == "pruner" and base not in cls.__mro__:
        base = Pruner  # of a class without a base, `attach` is not asked for
    missing = [n for n in sorted(base.__abstractmethods__) if n != "forward" and not _has(cls, n)]
    if kind in _CALLED and not _is_called(cls):
        missing.append("forward")
    if missing:
        first = getattr(base, missing[0])
        raise ZooError(
            f"{kind} {name!r}: {cls.__qualname__} ({_where(cls, cls)}) has no method "
            f"{', '.join(map(repr, missing))}, which every {kind} needs. "
            f"{missing[0]}{inspect.signature(first)}: {(inspect.getdoc(first) or '').splitlines()[0]}"
        )


def _require_base(kind: str, name: str, cls: type) -> None:
    """Refuse the base class of another kind, and a part of the model without `nn.Module`."""

    def said() -> str:  # finding the line reads and parses the file: only for an error
        return f"{kind} {name!r}: {cls.__qualname__} ({_where(cls, cls)})"

    others = [base.__name__ for other, base in BASES.items() if other != kind and base in cls.__mro__]
    if others and BASES[kind] not in cls.__mro__:
        raise ZooError(f"{said()} derives from {others[0]}; the base class of a {kind} is {BASES[kind].__name__}.")
    if BASES[kind] in cls.__mro__ and issubclass(BASES[kind], ModelPart) and not _is_module(cls):
        raise ZooError(
            f"{said()} is not a torch module. Write: class {cls.__name__}({BASES[kind].__name__}, nn.Module)."
        )


def _require_forms(kind: str, name: str, cls: type, base: type[Part], values: Mapping[str, Any]) -> None:
    """Refuse a value where the zoo calls a method, a method where it reads a value, and text for a set."""

    def said(hook: str) -> str:  # finding the line reads and parses the file: only for an error
        return f"{kind} {name!r}: {cls.__qualname__}.{hook} ({_where(values[hook], cls)})"

    for hook, default in hooks_of(base).items():
        if hook not in values:
            continue
        value = values[hook]
        if _is_method(default):
            if not _is_method(value) and not hasattr(value, "__get__"):  # a slot or a property: checked when built
                raise ZooError(
                    f"{said(hook)} is {reprlib.repr(value)}, and has to be a method, "
                    f"{hook}{inspect.signature(default)}: what is kept under its name hides it."
                )
        elif inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, (classmethod, staticmethod)):
            wanted = _annotation(base, hook) or "a value"
            raise ZooError(f"{said(hook)} is a method, and is read as a value: {wanted}. Put @property above it.")
        elif isinstance(value, str) and _annotation(base, hook).startswith(("frozenset[str]", "Sequence[str]")):
            raise ZooError(f"{said(hook)} is the text {value!r}, and has to be a set of words: {{{value!r}}}.")


def _refuse_misspelt(kind: str, name: str, cls: type, base: type[Part], set_by_init: Mapping[str, Any]) -> None:
    """Refuse `self.need = frozenset(...)`: an attribute with nearly the name of a hook, and its type."""
    hooks = hooks_of(base)
    for attribute, value in set_by_init.items():
        if attribute.startswith("_") or attribute in hooks or not isinstance(value, (bool, set, frozenset)):
            continue
        of_type = "bool" if isinstance(value, bool) else "frozenset[str]"
        alike = [n for n in hooks if n not in set_by_init and _annotation(base, n).startswith(of_type)]
        if near := get_close_matches(attribute, alike, n=1, cutoff=_CUTOFF):
            raise ZooError(
                f"{kind} {name!r}: {cls.__qualname__}.{attribute} ({_where(cls, cls)}) looks like a misspelt hook. "
                f"Did you mean {near[0]!r}? What is the class's own begins with an underscore, or has another name."
            )


@cache
def _annotation(base: type[Part], hook: str) -> str:
    """The type of an attribute as its base class has it in writing; nothing of a method."""
    of_classes = (vars(c).get("__annotations__", {}) for c in base.__mro__)
    return next((str(found[hook]) for found in of_classes if hook in found), "")


def _is_module(cls: type) -> bool:
    """Whether a class derives from `nn.Module`, of torch, which is not imported for it."""
    return any(c.__module__ == "torch.nn.modules.module" for c in cls.__mro__)


def _has(cls: type, method: str) -> bool:
    return not getattr(getattr(cls, method, None), "__isabstractmethod__", False) and hasattr(cls, method)


def _is_called(cls: type) -> bool:
    """Whether a class, or one that it derives from, defines what a call of its instances runs."""
    of_bases = (Part, *BASES.values())
    return any(
        n in vars(c)
        for c in cls.__mro__
        if c not in of_bases and c.__module__.partition(".")[0] != "torch"
        for n in ("forward", "__call__")
    )


def _own_classes(cls: type) -> list[type]:
    """A class and those that it derives from in its own package, the most basic first; not our bases."""
    top = cls.__module__.partition(".")[0]
    bases = {c for base in BASES.values() for c in base.__mro__} | {InsidePruner, Dataset, StreamingDataset}
    return [c for c in reversed(cls.__mro__) if c not in bases and c.__module__.partition(".")[0] == top]


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, (classmethod, staticmethod))


def _where(value: Any, cls: type) -> str:
    """File and line of a method, or of the class for other values."""
    found: Any
    for found in (value, getattr(value, "fget", None), cls):
        try:
            return f"{inspect.getsourcefile(found)}:{inspect.getsourcelines(found)[1]}"
        except (OSError, TypeError):
            continue
    return cls.__module__
