"""Read the words behind a command: names and flags in any order, mistakes named as everywhere in the zoo."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from zoo.registry import ZooError, nearest
from zoo.text.terminal import width, wrapped

JSON = "print one JSON object on stdout, and nothing else there"


class Parser(argparse.ArgumentParser):
    """argparse with our errors and help: flags before or behind names, 80 columns, `--json` where there is an answer.

    Args:
        command: behind `zoo`.
        summary: what it does, in a sentence.
        examples: command lines for the help, one a line, with what they do behind two spaces.
        json: whether it takes `--json`. `zoo.cli.entry` acts on it, the command has nothing to do.
        usage: of the help's first line, without `zoo COMMAND`; None: made from the arguments.
        more: paragraphs of the help between the options and the examples.
    """

    def __init__(
        self,
        command: str,
        summary: str,
        examples: str = "",
        *,
        json: bool = False,
        usage: str | None = None,
        more: str = "",
    ) -> None:
        shown = "\n\n".join([*(wrapped(line) for line in more.split("\n\n") if line), _indented(examples)]).strip("\n")
        super().__init__(
            f"zoo {command}",
            usage=f"zoo {command} {usage}" if usage is not None else None,
            description=wrapped(summary),
            epilog=shown or None,
            allow_abbrev=False,
            add_help=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, width=width(), max_help_position=26
            ),
        )
        self._optionals.title = "flags"
        self._positionals.title = "names"
        self.add_argument("-h", "--help", action="help", help="show this help")
        if json:
            self.add_argument("--json", action="store_true", help=JSON)

    def read(self, words: Sequence[str]) -> Any:
        """Parse words, flags among names in any order.

        Raises:
            ZooError: a flag does not exist, its value is missing or not allowed, or there are too many names.
        """
        args, extra = self.parse_known_intermixed_args(list(words))
        if extra:
            self._refuse(extra)
        return args

    def _refuse(self, extra: Sequence[str]) -> NoReturn:
        flags = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for word in extra:
            if word.startswith("-") and word != "-":
                near = nearest(word.partition("=")[0], flags)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ZooError(f"{self.prog} has no flag {word!r}.{hint} Flags: {', '.join(flags)}.")
        raise ZooError(f"{self.prog} takes no {' '.join(extra)!r}. Its form: {self._form()}")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found as our error."""
        raise ZooError(f"{self.prog}: {message[:1].lower()}{message[1:].rstrip('.')}. Its form: {self._form()}")

    def _form(self) -> str:
        return " ".join(self.format_usage().partition(":")[2].split())


def _indented(examples: str) -> str:
    return "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
