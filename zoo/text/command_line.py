"""Read the words behind a command: names and flags in any order, mistakes named as everywhere in the zoo."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from zoo.registry import ZooError, nearest, options_of
from zoo.registry.presets import shown
from zoo.text.terminal import columns, width, wrapped

JSON = "print one JSON object on stdout, and nothing else there"
HELP = ("-h", "--help", "help")
_OPTION = re.compile(r"[+~]*((?:hydra/)?[A-Za-z_][\w.-]*)=(.*)", re.DOTALL)  # dir:runs/lr=1 is a folder
REMOVAL = re.compile(r"~[A-Za-z_][\w.-]*")  # ~data.emoji.questions.name; ~/runs is a folder
_KINDS = {"int": "a whole number", "float": "a number"}
_SWITCHES = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


@dataclass
class _Sorted:
    """Words of a command line by what they are."""

    flags: list[str] = field(default_factory=list)  # with their values, as argparse reads them
    names: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)  # the command's own options
    options: list[str] = field(default_factory=list)  # of others: of a model, of a run
    repeats: dict[str, dict[str, str]] = field(default_factory=dict)  # what takes one value -> value -> its word

    def note(self, name: str, value: str, word: str) -> None:
        """Note a value of what takes one."""
        several = self.repeats.setdefault(name, {})
        several.pop(value, None)  # the last one is behind the others
        several[value] = word


class Parser(argparse.ArgumentParser):
    """argparse with our errors and help: flags and options before or behind names, 80 columns, `--json` where it fits.

    A flag with a value may be written `--name value`, `--name=value` or `name=value`. What is given several values is
    noted on stderr, and the last one is used.

    Args:
        command: behind `zoo`.
        summary: what it does, in a sentence.
        examples: command lines for the help, one a line, with what they do behind two spaces.
        json: whether it takes `--json`. `zoo.cli.entry` acts on it, the command has nothing to do.
        usage: of the help's first line, without `zoo COMMAND`; None: made from the arguments.
        more: paragraphs of the help between the options and the examples.
        options: what further key=value words are, for the help; they are `args.options`. Empty: there are none.
        schema: dataclass of the command's own options; those that were given are words of `args.given`.
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
        options: str = "",
        schema: type | None = None,
    ) -> None:
        self._form_given, self._takes_options = usage, bool(options)
        self._fields = {o.name: o for o in options_of(schema)} if schema is not None else {}
        rows = [(f"{o.name}={shown(o.default)}", o.doc) for o in self._fields.values()]
        rows += [("key=value", options)] if options else []
        table = f"options:\n{columns(rows)}" if rows else ""
        paragraphs = [wrapped(line) for line in more.split("\n\n") if line]
        epilog = "\n\n".join(filter(None, [table, *paragraphs, _indented(examples)])).strip("\n")
        super().__init__(
            f"zoo {command}",
            description=wrapped(summary),
            epilog=epilog or None,
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

    def read(self, words: Sequence[str], notes: bool = True) -> Any:
        """Parse words: names, flags and options in any order.

        Args:
            words: as typed.
            notes: print a note for what is given several values.

        Raises:
            ZooError: a flag does not exist, its value is missing or not allowed, or there are too many names.
            SystemExit: after the help was printed, with status 2 where nothing was typed that is needed.
        """
        if not words and any(a.required and a.nargs not in ("*", "?") for a in self._actions):
            print(self.format_help().rstrip(), file=sys.stderr)
            raise SystemExit(2)
        found = self._sorted(["--help"] if list(words) == ["help"] else words)
        args, extra = self.parse_known_args([*found.flags, *found.names])
        if extra:
            self._refuse(extra)
        for name, several in found.repeats.items():
            if notes and len(several) > 1:
                note_repeat(name, list(several.values()))
        args.given, args.options = found.given, found.options
        return args

    def _sorted(self, words: Sequence[str]) -> "_Sorted":
        """Return words by what they are; argparse alone would take an option for a name."""
        found, left = _Sorted(), list(words)
        while left:
            word = left.pop(0)
            option = None if word.startswith("-") else _OPTION.fullmatch(word)
            if len(word) > 1 and word.startswith("-"):
                self._flag(word, left, found)
            elif option is not None:
                self._option(word, option[1], option[2], found)
            elif self._takes_options and REMOVAL.fullmatch(word):
                found.options.append(word)
            else:
                found.names.append(word)
        return found

    def _flag(self, word: str, left: list[str], found: "_Sorted") -> None:
        """Sort a word with dashes, and take its value from the words behind it."""
        key, equals, value = word.partition("=")
        name = key.lstrip("-").replace("-", "_")
        action, option = self._option_string_actions.get(key), self._fields.get(name)
        if action is None and option is None:
            self._refuse([word])
        if action is not None and action.nargs == 0:
            self._switch(key, value if equals else None, found)
            return
        if not equals:
            if option is not None and option.type == "bool" and left[:1] not in (["true"], ["false"]):
                left.insert(0, "true")
            if not left or self._is_flag(left[0]):
                raise ZooError(f"{self.prog}: {word} needs a value. Its form: {self._form()}")
            value = left.pop(0)
            word = f"{word} {value}"
        self._valued(word, name, value, action, found)

    def _option(self, word: str, key: str, value: str, found: "_Sorted") -> None:
        """Sort a word `key=value`."""
        name = key.replace("-", "_")
        flag = f"--{key.replace('_', '-')}"
        action = self._option_string_actions.get(flag)
        if action is not None and action.nargs == 0:
            self._switch(flag, value, found)
        elif action is not None or name.partition(".")[0] in self._fields or (self._fields and not self._takes_options):
            self._valued(word, name, value, action, found)
        elif self._takes_options:
            found.options.append(word)
            found.note(key, value, word)
        else:
            found.names.append(word)

    def _is_flag(self, word: str) -> bool:
        key = word.partition("=")[0]
        return key in self._option_string_actions or (key[:2] == "--" and key[2:].replace("-", "_") in self._fields)

    def _switch(self, flag: str, value: str | None, found: "_Sorted") -> None:
        """Sort a flag that is on or off; None: written without a value."""
        if value is not None and (flag == "--json" or value.lower() not in _SWITCHES):
            takes = "is written without a value" if flag == "--json" else "takes true or false"
            raise ZooError(f"{self.prog}: {flag} {takes}, got {value!r}.")
        if value is None or _SWITCHES[value.lower()]:
            found.flags.append(flag)

    def _valued(self, word: str, name: str, value: str, action: Any, found: "_Sorted") -> None:
        if action is None:
            found.given.append(f"{name}={value}")
        else:
            found.flags.append(f"{next(s for s in action.option_strings if s.startswith('--'))}={value}")
        if not isinstance(action, argparse._AppendAction):
            found.note(name if action is None else action.dest, value, word)

    @property
    def valued(self) -> list[str]:
        """Flags that take a value, in all their spellings."""
        return [name for action in self._actions if action.nargs != 0 for name in action.option_strings]

    def format_usage(self) -> str:
        """Return the line of a help's usage; flags are listed below it."""
        return f"usage: {self._form()}\n"

    def format_help(self) -> str:
        """Return the help."""
        self.usage = wrapped(self._form(), subsequent=" " * 11).removeprefix(self.prog).strip().replace("%", "%%")
        self.usage = f"{self.prog} {self.usage}"
        return super().format_help()

    def _refuse(self, extra: Sequence[str]) -> NoReturn:
        flags = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        flags += [f"--{name.replace('_', '-')}" for name in self._fields]
        for word in extra:
            if word.startswith("-") and word != "-":
                near = nearest(word.partition("=")[0], flags)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                if not near and self._takes_options:
                    hint = f" Options have no dashes: {word.lstrip('-').partition('=')[0]}=<value>."
                raise ZooError(f"{self.prog} has no flag {word!r}.{hint} Flags: {', '.join(flags)}.")
        raise ZooError(f"{self.prog} takes no {' '.join(extra)!r}. Its form: {self._form()}")

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found as our error."""
        message = f"{message[:1].lower()}{message[1:].rstrip('.')}"
        if found := re.fullmatch(r"argument (\S+): invalid (\w+) value: (.*)", message):
            takes = _KINDS.get(found[2], found[2])
            raise ZooError(f"{self.prog}: {found[1].split('/')[-1]} takes {takes}, got {found[3]}.")
        message = message.replace("the following arguments are required:", "it needs")
        raise ZooError(f"{self.prog}: {message}. Its form: {self._form()}")

    def _form(self) -> str:
        if self._form_given is not None:
            return f"{self.prog} {self._form_given}"
        names = []
        for action in self._actions:
            if not action.option_strings:
                name = str(action.metavar or action.dest)
                name = f"{name} ..." if action.nargs in ("*", "+") else name
                names.append(f"[{name}]" if action.nargs in ("*", "?") else name)
        more = ["[key=value ...]"] if self._fields or self._takes_options else []
        return " ".join([self.prog, *names, *more, "[flags]"])


def note_repeat(name: str, several: Sequence[str]) -> None:
    """Print that an option was given several values: all are named, and the last one is used.

    A note, since a command is extended by appending words, as the fixes of a check are. Without it, a value that is
    left over from an earlier command would go unseen.
    """
    times = {2: "twice"}.get(len(several), f"{len(several)} times")
    listed = f"{', '.join(several[:-1])} and {several[-1]}"
    print(wrapped(f"zoo: {name} was given {times}, {listed}: {several[-1]} is used."), file=sys.stderr)


def _indented(examples: str) -> str:
    return "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
