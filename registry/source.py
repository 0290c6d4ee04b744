"""What the source text of a component says about it, read without importing it."""

import ast
import inspect
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
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
        text = file.read_text(encoding="utf-8")
        classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    except (OSError, SyntaxError):
        return []
    for node in classes.values():
        if _registers(node, kind, name):
            config = classes.get(_config_annotation(node))
            return _fields(config, classes, text.splitlines()) if config else []
    return []


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


def _fields(config: ast.ClassDef, classes: dict[str, ast.ClassDef], lines: list[str]) -> list[Option]:
    options = {}
    for base in config.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            options |= {o.name: o for o in _fields(classes[base.id], classes, lines)}
    docs = field_comments(lines[config.lineno - 1 : config.end_lineno])
    for item in config.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            try:
                default = ast.literal_eval(item.value) if item.value else MISSING
            except ValueError:
                default = MISSING if ast.unparse(item.value) == "MISSING" else None
            name = item.target.id
            options[name] = Option(name, ast.unparse(item.annotation), default, docs.get(name, ""))
    return list(options.values())


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
