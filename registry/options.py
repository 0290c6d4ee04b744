"""What the source text of a component says about it, read without importing it."""

import ast
import inspect
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MISSING: Any = "???"  # default of a required option, as OmegaConf spells it


@dataclass(frozen=True)
class Option:
    """One field of a component's dataclass."""

    name: str
    type: str
    default: Any  # MISSING where the option is required
    doc: str


def summary_of(file: Path) -> str:
    """Return the first line of a module's docstring."""
    try:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    except (OSError, SyntaxError):
        return ""
    return text.partition("\n")[0].strip()


def options_of(config: type) -> list[Option]:
    """Return the fields of a dataclass with type, default and the comment that follows each in its source."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if is_dataclass(base):
            docs |= _comments_of(base)
    result = []
    for f in fields(config):
        default = f.default
        if default is NO_DEFAULT:
            default = f.default_factory() if f.default_factory is not NO_DEFAULT else MISSING
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", None)
        if not isinstance(f.type, type) and kind is not None and not isinstance(f.type, str):
            kind = str(f.type).replace("typing.", "")
        result.append(Option(f.name, kind or str(f.type), default, docs.get(f.name, "")))
    return result


def options_in(file: Path, kind: str, name: str) -> list[Option]:
    """Return the options of the component that `file` registers under `name`; none where the text does not say."""
    try:
        text = _Text(file)
        for node in text.classes.values():
            if _registers(node, kind, name):
                return text.fields(_config_annotation(node))
    except (OSError, SyntaxError, LookupError, ImportError):
        pass
    return []


def line_in(file: Path, kind: str, name: str) -> int:
    """Return the line of the class that `file` registers under `name`, or 1."""
    try:
        found = [node.lineno for node in _Text(file).classes.values() if _registers(node, kind, name)]
    except (OSError, SyntaxError):
        found = []
    return found[0] if found else 1


class _Text:
    """The classes in a source file, and where it imports others from."""

    def __init__(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8")
        body = ast.parse(text).body
        self.lines = text.splitlines()
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module]
        self.imported = {
            alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names
        }

    def fields(self, name: str) -> list[Option]:
        """Return the fields of a dataclass, those it inherits first.

        Raises:
            LookupError: it, or one of its bases, is neither here nor imported from a file.
        """
        if name not in self.classes:
            module, original = self.imported[name]
            spec = find_spec(module)
            if spec is None or not spec.origin:
                raise LookupError(name)
            return _Text(Path(spec.origin)).fields(original)
        config = self.classes[name]
        options: dict[str, Option] = {}
        for base in reversed(config.bases):
            if not isinstance(base, ast.Name):
                raise LookupError(ast.unparse(base))
            options |= {option.name: option for option in self.fields(base.id)}
        docs = field_comments(self.lines[config.lineno - 1 : config.end_lineno])
        for item in config.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                field = item.target.id
                options[field] = Option(field, ast.unparse(item.annotation), _default(item.value), docs.get(field, ""))
        return list(options.values())


def _default(value: ast.expr | None) -> Any:
    """Return a default as far as the text says it; None where it is made by code."""
    if value is None or ast.unparse(value) == "MISSING":
        return MISSING
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def _registers(node: ast.ClassDef, kind: str, name: str) -> bool:
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and [a.value for a in call.args if isinstance(a, ast.Constant)] == [kind, name]:
            return True
    return False


def _config_annotation(node: ast.ClassDef) -> str:
    """Return the name of the dataclass that annotates `config` in `__init__`."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            for argument in [*item.args.posonlyargs, *item.args.args]:
                if argument.arg == "config" and isinstance(argument.annotation, ast.Name):
                    return argument.annotation.id
    return ""


@cache
def _comments_of(cls: type) -> dict[str, str]:
    try:
        return field_comments(inspect.getsource(cls).splitlines())
    except (OSError, TypeError):
        return {}


def field_comments(lines: list[str]) -> dict[str, str]:
    """Field name -> trailing comment, or the comment lines right above it, in the source lines of a class."""
    docs, above = {}, []
    for line in lines:
        text = line.strip()
        if text.startswith("#"):
            above.append(text.lstrip("# "))
            continue
        head = text.partition(":")[0].strip()
        if head.isidentifier() and ":" in text:
            _, hash_, tail = text.partition("  # ")
            docs[head] = tail.strip() if hash_ else " ".join(above)
        above = []
    return docs
