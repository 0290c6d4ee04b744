"""Shell completion of subcommands, slots, names and options. Reads source text and imports no component.

The scripts in the shell are Hydra's (`eval "$(zoo -sc install=bash)"`); they pass the typed line in COMP_LINE.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.registry import KINDS, ZooError, options_of, source_presets
from zoo.registry.presets import PRESET
from zoo.registry.table import kind_of
from zoo.settings import presets
from zoo.settings.overrides import SEVERAL, SLOTS, choose, load_plugins, parse, values
from zoo.settings.schema import SECTIONS, RunRoot
from zoo.settings.static_check import depth_of, schema_at


def complete(line: str, commands: Mapping[str, bool]) -> list[str]:
    """Return the completions of the last word of `line`.

    Args:
        line: as typed so far.
        commands: name -> whether the command takes the config of a run.
    """
    words = line.split(" ")
    if len(words) <= 2:
        return [c for c in commands if c.startswith(words[-1])]
    command, typed, last = words[1], words[2:-1], words[-1]
    load_plugins(command, [])
    if commands.get(command):
        found = _value(command, typed, last) if "=" in last else _keys(command, typed, last)
    elif command == "list":
        found = [*KINDS, "model", "recipe", "data"]
    elif command == "info":
        found = [*presets.available("model"), *presets.available("recipe")]
        found += [f"{kind}/{name}" for kind in KINDS for name in presets.names(kind)]
    elif command == "new":
        from zoo.cli.new import TEMPLATES

        found = list(TEMPLATES)
    else:
        found = []
    return sorted({f for f in found if f.startswith(last)})


def _value(command: str, words: Sequence[str], last: str) -> list[str]:
    """Return names for `pruner=`, `pruner=[a,`, `model=`, `recipe=` and `pruner.fastervlm.preset=`."""
    key, _, typed = last.partition("=")
    if key.rpartition(".")[2] == PRESET:
        return [f"{key}={name}" for name in _presets(key.split(".")[:-1], _chosen(command, words)[0])]
    if key == "model":
        return [f"model={name}" for name in (*presets.available("model"), "dir:", "hub:", "last")]
    if key not in (*SLOTS, "recipe"):
        return []
    names = presets.available(key)
    if key in SEVERAL and typed.startswith("["):
        head = typed[: max(typed.rfind(","), 0) + 1]
        return [f"{key}={head}{name}" for name in names if name not in head.strip("[").split(",")]
    return [f"{key}={name}" for name in (*names, "null")]


def _keys(command: str, typed: Sequence[str], last: str) -> list[str]:
    """Return the options below the last dot of a key, or the slots and options of the run."""
    path, dot, _ = last.rpartition(".")
    chosen, recipe = _chosen(command, typed)
    if not dot:
        plain = [o.name for o in options_of(RunRoot) if o.name not in ("defaults", "hydra", *SECTIONS, "stages")]
        held = [f"{slot}." for slot in SLOTS if chosen.get(slot)]
        return [f"{name}=" for name in (*plain, "model", "recipe")] + [f"{s}." for s in (*SECTIONS, "stages")] + held
    head, *members = path.split(".")
    if head in SEVERAL and head in chosen and not members:
        return [f"{head}.{name}." for name in chosen[head]]
    if head == "stages" and not members:
        return [f"stages.{s}." for s in _stages(recipe)]
    known = head in (*SECTIONS, "stages") or (kind_of(head) and head in chosen)
    found = schema_at([head, *members], chosen, None) if known and len(members) + 1 == depth_of([head]) else None
    has = [PRESET] if found and _presets([head, *members], chosen) else []
    return [f"{path}.{name}=" for name in [*has, *(o.name for o in found[1])]] if found else []


def _presets(path: Sequence[str], chosen: Mapping[str, Any]) -> list[str]:
    """Return the presets of the chosen component at a path such as `pruner.fastervlm` or `vision`."""
    kind, group = kind_of(path[0]), path[0]
    key = path[1] if path[1:] else str(chosen.get(group))
    if kind is None or key not in presets.as_list(chosen.get(group)):
        return []
    return list(source_presets(kind, presets.component_of(group, key)))


def _chosen(command: str, typed: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Return the components that earlier words choose, and the recipe; nothing if those words are incomplete."""
    try:  # the line is incomplete by nature, so mistakes in it are ignored
        choice = choose(command, values(o for o in parse([w for w in typed if "=" in w]) if not o.is_sweep_override()))
    except ZooError:
        return {}, None
    return choice.chosen, choice.recipe


def _stages(recipe: str | None) -> list[str]:
    content = presets.read("recipe", recipe) if recipe else {}
    return [str(name) for name in content.get("stages") or {}]
