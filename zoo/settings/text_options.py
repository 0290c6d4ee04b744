"""Options of type str keep the typed word: `revision=12e4567`, `run.name=0012345`, `split=on`, `12:30`.

Hydra's grammar and YAML convert words that look like numbers, booleans or null before the type of the option is known:
`12e4567` becomes `inf`. So words are quoted before parsing if the schema has a text there. `null` is None only for
options that may be None.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from zoo.registry import MANY, Option, ZooError, names, options_of, source_options
from zoo.registry.table import get, kind_of
from zoo.settings import presets
from zoo.settings.stage import TEACHER
from zoo.settings.static_check import depth_of, schema_at

FUNCTIONS = frozenset({"int", "str", "bool", "float", "choice", "range", "interval", "tag", "sort", "shuffle", "glob"})
OF_CHOICES = frozenset({"choice", "sort", "shuffle"})  # functions whose arguments are values of the option
CLOSING = {"[": "]", "{": "}", "(": ")"}
_INT = r"(?:0|[1-9](?:_?\d)*)"
_POINT = rf"(?:{_INT}\.|{_INT}?\.\d(?:_?\d)*)"
_NUMBER = rf"[+-]?(?:(?:{_POINT}|{_INT})e[+-]?\d(?:_?\d)*|{_POINT}|{_INT}|inf|nan)"
NO_TEXT = re.compile(rf"{_NUMBER}|true|false|null", re.IGNORECASE)  # words that Hydra converts
INVALID = re.compile(r"[^A-Za-z0-9_/\-\\+.$%*@?|: \t]")  # characters that Hydra's grammar allows in no word
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
END = re.compile(r"\s*(?:[,\]})]|$)")  # what follows a whole quoted value
CONTAINER = re.compile(r"(?:(?:list|tuple|sequence)\[|(?:dict|mapping)\[str,)+str(?:,\.\.\.)?\]+", re.IGNORECASE)
CHOICES = ("model", "recipe")
PACKAGE = re.compile(r"(?:#.*\n|\s)*?#\s*@package\s+(\S+)")


# ---- the words of a value, before Hydra's grammar converts or refuses them -----------------------------------------


@dataclass(frozen=True)
class Word:
    """A word without quotes.

    Attributes:
        start, end: its place in the value.
        text: the word without escapes.
        depth: number of lists and dicts around it.
        invalid: Hydra's grammar refuses it.
        value: whether it is a value of the option, or of one of its choices, and not an argument of a function.
        keys: of the dicts around it, the outermost first.
    """

    start: int
    end: int
    text: str
    depth: int
    invalid: bool
    value: bool
    keys: tuple[str, ...] = ()


def words(text: str) -> Iterator[Word]:
    """Yield the unquoted words of a value, without keys of dicts and names of functions.

    Words with an interpolation are left out, since their value is not known yet.
    """
    around: list[tuple[str, str]] = []  # open brackets, each with the function in front of it
    keys: list[str] = []  # for each of them, the key of the current item; empty outside of dicts
    start = at = 0
    refers = False  # the current word has an interpolation, ${...}
    keyed = False  # the key of the current item of a dict has been read

    def word(end: int) -> Iterator[Word]:
        piece = text[start:end]
        first = start + len(piece) - len(piece.lstrip(" \t"))
        piece = piece.strip(" \t")
        if piece and not refers:
            plain = ESCAPED.sub("", piece)
            value = all(bracket != "(" or name in OF_CHOICES for bracket, name in around)
            depth = sum(bracket != "(" for bracket, _ in around)
            invalid = bool(INVALID.search(plain))
            above = tuple(filter(None, keys))
            yield Word(first, first + len(piece), ESCAPED.sub(r"\1", piece), depth, invalid, value, above)

    while at < len(text):
        char, current = text[at], text[start:at].strip(" \t")  # what was read of the current word
        # A quote is one only if it encloses the whole value: it's has none.
        if not current and (quoted := QUOTED.match(text, at)) and END.match(text, quoted.end()):
            at = start = quoted.end()
        elif char == "\\":
            at += 2  # an escaped character has no meaning for the grammar
        elif text.startswith("${", at) and "}" in text[at:]:
            refers, at = True, _behind(text, at)  # skipped as a whole: its commas and braces do not end the word
        elif char == "," or (around and char == CLOSING[around[-1][0]]):
            yield from word(at)
            if char != ",":
                around.pop()
                keys.pop()
            at = start = at + 1
            refers, keyed = False, char != ","
        elif (char in "[{" and not current) or (char == "(" and current in FUNCTIONS):
            around.append((char, current))
            keys.append("")
            at = start = at + 1
            keyed = False
        elif char == ":" and around and around[-1][0] == "{" and not keyed:  # only the first colon ends the key
            keys[-1] = current
            at = start = at + 1
            keyed = True
        elif char == "=" and around and around[-1][0] == "(":
            at = start = at + 1
            refers = True  # the value of a named argument is not a value of the option
        else:
            at += 1
    yield from word(len(text))


def quoted_where(text: str, wanted: Callable[[Word], bool]) -> str:
    """Quote the words of a value for which `wanted` is true."""
    from hydra.core.override_parser.types import Quote, QuotedString

    pieces, at = [], 0
    for word in words(text):
        if wanted(word):
            pieces += [text[at : word.start], QuotedString(word.text, Quote.single).with_quotes()]
            at = word.end
    return "".join([*pieces, text[at:]])


def _behind(text: str, at: int) -> int:
    """Return the end of the interpolation that begins at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth == 0:
            return i + 1
    return len(text)


# ---- the options that hold text ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """An option that holds text, directly or in a list or dict."""

    inside: bool = False  # in a list or a dict
    optional: bool = False  # may be None

    def takes(self, word: Word) -> bool:
        """Return whether a word that Hydra would convert must remain text."""
        if not word.value or not NO_TEXT.fullmatch(word.text) or (word.depth > 0 and not self.inside):
            return False
        return word.text.lower() != "null" or (word.depth > 0 if self.inside else not self.optional)


def text_of(annotation: str) -> Text | None:
    """Return how an option of this type holds text; None if it does not.

    >>> text_of("str | None")
    Text(inside=False, optional=True)
    """
    plain = annotation.replace("typing.", "").replace(" ", "")
    optional = False
    if found := re.fullmatch(r"Optional\[(.*)\]", plain):
        plain, optional = found[1], True
    kinds = plain.split("|")
    if "None" in kinds:
        kinds, optional = [k for k in kinds if k != "None"], True
    if kinds in (["str"], ["Path"]):
        return Text(optional=optional)
    return Text(inside=True, optional=optional) if CONTAINER.fullmatch("|".join(kinds)) else None


class TextOptions:
    """The options of a run that hold text.

    Args:
        chosen: group -> choice of the run; options of unknown components are not changed.
        config_dir: a user's own folder of presets.
    """

    def __init__(self, chosen: Mapping[str, Any], config_dir: str | Path | None = None) -> None:
        self.chosen, self.config_dir = chosen, config_dir
        self._owners: dict[tuple[str, ...], list[Option]] = {}

    def typed(self, line: str) -> str:
        """Return an override with quotes around texts and around words that Hydra's grammar refuses."""
        key, equals, value = line.partition("=")
        value = quoted_where(value, lambda word: word.invalid)
        path = key.lstrip("+~").split(".")
        return key + equals + quoted_where(value, lambda word: self._takes(path, word)) if equals else line

    def _takes(self, path: list[str], word: Word) -> bool:
        """Return whether a word must remain text; in a dict such as `{store: 1e5}` its key decides."""
        text = self.at(path)
        if word.keys and not (text and text.inside):
            text = self.at([*path, *word.keys])
            word = replace(word, depth=word.depth - len(word.keys))
        return text is not None and text.takes(word)

    def written(self, group: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body of a preset with its texts as written in the file."""
        words = _words_of(file) if (file := presets.file_of(group, name, self.config_dir)) else {}
        above = ("data", name) if group == "data" else ()
        return {k: self._restored((*above, k), v, words[k]) if k in words else v for k, v in body.items()}

    def choice(self, names: Any) -> Any:
        """Return a choice of data sets, with presets whose texts YAML converts replaced by corrected versions."""
        if isinstance(names, list):
            return [self._data(name) for name in names]
        return self._data(names)

    def _data(self, name: Any) -> Any:
        file = presets.file_of("data", name, self.config_dir) if isinstance(name, str) else None
        if file is None:
            return name
        content = presets.read("data", name, self.config_dir)
        entries = [self._base(entry) for entry in content.get("defaults") or []]
        body = {k: v for k, v in content.items() if k != "defaults"}
        texts = TextOptions({**self.chosen, "data": [name]}, self.config_dir)
        written = texts.written("data", name, body)
        package = PACKAGE.match(file.read_text(encoding="utf-8"))
        if package is None or (written == body and entries == (content.get("defaults") or [])):
            return name
        return presets.store_once("data", name, {"defaults": entries, **written} if entries else written, package[1])

    def _base(self, entry: Any) -> Any:
        """Return an entry of a data preset's defaults list, with its base replaced by a corrected version."""
        if not isinstance(entry, str) or "@" not in entry:
            return entry
        path, _, package = entry.partition("@")
        head, slash, name = path.rpartition("/")
        return f"{head}{slash}{self._data(name)}@{package}"

    def _restored(self, path: tuple[str, ...], value: Any, word: Any) -> Any:
        slot = len(path) == 1 and isinstance(value, dict)  # options of a slot, not the choice of its component
        text = None if slot else self.at(path)
        if text and (text.inside or not isinstance(value, dict)):
            return _as_text(value, word, text)
        if isinstance(value, dict) and isinstance(word, dict):
            return {k: self._restored((*path, k), v, word[k]) if k in word else v for k, v in value.items()}
        return value

    def at(self, path: tuple[str, ...] | list[str]) -> Text | None:
        """Return how the option at a path holds text; None if it does not, or is unknown."""
        head, kind = path[0], kind_of(path[0])
        if len(path) == 1 and (kind or head in CHOICES):
            return Text(inside=kind in MANY, optional=True)
        depth = depth_of(path)
        if kind in MANY and len(path) == 2:
            return self._of_members(head, path[1])
        if len(path) <= depth:
            return None
        name, below = path[depth], path[depth + 1 :]
        if head == "stages" and name in ("teacher", "distiller") and not below:  # the name of one, or a mapping
            return Text(optional=True)
        if head == "stages" and name == "teacher":
            return _of_teacher(below[0]) if len(below) == 1 else None
        if head == "stages" and name == "distiller":
            return self._of_distillers(below[0]) if len(below) == 1 else None
        if head == "vision" and name == "encoders" and len(below) == 2:  # of one of several, which may be any
            return _of_any("vision", below[1])
        found = next((o for o in self._options(tuple(path[:depth])) if o.name == name), None)
        text = text_of(found.type) if found else None
        if not below:
            return text
        return Text() if text and text.inside and len(below) == 1 else None

    def _of_members(self, group: str, option: str) -> Text | None:
        """Return how a short path such as `data.split` holds text: as in all chosen members that have the option."""
        members = [m for m in presets.as_list(self.chosen.get(group)) if isinstance(m, str)]
        if option in members:
            return None
        found = [text_of(o.type) for m in members for o in self._options((group, m)) if o.name == option]
        return found[0] if found and all(found) else None

    def _of_distillers(self, option: str) -> Text | None:
        """Return how an option of a stage's distiller holds text: as in all distillers that have the option.

        An override does not name the distiller.
        """
        return _of_any("distiller", option)

    def _options(self, owner: tuple[str, ...]) -> list[Option]:
        if owner not in self._owners:
            self._owners[owner] = self._look_up(owner)
        return self._owners[owner]

    def _look_up(self, owner: tuple[str, ...]) -> list[Option]:
        kind = kind_of(owner[0]) if owner else None
        group = owner[0] if owner else ""
        picked = [p for p in presets.as_list(self.chosen.get(group)) if isinstance(p, str)]
        if kind and (not picked or (kind in MANY and owner[1] not in picked)):
            return []
        if found := schema_at(list(owner), self.chosen, self.config_dir):
            return found[1]
        try:  # the options cannot be read from its source text, so the component is imported
            key = owner[1] if kind in MANY else picked[0]
            return options_of(get(str(kind), presets.component_of(group, key, self.config_dir)).config)
        except ZooError:  # composing reports it
            return []


def _of_any(kind: str, option: str) -> Text | None:
    """Return how an option holds text, as in all components of a kind that have it."""
    if option == "name":
        return Text()
    found = [text_of(o.type) for n in names(kind) for o in source_options(kind, n) if o.name == option]
    return found[0] if found and all(found) else None


def _of_teacher(option: str) -> Text | None:
    """Return how an option of a stage's teacher holds text."""
    default = TEACHER.get(option)
    if isinstance(default, str):
        return Text(optional=True)
    return Text(inside=True) if isinstance(default, list) else None


def _as_text(value: Any, word: Any, text: Text) -> Any:
    if isinstance(value, str) or word is None:
        return value
    if isinstance(value, list) and isinstance(word, list) and text.inside:
        return [_as_text(v, w, Text(inside=True)) for v, w in zip(value, word, strict=True)]
    if isinstance(value, dict) and isinstance(word, dict) and text.inside:
        return {key: _as_text(v, word[key], Text(inside=True)) for key, v in zip(word, value.values(), strict=False)}
    if value is None and (text.optional or not word):
        return None
    return word if isinstance(word, str) else value


class _WordLoader(yaml.SafeLoader):
    """Reads every unquoted word as text; `<<` still merges."""


# Implicit resolvers turn unquoted words into numbers, booleans and dates; without them, every word is a string.
_WordLoader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


@lru_cache(maxsize=64)
def _words_at(file: Path, stamp: tuple[int, int]) -> Any:
    return yaml.load(file.read_text(encoding="utf-8"), _WordLoader)  # a safe loader with fewer types


def _words_of(file: Path) -> dict[str, Any]:
    """Return a preset with all its words as texts; empty if it is not a mapping, which is reported elsewhere."""
    stat = file.stat()
    try:
        found = _words_at(file, (stat.st_mtime_ns, stat.st_size))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
