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

from zoo.registry import ZooError, plugins
from zoo.text.command_line import HELP, Parser
from zoo.text.terminal import columns, wrapped

HYDRAS = ("--multirun", "--cfg", "--package", "--info", "--resolve", "--hydra-help")
WITH_RESUME = {"resume", "device", "log", "plugins", "run.dir"}  # of this process, or needed to find the run
WITH_LOCK = {"lock", "device", "log", "plugins", "run.dir", "run.name", "run.folder"}  # the same, of a new run
MOVED = {"llm.checkpoint", "model", "model.base", "vision.checkpoint"}  # new locations of the run's initial weights
MOVED_OF_SEVERAL = re.compile(r"vision\.encoders\.\w+\.checkpoint").fullmatch
PARALLEL = "parallel."  # how the processes of this launch share the model: a checkpoint is read by any of them
NONE = ("", "null")
OPTIONS = "of a run; a slot's component has options of its own, and so has a stage of the recipe"


def launch(
    command: str,
    summary: str,
    load: Callable[[], Callable[[Any], Any]],
    words: Sequence[str],
    json: bool = False,
    notes: bool = True,
) -> Any:
    """Run a command that takes a composed config, and return what it returns; 0 for a sweep, help and Hydra's views.

    Args:
        command: its name.
        summary: what it does, for its help.
        load: imports and returns it; called after the config was validated, so that mistakes are reported fast.
        words: overrides and flags.
        json: whether it takes `--json`.
        notes: print a note for what is given several values.
    """
    parser = parser_of(command, summary, json)
    if set(words) & set(HELP):
        print(usage(command, parser))
        return 0
    args = parser.read(words, notes)
    overrides, flags = [*args.word, *args.options], _flags(args)
    with_json, config_dir = getattr(args, "json", False), args.config_dir
    if with_json and flags:
        raise ZooError(f"--json is for one run: it cannot be combined with {', '.join(flags)}.")
    if config_dir and not Path(config_dir).is_dir():
        raise ZooError(f"--config-dir {config_dir!r}: no such folder.")
    from zoo.settings.config import explained

    resumes_alone(overrides)
    if not flags:  # without hydra.main, which would take over sys.argv, logging and errors
        from zoo.settings.config import compose

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
    free = ("hydra", PARALLEL) if resumed else ("hydra",)  # Hydra's launcher of a sweep is none of a run's options
    extra = [
        word
        for word, name in names.items()
        if name not in allowed | MOVED and not MOVED_OF_SEVERAL(name) and not name.startswith(free)
    ]
    if word and extra:
        does, shared = ("goes on", f", {PARALLEL}<option>") if resumed else ("trains once more", "")
        raise ZooError(
            f"{word} {does} with the options that the run was started with; it cannot take {', '.join(extra)}. "
            f"Allowed beside it: {', '.join(sorted(allowed - {'resume', 'lock'}))}{shared}; and for weights that were "
            f"moved, {', '.join(sorted(MOVED))}."
        )


def parser_of(command: str, summary: str, json: bool = False) -> Parser:
    """Return the parser of a command that takes a composed config: Hydra's flags, and options of the run."""
    about, form = f"{summary[:1].upper()}{summary[1:]}.", "[key=value ...] [flags]"
    parser = Parser(command, about, json=json, usage=form, options=OPTIONS)
    parser.add_argument("word", nargs="*", help=argparse.SUPPRESS)  # refused where overrides are read
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of comma-separated values")
    parser.add_argument("-c", "--cfg", metavar="job", help="print the config and stop; with -p, a part of it")
    parser.add_argument("-p", "--package", metavar="key", help="the part that --cfg prints")
    parser.add_argument("-i", "--info", metavar="what", help="print what Hydra knows: searchpath, defaults-tree, ...")
    parser.add_argument("-cd", "--config-dir", metavar="dir", help="a folder of yours with model/, recipe/ and data/")
    parser.add_argument("--resolve", action="store_true", help="of --cfg: with interpolations resolved")
    parser.add_argument("--hydra-help", action="store_true", help="print the help of Hydra")
    return parser


def _flags(args: Any) -> dict[str, str]:
    """Return the flags that are for Hydra, and `--multirun`, with their values."""
    given = {name: getattr(args, name[2:].replace("-", "_")) for name in HYDRAS}
    return {name: "" if value is True else value for name, value in given.items() if value}


def _as_words(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in filter(None, (name, value))]


@contextmanager
def naming_failed_plugins() -> Iterator[None]:
    """Warn of plugins that failed to load; add them to an error, which they may have caused."""
    try:
        yield
    except ZooError as error:
        others = [p for p in plugins.failed() if p.error not in str(error)]
        if not others:
            raise
        broken = "; ".join(f"{p.name!r} ({p.error})" for p in others)
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


def usage(command: str, parser: Parser) -> str:
    """Return the text of `zoo train --help`."""
    from dataclasses import fields

    from zoo.registry import options_of
    from zoo.registry.presets import shown
    from zoo.settings.overrides import SEVERAL, SLOTS
    from zoo.settings.presets import available
    from zoo.settings.schema import SECTIONS, RunRoot

    plugins.load_installed()
    models = [*available("model"), "dir:<folder>", "hub:<org>/<name>", "last"]
    groups = [("recipe", available("recipe")), ("model", models), *((slot, available(slot)) for slot in SLOTS)]
    parts = [(f"{key}=[...]" if key in SEVERAL else f"{key}=", ", ".join(found)) for key, found in groups]
    of_run = {f.name for f in fields(RunRoot)} - {"defaults", "hydra", "model", "stages", *SLOTS}
    options = [(f"{o.name}={shown(o.default)}", o.doc) for o in options_of(RunRoot) if o.name in of_run and o.doc]
    if section := {"teach": "teach", "data": "survey"}.get(command):  # options of this command alone
        options += [(f"{section}.{o.name}={shown(o.default)}", o.doc) for o in options_of(SECTIONS[section]) if o.doc]
    several = ""
    if command == "eval":
        rows = [
            ("model=[a,b]", "compare two models on the same samples"),
            ("runs/a runs/b", "compare two folders of evaluations; nothing is run"),
            ("--flips N", "of a comparison: answers shown that are right of one alone (5)"),
        ]
        several = f"two models:\n{columns(rows)}"
    within = [
        ("<slot>.<option>=", "an option of a slot's component, such as projector.depth=2"),
        ("<slot>.<name>.<option>=", "the same where several are chosen: pruner.random.keep_ratio=0.5"),
        ("stages.<stage>.<option>=", "an option of a stage of the recipe"),
    ]
    more = wrapped("zoo info <kind>/<name> lists the options of a component, zoo info recipe/<name> shows the stages.")
    tables = (("parts:", parts), ("options of the run:", options), ("options of parts and stages:", within))
    listed = [f"{title}\n{columns(rows)}" for title, rows in tables]
    parser.epilog = "\n\n".join(filter(None, [*listed, several, more]))
    return parser.format_help().rstrip()
