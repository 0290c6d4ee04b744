"""`zoo serve MODEL [option=value ...]`: answer over HTTP, in OpenAI's chat-completions protocol."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from zoo.cli.bench import parse
from zoo.registry import unknown
from zoo.serving.server import ServeOptions, listen, require_packages, run, server_for
from zoo.settings.schema import RunRoot
from zoo.text.command_line import Parser

EXAMPLES = """zoo serve scenes_tiny
zoo serve last --port 8080 pruner=fastervlm pruner.fastervlm.keep_ratio=0.25"""
MORE = (
    "Any client of OpenAI's protocol talks to it, with images as data URLs, streamed or not; requests that wait are "
    "generated together."
)
MODEL = "a preset, dir:<folder>, hub:<org>/<name>, or last: that of the newest run"
OF_MODEL = "of the model, as for zoo.load: pruner=random"


def main(words: Sequence[str]) -> int:
    """Load the model and serve it until it is interrupted."""
    args, options = parsed(words)
    require_packages()
    listening = listen(options)
    try:
        from zoo.loading.other_pruners import Pruned

        pruned = Pruned(args.model, args.options, device=options.device, dtype=options.dtype, bits=options.bits)
        run(server_for(args.model, pruned, options), options, listening)
    finally:
        listening.close()
    return 0


def parsed(words: Sequence[str]) -> tuple[Any, ServeOptions]:
    """Return what was typed, and the options of the server."""
    parser = Parser(
        "serve",
        "Answer over HTTP, in OpenAI's chat-completions protocol.",
        EXAMPLES,
        schema=ServeOptions,
        options=OF_MODEL,
        more=MORE,
    )
    parser.add_argument("model", help=MODEL)
    args = parser.read(words)
    return args, own_options(args, ServeOptions, "zoo serve")


def own_options(args: Any, schema: type, command: str) -> Any:
    """Return the options of a command itself.

    Args:
        args: from the command's parser.
        schema: dataclass of the command's options.
        command: for messages.

    Raises:
        ZooError: an option has a wrong value, or is neither one of the command nor of a model.
    """
    for name in (word.partition("=")[0] for word in args.options):
        if "." not in name and name not in RunRoot.__dataclass_fields__:
            raise unknown(f"option of {command}", name, {f.name for f in dataclasses.fields(schema)})
    return parse(command, schema, args.given, command)
