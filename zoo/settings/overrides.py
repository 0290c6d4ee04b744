"""Turn typed overrides into overrides that Hydra can compose: plugins, names, saved models, trimmed presets.

`prepare` is called once for a run and once for every job of a sweep. It works on names only, so that most mistakes are
found before components are imported.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zoo.registry import MANY, ZooError, plugins, source_options, source_presets
from zoo.registry.errors import unknown_kind
from zoo.registry.presets import PRESET
from zoo.registry.table import EMPTY_SLOT, SLOT_KINDS, group_of, kind_of
from zoo.settings import component_presets, presets, several_encoders
from zoo.settings import model_names as saved
from zoo.settings.schema import DEFAULT_MODEL, DEFAULT_RECIPE, RunRoot
from zoo.settings.static_check import elsewhere, no_stage, try_override
from zoo.settings.text_options import NO_TEXT, TextOptions
from zoo.text.tokenizer_files import has_template

RECIPE_COMMANDS = ("train", "eval", "check", "data")  # commands that start from the default recipe
SLOTS = tuple(group_of(kind) for kind in SLOT_KINDS)
SEVERAL = tuple(group_of(kind) for kind in SLOT_KINDS if kind in MANY)
# Dicts of the schema with arbitrary keys.
_OPEN_WHOLE = re.compile(r"stages\.\w+\.(data|loss_weights|lr_scale)|tokenizer\.template_options")
_OPEN = re.compile(rf"(?:{_OPEN_WHOLE.pattern})\.")
_TEACHING = re.compile(r"stages\.(\w+)\.(distiller|teacher)(?=\.|$)")  # untyped nodes of a stage
_STAGE = re.compile(r"stages\.(\w+)(?:\.|$)")
_QUESTION = re.compile(r"data\.[\w-]+\.questions\.[\w-]+")  # that a table asks, or not


def prepare(command: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """Load plugins, make every component an option, and rewrite overrides to what Hydra can compose.

    Raises:
        ZooError: an override cannot be read, or names something that does not exist.
    """
    parsed = parse(component_presets.with_components(several_encoders.with_encoders(overrides)))
    for override in parsed:
        if override.is_sweep_override():
            line, key = override.input_line, override.key_or_group
            typed = [value.strip() for value in line.partition("=")[2].split(",")]
            several = f", or brackets for several at once: {key}=[...]" if key in SEVERAL else ""
            if key not in (*SLOTS, "model", "recipe") and not all(map(NO_TEXT.fullmatch, typed)):
                several = f", or quotes for one text with commas: \"{key}='...'\""
            raise ZooError(f"{line!r} is a sweep: add -m to run each{several}.")
    from zoo.registry.hydra import flush

    load_plugins(command, [values(parsed)], config_dir)
    flush()  # components of plugins become options of Hydra
    for override in parsed:
        check(override, config_dir)
    for override in parsed:
        require_option(override, lambda: _chosen(command, parsed, config_dir), config_dir)
    parsed = chosen_last(parsed)
    choice = choose(command, values(parsed), config_dir)
    if any(override.key_or_group.endswith(f".{PRESET}") for override in parsed):
        parsed = parse(component_presets.expanded(parsed, choice.chosen, config_dir))
        choice = choose(command, values(parsed), config_dir)  # a preset may set a checkpoint
    choice.added = _added_stages(parsed, choice.recipe, config_dir)
    # Which options are text depends on the chosen components, so overrides are parsed a second time.
    texts = TextOptions(choice.chosen, config_dir)
    parsed = parse([texts.typed(o.input_line) for o in parsed])
    for override in parsed:
        if not having(override.key_or_group, choice.chosen, config_dir):
            try_override(override, choice.chosen, config_dir)
    rest = [o for o in parsed if o.key_or_group not in ("model", "recipe")]
    lines = [line for override in rest for line in _rewritten(override, choice, config_dir)]
    return lines + choice.lines(config_dir)


def chosen_last(parsed: Sequence[Any]) -> list[Any]:
    """Remove the first choice of a slot that is chosen twice, and its options.

    Options of members that both choices name are kept. So a command can be extended by appending words, as fixes are.
    """
    choices = {key: [i for i, o in enumerate(parsed) if o.key_or_group == key] for key in SLOTS}
    dropped: set[int] = set()
    for key, places in choices.items():
        if len(places) < 2:
            continue
        # Hydra refuses a group that is overridden twice; the last choice is the valid one.
        value = None if parsed[places[-1]].is_delete() else parsed[places[-1]].value()
        stay = {str(name) for name in presets.as_list(value)} if key in SEVERAL else set()
        for i, override in enumerate(parsed[: places[-1]]):
            group, _, rest = override.key_or_group.partition(".")
            if group == key and rest.partition(".")[0] not in stay:
                dropped.add(i)
    return [o for i, o in enumerate(parsed) if i not in dropped]


def parse(overrides: Sequence[str]) -> list[Any]:
    """Parse overrides by Hydra's grammar, with words that it would refuse as quoted text.

    Text options of the run itself keep the typed word; those of components do once the components are known.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed, texts = OverridesParser.create(), [], TextOptions({})
    for text in overrides:
        try:
            parsed.append(parser.parse_override(texts.typed(text)))
        except HydraException as error:
            hint = "" if "=" in text else f" Options are given as {text}=<value>."
            raise ZooError(f"Cannot read {text!r}.{hint} Quote a value that holds spaces, commas or braces.") from error
    return parsed


def values(parsed: Iterable[Any]) -> dict[str, Any]:
    """Return key -> value of the overrides that set a value."""
    return {o.key_or_group: o.value() for o in parsed if not o.is_delete()}


def typed_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Return key -> value of overrides as they were typed."""
    words = component_presets.with_components(several_encoders.with_encoders(overrides))
    return values(chosen_last(parse(words)))


def default_recipe(command: str) -> str | None:
    """Return the recipe of a command without `recipe=`."""
    return DEFAULT_RECIPE if command in RECIPE_COMMANDS else None


def load_plugins(command: str, runs: Iterable[Mapping[str, Any]], config_dir: str | Path | None = None) -> None:
    """Load installed plugins, those that the recipes name, and those named with `plugins=`.

    Raises:
        ZooError: a plugin that a recipe or the command names does not load.
    """
    plugins.load_installed()
    wanted: list[str] = []
    for given in runs:
        recipe = given.get("recipe", default_recipe(command))
        if isinstance(recipe, str):
            wanted += presets.plugins_of(recipe, config_dir)
        wanted += [str(name) for name in presets.as_list(given.get("plugins"))]
    plugins.require(dict.fromkeys(wanted))


def check(override: Any, config_dir: str | Path | None) -> None:
    """Refuse choices that do not exist, and Hydra's prefixes, which would bypass the schema."""
    key, value = override.key_or_group, override.value()
    if override.is_hydra_override() or key.startswith("hydra/"):
        return
    if override.package is not None:
        raise ZooError(f"{override.input_line!r}: '@' is for files. Write {key}=<name>.")
    may = _STAGE.match(key) or (override.is_delete() and _QUESTION.fullmatch(key))
    if (override.is_add() or override.is_force_add() or override.is_delete()) and not may:
        off = f"Write {key}={'[]' if key in SEVERAL else 'null'}" if key in SLOTS else "Without one, its default holds"
        instead = off if override.is_delete() else f"Write {override.input_line.lstrip('+')}"
        raise ZooError(f"{override.input_line!r}: options cannot be added or removed. {instead}.")
    if key in SLOTS and not override.is_delete() and not isinstance(value, dict):
        if isinstance(value, list) and key not in SEVERAL:
            raise ZooError(f"{key}={_text(value)}: the slot {key!r} holds one component. Write {key}=<name>.")
        # Here, since Hydra's message has no nearest match.
        for name in presets.as_list(value):
            presets.require(key, name, config_dir)
    elif key == "recipe" and value is not None:
        presets.require(key, value, config_dir)


def require_option(
    override: Any, chosen: Callable[[], Mapping[str, Any]], config_dir: str | Path | None = None
) -> None:
    """Refuse an option that the run does not have, with the paths of options of that name.

    Args:
        override: as Hydra parsed it.
        chosen: returns group -> choice of the run; called for the message only.
        config_dir: a user's own folder of presets.
    """
    key = override.key_or_group
    if override.is_hydra_override() or key.startswith("hydra/"):
        return
    head = key.partition(".")[0]
    known = {f.name for f in fields(RunRoot)} - {"defaults", "hydra"} | {"recipe"}
    if head not in known:
        if head == key and (error := elsewhere("", head, chosen(), config_dir)):
            raise error
        raise unknown_kind("option", head, known)


def _chosen(command: str, parsed: Sequence[Any], config_dir: str | Path | None) -> Mapping[str, Any]:
    """Return the choices of a run that has unknown options; empty if they cannot be determined."""
    with suppress(ZooError):
        return choose(command, values(parsed), config_dir).chosen
    return {}


@dataclass
class Choice:
    """The recipe, the model and the components of a run."""

    recipe: str | None
    model: str
    own: dict[str, Any]  # group -> choice of recipe and model, without the overrides
    own_of_model: dict[str, Any]
    chosen: dict[str, Any]  # group -> choice of the run; a list for slots that hold several
    source: dict[str, str]  # fields of ModelSource
    without: dict[str, frozenset[str]]  # section -> options of presets that do not apply to a checkpoint of the run
    added: list[str] = field(default_factory=list)  # stages that the run adds to those of the recipe

    def lines(self, config_dir: str | Path | None = None) -> list[str]:
        """Return the overrides that make Hydra compose this choice."""
        texts = TextOptions(self.chosen, config_dir)
        model = presets.trim("model", self.model, self.own_of_model, self.chosen, config_dir, texts, self.without)
        lines = [f"model={quoted(model)}"]
        lines += [f"++model.{key}={quoted(value)}" for key, value in self.source.items()]
        # Added stages go into a preset, since Hydra does not apply the schema to nodes that an override adds.
        stages: dict[str, Any] = {name: {} for name in self.added}
        if self.recipe is None:
            recipe = presets.store_once("recipe", "added", {"stages": stages}) if stages else EMPTY_SLOT
            return [*lines, f"recipe={quoted(recipe)}"]
        recipe = presets.trim("recipe", self.recipe, self.own, self.chosen, config_dir, texts, self.without)
        if stages:
            recipe = presets.store_once("recipe", recipe, {"defaults": [recipe, "_self_"], "stages": stages})
        return [*lines, f"recipe={quoted(recipe)}", f"run.recipe={quoted(self.recipe)}"]


def choose(command: str, given: Mapping[str, Any], config_dir: str | Path | None = None) -> Choice:
    """Determine recipe, model and components of a run: overrides first, then the recipe, then the model."""
    recipe = given.get("recipe", default_recipe(command))
    from_recipe = presets.selection("recipe", recipe, config_dir) if recipe else {}
    asked = given.get("model", from_recipe.get("model", _default_model({*from_recipe, *given})))
    # `zoo check` works offline, with the options that the preset states.
    if command in ("train", "eval", "data") and isinstance(asked, str):
        saved.fetch_config(asked, config_dir)
    named = presets.as_list(given.get("data", from_recipe.get("data") if "recipe" in given else None))
    model, source = (EMPTY_SLOT, {"name": ""}) if asked is None else saved.resolve(asked, given, config_dir, named)
    from_model = presets.selection("model", model, config_dir)
    if recipe and "recipe" not in given and "data" in from_model:
        recipe, from_recipe = None, {}  # a saved model names its own data, which replaces the default recipe's
    own = {**from_model, **from_recipe}
    # A dict for a slot holds options of its component and does not choose one.
    picked = {key: given[key] for key in SLOTS if key in given and not isinstance(given[key], dict)}
    chosen = {key: presets.as_list(v) if key in SEVERAL else v for key, v in {**own, **picked}.items()}
    for key in SLOTS:
        if key in own and key not in picked:
            for name in presets.as_list(own[key]):
                presets.require(key, name, config_dir)
    without: dict[str, frozenset[str]] = {}
    if source.get("source", "preset") == "preset":
        without = _of_random_parts(given, model, recipe, own, from_model, config_dir)
    else:
        _refuse_checkpoints(given, model, str(asked), config_dir)
    if "vision.encoders" in given and without.get("vision", True):  # they are named anew, not added to a preset's
        without["vision"] = frozenset({"encoders", *without.get("vision", ())})
    source = {key: value for key, value in source.items() if f"model.{key}" not in given}
    return Choice(recipe, model, own, from_model, chosen, source, without)


def _refuse_checkpoints(given: Mapping[str, Any], model: str, asked: str, config_dir: str | Path | None) -> None:
    """Refuse a checkpoint for a part of a saved model that was made without one: its weights are in the folder."""
    for slot in ("vision", "llm"):
        checkpoint, stated = given.get(f"{slot}.checkpoint"), presets.section("model", model, slot, config_dir)
        if checkpoint and slot not in given and stated and not stated.get("checkpoint"):
            raise ZooError(
                f"{slot}.checkpoint={checkpoint}: the folder of model {asked!r} has all weights of its {slot}, so no "
                f"checkpoint is read: omit the option. To replace its {slot}, choose another: {slot}=<name>."
            )


def _of_random_parts(
    given: Mapping[str, Any],
    model: str,
    recipe: str | None,
    own: Mapping[str, Any],
    own_of_model: Mapping[str, Any],
    config_dir: str | Path | None,
) -> dict[str, frozenset[str]]:
    """Return the options that presets state for a part with random weights, if the run gives it a checkpoint or family.

    Sizes, fields of a family and a tokenizer for the run's own text do not apply to a checkpoint. Options that a preset
    states beside a checkpoint of its own (which layer is read, say) apply to another checkpoint too.

    Returns:
        Section -> options that do not apply; an empty set: the whole section.
    """
    found: dict[str, frozenset[str]] = {}
    for slot in ("vision", "llm"):
        same = own.get(slot) == own_of_model.get(slot)  # else the recipe replaces the part
        stated = presets.section("model", model, slot, config_dir) if same else {}
        stated |= presets.section("recipe", recipe, slot, config_dir) if recipe else {}
        stated = presets.spelled_out(slot, own.get(slot, ""), stated, config_dir)
        checkpoint = given.get(f"{slot}.checkpoint")
        if (checkpoint or given.get(f"{slot}.model")) and not (stated.get("checkpoint") or stated.get("model")):
            found[slot] = frozenset()
            if slot == "llm":
                # A tokenizer without a chat template of its own keeps the preset's.
                found["tokenizer"] = frozenset({"checkpoint", "vocab_size", "template_options"})
                if has_template(str(checkpoint)):
                    found["tokenizer"] = frozenset()
        elif given.get(f"{slot}.model") and not checkpoint and not stated.get("model"):
            found[slot] = frozenset({"checkpoint", "revision"})  # of another model
        elif given.get(f"{slot}.model_type", stated.get("model_type")) != stated.get("model_type"):
            found[slot] = frozenset({"extra"})
    return found


def _default_model(picked: set[str]) -> str | None:
    """Return the model of a run without `model=`; None if encoder and LLM are named, which do not need a preset."""
    return None if {"vision", "llm"} <= picked else DEFAULT_MODEL


def _rewritten(override: Any, choice: Choice, config_dir: str | Path | None) -> list[str]:
    """Return an override in the form that Hydra accepts."""
    key, value = override.key_or_group, override.value()
    if key in SEVERAL and value is None:
        return [f"{key}=[]"]
    if key in SLOTS and value is None:
        return [f"{key}={EMPTY_SLOT}"]
    if key == "data" and isinstance(value, (str, list)):
        names = TextOptions(choice.chosen, config_dir).choice(value)
        return [override.input_line] if names == value else [f"data={_text(presets.as_list(names))}"]
    if key in ("plugins", "log") and not isinstance(value, list):
        return [f"{key}={component_presets.written_value(presets.as_list(value))}"]
    line = override.input_line
    if stage := _STAGE.match(key):
        there = {
            s for g, n in (("model", choice.model), ("recipe", choice.recipe)) if n for s in _stages(g, n, config_dir)
        }
        if stage[1] in choice.added:
            line = line.lstrip("+")  # exists by now
        elif stage[1] not in there and (_OPEN.match(key) or _TEACHING.match(key)):  # Hydra reports others
            raise no_stage(stage[1], [*there, *choice.added])
    if _OPEN_WHOLE.fullmatch(key) and isinstance(value, dict):  # Hydra adds no names to a dict of the schema
        return [f"++{key}.{name}={component_presets.written_value(one)}" for name, one in value.items()]
    if _OPEN.match(key) and not override.is_delete():
        return ["++" + line.lstrip("+")]
    if members := having(key, choice.chosen, config_dir):
        group, _, option = key.partition(".")
        return [f"{group}.{member}.{option}={override.get_value_element_as_str()}" for member in members]
    if _TEACHING.match(key) and not override.is_delete():
        line = "++" + line.lstrip("+")  # the recipe may not state the option
        another = isinstance(value, dict) and _names_another(key, value, choice.recipe, config_dir)
        return [f"{key}=null", line] if another else [line]  # replaces the recipe's instead of merging with it
    return [line]


def _added_stages(parsed: Sequence[Any], recipe: str | None, config_dir: str | Path | None) -> list[str]:
    """Return the stages that overrides add with `+` and the recipe does not have."""
    there = _stages("recipe", recipe, config_dir) if recipe else {}
    found = [m[1] for o in parsed if (o.is_add() or o.is_force_add()) and (m := _STAGE.match(o.key_or_group))]
    return [name for name in dict.fromkeys(found) if name not in there]


def _stages(group: str, name: str, config_dir: str | Path | None) -> dict[str, Any]:
    """Return the stages of a preset and of the presets that it starts from."""
    return presets.section(group, name, "stages", config_dir, deep=True)


def _names_another(key: str, value: Mapping[str, Any], recipe: str | None, config_dir: str | Path | None) -> bool:
    """Return whether a dict for a stage's distiller or teacher names another one than the recipe does."""
    found = _TEACHING.fullmatch(key)
    if found is None or recipe is None:
        return False
    stated = _stages("recipe", recipe, config_dir).get(found[1])
    before = stated.get(found[2]) if isinstance(stated, dict) else None
    names = ("name",) if found[2] == "distiller" else ("model", "store")
    given = {name: value[name] for name in names if value.get(name)}
    return bool(given) and isinstance(before, dict) and any(before.get(n) != v for n, v in given.items())


def quoted(text: str) -> str:
    """Quote a string, such as a path, for Hydra's grammar."""
    return component_presets.written_value(text).replace("${", "\\${")


def having(key: str, chosen: Mapping[str, Any], config_dir: str | Path | None = None) -> list[str]:
    """Return the chosen members that have the option of a short path such as `pruner.keep_ratio`."""
    parts = key.split(".")
    if len(parts) != 2 or parts[0] not in SEVERAL:
        return []
    group, option = parts
    kind, members = kind_of(group), chosen.get(group, [])
    if kind is None or option in members:
        return []
    components = {m: presets.component_of(group, m, config_dir) for m in members}
    if option == PRESET:
        return [m for m, name in components.items() if source_presets(kind, name)]
    return [m for m, name in components.items() if option in {o.name for o in source_options(kind, name)}]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)
