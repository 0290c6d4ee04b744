"""Presets of components as a person writes them, `pruner.fastervlm.preset=llava15_144`: written out as options.

Hydra composes and saves the options themselves. Those that are given beside a preset have precedence over it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.registry import MANY, ZooError, source_presets
from zoo.registry.presets import PRESET, preset_called, shown
from zoo.registry.table import kind_of, parts_of
from zoo.settings import presets
from zoo.settings.static_check import called, depth_of


def with_components(words: Sequence[str]) -> list[str]:
    """Return overrides with a part that is chosen by the name of its weights as its component and a preset of it.

    `vision=dinov2_small` becomes `vision=hf vision.preset=dinov2_small`.
    """
    found: list[str] = []
    for word in words:
        group, equals, name = word.partition("=")
        component = parts_of(group).get(name.strip().strip("'\"")) if equals else None
        found += [word] if component is None else [f"{group}={component}", f"{group}.{PRESET}={name}"]
    return found


def expanded(parsed: Sequence[Any], chosen: Mapping[str, Any], config_dir: str | Path | None = None) -> list[str]:
    """Return overrides with the options of presets in front, in place of their names.

    Args:
        parsed: overrides as Hydra parsed them.
        chosen: group -> choice of the run. A preset of what it does not choose is left for the check of options.
        config_dir: a user's own folder of presets.

    Raises:
        ZooError: a component has no preset of that name.
    """
    options: list[str] = []
    rest: list[str] = []
    for override in parsed:
        path = override.key_or_group.split(".")
        owners = [] if override.is_delete() else list(_owners(path, chosen, config_dir))
        if not owners:
            rest.append(override.input_line)
            continue
        name = _name(override.input_line)  # as written: Hydra reads 1e5 as a number
        for owner, kind, component in owners if override.value() is not None else []:
            what = called(path[0], kind, owner.rpartition(".")[2], component)
            preset = preset_called(name, what, source_presets(kind, component))
            options += [f"{owner}.{option}={written_value(value)}" for option, value in preset.options.items()]
    return [*options, *rest]


def _owners(
    path: Sequence[str], chosen: Mapping[str, Any], config_dir: str | Path | None
) -> Iterator[tuple[str, str, str]]:
    """Yield path, kind and component of what a path such as `pruner.fastervlm.preset` or `pruner.preset` is of."""
    group, kind = path[0], kind_of(path[0])
    if kind is None or path[-1] != PRESET or len(path) < 2:
        return
    members = [str(member) for member in presets.as_list(chosen.get(group))]
    if len(path) == depth_of(path) + 1:
        for member in members if kind not in MANY else [path[1]] if path[1] in members else []:
            yield ".".join(path[:-1]), kind, presets.component_of(group, member, config_dir)
    elif len(path) == 2:  # of all chosen members that have presets
        found = {member: presets.component_of(group, member, config_dir) for member in members}
        having = {member: component for member, component in found.items() if source_presets(kind, component)}
        if not having:
            raise ZooError(f"None of the chosen {kind}s has presets: {', '.join(members) or 'nothing'}.")
        for member, component in having.items():
            yield f"{group}.{member}", kind, component


def _name(word: str) -> str:
    """Return the name of a preset in a word such as `pruner.fastervlm.preset=llava15_144`."""
    return word.partition("=")[2].strip().strip("'\"")


def written_value(value: Any) -> str:
    """Write a value for Hydra's grammar, with texts in quotes."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(written_value, value))}]"
    return shown(value)


def explained(words: Sequence[str], slots: Mapping[str, Any]) -> Iterator[str]:
    """Say what the presets among typed words have set, in the nodes that were composed from them."""
    for word in words:
        name, path = _name(word), word.partition("=")[0].split(".")
        group, kind = path[0], kind_of(path[0])
        if kind is None or path[-1] != PRESET:
            continue
        held = slots.get(group) or {}
        nodes = {k: v for k, v in held.items() if path[1] in (k, PRESET)} if kind in MANY else {group: held}
        for member, node in nodes.items():
            try:
                preset = preset_called(name, "", source_presets(kind, node["name"]))
            except (ZooError, KeyError):
                continue  # another member's; composing has refused what is wrong
            beside = [f"{k}={shown(node[k])} given beside it" for k, v in preset.options.items() if node[k] != v]
            what = f"{group}.{member}" if kind in MANY else group
            yield f"preset {name} of {what} ({preset.source}): {', '.join([preset.text, *beside])}"
