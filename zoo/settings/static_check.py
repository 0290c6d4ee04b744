"""Check overrides against the source text of components, before any is imported.

Importing a component imports torch, which takes seconds, so mistakes are reported without it if possible. Overrides
that pass are checked again by Hydra, with the dataclasses themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.registry import (
    MANY,
    Option,
    ZooError,
    nearest,
    options_of,
    source_options,
    unknown,
    unknown_option,
    wrong_value,
)
from zoo.registry.table import kind_of
from zoo.settings import presets
from zoo.settings.schema import SECTIONS, RunRoot
from zoo.settings.stage import Stage


def try_override(override: Any, chosen: Mapping[str, Any], config_dir: str | Path | None = None) -> None:
    """Refuse an override of an option that does not exist, or with a value of another type.

    Args:
        override: as Hydra parsed it.
        chosen: group -> choice of the run.
        config_dir: a user's own folder of presets.
    """
    path = override.key_or_group.split(".")
    kind = kind_of(path[0])
    if override.is_delete() or (len(path) == 1 and (kind or path[0] in ("model", "recipe"))):
        return  # choices of components and presets are checked by name
    if len(path) == 1 and path[0] in {*SECTIONS, "stages"}:
        below = "<stage>.<option>" if path[0] == "stages" else "<option>"
        raise ZooError(f"{override.input_line!r}: {path[0]!r} holds several options. Write {path[0]}.{below}=<value>.")
    depth = depth_of(path)
    if kind in MANY and path[1] not in chosen.get(path[0], []):
        raise not_chosen(path[0], path[1], chosen.get(path[0], []), config_dir)
    if kind and kind not in MANY and chosen.get(path[0]) is None:
        raise ZooError(f"{path[0]!r} holds no component in this run, so it has no option {path[1]!r}.")
    if len(path) <= depth or not (found := schema_at(path[:depth], chosen, config_dir)):
        return
    owner, options = found
    name = path[depth]
    if kind and name == "name":
        raise ZooError(f"{override.input_line!r}: a component is chosen with {path[0]}=<name>.")
    option = next((o for o in options if o.name == name), None)
    if option is None:
        home = elsewhere(path[0], name, chosen, config_dir) if path[0] in SECTIONS and len(path) == 2 else None
        raise home or unknown_option(owner, name, options)
    if len(path) == depth + 1:
        _try_value(owner, option, override.value())


def elsewhere(
    given: str, name: str, chosen: Mapping[str, Any], config_dir: str | Path | None = None
) -> ZooError | None:
    """Return the error for an option that a stage, a group of options or a part has, but not the run itself.

    Args:
        given: group of options in front of it; empty: none.
        name: of the option.
        chosen: group -> choice of the run.
        config_dir: a user's own folder of presets.

    Returns:
        None if nothing in the run has an option of that name.
    """
    homes = [""] if given and any(o.name == name for o in options_of(RunRoot)) else []
    homes += ["stages.<stage>"] if any(o.name == name for o in options_of(Stage)) else []
    homes += [key for key, section in SECTIONS.items() if any(o.name == name for o in options_of(section))]
    for group, picked in chosen.items():
        kind = kind_of(group)
        for member in presets.as_list(picked) if kind else []:
            if any(o.name == name for o in source_options(str(kind), presets.component_of(group, member, config_dir))):
                homes.append(f"{group}.{member}" if kind in MANY else group)
    if not homes:
        return None
    places = " or ".join(".".join(filter(None, [home, name])) for home in homes)
    return ZooError(f"No option named {'.'.join(filter(None, [given, name]))!r} of the run itself. It is {places}.")


def no_stage(name: str, there: Iterable[str]) -> ZooError:
    """Return the error for a stage that the run does not have, with the way to add it."""
    return ZooError(f"{unknown('stage', name, there)} To add one behind them, write +stages.{name}.<option>=<value>.")


def not_chosen(group: str, key: str, members: Sequence[str], config_dir: str | Path | None = None) -> ZooError:
    """Return the error for `group.key` if the run has no such member.

    It is a component that is not chosen, a misspelt member, or an option of a member, whose name is missing.
    """
    known = presets.available(group, config_dir)
    if key in known:
        both = ",".join([*members, key])
        return ZooError(f"{group} {key!r} is not chosen in this run: add it with {group}=[{both}].")
    kind = kind_of(group) or group
    options = {o.name: o for m in members for o in source_options(kind, presets.component_of(group, m, config_dir))}
    # A name that resembles an option or a chosen member is more likely meant than a component that is not chosen.
    near = nearest(key, [*options, *members]) or nearest(key, known)
    if near and near[0] in options:
        return unknown_option(f"the chosen {presets.KIND_WORDS.get(group, group)}s", key, list(options.values()))
    return unknown(presets.KIND_WORDS.get(group, group), key, members if near and near[0] in members else known)


def depth_of(path: Sequence[str]) -> int:
    """Return the number of leading words of a path that name the owner of the option."""
    kind = kind_of(path[0])
    return 2 if path[0] == "stages" or kind in MANY else 1 if kind or path[0] in SECTIONS else 0


def schema_at(
    path: Sequence[str], chosen: Mapping[str, Any], config_dir: str | Path | None
) -> tuple[str, list[Option]] | None:
    """Return a name for the node at `path`, and its options; None if the source text does not show them."""
    kind = kind_of(path[0]) if path else None
    if not path:
        return "the run", [o for o in options_of(RunRoot) if o.name not in ("defaults", "hydra")]
    if kind:
        key = path[1] if kind in MANY else str(chosen[path[0]])
        name = presets.component_of(path[0], key, config_dir)
        options = source_options(kind, name)
        return (called(path[0], kind, key, name), options) if options else None
    if path[0] == "stages":
        return f"stage {path[1]!r}", options_of(Stage)
    return repr(path[0]), options_of(SECTIONS[path[0]])


def called(group: str, kind: str, key: str, name: str) -> str:
    """Return the name of a component in messages: its kind and name, and its key if that differs."""
    return f"{kind} {name!r}" if key in (name, kind) else f"{group} {key!r} ({kind} {name!r})"


def _try_value(owner: str, option: Option, value: Any) -> None:
    from omegaconf import BooleanNode, FloatNode, IntegerNode
    from omegaconf.errors import ValidationError

    nodes: dict[str, Any] = {"int": IntegerNode, "float": FloatNode, "bool": BooleanNode}
    # Only scalar types can be judged from text; interpolations are resolved later.
    plain = option.type.removesuffix(" | None")
    if plain not in nodes or (isinstance(value, str) and "${" in value) or (value is None and plain != option.type):
        return
    try:
        if value is None or isinstance(value, (list, dict)):
            raise ValidationError("not a single value")
        nodes[plain](value)
    except ValidationError as error:
        shown = "null" if value is None else str(value)
        raise wrong_value(owner, option.name, [option], f"Value '{shown}' is not") from error
