"""Run a command with the words after `zoo train`: one run, a sweep, or one of Hydra's views of the config.

A single run is composed as in `zoo.load` and passed to its command. A sweep goes through Hydra's launcher, `--cfg` and
`--info` through `hydra.main`, all with the same schema and the same prepared overrides.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.registry import ZooError, nearest, plugins

FLAGS = {  # our flags and Hydra's; True if the flag takes a value
    "-h": False,
    "--help": False,
    "-m": False,
    "--multirun": False,
    "-c": True,
    "--cfg": True,
    "-p": True,
    "--package": True,
    "-i": True,
    "--info": True,
    "-cd": True,
    "--config-dir": True,
    "--resolve": False,
    "--hydra-help": False,
    "--json": False,
}
WITH_RESUME = {"resume", "device", "log", "plugins", "run.dir"}  # of this process, or needed to find the run
WITH_LOCK = {"lock", "device", "log", "plugins", "run.dir", "run.name", "run.folder"}  # the same, of a new run
MOVED = {"llm.checkpoint", "model", "model.base", "vision.checkpoint"}  # new locations of the run's initial weights
MOVED_OF_SEVERAL = re.compile(r"vision\.encoders\.\w+\.checkpoint").fullmatch
PARALLEL = "parallel."  # how the processes of this launch share the model: a checkpoint is read by any of them
NONE = ("", "null")
_FOLDERS = (
    "  runs/a runs/b   compare two folders of evaluations; nothing is run",
    "  --flips N       of a comparison: answers shown that are right of one alone (5)",
)
LONG = {"-m": "--multirun", "-c": "--cfg", "-p": "--package", "-i": "--info", "-cd": "--config-dir", "-h": "--help"}


def launch(command: str, summary: str, load: Callable[[], Callable[[Any], Any]], words: Sequence[str]) -> Any:
    """Run a command that takes a composed config, and return what it returns; 0 for a sweep, help and Hydra's views.

    Args:
        command: its name.
        summary: what it does, for its help.
        load: imports and returns it; called after the config was validated, so that mistakes are reported fast.
        words: overrides and flags.
    """
    overrides, flags = split(words)
    with_json = flags.pop("--json", None) is not None
    config_dir = flags.pop("--config-dir", None)
    if with_json and flags:
        raise ZooError(f"--json is for one run: it cannot be combined with {', '.join(flags)}.")
    if config_dir and not Path(config_dir).is_dir():
        raise ZooError(f"--config-dir {config_dir!r}: no such folder.")
    if "--help" in flags:
        print(usage(command, summary))
        return 0
    from zoo.settings.config import explained

    if not flags:  # without hydra.main, which would take over sys.argv, logging and errors
        from zoo.settings.config import compose

        resumes_alone(overrides)
        with naming_failed_plugins():
            cfg = compose(command, overrides, config_dir)
        return load()(cfg)

    def task(cfg: Any) -> Any:
        from zoo.settings.config import validate

        validate(cfg)
        return load()(cfg)

    if "--multirun" in flags:
        from zoo.cli.sweep import plan, run

        with explained():
            with naming_failed_plugins():
                sweep = plan(command, overrides, config_dir)
            run(sweep, task, config_dir)
        return 0
    from zoo.settings.overrides import prepare

    with explained(), naming_failed_plugins():
        prepared = prepare(command, overrides, config_dir)
    _hydra_main(task, [*_as_words(flags), *prepared], config_dir)
    return 0


def resumes_alone(overrides: Sequence[str]) -> None:
    """Refuse options beside `resume` and `lock`, since a run keeps those that it was started with.

    Raises:
        ZooError: an option would be ignored.
    """
    names = {word: word.lstrip("+~").partition("=")[0] for word in overrides}
    resumed = next(
        (word for word, name in names.items() if name == "resume" and word.partition("=")[2] not in NONE), None
    )
    replayed = next(
        (word for word, name in names.items() if name == "lock" and word.partition("=")[2] not in NONE), None
    )
    word, allowed = (resumed, WITH_RESUME) if resumed else (replayed, WITH_LOCK)
    extra = [
        word
        for word, name in names.items()
        if name not in allowed | MOVED and not MOVED_OF_SEVERAL(name) and not (resumed and name.startswith(PARALLEL))
    ]
    if word and extra:
        does, shared = ("goes on", f", {PARALLEL}<option>") if resumed else ("trains once more", "")
        raise ZooError(
            f"{word} {does} with the options that the run was started with; it cannot take {', '.join(extra)}. "
            f"Allowed beside it: {', '.join(sorted(allowed - {'resume', 'lock'}))}{shared}; and for weights that were "
            f"moved, {', '.join(sorted(MOVED))}."
        )


def split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate overrides from flags.

    Raises:
        ZooError: a flag does not exist, or has no value.
    """
    overrides: list[str] = []
    flags: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        name, equals, value = word.partition("=")
        if name not in FLAGS:
            near = nearest(name, [f for f in FLAGS if f.startswith("--")])
            hint = f" Did you mean {near[0]!r}?" if near else ""
            option = f" Options of a run have no dashes: {name.lstrip('-')}=<value>." if not near else ""
            raise ZooError(f"No flag {name!r}.{hint}{option} Flags: {', '.join(f for f in FLAGS if f[:2] == '--')}.")
        if FLAGS[name] and not equals:
            if not rest:
                raise ZooError(f"{name} needs a value.")
            value = rest.pop(0)
        flags[LONG.get(name, name)] = value
    return overrides, flags


def _as_words(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in ([name, value] if FLAGS[name] else [name])]


@contextmanager
def naming_failed_plugins() -> Iterator[None]:
    """Warn of plugins that failed to load; add them to an error, which they may have caused."""
    try:
        yield
    except ZooError as error:
        if not plugins.failed():
            raise
        broken = "; ".join(f"{p.name!r} ({p.error})" for p in plugins.failed())
        raise ZooError(f"{error} Plugins that failed to load: {broken}.") from error
    for plugin in plugins.failed():
        print(f"zoo: plugin {plugin.name!r} was left out: {plugin.error}", file=sys.stderr)


def _hydra_main(task: Callable[[Any], Any], words: Sequence[str], config_dir: str | None) -> None:
    """Run `hydra.main` with our schema. Errors are raised, and the process's state is restored."""
    import hydra

    from zoo.settings.config import explained, store_schema
    from zoo.settings.schema import CONFIG_NAME

    skip_lazy_help()
    store_schema()
    directory = ["--config-dir", config_dir] if config_dir else []
    # hydra.main has no other way in than sys.argv and the environment.
    full_error, argv = os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing and exiting
    sys.argv = ["zoo", *words, *directory]
    try:
        with explained():
            hydra.main(version_base="1.3", config_path="pkg://zoo.conf", config_name=CONFIG_NAME)(task)()
    finally:
        sys.argv = argv
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def skip_lazy_help() -> None:
    """Let Python 3.14's argparse accept the lazy help object of Hydra 1.3, which is not a string (hydra issue 3121)."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None or getattr(check, "skips_lazy_help", False):
        return

    def checked(self: argparse.ArgumentParser, action: argparse.Action) -> None:
        if action.help is None or isinstance(action.help, str):
            check(self, action)

    checked.skips_lazy_help = True  # type: ignore[attr-defined]
    argparse.ArgumentParser._check_help = checked  # type: ignore[attr-defined]


def shell_script(words: Sequence[str]) -> int:
    """Print Hydra's completion script for `install=bash` and the like."""
    argv, shells = sys.argv, ("bash", "fish", "zsh")
    what, _, shell = (words[0] if words else "").partition("=")
    if what not in ("install", "uninstall") or shell not in shells:
        raise ZooError(f"Completion is set up with `zoo -sc install=<shell>`; shells: {', '.join(shells)}.")
    from hydra.core.plugins import Plugins
    from hydra.plugins.completion_plugin import CompletionPlugin

    sys.argv = ["zoo"]
    try:
        found: Any = Plugins.instance().discover(CompletionPlugin)
        for plugin in found:
            if plugin.provides() == shell:
                getattr(plugin(config_loader=None), what)()
    finally:
        sys.argv = argv
    return 0


def usage(command: str, summary: str) -> str:
    """Return the text of `zoo train --help`."""
    from dataclasses import fields
    from textwrap import fill

    from zoo.registry import options_of
    from zoo.settings.overrides import SEVERAL, SLOTS
    from zoo.settings.presets import available
    from zoo.settings.schema import SECTIONS, RunRoot

    plugins.load_installed()
    models = [*available("model"), "dir:<folder>", "hub:<org>/<name>", "last"]
    groups = [("recipe", available("recipe")), ("model", models)]
    groups += [(slot, available(slot)) for slot in SLOTS]
    heads = {key: f"  {key + ('=[...]' if key in SEVERAL else '='):<16}" for key, _ in groups}
    lines = [fill(heads[key] + ", ".join(found), 110, subsequent_indent=" " * 18) for key, found in groups]
    shown = {f.name for f in fields(RunRoot)} - {"defaults", "hydra", "model", "stages", *SLOTS}
    options = [o for o in options_of(RunRoot) if o.name in shown and o.doc]
    lines += ["", *(f"  {o.name + '=':<16}{o.doc}" for o in options)]
    if section := {"teach": "teach", "data": "survey"}.get(command):  # options of this command alone
        own = options_of(SECTIONS[section])
        lines += ["", *(f"  {section + '.' + o.name + '=':<18}{o.doc}" for o in own if o.doc)]
    if command == "eval":
        lines += ["", "  model=[a,b]     compare two models on the same samples", *_FOLDERS]
    listing = "\n".join(lines)
    return f"""zoo {command}: {summary}

usage: zoo {command} [key=value ...] [flags]

{listing}

  <slot>.<option>=, <slot>.<name>.<option>=     an option of a slot's component; zoo info <kind>/<name> lists them
  stages.<stage>.<option>=                      an option of a stage of the recipe

  -m, --multirun          run every combination of comma-separated values
  --cfg job [-p KEY]      print the config and stop
  --config-dir DIR        a folder of your own with model/, recipe/ and data/"""
