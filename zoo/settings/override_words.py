"""The words of an override's value, before Hydra's grammar turns them into numbers, truth values or errors."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

FUNCTIONS = frozenset({"int", "str", "bool", "float", "choice", "range", "interval", "tag", "sort", "shuffle", "glob"})
OF_CHOICES = frozenset({"choice", "sort", "shuffle"})  # functions whose arguments are values of the option
CLOSING = {"[": "]", "{": "}", "(": ")"}
_INT = r"(?:0|[1-9](?:_?\d)*)"
_POINT = rf"(?:{_INT}\.|{_INT}?\.\d(?:_?\d)*)"
_NUMBER = rf"[+-]?(?:(?:{_POINT}|{_INT})e[+-]?\d(?:_?\d)*|{_POINT}|{_INT}|inf|nan)"
NO_TEXT = re.compile(rf"{_NUMBER}|true|false|null", re.IGNORECASE)  # what Hydra takes for something else than text
STRANGE = re.compile(r"[^A-Za-z0-9_/\-\\+.$%*@?|: \t]")  # what Hydra's grammar has in no word
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
BEHIND = re.compile(r"\s*(?:[,\]})]|$)")


@dataclass(frozen=True)
class Word:
    """A word without quotes.

    Attributes:
        start, end: where it stands.
        text: as Hydra would read it, were it a text.
        depth: how many lists and dicts it stands in.
        strange: Hydra's grammar refuses it.
        value: it is a value of the option, or of one of its choices, and not an argument of a function.
        keys: of the dicts that it is in, the outermost first.
    """

    start: int
    end: int
    text: str
    depth: int
    strange: bool
    value: bool
    keys: tuple[str, ...] = ()


def words(text: str) -> Iterator[Word]:
    """Yield the words of a value that have no quotes, keys of dicts and names of functions left out.

    A word with an interpolation is none: what it will be is not known.
    """
    around: list[tuple[str, str]] = []  # brackets that are open, and the function in front of them
    keys: list[str] = []  # in each of them, the key of the item that we are in; empty where it is no dict
    start = at = 0
    refers = False  # to something else, with ${...}
    keyed = False  # the key of a dict's item is behind us

    def word(end: int) -> Iterator[Word]:
        piece = text[start:end]
        first = start + len(piece) - len(piece.lstrip(" \t"))
        piece = piece.strip(" \t")
        if piece and not refers:
            plain = ESCAPED.sub("", piece)
            value = all(bracket != "(" or name in OF_CHOICES for bracket, name in around)
            depth = sum(bracket != "(" for bracket, _ in around)
            strange = bool(STRANGE.search(plain))
            above = tuple(filter(None, keys))
            yield Word(first, first + len(piece), ESCAPED.sub(r"\1", piece), depth, strange, value, above)

    while at < len(text):
        char, said = text[at], text[start:at].strip(" \t")
        if not said and (quoted := QUOTED.match(text, at)) and BEHIND.match(text, quoted.end()):
            at = start = quoted.end()
        elif char == "\\":
            at += 2
        elif text.startswith("${", at) and "}" in text[at:]:
            refers, at = True, _behind(text, at)
        elif char == "," or (around and char == CLOSING[around[-1][0]]):
            yield from word(at)
            if char != ",":
                around.pop()
                keys.pop()
            at = start = at + 1
            refers, keyed = False, char != ","
        elif (char in "[{" and not said) or (char == "(" and said in FUNCTIONS):
            around.append((char, said))
            keys.append("")
            at = start = at + 1
            keyed = False
        elif char == ":" and around and around[-1][0] == "{" and not keyed:
            keys[-1] = said
            at = start = at + 1
            keyed = True
        elif char == "=" and around and around[-1][0] == "(":
            at = start = at + 1
            refers = True  # the value of a named argument is none of the option
        else:
            at += 1
    yield from word(len(text))


def quoted_where(text: str, wanted: Callable[[Word], bool]) -> str:
    """Put those words of a value into quotes that are wanted so."""
    from hydra.core.override_parser.types import Quote, QuotedString

    pieces, at = [], 0
    for word in words(text):
        if wanted(word):
            pieces += [text[at : word.start], QuotedString(word.text, Quote.single).with_quotes()]
            at = word.end
    return "".join([*pieces, text[at:]])


def _behind(text: str, at: int) -> int:
    """Where the interpolation ends that begins at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth == 0:
            return i + 1
    return len(text)
