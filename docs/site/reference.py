"""Reference pages from what the code says of itself: the registry, dataclasses, docstrings, and the help of commands.

Docstrings are plain text with names in backticks, so everything else that Markdown would read is escaped.
"""

import ast
import contextlib
import inspect
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import zoo
from zoo.cli import entry, listing
from zoo.registry import KINDS, Option, Part, get, hooks, names, options_of
from zoo.registry.options import field_comments
from zoo.registry.parts import derived
from zoo.registry.table import group_of
from zoo.settings import presets, schema
from zoo.settings.stage import TEACHER, Stage

ROOT = Path(__file__).parents[2]
# Modules whose public names are documented: those that scripts and plug-ins import from.
MODULES = {
    "zoo": "What a script uses.",
    "zoo.registry": "What a component uses: the values that flow between parts, the table of names, and errors.",
    "zoo.registry.forward_pass": "A forward pass as a value: what hooks know of it, and what they note in it.",
    "zoo.fusion.attach": "Ways to attach to a model without changing its code, each with its undo.",
    "zoo.vision.images.video": "Videos, and which of their frames are taken.",
}
HEADS = {
    "vision": ("Encoders", "pixels to features on a grid of patches"),
    "pruner": ("Pruners", "fewer image tokens, before the LLM or between its layers"),
    "projector": ("Projectors", "tokens of the encoder's width to tokens of the LLM's"),
    "layout": ("Layouts", "crops and frames of an image as one sequence"),
    "llm": ("Language models", "a causal language model of transformers, unmodified"),
    "adapter": ("Adapters", "new weights inside a language model"),
    "distiller": ("Distillers", "losses of a stage that learns from a teacher, or from dense targets"),
    "dataset": ("Data sets", "samples, from files or drawn"),
    "task": ("Tasks", "what an answer scores"),
}
NAMED = {
    "model": ("Models", 'Named models: `model=NAME`, `zoo.load("NAME")`, `zoo chat NAME`.'),
    "recipe": ("Recipes", "Named recipes: `zoo train recipe=NAME`. Each is a YAML file of stages, shown in full."),
    "data": ("Named data", "Data sets with options set: `data=[NAME]`. Paths in them are options like any other."),
}


def pages() -> Iterator[tuple[str, str]]:
    """Yield each page of the reference: its place in the site, and its Markdown."""
    kinds = [kind for kind in KINDS if names(kind)]
    yield "reference/index.md", _index(kinds)
    for kind in kinds:
        yield f"reference/{kind}.md", _kind(kind)
    for noun in NAMED:
        yield f"reference/{noun}s.md", _presets(noun)
    yield "reference/commands.md", _commands()
    yield "reference/config.md", _config()
    for module, line in MODULES.items():
        yield f"reference/{_file(module)}.md", _module(module, line)


def _file(module: str) -> str:
    return "api-" + module.removeprefix("zoo.").replace(".", "-") if module != "zoo" else "api"


def _index(kinds: Sequence[str]) -> str:
    parts = ["# Reference", "Written from the code of this version: registry, dataclasses, docstrings, commands."]
    groups = {
        "Parts": [(kind, f"{HEADS[kind][0]}: {HEADS[kind][1]}") for kind in kinds],
        "Named": [(f"{noun}s", text) for noun, (_, text) in NAMED.items()],
        "Commands and config": [("commands", "The commands of `zoo`"), ("config", "The config of a run")],
        "Python": [(_file(module), f"`{module}`: {line}") for module, line in MODULES.items()],
    }
    for head, rows in groups.items():
        parts += [f"## {head}", "\n".join(f"- [{name}]({name}.md): {text}" for name, text in rows)]
    listed = "\n".join(name for rows in groups.values() for name, _ in rows)
    return "\n\n".join([*parts, f"```{{toctree}}\n:hidden:\n\n{listed}\n```"]) + "\n"


# Parts


def _kind(kind: str) -> str:
    head, what = HEADS[kind]
    found = [get(kind, name) for name in names(kind)]
    rows = [[f"[`{e.name}`](#{_anchor(e.name)})", escaped(e.summary)] for e in found]
    parts = [f"# {head}", f"`{kind}`: {what}.", table(["name", ""], rows)]
    for component in found:
        parts.append(_component(kind, component))
    if contract := _contract(kind):
        parts += ["## The contract", contract]
    return "\n\n".join(parts) + "\n"


def _component(kind: str, component: Any) -> str:
    facts = {
        "choose it": f"`{listing.usage(kind, component.name)}`",
        "needs": _words(component.needs),
        "provides": _words(component.provides),
        "destroys": _words(component.destroys),
        "licence": escaped(component.licence),
        "file": f"`{Path(component.file).relative_to(ROOT)}`",
    }
    parts = [f"## {component.name}", prose(inspect.getdoc(inspect.getmodule(component.cls)) or component.summary)]
    if component.cls.__doc__:
        parts.append(prose(inspect.cleandoc(component.cls.__doc__)))
    parts.append(table(["", ""], [[key, value] for key, value in facts.items() if value]))
    if component.options:
        parts.append(options_table(component.options))
    if component.presets:
        rows = [[f"`{name}`", f"`{preset.text}`", escaped(preset.source)] for name, preset in component.presets.items()]
        parts.append(table(["preset", "options", "source"], rows))
    return "\n\n".join(parts)


def _words(words: frozenset[str]) -> str:
    return ", ".join(f"`{word}`" for word in sorted(words))


def _contract(kind: str) -> str:
    """What a part of this kind has, may have and is given: its base class, and the special forms of it."""
    base = hooks.BASES[kind]
    forms = [cls for cls in _bases() if issubclass(cls, base) and cls is not base]
    head = f"One of your own derives from `{base.__name__}`: what is abstract it must have, the rest has defaults."
    shown = [_class(f"zoo.registry.{base.__name__}", base, (base, Part))]
    shown += [_class(f"zoo.registry.{cls.__name__}", cls, (cls,)) for cls in forms]
    return "\n\n".join([head, *shown])


def _bases() -> list[type]:
    """The base classes of parts that the registry offers, each shown on the page of its kind."""
    found = [getattr(zoo.registry, name) for name in zoo.registry.__all__]
    return [cls for cls in found if inspect.isclass(cls) and issubclass(cls, Part) and cls is not Part]


def options_table(options: Sequence[Option]) -> str:
    """Return a table of options as `zoo info` has it."""
    return table(
        ["option", "type", "default", "meaning"],
        [[f"`{o.name}`", f"`{o.type}`", f"`{listing._shown(o.default)}`", escaped(o.doc)] for o in options],
    )


# Named things


def _presets(noun: str) -> str:
    head, what = NAMED[noun]
    files = dict(sorted(presets.preset_files(noun).items()))
    rows = [[f"[`{name}`](#{_anchor(name)})", escaped(listing.yaml_summary(file))] for name, file in files.items()]
    parts = [f"# {head}", what, table(["name", ""], rows)]
    for name, file in files.items():
        card = [f"[Its card](../models/{name}.md): sources, figures, limits."] if noun == "model" else []
        yaml = file.read_text("utf-8").rstrip()
        parts += [f"## {name}", escaped(listing.yaml_summary(file)), *card, f"```yaml\n{yaml}\n```"]
    if noun == "model":
        listed = "\n".join(f"../models/{name}" for name in files)
        parts.append(f"```{{toctree}}\n:hidden:\n\n{listed}\n```")
    return "\n\n".join(parts) + "\n"


# Commands and config


def _commands() -> str:
    parts = ["# Commands", f"```text\n{entry.overview()}\n```"]
    for name in entry.COMMANDS:
        parts += [f"## zoo {name}", f"```text\n{_help(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(name: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        entry.main([name, "--help"])
    return said.getvalue().rstrip()


def _config() -> str:
    root = [o for o in options_of(schema.RunRoot) if o.name not in ("defaults", "hydra")]
    slots = {group_of(kind): kind for kind in KINDS}
    rows = []
    for option in root:
        doc = escaped(option.doc)
        if option.name in slots:
            doc = f"slot: [{HEADS[slots[option.name]][0].lower()}]({slots[option.name]}.md)"
        elif option.name in schema.SECTIONS:
            doc = f"[options of their own](#{option.name})"
        elif option.name == "stages":
            doc = "[stages](#stages), by name, one after the other"
        rows.append([f"`{option.name}`", f"`{option.type}`", f"`{listing._shown(option.default)}`", doc])
    for row, option in zip(rows, root, strict=True):
        if is_dataclass(option.default):
            row[1:3] = "", ""
    parts = ["# The config of a run", prose(inspect.getdoc(schema.RunRoot) or "")]
    parts += ["What stands behind `zoo train`, `zoo eval`, `zoo check` and `zoo.load`: `key=value` sets it."]
    parts.append(table(["key", "type", "default", "meaning"], rows))
    for name, section in schema.SECTIONS.items():
        doc = inspect.getdoc(section) or ""
        parts += [f"## {name}", *([prose(doc)] if not doc.startswith(section.__name__ + "(") else [])]
        parts.append(options_table(options_of(section)))
    parts += ["## stages", prose(inspect.getdoc(inspect.getmodule(Stage)) or ""), options_table(options_of(Stage))]
    said = _comments_in(inspect.getsource(import_module("zoo.settings.stage")), "TEACHER")
    teacher = [Option(k, type(v).__name__, v, said.get(k, "")) for k, v in TEACHER.items()]
    return "\n\n".join([*parts, "### A stage's teacher", options_table(teacher)]) + "\n"


def _comments_in(source: str, name: str) -> dict[str, str]:
    """The comments behind the entries of a dict that is written out."""
    body = re.search(rf"^{name}\b.*?= \{{\n(.*?)^\}}", source, re.MULTILINE | re.DOTALL)
    lines = body[1].splitlines() if body else []
    return dict(found.groups() for line in lines if (found := re.match(r'\s+"(\w+)": .*?  # (.*)', line)))


# Python


def _module(name: str, line: str) -> str:
    module: Any = import_module(name)
    public = getattr(module, "__all__", None) or [
        n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", "") == name
    ]
    functions, classes, values, others, bases = [], [], [], [], _bases()
    for item in public:
        value = getattr(module, item)
        if value in bases or (name != "zoo" and getattr(zoo, item, None) is value):  # on another page
            word, owner = "class" if inspect.isclass(value) else "func", "zoo.registry" if value in bases else "zoo"
            others.append(f"{{py:{word}}}`{owner}.{item}`")
            continue
        if inspect.isclass(value):
            classes.append(_class(f"{name}.{item}", value))
        elif callable(value) and inspect.isfunction(inspect.unwrap(value)):
            functions.append(_function(f"{name}.{item}", value))
        else:
            shown = repr(value)
            values.append(f"- `{item}`" + (f" = `{shown}`" if len(shown) < 100 else ""))
    parts = [f"# {name}", line]
    for head, found in (("Functions", functions), ("Classes", classes), ("Values", ["\n".join(values)] * bool(values))):
        parts += [f"## {head}", *found] if found else []
    if others:
        parts.insert(2, f"Also here: {', '.join(others)}.")
    return "\n\n".join(parts) + "\n"


def _function(name: str, value: Any) -> str:
    return directive("py:function", f"{name}{_signature(value)}", docstring(value))


def _class(name: str, cls: type, owners: Sequence[type] = ()) -> str:
    """A class with its attributes and methods: of `owners`, else of itself and those of its bases that are ours."""
    shown = name.rpartition(".")[2]
    owners = owners or [owner for owner in cls.__mro__ if owner.__module__.startswith("zoo.")]
    parts = [docstring(cls)]
    if is_dataclass(cls):
        parts.append(options_table(options_of(cls)))
    elif rows := _attributes(owners):
        parts.append(table(["attribute", "type", "default", "meaning"], rows))
    seen: set[str] = set()
    for owner in owners:
        for item, value in vars(owner).items():
            if item not in seen and (not item.startswith("_") or item == "__call__"):
                seen.add(item)
                parts += _member(f"{shown}.{item}", value)
    made = ""
    if inspect.isfunction(vars(cls).get("__init__")) and not is_dataclass(cls) and "_is_protocol" not in vars(cls):
        made = _signature(vars(cls)["__init__"])
    return directive("py:class", f"{name}{made}", "\n\n".join(part for part in parts if part))


def _member(name: str, value: Any) -> list[str]:
    if isinstance(value, (property, derived)):
        said = docstring(value)
        return [directive("py:property", name, said)] if said else []
    inner = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    if not inspect.isfunction(inner) or not inner.__doc__:
        return []
    mark = ":abstractmethod:\n\n" if getattr(inner, "__isabstractmethod__", False) else ""
    return [directive("py:method", f"{name}{_signature(inner)}", mark + docstring(inner))]


def _attributes(owners: Sequence[type]) -> list[list[str]]:
    """Name, type, default and meaning of what classes annotate: the text below an attribute, or the comment behind."""
    rows: dict[str, list[str]] = {}
    for owner in reversed(owners):
        source = inspect.cleandoc("\n" + inspect.getsource(owner))
        said = field_comments(source.splitlines())
        node: Any = ast.parse(source).body[0]
        for item, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            text = getattr(getattr(below, "value", None), "value", None) if isinstance(below, ast.Expr) else None
            meaning = " ".join(text.split()) if isinstance(text, str) else said.get(item.target.id, "")
            default = f"`{ast.unparse(item.value)}`" if item.value is not None else ""
            if not item.target.id.startswith("_"):
                rows[item.target.id] = [
                    f"`{item.target.id}`", f"`{ast.unparse(item.annotation)}`", default, escaped(meaning)
                ]  # fmt: skip
    return list(rows.values())


def _signature(function: Any) -> str:
    """Arguments and result as the source writes them, without `self`."""
    source = inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(function)))
    node: Any = ast.parse(source).body[0]
    if not isinstance(node, ast.FunctionDef):
        return "()"
    positional = node.args.posonlyargs or node.args.args
    if positional and positional[0].arg in ("self", "cls"):
        del positional[0]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){result}"


def docstring(value: Any) -> str:
    """Return a docstring as Markdown: paragraphs, and its sections of arguments, results and errors as field lists."""
    text = inspect.getdoc(value) or ""
    if is_dataclass(value) and text.startswith(f"{getattr(value, '__name__', '')}("):
        return ""  # what dataclasses writes where nobody did
    body, *sections = re.split(r"^(Args|Returns|Yields|Raises):\n", text, flags=re.MULTILINE)
    parts = [prose(body.strip())]
    for head, lines in zip(sections[::2], sections[1::2], strict=True):
        lines, _, rest = lines.partition("\n\n")
        items = re.split(r"^(?=\S)", inspect.cleandoc("\n" + lines), flags=re.MULTILINE)
        parts.append("\n".join(_field(head, item) for item in items if item.strip()))
        parts.append(prose(rest.strip()) if rest.strip() else "")
    return "\n\n".join(part for part in parts if part)


def _field(head: str, item: str) -> str:
    one = " ".join(item.split())
    if head in ("Returns", "Yields"):
        return f":{head.lower()}: {escaped(one)}"
    name, colon, said = one.partition(": ")
    word = "param" if head == "Args" else "raises"
    return f":{word} {name.strip('*')}: {escaped(said)}" if colon else f":{word}: {escaped(one)}"


# Markdown


def directive(name: str, argument: str, body: str) -> str:
    """A directive with more colons around it than any inside; its options, if any, begin the body."""
    longest = max((len(found) for found in re.findall(r"^:{3,}", body, re.MULTILINE)), default=2)
    fence = ":" * (longest + 1)
    return f"{fence}{{{name}}} {argument}\n{'' if body.startswith(':abstract') else chr(10)}{body}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text in which names in backticks stay code and nothing else is markup."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_<>\[\]{}|#$~^`])", r"\\\1", part) for i, part in enumerate(parts))


def prose(text: str) -> str:
    """A docstring's paragraphs and lists; what is indented behind an empty line is shown as it is written."""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(_block(block) for block in blocks if block.strip())


def _block(block: str) -> str:
    lines = block.splitlines()
    if lines[0] == "Example:":
        return "Example:\n\n```python\n" + inspect.cleandoc("\n" + "\n".join(lines[1:])) + "\n```"
    if all(line.startswith("    ") for line in lines):
        return "```text\n" + "\n".join(line[4:] for line in lines) + "\n```"
    return escaped("\n".join(lines))


def _anchor(name: str) -> str:
    return name.lower()
