"""`zoo serve MODEL [option=value ...]`: answer over HTTP, in OpenAI's chat-completions protocol."""

import dataclasses
from collections.abc import Sequence

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
        print(describe())
        return 0
    model, options, overrides = parsed(words)
    require_packages()
    listening = listen(options)
    try:
        from zoo.loading.other_pruners import Pruned

        pruned = Pruned(model, overrides, device=options.device, dtype=options.dtype, bits=options.bits)
        run(server_for(model, pruned, options), options, listening)
    finally:
        listening.close()
    return 0


def parsed(words: Sequence[str]) -> tuple[str, ServeOptions, list[str]]:
    """Separate the model, options of the server, also as `--port 80`, and those of the model."""
    known = {f.name for f in dataclasses.fields(ServeOptions)}
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
            raise unknown("option of zoo serve", name, known)
    names = [word for word in rest if "=" not in word]
    if len(names) != 1:
        raise ZooError(f"zoo serve takes one model, got {', '.join(map(repr, names)) or 'none'}.")
    return names[0], parse("serve", ServeOptions, own, "zoo serve"), [word for word in rest if "=" in word]


def describe() -> str:
    """Return the help text, with the options of the server."""
    rows = [(f"{o.name}={o.default}", o.doc) for o in options_of(ServeOptions)]
    width = max(len(left) for left, _ in rows) + 2
    return "\n".join([USAGE, *(f"  {left:<{width}}{doc}" for left, doc in rows)])
