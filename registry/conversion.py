"""Plain values, converted to the types of a dataclass's fields as OmegaConf converts them.

OmegaConf takes milliseconds for a node, and loading a model asks some twenty times. Values that have exactly the types
of their fields are taken as they are; what OmegaConf makes of others is cached by content.
"""

import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from zoo.registry.errors import ZooError

_SCALARS = (str, int, float, bool, type(None))
_HELD = "bool, int, float, str, Path, an Enum, a dataclass, Any, and lists, tuples and dicts of these"
_converted: dict[tuple[type, str], dict[str, Any]] = {}  # schema, plain values as text -> values of the right types


def converted(schema: type, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass as OmegaConf converts plain values to their types, as plain values again.

    Raises:
        ZooError: a required value is missing.
        OmegaConfBaseException: a field does not exist, or a value does not have its type.
    """
    if (found := exact(schema, plain)) is not None:
        return _copied(found)
    key = (schema, repr(plain)) if _is_plain(plain) else None
    if key is None or key not in _converted:
        found = _by_omegaconf(schema, plain)
        if key is None:
            return found
        if len(_converted) >= 1024:  # a sweep must not fill memory; models of one process have a few dozen nodes
            _converted.clear()
        _converted[key] = found
    return _copied(_converted[key])


def made(schema: type, plain: Mapping[str, Any]) -> Any:
    """Return the dataclass of plain values. Never cached: `__post_init__` may check files or versions that change.

    Raises: as `converted`; and what the dataclass itself raises.
    """
    values = converted(schema, plain)
    if _is_plain(values):
        with suppress(LookupError):
            return _as_hinted(values, schema)
    from omegaconf import OmegaConf

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))


def require_schema(schema: type, owner: str) -> None:
    """Refuse a dataclass that no config can have the values of: they are typed in a shell, and kept as YAML and JSON.

    Raises:
        ZooError: with `owner` ("pruner 'random'"), the field, and what it may be.
    """
    if schema.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ZooError(f"{owner}: its dataclass {schema.__qualname__} is frozen. Write @dataclass without frozen=True.")
    for f in fields(schema):
        if not f.init:
            how = "What is computed is no option: set it in `__post_init__`, without a field."
            raise ZooError(f"{owner}: option {f.name!r} has init=False. {how}")
        if (wrong := _unheld(_hints(schema)[f.name])) is not None:
            text = str(wrong).replace("typing.", "") if get_origin(wrong) else getattr(wrong, "__name__", str(wrong))
            more = " Write str and check it in `__post_init__`, or use an Enum." if get_origin(wrong) is Literal else ""
            raise ZooError(
                f"{owner}: option {f.name!r} has the type {text}, which a config cannot hold.{more} It holds {_HELD}; "
                "any of them may be None, and a union is of plain values."
            )


def _unheld(hint: Any) -> Any:
    """The type, inside of the type of a field, that OmegaConf has no values of; None where it has all."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [one for one in inner if one is not type(None)]
        if len(kinds) > 1 and any(one not in _SCALARS for one in kinds):
            return hint
        return next((wrong for wrong in map(_unheld, kinds) if wrong is not None), None)
    if (origin or hint) in (list, tuple, dict):
        return next((wrong for wrong in map(_unheld, inner) if wrong is not None), None)
    if hint in (*_SCALARS, bytes, Any, ...):
        return None
    return None if isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, (Enum, Path))) else hint


def unnamed_of(node: Any, schema: type) -> Any:
    """Return a node as the component's own dataclass, without its name.

    The class of a node is made at run time, and so cannot be pickled. `__post_init__` has run, may have changed fields
    (`self.share = self.percent / 100`), and is not run again.
    """
    config: Any = object.__new__(schema)
    values = {f.name: getattr(node, f.name) for f in fields(schema)} | vars(node)  # and what `__post_init__` has set
    for key, value in values.items():
        if key != "name":
            object.__setattr__(config, key, value)
    return config


def plain_values(value: Any) -> Any:
    """Return a value with members of enums by their names and paths as texts, as a shell, YAML and JSON have them."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {plain_values(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _as_hinted(value: Any, hint: Any) -> Any:
    """Make of a plain value what its type states: dataclasses, tuples of lists, members of enums, paths of texts.

    Raises:
        LookupError: a dataclass has other fields than its type, as where the default is one that derives from it.
    """
    origin, inner = get_origin(hint), [one for one in get_args(hint) if one is not type(None)]
    if value is None:
        return None
    if origin in (Union, types.UnionType):
        return _as_hinted(value, inner[0]) if len(inner) == 1 else value
    if origin is tuple:
        each = inner[:1] * len(value) if inner[1:] == [...] else inner
        return tuple(_as_hinted(item, one) for item, one in zip(value, each, strict=True))
    if origin is list:
        return [_as_hinted(item, inner[0]) for item in value]
    if origin is dict:
        return {_as_hinted(key, inner[0]): _as_hinted(item, inner[1]) for key, item in value.items()}
    if hint is tuple:
        return tuple(value)
    if is_dataclass(hint):
        hints = _hints(hint)  # type: ignore[arg-type]
        if value.keys() != hints.keys() or "???" in value.values():
            raise LookupError(hint)
        return hint(**{name: _as_hinted(item, hints[name]) for name, item in value.items()})  # type: ignore[operator]
    if not isinstance(hint, type) or not issubclass(hint, (Enum, Path)):
        return value
    return hint[value] if issubclass(hint, Enum) else hint(value)


def exact(schema: type, plain: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fields where all values, given or default, have exactly their types; None where there is work to do.

    A whole number is taken for a float. A number to be made of a text, an interpolation, a missing value, a mapping
    that is merged with its default: that is OmegaConf's.
    """
    hints = _hints(schema)
    if type(plain) is not dict or not plain.keys() <= hints.keys():
        return None
    found: dict[str, Any] = {}
    for f in fields(schema):
        value = default = _default(f)
        if f.name in plain:
            value = plain[f.name]
            if default and type(default) is dict:
                return None
            if hints[f.name] is float and type(value) is int:
                value = _as_float(value, f.name)
        if (default is NO_DEFAULT and f.name not in plain) or not _is_exactly(value, hints[f.name]):
            return None
        found[f.name] = value
    return found


def _as_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError as error:  # a file may hold a number of any length
        raise ZooError(f"{name} must be a finite number, got a whole number of {value.bit_length()} bits.") from error


def _by_omegaconf(schema: type, plain: Mapping[str, Any]) -> Any:
    try:
        from omegaconf import OmegaConf
    except ImportError as error:  # a pruner alone needs torch and no other package
        wanted = ", ".join(f"{name}: {getattr(hint, '__name__', hint)}" for name, hint in _hints(schema).items())
        raise ZooError(f"without OmegaConf, values must have the types of their options ({wanted}).") from error

    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(schema), plain)
    except OverflowError as error:
        raise ZooError(f"numbers must be finite, and one is too large ({error}).") from error
    missing = [f.name for f in fields(schema) if OmegaConf.is_missing(merged, f.name)]
    if missing:
        raise ZooError(f"a value is needed for {', '.join(map(repr, missing))}.")
    return plain_values(OmegaConf.to_container(merged, resolve=True))


def _default(f: Field) -> Any:
    return f.default_factory() if f.default_factory is not NO_DEFAULT else f.default


def _is_exactly(value: Any, hint: Any) -> bool:
    """Whether OmegaConf leaves a value of a field of this type alone."""
    if hint is Any:
        return _is_plain(value) and _is_final(value)
    if hint in _SCALARS or hint is None:
        return type(value) is (type(None) if hint is None else hint) and _is_final(value)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_exactly(value, one) for one in inner)
    if origin is list:
        return type(value) is list and all(_is_exactly(item, inner[0]) for item in value)
    if origin is dict and inner[0] is str:
        return type(value) is dict and all(
            type(key) is str and _is_exactly(item, inner[1]) for key, item in value.items()
        )
    return False


def _is_final(value: Any) -> bool:
    """Whether no text in a value means something else: an interpolation, or a value that is missing."""
    if type(value) is dict:
        return all(map(_is_final, value.values()))
    if type(value) is list:
        return all(map(_is_final, value))
    return type(value) is not str or ("${" not in value and value != "???")


@lru_cache(maxsize=512)
def _hints(schema: type) -> dict[str, Any]:
    names = {f.name for f in fields(schema)}
    return {name: hint for name, hint in get_type_hints(schema).items() if name in names}


def _is_plain(value: Any) -> bool:
    """Whether a value is made of dicts with text keys, lists and scalars, so that equal `repr`s mean equal values."""
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if type(value) is list else type(value) in _SCALARS


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
