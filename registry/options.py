"""The options of a component: the fields of its dataclass, each with the comment behind it."""

import ast
import inspect
import re
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent
from tokenize import COMMENT, TokenError, generate_tokens
from typing import Any, get_type_hints

MISSING: Any = "???"  # default of a required option, as OmegaConf spells it


@dataclass(frozen=True)
class Option:
    """One field of a component's dataclass."""

    name: str
    type: str
    default: Any  # MISSING where the option is required
    doc: str


def options_of(config: type) -> list[Option]:
    """Return the fields of a dataclass with type, default and the comment that follows each in its source."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if is_dataclass(base):
            docs |= _comments_of(base)
    result, hints = [], _hints(config)
    for f in fields(config):
        default = f.default
        if default is NO_DEFAULT:
            default = f.default_factory() if f.default_factory is not NO_DEFAULT else MISSING
        default = _as_typed(default)
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", None)
        if not isinstance(f.type, type) and kind is not None and not isinstance(f.type, str):
            kind = re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(f.type))  # names without their modules, as in the source
        if isinstance(hint := hints.get(f.name), type) and issubclass(hint, Enum):
            kind = " | ".join(hint.__members__)
        result.append(Option(f.name, kind or str(f.type), default, docs.get(f.name, "")))
    return result


def _hints(config: type) -> dict[str, Any]:
    """The types of fields, those in quotes too; nothing where one of them is not known."""
    try:
        return get_type_hints(config)
    except (NameError, TypeError):
        return {}


def _as_typed(default: Any) -> Any:
    """Return a default as a person would type it: an enum's by its name, those of a dataclass as a mapping."""
    if isinstance(default, Enum):
        return default.name
    if is_dataclass(default) and not isinstance(default, type):
        return {f.name: _as_typed(getattr(default, f.name)) for f in fields(default)}
    return str(default) if isinstance(default, Path) else default


@cache
def _comments_of(cls: type) -> dict[str, str]:
    try:
        return field_comments(inspect.getsource(cls).splitlines())
    except (OSError, TypeError, SyntaxError, TokenError):
        return {}


def field_comments(lines: list[str]) -> dict[str, str]:
    """Map field names to what is said of them in the source lines of a class.

    That is the comment behind a field, behind the bracket that closes its default, in the lines right above, or the
    text right below.
    """
    text = dedent("\n".join(lines)) + "\n"
    found = [token for token in generate_tokens(StringIO(text).readline) if token.type == COMMENT]
    comments = {token.start[0]: token.string.lstrip("# ").rstrip() for token in found}
    alone = {token.start[0] for token in found if not token.line[: token.start[1]].strip()}
    body = next((node.body for node in ast.parse(text).body if isinstance(node, ast.ClassDef)), [])
    docs = {}
    for item, below in zip_longest(body, body[1:]):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        behind = comments.get(item.end_lineno or 0) or comments.get(item.lineno, "")
        above: list[str] = []
        line = item.lineno - 1
        while line in alone:
            above, line = [comments[line], *above], line - 1
        doc = behind or " ".join(above)
        if not doc and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            doc = " ".join(str(below.value.value).split("\n\n")[0].split())
        docs[item.target.id] = doc
    return docs
