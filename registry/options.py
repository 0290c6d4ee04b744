"""The options of a component: the fields of its dataclass, each with the comment behind it."""

import inspect
import re
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

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
    result = []
    for f in fields(config):
        default = f.default
        if default is NO_DEFAULT:
            default = f.default_factory() if f.default_factory is not NO_DEFAULT else MISSING
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", None)
        if not isinstance(f.type, type) and kind is not None and not isinstance(f.type, str):
            kind = re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(f.type))  # names without their modules, as in the source
        result.append(Option(f.name, kind or str(f.type), default, docs.get(f.name, "")))
    return result


@cache
def _comments_of(cls: type) -> dict[str, str]:
    try:
        return field_comments(inspect.getsource(cls).splitlines())
    except (OSError, TypeError):
        return {}


def field_comments(lines: list[str]) -> dict[str, str]:
    """Map field names to their trailing comments, or the comment lines right above, in the source lines of a class."""
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
        above = []  # a comment describes the next line alone
    return docs
