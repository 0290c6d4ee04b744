"""Presets in YAML: models, recipes, data; read and trimmed before Hydra composes.

Options that a preset states for a slot belong to the component that it chooses there. A run with another component must
not inherit them (a CLIP checkpoint does not fit a timm encoder), so presets are trimmed to the choices of the run.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from zoo.registry import MANY, ZooError, names, source_presets, unknown
from zoo.registry.presets import PRESET, written_out
from zoo.registry.table import SLOT_KINDS, group_of, kind_of, parts_of
from zoo.settings import several_encoders

GROUPS = ("model", "recipe", "data")  # groups that have YAML files
KIND_WORDS = {"data": "data set"}

_members: dict[str, dict[str, str]] = {}  # group -> key -> component, for keys of saved models
_private: dict[str, dict[str, dict[str, Any]]] = {group: {} for group in GROUPS}  # presets made in this process


class Texts(Protocol):
    """Interface of `zoo.settings.text_options.TextOptions`, which knows the options that hold text."""

    def written(self, group: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]: ...

    def choice(self, names: Any) -> Any: ...


@cache
def _ours() -> Path:
    return Path(str(files("zoo.conf")))


def folders(config_dir: str | Path | None = None) -> list[Path]:
    """Return the folders of presets: ours, and a user's own."""
    return [_ours(), *([Path(config_dir)] if config_dir else [])]


def preset_files(group: str, config_dir: str | Path | None = None) -> dict[str, Path]:
    """Return name -> file of the presets of a group."""
    found: dict[str, Path] = {}
    for folder in folders(config_dir):
        with suppress(OSError), os.scandir(folder / group) as entries:
            there = _yaml_of(folder / group, tuple(sorted(entry.name for entry in entries)))
            found |= {name: file for name, file in there.items() if name not in found}
    return found


@lru_cache(maxsize=64)
def _yaml_of(folder: Path, entries: tuple[str, ...]) -> dict[str, Path]:
    """The presets among the entries of a folder. Cached, since composing one config asks forty times for them."""
    return {name.removesuffix(".yaml"): folder / name for name in entries if name.endswith(".yaml")}


def file_of(group: str, name: str, config_dir: str | Path | None = None) -> Path | None:
    """Return the file of a preset; None for components and for presets made in this process."""
    return None if name in _private[group] else preset_files(group, config_dir).get(name)


def available(group: str, config_dir: str | Path | None = None) -> list[str]:
    """Return the choices of a group: components, presets, or both."""
    kind = kind_of(group)
    presets = preset_files(group, config_dir) if group in GROUPS else {}
    return sorted({*(names(kind) if kind else ()), *presets, *_members.get(group, ()), *parts_of(group)})


def require(group: str, name: Any, config_dir: str | Path | None = None) -> str:
    """Return `name` if the group has it.

    Raises:
        ZooError: it does not; paths are refused too.
    """
    allowed = available(group, config_dir)
    if name in _private.get(group, {}):
        return name
    if not isinstance(name, str) or name not in allowed:
        raise unknown(KIND_WORDS.get(group, group), str(name), allowed)
    return name


def read(group: str, name: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """Return the content of a preset; empty for a component.

    A part that its defaults list chooses by the name of its weights (`override /vision: dinov2_small`) is written as
    the component with a preset.
    """
    return _with_components(_read(group, name, config_dir))


def _with_components(content: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, dict[str, Any]] = {}
    entries = []
    for entry in content.get("defaults") or []:
        if isinstance(entry, dict):
            for key, value in entry.items():
                kind = kind_of(match[1]) if (match := re.fullmatch(r"override\s+/(\w+)", str(key))) else None
                if kind == "vision" and isinstance(value, list) and len(value) > 1:
                    chosen[kind] = {"encoders": several_encoders.nodes_of(value)}
                    entry = {**entry, key: several_encoders.FUSED}
                elif kind and isinstance(value, str) and value in (parts := parts_of(kind)):
                    chosen[kind] = {PRESET: value}
                    entry = {**entry, key: parts[value]}
        entries.append(entry)
    if not chosen:
        return content
    stated = {kind: _merged(node, content.get(kind) or {}, deep=True) for kind, node in chosen.items()}
    return {**content, "defaults": entries, **stated}


def _read(group: str, name: str, config_dir: str | Path | None) -> dict[str, Any]:
    if name in _private[group]:
        return _private[group][name]
    file = preset_files(group, config_dir).get(name)
    if file is None:  # a component, which has no file of options
        return {}
    _require_own_name(group, name, file, config_dir)
    from yaml import YAMLError

    try:
        content = deepcopy(_content(file, file.read_text("utf-8")))
    except YAMLError as error:
        raise ZooError(f"{group} {name!r} ({file}) is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ZooError(f"{group} {name!r} ({file}) must hold a mapping.")
    return {str(key): value for key, value in content.items()}


def _require_own_name(group: str, name: str, file: Path, config_dir: str | Path | None) -> None:
    """Refuse a file of a user's own folder with the name of a preset or a component: it would not be read.

    Raises:
        ZooError: with both.
    """
    own = Path(config_dir) / group / f"{name}.yaml" if config_dir else None
    if own is None or not own.is_file():
        return
    what, kind = KIND_WORDS.get(group, group), kind_of(group)
    if (kind and name in names(kind)) or (file != own and file.read_bytes() != own.read_bytes()):
        hint = "" if kind else f" Yours may start from it: defaults: [{name}, ...]."
        raise ZooError(f"{str(own)!r}: there is a {what} {name!r} already, so yours needs another name.{hint}")


@lru_cache(maxsize=256)
def _content(file: Path, text: str) -> Any:
    """Parse a file with this text. Cached, since composing one config reads the same presets several times."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


def add_member(kind: str, key: str, component: str) -> None:
    """Make a component available under a key of its own, in a slot that holds several."""
    from zoo.registry.hydra import add_option

    add_option(kind, key, component)
    _members.setdefault(group_of(kind), {})[key] = component


def store(group: str, name: str, content: Mapping[str, Any], package: str = "_global_") -> str:
    """Store a preset in Hydra under a name of this process, and return the name."""
    from hydra.core.config_store import ConfigStore

    _private[group][name] = dict(content)
    ConfigStore.instance().store(name, dict(content), group=group, package=package, provider="zoo")
    return name


def store_once(group: str, name: str, content: Mapping[str, Any], package: str = "_global_") -> str:
    """Store a changed version of preset `name`; reuse one with the same content."""
    same = [key for key, value in _private[group].items() if value == content and key.startswith(f"{name}-")]
    return same[0] if same else store(group, f"{name}-{len(_private[group])}", content, package)


def component_of(group: str, key: str, config_dir: str | Path | None = None) -> str:
    """Return the component of a choice: itself, or the one that a data preset builds on."""
    for entry in read(group, key, config_dir).get("defaults") or [] if group in GROUPS else []:
        name = entry.partition("@")[0].rpartition("/")[2] if isinstance(entry, str) else ""
        if name and name != "_self_":
            return component_of(group, name, config_dir)
    return {**parts_of(group), **_members.get(group, {})}.get(key, key)


def plugins_of(recipe: Any, config_dir: str | Path | None = None) -> list[str]:
    """Return the plugins named by a recipe and the recipes that it starts from."""
    content = read("recipe", recipe, config_dir)
    named = [str(p) for p in as_list(content.get("plugins"))]
    return [p for base in bases(content) for p in plugins_of(base, config_dir)] + named


def bases(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the presets of the same group that this one starts from, highest precedence first."""
    entries = content.get("defaults") or []
    for entry in reversed(entries):
        if isinstance(entry, str) and entry != "_self_":
            yield entry


def selection(group: str, name: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """Return group -> choice of the overrides in the defaults lists of a preset and of its bases."""
    content, chosen = read(group, name, config_dir), {}
    for entry in content.get("defaults") or []:
        if isinstance(entry, dict):
            for key, value in entry.items():
                if match := re.fullmatch(r"override\s+/(\w+)", str(key)):
                    chosen[match[1]] = value
    for base in bases(content):
        if base not in {**preset_files(group, config_dir), **_private[group]}:
            error = unknown(group, base, available(group, config_dir))
            raise ZooError(f"{group} {name!r} starts from {base!r}. {error}")
        for key, value in selection(group, base, config_dir).items():
            chosen.setdefault(key, value)  # the preset's own choices have precedence over those of its bases
    return chosen


def section(
    group: str, name: str, key: str, config_dir: str | Path | None = None, deep: bool = False
) -> dict[str, Any]:
    """Return the content of a preset and of its bases in a section of the run: `llm`, `tokenizer`, ...

    Args:
        group, name: of the preset.
        key: of the section.
        config_dir: a user's own folder of presets.
        deep: merge dicts in it too, as Hydra does.
    """
    content = read(group, name, config_dir)
    stated: dict[str, Any] = {}
    for base in reversed(list(bases(content))):
        stated = _merged(stated, section(group, base, key, config_dir, deep), deep)
    own = content.get(key)
    return _merged(stated, own if isinstance(own, dict) else {}, deep)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], deep: bool) -> dict[str, Any]:
    both = {
        key: _merged(below[key], value, deep)
        for key, value in above.items()
        if deep and isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **both}


def as_list(value: Any) -> list[Any]:
    """Return a choice in a slot that holds several as a list: empty for `null`, one member for a name."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def trim(
    group: str,
    name: str,
    own: Mapping[str, Any],
    chosen: Mapping[str, Any],
    config_dir: str | Path | None = None,
    texts: "Texts | None" = None,
    without: Mapping[str, Collection[str]] | None = None,
) -> str:
    """Return the preset without options for components that the run does not choose, and with its texts as written.

    Args:
        group: model or recipe.
        name: of the preset; returned unchanged if nothing has to be removed.
        own: choices of the preset and its bases.
        chosen: choices of the run; absent groups are not known yet.
        config_dir: a user's own folder of presets.
        texts: knows which options hold text.
        without: section -> options of it that do not apply in this run; empty: the whole section.
    """
    content = read(group, name, config_dir)
    body = {k: v for k, v in content.items() if k != "defaults"}
    as_written = content == _read(group, name, config_dir)
    # Bases are trimmed as well, each into a preset of its own, since Hydra reads them by name.
    entries, changed = [], False
    for entry in content.get("defaults") or []:
        kept = entry
        if isinstance(entry, str) and entry != "_self_":
            kept = trim(group, entry, own, chosen, config_dir, texts, without)
        elif isinstance(entry, dict) and texts:
            kept = {k: texts.choice(v) if k.split()[-1] == "/data" else v for k, v in entry.items()}
        changed |= kept != entry
        entries.append(kept)
    kept_body = _without_unchosen(texts.written(group, name, body) if texts else body, own, chosen, config_dir)
    for key, options in (without or {}).items():
        if isinstance(stated := kept_body.get(key), dict):
            kept_body[key] = {k: v for k, v in stated.items() if options and k not in options}
    if as_written and not changed and kept_body == body:
        return name  # the usual case: Hydra reads the file itself
    return store_once(group, name, {"defaults": entries, **kept_body} if entries else kept_body)


def _without_unchosen(
    body: dict[str, Any], own: Mapping[str, Any], chosen: Mapping[str, Any], config_dir: str | Path | None
) -> dict[str, Any]:
    body = dict(body)
    for kind in SLOT_KINDS:
        group = group_of(kind)
        options = body.get(group)
        if group not in chosen or not isinstance(options, dict):
            continue
        if kind in MANY:
            members = _chosen_members(options, group, chosen, config_dir)
            body[group] = {key: spelled_out(kind, key, node, config_dir) for key, node in members.items()}
        elif group in own and own[group] != chosen[group]:
            del body[group]  # the options are of another component
        else:
            body[group] = spelled_out(kind, chosen[group], options, config_dir)
    if "data" in chosen and isinstance(body.get("stages"), dict):
        body["stages"] = {
            key: {**stage, "data": _chosen_members(stage["data"], "data", chosen, config_dir)}
            if isinstance(stage, dict) and isinstance(stage.get("data"), dict)
            else stage
            for key, stage in body["stages"].items()
        }
    return body


def spelled_out(kind: str, key: str, node: Any, config_dir: str | Path | None) -> Any:
    """Return the options of a component with those of the preset that it names, if it does, in place of the name."""
    if not isinstance(node, dict) or PRESET not in node:
        return node
    component = component_of(group_of(kind), key, config_dir)
    return dict(written_out(node, f"{kind} {component!r}", source_presets(kind, component)))


def _chosen_members(
    options: dict[str, Any], group: str, chosen: Mapping[str, Any], config_dir: str | Path | None
) -> dict[str, Any]:
    """Keep the members that the run chose, and names that do not exist, which are reported as mistakes."""
    there, known = as_list(chosen[group]), set(available(group, config_dir))
    return {key: value for key, value in options.items() if key in there or key not in known}
