"""`zoo list` and `zoo info`: list components and presets, and show everything about one of them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.registry import (
    KINDS,
    MANY,
    MISSING,
    ZooError,
    names,
    nearest,
    plugins,
    source_options,
    source_presets,
    unknown,
)
from zoo.registry.facts import facts_of
from zoo.registry.source_text import summary_of
from zoo.registry.table import group_of, parts_of, source_of
from zoo.settings import presets
from zoo.text.command_line import Parser
from zoo.text.terminal import Answer, columns, say

PRESETS = ("model", "recipe", "data")  # kinds of YAML files
NOUNS = (*KINDS, *PRESETS)
_WIDE = 24  # characters of a type or a default; longer ones do not widen the column


def list_main(words: Sequence[str]) -> Answer:
    """Print names and summaries: `zoo list [kind] [pattern]`."""
    parser = Parser(
        "list",
        "List components, models, recipes and data.",
        """zoo list pruner '*pool*'
        zoo list model '*llava*' --where 'params<8B'
        zoo list pruner plugins=[./my_pruner.py]""",
        json=True,
        more=f"Kinds: {', '.join(NOUNS)}.",
    )
    parser.add_argument("name", nargs="*", metavar="kind, pattern", help="what to list; without any, everything")
    parser.add_argument("--where", default="", metavar="X", help="models that fit a comparison: params<8B")
    args = parser.read(_with_plugins(words))
    words, where = args.name, args.where
    if len(words) > 2:
        raise ZooError(f"zoo list takes a kind and a pattern, got {' '.join(words)!r}.")
    nouns, pattern = _asked(words)
    if where and nouns != ("model",):
        raise ZooError("--where is for models: zoo list model '*llava*' --where 'params<8B'.")
    tables = {noun: rows for noun in nouns if (rows := _rows(noun, pattern))}
    if where:
        tables = {"model": _matching(tables.get("model", []), where)}
        if not tables["model"]:
            raise ZooError(f"No model matches {pattern!r} with {where!r}.")
    if not tables and words:
        raise ZooError(f"Nothing matches {' '.join(words)!r}. `zoo list` shows everything.")
    for i, (noun, rows) in enumerate(tables.items()):
        say(("\n" if i else "") + noun)
        say(columns(rows))
    return Answer({noun: [{"name": name, "summary": text} for name, text in rows] for noun, rows in tables.items()})


def _with_plugins(words: Sequence[str]) -> list[str]:
    """Load installed plugins and those of `plugins=[...]`, and return the other words."""
    plugins.load_installed()
    return plugins.load_words(words)


def _matching(rows: list[tuple[str, str]], where: str) -> list[tuple[str, str]]:
    """Return the models for which a comparison holds, with their sizes; each is built on the meta device."""
    from zoo.inspection.model_facts import facts_of, matcher
    from zoo.text.sizes import count_text

    holds = matcher(where)  # before the models are built: a mistake is reported at once
    found = [(name, summary, facts_of(name)) for name, summary in rows]
    return [(n, f"{count_text(f.value('params')):>8}  {s}") for n, s, f in found if holds(f)]


def _asked(words: Sequence[str]) -> tuple[Sequence[str], str]:
    if not words:
        return NOUNS, "*"
    if words[0] in NOUNS:
        return (words[0],), words[1] if len(words) > 1 else "*"
    if len(words) == 1 and any(c in words[0] for c in "*?["):
        return NOUNS, words[0]
    raise unknown("kind", words[0], NOUNS)


def _rows(noun: str, pattern: str) -> list[tuple[str, str]]:
    if noun in PRESETS:
        files = presets.preset_files(noun)
        return [(n, yaml_summary(f)) for n, f in sorted(files.items()) if fnmatchcase(n, pattern)]
    parts = {name: _part_summary(noun, name) for name in parts_of(noun) if fnmatchcase(name, pattern)}
    return [*((name, component_summary(noun, name)) for name in names(noun, pattern)), *sorted(parts.items())]


def _part_summary(kind: str, name: str) -> str:
    """Return where a part with its weights is from, and the component that it is a preset of."""
    component = parts_of(kind)[name]
    preset = source_presets(kind, component)[name]
    return f"{component} with weights: {preset.source} ({preset.text})"


def component_summary(kind: str, name: str) -> str:
    """Return the first sentence of a component's file, without importing it."""
    file = source_of(kind, name)
    return summary_of(file) if file and file.is_file() else "(its file is missing)"


def yaml_summary(file: Path) -> str:
    """Return the first comment of a YAML file, apart from directives such as `@package`."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        if text and not text.startswith("@"):
            return text
    return ""


def info_main(words: Sequence[str]) -> int:
    """Print everything about components or presets: `zoo info <kind>/<name>`, `zoo info <preset>`."""
    parser = Parser(
        "info",
        "Show everything about components, models, recipes or data.",
        """zoo info pruner/random
        zoo info recipe/scenes_tiny
        zoo info pruner/my_pruner plugins=[./my_pruner.py]""",
    )
    parser.add_argument("name", nargs="+", help="<kind>/<name>, or a name that one thing has; `zoo list` shows all")
    if words and not any(word in ("-h", "--help") for word in words):
        words = _with_plugins(words)
        if not words:
            raise ZooError("zoo info takes the name of a component beside plugins=, such as pruner/random.")
    for i, word in enumerate(parser.read(words).name):
        say(("\n" if i else "") + describe(word))
    return 0


def describe(word: str) -> str:
    """Return the description of `kind/name`, or of each preset or component with an unambiguous name."""
    found = _find(word)
    return "\n\n".join(_described(*where) for where in found)


def _described(noun: str, name: str) -> str:
    if noun not in KINDS:
        return _preset(noun, name)
    return _part(noun, name) if name in parts_of(noun) else _component(noun, name)


def _part(kind: str, name: str) -> str:
    """Describe a part with its weights by its card."""
    head = f"{kind}/{name}  {_part_summary(kind, name)}\nuse       {kind}={name}"
    card = files("zoo.model_cards").joinpath("parts", f"{name}.md")
    return f"{head}\n\n{card.read_text(encoding='utf-8').rstrip()}" if card.is_file() else head


def _find(word: str) -> list[tuple[str, str]]:
    everything = [(noun, name) for noun in NOUNS for name in _names(noun)]
    noun, slash, name = word.rpartition("/")
    if slash:
        if noun not in NOUNS:
            raise unknown("kind", noun, NOUNS)
        if (noun, name) in everything:
            return [(noun, name)]
        if noun == "data" and ("dataset", name) in everything:
            return [("dataset", name)]
        raise unknown(noun, name, [n for k, n in everything if k == noun])
    found = [(k, n) for k, n in everything if n == word]
    if not found:
        near = nearest(word, [n for _, n in everything])
        meant = [f"{k}/{n}" for k, n in everything if near and n == near[0]]
        hint = f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""
        raise ZooError(f"Nothing is called {word!r}.{hint} `zoo list` shows all names.")
    if len({k for k, _ in found if k in KINDS}) > 1:
        raise ZooError(f"{word!r} is ambiguous: {', '.join(f'{k}/{n}' for k, n in found)}.")
    return found


def _names(noun: str) -> list[str]:
    return sorted(presets.preset_files(noun)) if noun in PRESETS else [*names(noun), *parts_of(noun)]


def _preset(noun: str, name: str) -> str:
    file = presets.preset_files(noun)[name]
    if noun == "model":
        from zoo.inspection.model_facts import facts_of, shown

        head = f"{noun}/{name}  {yaml_summary(file)}\nfile    {file}"
        return f"{head}\n\n{shown(facts_of(name))}\n\n{file.read_text(encoding='utf-8').rstrip()}"
    return f"{noun}/{name}  {yaml_summary(file)}\nfile    {file}\n\n{file.read_text(encoding='utf-8').rstrip()}"


def _component(kind: str, name: str) -> str:
    known = facts_of(kind, name)
    facts = {
        "about": _first_paragraph(known.about),
        "paper": known.paper,
        "licence": known.licence,
        "needs": ", ".join(sorted(known.needs)),
        "provides": ", ".join(sorted(known.provides)),
        "destroys": ", ".join(sorted(known.destroys)),
        "positions": "kept or dense, by the model's option: positions=dense" if kind == "pruner" else "",
        "package": known.package,
        "source": f"{known.file}:{known.line}",
        "use": usage(kind, name),
    }
    lines = [f"{kind}/{name}  {known.summary}", ""]
    lines += [f"{key:<10}{value}" for key, value in facts.items() if value]
    rows = [(o.name, o.type, _shown(o.default), o.doc) for o in known.options]
    if rows:
        widths = [max(len(row[i]) for row in rows if len(row[i]) <= _WIDE) + 2 for i in range(3)]
        lines += ["", "options"]
        for row in rows:
            cells = "".join(f"{cell + '  ':<{w}}" for cell, w in zip(row, widths, strict=False))
            lines.append(f"  {cells}{row[3]}".rstrip())
    if known.presets:
        names = {name: preset.text for name, preset in known.presets.items()}
        wide = [max(map(len, column)) + 2 for column in (names, names.values())]
        lines += ["", f"presets   {usage(kind, name).partition(' ')[0]} {_option(kind, name, 'preset')}=..."]
        for preset, text in names.items():
            lines.append(f"  {preset:<{wide[0]}}{text + '  ':<{wide[1]}}{known.presets[preset].source}")
    return "\n".join(lines)


def usage(kind: str, name: str) -> str:
    """Return how to choose a component on the command line."""
    options = source_options(kind, name)
    if kind == "distiller":
        return f"stages.<stage>.distiller={name}"
    chosen = f"{group_of(kind)}=[{name}]" if kind in MANY else f"{group_of(kind)}={name}"
    return f"{chosen} {_option(kind, name, options[0].name)}=..." if options else chosen


def _option(kind: str, name: str, option: str) -> str:
    return f"{group_of(kind)}.{name}.{option}" if kind in MANY else f"{group_of(kind)}.{option}"


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "(required)" if default == MISSING else repr(default) if isinstance(default, str) else str(default)


def _first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())
