"""Options whose type is text keep what was typed: `revision=12e4567`, `run.name=0012345`, `split=on`, `12:30`.

Hydra's grammar and YAML turn words that look like numbers, truth values or nothing into these before they know what an
option takes, and `12e4567` comes out as `inf`. So words are looked at here before that: where the schema says text they
are put into quotes. `null` is nothing only where an option may hold nothing.
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
NO_TEXT = re.compile(rf"{_NUMBER}|true|false|null", re.IGNORECASE)  # what Hydra takes for something else than text
STRANGE = re.compile(r"[^A-Za-z0-9_/\-\\+.$%*@?|: \t]")  # what Hydra's grammar has in no word
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
BEHIND = re.compile(r"\s*(?:[,\]})]|$)")
CONTAINER = re.compile(r"(?:(?:list|tuple|sequence)\[|(?:dict|mapping)\[str,)+str(?:,\.\.\.)?\]+", re.IGNORECASE)
CHOICES = ("model", "recipe")
PACKAGE = re.compile(r"(?:#.*\n|\s)*?#\s*@package\s+(\S+)")


# ---- the words of a value, before Hydra's grammar turns them into numbers, truth values or errors ------------------


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


# ---- the options that hold text ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """An option that holds text: itself, or in a list or a dict."""

    inside: bool = False  # in a list or a dict
    optional: bool = False  # it may hold nothing

    def takes(self, word: Word) -> bool:
        """Whether a word that Hydra would read as something else is to be text."""
        if not word.value or not NO_TEXT.fullmatch(word.text) or (word.depth > 0 and not self.inside):
            return False
        return word.text.lower() != "null" or (word.depth > 0 if self.inside else not self.optional)


def text_of(annotation: str) -> Text | None:
    """Return how an option of this type holds text; None where it does not.

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
    if kinds == ["str"]:
        return Text(optional=optional)
    return Text(inside=True, optional=optional) if CONTAINER.fullmatch("|".join(kinds)) else None


class TextOptions:
    """The options of a run that hold text.

    Args:
        chosen: group -> what the run picks; options of what is not known yet are left alone.
        config_dir: a user's own folder of presets.
    """

    def __init__(self, chosen: Mapping[str, Any], config_dir: str | Path | None = None) -> None:
        self.chosen, self.config_dir = chosen, config_dir
        self._owners: dict[tuple[str, ...], list[Option]] = {}

    def typed(self, line: str) -> str:
        """Return an override with its texts in quotes, and the words that Hydra's grammar refuses."""
        key, equals, value = line.partition("=")
        value = quoted_where(value, lambda word: word.strange)
        path = key.lstrip("+~").split(".")
        return key + equals + quoted_where(value, lambda word: self._takes(path, word)) if equals else line

    def _takes(self, path: list[str], word: Word) -> bool:
        """Whether a word of an option's value is to be text; in a dict such as `{store: 1e5}` its key says so."""
        text = self.at(path)
        if word.keys and not (text and text.inside):
            text = self.at([*path, *word.keys])
            word = replace(word, depth=word.depth - len(word.keys))
        return text is not None and text.takes(word)

    def written(self, group: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body of a preset with its texts as they stand in the file."""
        words = _words_of(file) if (file := presets.file_of(group, name, self.config_dir)) else {}
        above = ("data", name) if group == "data" else ()
        return {k: self._restored((*above, k), v, words[k]) if k in words else v for k, v in body.items()}

    def choice(self, names: Any) -> Any:
        """Return a choice of data sets in which a preset whose texts YAML changes has its own name for them."""
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
        """An entry of a data preset's defaults list: the preset that it starts from, with its own texts."""
        if not isinstance(entry, str) or "@" not in entry:
            return entry
        path, _, package = entry.partition("@")
        head, slash, name = path.rpartition("/")
        return f"{head}{slash}{self._data(name)}@{package}"

    def _restored(self, path: tuple[str, ...], value: Any, word: Any) -> Any:
        slot = len(path) == 1 and isinstance(value, dict)  # what it holds, and not what is chosen
        text = None if slot else self.at(path)
        if text and (text.inside or not isinstance(value, dict)):
            return _as_text(value, word, text)
        if isinstance(value, dict) and isinstance(word, dict):
            return {k: self._restored((*path, k), v, word[k]) if k in word else v for k, v in value.items()}
        return value

    def at(self, path: tuple[str, ...] | list[str]) -> Text | None:
        """How the option at a path holds text; None where it does not, or is not known."""
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
        found = next((o for o in self._options(tuple(path[:depth])) if o.name == name), None)
        text = text_of(found.type) if found else None
        if not below:
            return text
        return Text() if text and text.inside and len(below) == 1 else None

    def _of_members(self, group: str, option: str) -> Text | None:
        """A short path such as `data.split`: it is that of all chosen members that have it."""
        members = [m for m in presets.as_list(self.chosen.get(group)) if isinstance(m, str)]
        if option in members:
            return None
        found = [text_of(o.type) for m in members for o in self._options((group, m)) if o.name == option]
        return found[0] if found and all(found) else None

    def _of_distillers(self, option: str) -> Text | None:
        """An option of a stage's distiller: that of all that have it, for a line does not say which it is."""
        if option == "name":
            return Text()
        found = [
            text_of(o.type) for n in names("distiller") for o in source_options("distiller", n) if o.name == option
        ]
        return found[0] if found and all(found) else None

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
        try:  # its source does not say what options it has
            key = owner[1] if kind in MANY else picked[0]
            return options_of(get(str(kind), presets.component_of(group, key, self.config_dir)).config)
        except ZooError:  # said where it is composed
            return []


def _of_teacher(option: str) -> Text | None:
    """An option of a stage's teacher."""
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
    """Reads every word without quotes as the text that it is; `<<` still merges."""


_WordLoader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


@lru_cache(maxsize=64)
def _words_at(file: Path, stamp: tuple[int, int]) -> Any:
    return yaml.load(file.read_text(encoding="utf-8"), _WordLoader)  # a safe loader with fewer types


def _words_of(file: Path) -> dict[str, Any]:
    """A preset with all its words as texts; nothing where it is no mapping, which is said elsewhere."""
    stat = file.stat()
    try:
        found = _words_at(file, (stat.st_mtime_ns, stat.st_size))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
