"""Turn errors of Hydra and OmegaConf into messages with the given value, the allowed ones and the nearest match.

Both libraries report the place where an error surfaced; the OmegaConf error at the root of the chain has the full key
and the node in which it was looked up, from which a message is made.
"""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from zoo.registry import Option, ZooError, options_of, unknown, unknown_option, wrong_value
from zoo.registry.table import kind_of
from zoo.settings import presets
from zoo.settings.overrides import SEVERAL, SLOTS
from zoo.settings.schema import RunRoot
from zoo.settings.static_check import called, elsewhere, no_stage


def explain(error: BaseException) -> ZooError:
    """Return the ZooError for an error of Hydra or OmegaConf."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

    where = _where(str(error))
    for cause in _chain(error):
        if isinstance(cause, ZooError):
            return cause
        if file := getattr(cause, "missing_cfg_file", None):
            return _missing_file(str(file), where)
        if isinstance(cause, OmegaConfBaseException) and (cause.full_key or cause.key) is not None:
            path = [p for p in re.split(r"[.\[\]]", str(cause.full_key or cause.key)) if p]
            node = cause.parent_node
            while OmegaConf.is_list(node):  # an item of a list: the option is the list
                node, path = node._get_parent(), path[:-1]
            owner, options = describe(path[:-1], node)
            if isinstance(cause, ValidationError):
                return _at(where, wrong_value(owner, path[-1], options, (cause.msg or str(cause)).splitlines()[0]))
            if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
                return _at(where, unknown_key(path, owner, options))
    return ZooError(" ".join(re.sub(r"To append to your .*", "", str(error)).split()))


def unknown_key(path: list[str], owner: str, options: list[Option]) -> ZooError:
    """Return the error for a path whose last part does not exist."""
    if path[:1] == ["stages"] and len(path) == 2:
        return no_stage(path[1], [o.name for o in options])
    if not options and path[0] in SLOTS and len(path) > 1:
        return ZooError(f"{path[0]!r} holds no component in this run, so it has no option {path[-1]!r}.")
    if not path[1:]:  # a word of the run itself, which is often an option of a stage or part
        if home := elsewhere("", path[0], {}):
            return home
        return unknown("option", path[0], [o.name for o in options])
    return unknown_option(owner, path[-1], options)


def describe(path: list[str], node: Any) -> tuple[str, list[Option]]:
    """Return a name for the node at `path`, and its options.

    >>> describe(["pruner", "random"], node)
    ("pruner 'random'", [Option("keep_ratio", ...), ...])
    """
    from omegaconf import OmegaConf

    schema = OmegaConf.get_type(node) if node is not None else None
    options = options_of(schema) if schema and is_dataclass(schema) else []
    if path and kind_of(path[0]):
        options = [o for o in options if o.name != "name"]
    if not options and node is not None and hasattr(node, "keys"):
        options = [Option(str(key), "?", None, "") for key in node]
    if not path:
        return "the run", [o for o in options_of(RunRoot) if o.name not in ("defaults", "hydra")]
    group, kind = path[0], kind_of(path[0])
    name = node.get("name") if options and kind and hasattr(node, "get") else None
    if kind and name and len(path) == (2 if group in SEVERAL else 1):
        return called(group, kind, path[-1], name), options
    if group == "stages" and len(path) == 2:
        return f"stage {path[1]!r}", options
    return repr(".".join(path)), options


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _where(message: str) -> str:
    """Return the preset that Hydra's message names, as the beginning of ours; empty without one."""
    found = re.match(r"In '(\w+)/([\w-]+)'", message)
    return f"{found[1]} {found[2].partition('-')[0]!r}: " if found else ""  # trimmed presets are called NAME-3


def _at(where: str, error: ZooError) -> ZooError:
    return ZooError(f"{where}{error}")


def _missing_file(file: str, where: str) -> ZooError:
    group, _, name = file.rpartition("/")
    if group in (*SLOTS, "model", "recipe"):
        return _at(where, unknown(presets.KIND_WORDS.get(group, group), name, presets.available(group)))
    return ZooError(f"{where}there is no config {file!r}.")
