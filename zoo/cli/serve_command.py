"""`zoo serve MODEL [option=value ...]`: answer over HTTP, in OpenAI's chat-completions protocol."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from zoo.cli.bench import parse
from zoo.registry import ZooError, options_of, unknown
from zoo.serving.server import ServeOptions, listen, require_packages, run, server_for
from zoo.settings.schema import RunRoot

USAGE = """\
usage: zoo serve MODEL [option=value ...] [options as for zoo.load]

MODEL is a preset, dir:<folder> or hub:<org>/<name>. Any client of OpenAI's protocol talks to it, with images as data
URLs, streamed or not; requests that wait are generated together.

  zoo serve scenes_tiny
  zoo serve dir:runs/last port=8080 pruner=fastervlm pruner.fastervlm.keep_ratio=0.25
"""


def main(words: Sequence[str]) -> int:
    """Load the model and serve it until it is interrupted."""
    if not words or any(word in ("-h", "--help", "help") for word in words):
        print(describe(USAGE, ServeOptions))
        return 0
    (model,), options, overrides = parsed(words, ServeOptions, "zoo serve")
    require_packages()
    listening = listen(options)
    try:
        from zoo.loading.other_pruners import Pruned

        pruned = Pruned(model, overrides, device=options.device, dtype=options.dtype, bits=options.bits)
        run(server_for(model, pruned, options), options, listening)
    finally:
        listening.close()
    return 0


def parsed(words: Sequence[str], schema: type, command: str, most: int = 1) -> tuple[list[str], Any, list[str]]:
    """Separate names of models, options of the command, also as `--port 80`, and those of the models.

    Args:
        words: as typed.
        schema: dataclass of the command's options.
        command: for messages.
        most: models.

    Raises:
        ZooError: there are no models or too many, or an option is unknown or has a wrong value.
    """
    known = {f.name for f in dataclasses.fields(schema)}
    own: list[str] = []
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--"):
            if not equals and not left:
                raise ZooError(f"{word} needs a value.")
            own.append(f"{name}={word.partition('=')[2] if equals else left.pop(0)}")
        elif equals and name in known:
            own.append(word)
        else:
            rest.append(word)
    for name in (word.partition("=")[0] for word in rest if "=" in word):
        if "." not in name and name not in RunRoot.__dataclass_fields__:  # neither of the server nor of a model
            raise unknown(f"option of {command}", name, known)
    names = [word for word in rest if "=" not in word]
    if not 1 <= len(names) <= most:
        number = "one model" if most == 1 else f"one to {most} models"
        raise ZooError(f"{command} takes {number}, got {', '.join(map(repr, names)) or 'none'}.")
    return names, parse(command, schema, own, command), [word for word in rest if "=" in word]


def describe(usage: str, schema: type) -> str:
    """Return a help text, with the options of a command."""
    rows = [(f"{o.name}={o.default}", o.doc) for o in options_of(schema)]
    width = max(len(left) for left, _ in rows) + 2
    return "\n".join([usage, *(f"  {left:<{width}}{doc}" for left, doc in rows)])
