"""Make presets of saved models: `model=dir:runs/x`, `model=hub:org/name`, `model=last`.

Their config.json may come from elsewhere: it may contain names of registered components and plain values only. It is
stored as a preset with typed options, so that `pruner=...` and other overrides work as on any preset.
"""

import re
import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zoo.published import FAMILIES, is_published
from zoo.registry import MANY, ZooError, names, nearest, plugins, refuse_code, require_revision, unknown
from zoo.registry.foreign import read_json, read_run_config, require_model_config, require_types, said_since
from zoo.registry.table import SLOT_KINDS, group_of
from zoo.settings import presets

SPELLINGS = "a preset, 'dir:<folder>' for a saved model, 'hub:<org>/<name>' for one on the hub, or 'last'"


def resolve(
    asked: Any, given: Mapping[str, Any], config_dir: str | Path | None = None, data: Collection[Any] = ()
) -> tuple[str, dict[str, str]]:
    """Return the name of the preset that `model=<asked>` means, and the fields of its `ModelSource`.

    Args:
        asked: value of `model=`.
        given: key -> value of the overrides.
        config_dir: a user's own folder of presets.
        data: names of data sets that the run chooses; their options are those of presets, not of the model's run.

    Raises:
        ZooError: there is no such model, the name is ambiguous, or its config is refused.
    """
    if not isinstance(asked, str) or not asked:
        raise ZooError(f"model={asked!r}: name {SPELLINGS}.")
    kind, colon, place = asked.partition(":")
    if asked == "last":
        folder = newest(Path(str(given.get("run.dir", "runs"))).expanduser())
        return from_folder(folder, f"dir:{folder}", config_dir, data, given)
    if colon and kind == "dir":
        return from_folder(Path(place).expanduser(), asked, config_dir, data, given)
    if colon and kind == "hub":
        return from_hub(place, str(given.get("model.revision", "") or ""), config_dir)
    if asked in presets.available("model", config_dir) or asked in presets._private["model"]:
        return _from_cache(asked, config_dir) or (asked, {"name": asked})
    raise ambiguous(asked, presets.available("model", config_dir))


def require(asked: str, given: Mapping[str, Any], config_dir: str | Path | None = None) -> None:
    """Refuse a name that no model has; what the model is made of is not looked at, and a hub is not asked.

    Raises:
        ZooError: as `resolve`.
    """
    kind, colon, place = asked.partition(":")
    if asked == "last":
        newest(Path(str(given.get("run.dir", "runs"))).expanduser())
    elif colon and kind == "dir":
        content_of(Path(place).expanduser(), asked)
    elif not (colon and kind == "hub") and asked not in {
        *presets.available("model", config_dir),
        *presets._private["model"],
    }:
        raise ambiguous(asked, presets.available("model", config_dir))


def ambiguous(asked: str, allowed: list[str]) -> ZooError:
    """Return the error for a model name that is not a preset, with the spellings that would work."""
    meant = []
    if Path(asked).expanduser().is_dir():
        meant.append(f"'dir:{asked}'")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", asked) and not asked.startswith("."):
        meant.append(f"'hub:{asked}'")
    if not meant:
        return ZooError(f"{unknown('model', asked, allowed)} A model is {SPELLINGS}.")
    near = nearest(asked, allowed)
    preset = f" The nearest preset is {near[0]!r}." if near else ""
    return ZooError(f"model {asked!r} is not a preset. Did you mean {' or '.join(meant)}?{preset}")


def newest(root: Path) -> Path:
    """Return the newest folder below `root` that holds a saved model."""
    files = (f for f in root.glob("**/config.json") if not f.parent.name.startswith("."))  # names of unfinished folders
    found = [file for file in files if _is_zoo_model(file)]
    if not found:
        raise ZooError(f"model=last: no finished run below {str(root)!r}. Train one with `zoo train`.")
    return max(found, key=lambda file: file.stat().st_mtime).parent


def from_folder(
    folder: Path,
    asked: str,
    config_dir: str | Path | None = None,
    data: Collection[Any] = (),
    given: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, str]]:
    """Make a preset of the model saved in `folder`, or in `folder`/model if `folder` is a run."""
    place, content = content_of(folder, asked)
    anew = {name for name in data if name in presets.preset_files("data", config_dir)}
    if isinstance(stated := content.get("data"), Mapping):
        nodes = {key: _name_alone(node) if key in anew else node for key, node in stated.items()}
        content["data"] = {key: _without_split(key, node, given or {}) for key, node in nodes.items()}
    return store_preset(content, asked, config_dir), {"name": str(place), "source": "dir"}


def content_of(folder: Path, asked: str) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a saved model (the folder itself, or `model` in the folder of a run), and its config.

    Raises:
        ZooError: the folder holds no model.
    """
    for place in (folder, folder / "model"):
        if _is_zoo_model(place / "config.json"):
            content = read_json(place / "config.json")
            content = {k: v for k, v in content.items() if v is not None}
            return place, {**_data_of_run(place.parent), **said_since(content)}
    if is_published(_content(folder / "config.json")):
        return folder, published_content(folder)
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.glob("*")]) if folder.parent.is_dir() else []
        hint = f" Did you mean 'dir:{folder.parent / near[0]}'?" if near else ""
        raise ZooError(f"model {asked!r}: no such folder.{hint}")
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        raise ZooError(
            f"model {asked!r}: the run in this folder has not saved its model yet. If it was stopped, "
            f"zoo train resume={shlex.quote(str(folder))} goes on to the end."
        )
    raise ZooError(
        f"model {asked!r}: the folder holds no saved model (a config.json with the key 'slots') and none of a "
        f"published family ({', '.join(FAMILIES)})."
    )


def _data_of_run(run: Path) -> dict[str, Any]:
    """Return the data and tasks of a model's run, if its folder is in a run, so that `zoo eval` uses the same.

    Paths in it are those at the time of the run.
    """
    if not (run / "config.yaml").is_file():
        return {}
    content = read_run_config(run / "config.yaml")
    return {k: content[k] for k in ("data", "task") if content.get(k)}


def _without_split(key: str, node: Any, given: Mapping[str, Any]) -> Any:
    """Return a data set of a run without its `eval_split`, which a typed file that is the same for all splits lacks."""
    files = [str(given[f"data.{key}.{option}"]) for option in ("file", "shards") if f"data.{key}.{option}" in given]
    whole = isinstance(node, Mapping) and files and not any("{split}" in file for file in files)
    return {**node, "eval_split": ""} if whole and node.get("eval_split") and not node.get("split_field") else node


def _name_alone(node: Any) -> Any:
    """Return a component without options: those of the preset with its name apply."""
    return {"name": node["name"]} if isinstance(node, Mapping) and "name" in node else node


def from_hub(repository: str, revision: str = "", config_dir: str | Path | None = None) -> tuple[str, dict[str, str]]:
    """Make a preset of the model in a repository of the hub; only its configs are read."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or ".." in repository:
        raise ZooError(f"model 'hub:{repository}': write a repository as <org>/<name>.")
    require_revision(revision)
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(repository, "config.json", revision=revision or None)
    except Exception as error:  # offline, not found, no access: the library has a type for each
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ZooError(f"model 'hub:{repository}': cannot read its config.json ({first}).") from error
    content = read_json(Path(file))
    # Weights are downloaded only after the check has passed.
    if is_published(content):
        for extra in ("preprocessor_config.json", "processor_config.json"):  # size and normalisation of images
            with suppress(Exception):
                hf_hub_download(repository, extra, revision=revision or None)
        content = published_content(Path(file).parent)
    if not isinstance(content, dict) or "slots" not in content:
        raise ZooError(
            f"model 'hub:{repository}' is not a model of this zoo: its config.json has no 'slots', and its type is not "
            f"one of {', '.join(FAMILIES)}."
        )
    name = store_preset(said_since(content), f"hub:{repository}", config_dir)
    return name, {"name": repository, "source": "hub", "repository": repository}


def published_content(folder: Path) -> dict[str, Any]:
    """Return the config of a published folder, in the form of a saved model's."""
    from zoo.published.folder import slots_in

    return {"slots": {"pruner": {}, "adapter": {}, "layout": None, **slots_in(folder)}}


def fetch_config(asked: str, config_dir: str | Path | None = None) -> None:
    """Fetch the config of a published preset into the hub's cache; it has precedence over the preset's own options.

    Errors are ignored here: fetching the weights will report them.
    """
    stated = presets.read("model", asked, config_dir).get("model") if asked in presets.available("model") else None
    if not isinstance(stated, Mapping) or not stated.get("family"):
        return
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, revision = str(stated["repository"]), str(stated.get("revision") or "") or None
    if not isinstance(try_to_load_from_cache(repository, "config.json", revision=revision), str):
        with suppress(Exception):  # without the first, and so without a connection, there is no point in the others
            hf_hub_download(repository, "config.json", revision=revision)
            for name in ("preprocessor_config.json", "processor_config.json"):
                with suppress(Exception):
                    hf_hub_download(repository, name, revision=revision)


def _from_cache(asked: str, config_dir: str | Path | None) -> tuple[str, dict[str, str]] | None:
    """Make a preset of the checkpoint's own config, if a preset names a published repository that is in the cache."""
    stated = presets.read("model", asked, config_dir).get("model") or {}
    if not isinstance(stated, Mapping) or not stated.get("family"):
        return None
    from huggingface_hub import try_to_load_from_cache

    repository, revision = str(stated["repository"]), str(stated.get("revision") or "")
    found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if not isinstance(found, str) or not is_published(_content(Path(found))):
        return None
    name = store_preset(published_content(Path(found).parent), asked, config_dir)
    return name, {"name": asked, "repository": repository, "revision": revision, "family": str(stated["family"])}


def _is_zoo_model(file: Path) -> bool:
    content = _content(file)
    return isinstance(content, dict) and isinstance(content.get("slots"), dict)


def _content(file: Path) -> Any:
    try:
        return read_json(file)
    except ZooError:
        return None


def trusted_slots(content: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """Return the parts, data and tasks of a config, which may come from elsewhere.

    Raises:
        ZooError: it contains code, absurd sizes, values of other types, or components that are not registered.
    """
    where = f"The config of model {asked!r}"
    if not isinstance(content.get("slots"), Mapping):
        raise ZooError(f"{where} has no 'slots'.")
    require_types(content, where)
    slots = {**content["slots"], **{k: content[k] for k in ("data", "task") if isinstance(content.get(k), dict)}}
    for part in (slots, content.get("tokenizer") or {}, content.get("plugins") or []):
        refuse_code(part, where)
        require_model_config(part, where)
    _ask_for_plugins(slots, content.get("plugins") or [], where)
    return slots


def store_preset(content: Mapping[str, Any], asked: str, config_dir: str | Path | None = None) -> str:
    """Check a saved config and store it as a preset; return its private name."""
    slots, where = trusted_slots(content, asked), f"The config of model {asked!r}"
    defaults: list[Any] = []
    body: dict[str, Any] = {}
    for kind in SLOT_KINDS:
        group = group_of(kind)
        if group not in slots:
            continue
        node = slots[group]
        if kind in MANY:
            if not isinstance(node or {}, Mapping):
                raise ZooError(f"{where}: {group!r} must be a mapping of names to components, got {node!r}.")
            members = {str(key): item for key, item in (node or {}).items()}
            for key, item in members.items():
                _member(kind, key, item, where, config_dir)
            defaults.append({f"override /{group}": list(members)})
            body[group] = {key: _options(item) for key, item in members.items()}
        elif node is None:
            defaults.append({f"override /{group}": None})
        else:
            defaults.append({f"override /{group}": _member(kind, group, node, where, config_dir)})
            body[group] = _options(node)
    if content.get("tokenizer"):
        body["tokenizer"] = dict(content["tokenizer"])
    body["positions"] = content.get("positions", "auto")
    # Names of presets are words: a path would be read as a group.
    name = "saved_" + re.sub(r"\W+", "_", asked).strip("_")
    return presets.store("model", name, {"defaults": defaults, **body})


def _ask_for_plugins(slots: Mapping[str, Any], remembered: Any, where: str) -> None:
    """Raise an error that names the plugins to add, if a slot holds a component that is not registered."""
    unknowns = []
    for kind in SLOT_KINDS:
        node = slots.get(group_of(kind)) or {}
        members = node.values() if kind in MANY and isinstance(node, Mapping) else [node]
        given = [m["name"] for m in members if isinstance(m, Mapping) and "name" in m]
        unknowns += [f"{kind} {name!r}" for name in given if name not in names(kind)]
    absent = [str(p) for p in remembered if not plugins.is_loaded(str(p))]
    if unknowns and absent:
        raise ZooError(
            f"{where} needs {', '.join(unknowns)}, which the model got from a plugin that is not loaded: "
            f"{', '.join(map(repr, absent))}. If you trust it, add plugins=[{','.join(absent)}]."
        )


def require_member(kind: str, key: str, node: Any, where: str) -> None:
    """Refuse a saved slot without a registered component, or in another form than a component's options.

    Args:
        kind, key: of the slot's member; in a slot for a single part, the key is the slot.
        node: content of the config there.
        where: names the config, for the message.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("name"), str):
        raise ZooError(f"{where}: the slot {key!r} must be a mapping with a 'name', got {node!r}.")
    if node["name"] not in names(kind):
        raise ZooError(f"{where}: {unknown(kind, node['name'], names(kind))}")
    if not re.fullmatch(r"\w+", key):
        raise ZooError(f"{where}: {key!r} is not a valid name; allowed are letters, digits and underscores.")


def _member(kind: str, key: str, node: Any, where: str, config_dir: str | Path | None) -> str:
    """Check that a saved slot names a component; make a key other than its name available in the group."""
    require_member(kind, key, node, where)
    if kind in MANY and presets.component_of(group_of(kind), key, config_dir) != node["name"]:
        presets.add_member(kind, key, node["name"])
    return node["name"]


def _options(node: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in node.items() if key != "name"}
