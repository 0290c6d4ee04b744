"""The command `zoo`: find the subcommand, and import only its modules."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from zoo.registry import ZooError, nearest
from zoo.registry.quiet import for_people
from zoo.text.command_line import HELP
from zoo.text.terminal import columns, only_json, wrapped, write_answer


@dataclass(frozen=True)
class Command:
    """A subcommand: `module:function`, imported when it runs."""

    target: str
    summary: str
    composed: bool = False  # takes a config composed from overrides; else the words unchanged
    json: bool = False  # takes --json: what it returns is an `Answer`, or has `as_json`
    json_file: bool = False  # its --json is another, which takes a file

    def load(self) -> Callable[..., Any]:
        module, _, function = self.target.partition(":")
        return getattr(import_module(module), function)


COMMANDS = {
    "train": Command(
        "zoo.training.loop:main", "train a model; without options, a small one on drawn scenes", composed=True
    ),
    "eval": Command(
        "zoo.evaluation.evaluate:main",
        "score a model, model=last, or compare two, model=[a,b]",
        composed=True,
        json=True,
    ),
    "chat": Command("zoo.cli.chat_command:main", "talk to a model: zoo chat MODEL --image photo.jpg"),
    "export": Command(
        "zoo.cli.export_command:main", "write a model for transformers or for zoo elsewhere: zoo export last"
    ),
    "demo": Command("zoo.cli.demo_command:main", "talk to models on a page, with what pruners keep: zoo demo MODEL"),
    "serve": Command("zoo.cli.serve_command:main", "answer over HTTP, as OpenAI's API does: zoo serve MODEL"),
    "push": Command("zoo.cli.push_command:main", "put a model on the hub: zoo push last org/name --dry-run"),
    "teach": Command("zoo.training.teach:main", "store the outputs of a stage's teacher, to train from", composed=True),
    "check": Command(
        "zoo.cli.check_command:main", "check whether the parts fit, before weights are loaded", composed=True, json=True
    ),
    "data": Command(
        "zoo.inspection.survey_report:main",
        "survey data before a run: broken records, lengths, duplicates",
        composed=True,
    ),
    "report": Command(
        "zoo.inspection.report:main", "compare runs: a row for each, a picture and a page of curves", json=True
    ),
    "bench": Command("zoo.cli.bench:main", "measure speed: zoo bench train", json_file=True),
    "shift": Command(
        "zoo.inspection.moextend_layers:main",
        "find the layers whose experts new data shifts most, for adapter moextend",
    ),
    "inspect": Command("zoo.inspection.xray:main", "what pruners keep of a picture: zoo inspect MODEL --image cat.jpg"),
    "list": Command(
        "zoo.cli.listing:list_main", "list components, models, recipes and data: zoo list [kind] [pattern]", json=True
    ),
    "info": Command(
        "zoo.cli.listing:info_main", "show everything about one of them: zoo info pruner/random", json=True
    ),
    "new": Command("zoo.cli.new:main", "write a component of your own to start from: zoo new pruner my_pruner"),
    "test": Command(
        "zoo.cli.test_command:main",
        "try all that a part has to do: zoo test pruner/random",
        json=True,
    ),
    "doctor": Command(
        "zoo.cli.doctor:main", "show versions, devices and plugins, and what is worth installing", json=True
    ),
    "version": Command("zoo.cli.entry:version", "print the version"),
}

EXAMPLES = (
    ("zoo train pruner=random pruner.keep_ratio=0.25", "a part, and an option of it"),
    ("zoo train adapter=[lora] adapter.lora.rank=8", "one of several in a slot"),
    ("zoo train -m pruner=null,random,pool", "a sweep: a run for each"),
    ("zoo eval model=last", "the newest run, on its data"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zoo <argv>` and return the exit status: 0, or 2 for an error of the user."""
    words = _command_first(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    with_json = "--json" in words and name in COMMANDS and COMMANDS[name].json and not set(words) & {*HELP}
    # Loader threads prepare samples while a step runs; OpenBLAS threads for numpy's small products would take the
    # step's cores: stage `look` of the default recipe ran at half its speed. numpy reads this when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        with only_json() if with_json else nullcontext(), for_people() if argv is None else nullcontext():
            result = _run(words)
        status = _status(result)
        if with_json:
            write_answer(name, status, result.as_json())
        return status
    except ZooError as error:
        if "1" in (os.environ.get("ZOO_DEBUG"), os.environ.get("HYDRA_FULL_ERROR")):
            raise
        lines = f"zoo: {error}".split("\n")
        if sys.stderr.isatty():  # in a pipe, a line of a log is searched
            lines = [wrapped(line, subsequent="  ") for line in lines]
        print("\n".join(lines), file=sys.stderr)
        if with_json:
            fixes = getattr(error, "fixes", None)  # of a composition that was refused
            why = str(error) if fixes is None else getattr(error, "reason", str(error))
            fixes = fixes and [fix.replace("\n", " ") for fix in fixes]  # of two overrides, as they are typed
            write_answer(name, 2, {"error": why} if fixes is None else {"error": why, "fixes": fixes})
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has exited, as in `zoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command_first(words: Sequence[str]) -> list[str]:
    """Move `--json` and `--help` in front of a command behind it."""
    flags = next((i for i, word in enumerate(words) if word not in ("--json", "--help", "-h")), 0)
    return [*words[flags : flags + 1], *words[:flags], *words[flags + 1 :]]


def _run(words: list[str]) -> Any:
    if words[:1] in (["-sc"], ["--shell-completion"]):
        return _completion(words[1:])
    if not words or words[0] in HELP:
        print(overview())
        return 0
    name, rest = words[0], words[1:]
    if name in ("-V", "--version"):
        name = "version"
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ZooError(f"No command named {name!r}.{hint} Available: {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    if "--json" in rest and not (command.json or command.json_file):
        having = ", ".join(name for name, command in COMMANDS.items() if command.json)
        raise ZooError(f"zoo {name} has no flag '--json'. Commands that have it: {having}.")
    if not command.composed:
        try:
            return command.load()(rest)
        except SystemExit as done:  # of argparse, after --help
            return done.code
    from zoo.cli import compare_command
    from zoo.cli.launch import launch

    def run(words: Sequence[str], notes: bool = True) -> Any:
        return launch(name, command.summary, command.load, words, json=command.json, notes=notes)

    if name == "eval" and not set(rest) & {*HELP} and compare_command.names_two(rest):
        return compare_command.main(rest, lambda words: run(words, notes=False))
    return run(rest)


def _status(result: Any) -> int:
    return result if isinstance(result, int) else int(getattr(result, "status", 0))


def overview() -> str:
    """Return the text of `zoo --help`."""
    commands = columns([(name, command.summary) for name, command in COMMANDS.items()])
    having = ", ".join(name for name, command in COMMANDS.items() if command.json)
    more = f"zoo <command> --help lists its options. --json prints one JSON object: {having}."
    return f"""Compose vision-language models from registered parts, by config.

usage: zoo <command> [name or key=value ...] [flags]

{commands}

{columns(EXAMPLES, widest=48)}

{wrapped(more)}
Completion: eval "$(zoo -sc install=bash)\""""


def _completion(words: list[str]) -> int:
    """Answer a completion script of the shell, or install one."""
    if words[:1] and words[0].startswith("query="):
        from zoo.cli.complete import complete

        try:
            found = complete(os.environ.get("COMP_LINE", ""), {name: c.composed for name, c in COMMANDS.items()})
        except ZooError:
            found = []
        print(("\n" if words[0] == "query=fish" else " ").join(found))
        return 0
    from zoo.cli.launch import shell_script

    return shell_script(words)


def version(words: Sequence[str] = ()) -> int:
    """Print the version."""
    import zoo

    print(zoo.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
