"""Facts of a component for lists and pages: from its source text where that suffices, else from its imported class."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.registry.options import Option
from zoo.registry.packages import licence_of, package_of
from zoo.registry.presets import Preset
from zoo.registry.source_text import UNSAID, SourceText, stated
from zoo.registry.table import Entry, capabilities, get, module_of, source_of


@dataclass(frozen=True)
class Facts:
    """What `zoo info` shows."""

    summary: str  # the first line of its file
    about: str  # the docstring of its class
    paper: str
    licence: str
    needs: frozenset[str]  # as the class declares them: those that depend on options are known once it is built
    provides: frozenset[str]
    destroys: frozenset[str]
    package: str
    file: str
    line: int
    options: list[Option]
    presets: Mapping[str, Preset]


def facts_of(kind: str, name: str, imported: bool = False) -> Facts:
    """Return what there is to say about a component. It is imported only where its text leaves something open.

    Args:
        kind: of the component.
        name: of the component.
        imported: ask the imported class, whatever its text states.

    Raises:
        ZooError: there is none of that name.
    """
    module, file = module_of(kind, name), source_of(kind, name)
    found = facts_in(file, module, kind, name) if module and file and not imported else None
    return found or _of_entry(get(kind, name))


def facts_in(file: Path, module: str, kind: str, name: str) -> Facts | None:
    """Return the facts of the component that `file` registers; None where its text does not say all of them."""
    try:
        text = SourceText(file)
        node = text.component(kind, name)
        options = text.options(node, exact=True)
        presets = text.attribute(node, "presets")
        said = _capabilities(lambda hook: text.attribute(node, hook))
    except UNSAID:
        return None
    if len(node.decorator_list) > 1:  # the other may change anything
        return None
    package = package_of(module)
    return Facts(
        text.doc.partition("\n")[0].strip(),
        ast.get_docstring(node) or "",
        stated(text.doc, "Paper"),
        licence_of(text.doc, package),
        **said,
        package=package,
        file=str(file),
        line=node.decorator_list[0].lineno,
        options=options,
        presets=presets,
    )


def _of_entry(entry: Entry) -> Facts:
    return Facts(
        entry.summary,
        entry.cls.__doc__ or "",
        entry.paper,
        entry.licence,
        **_capabilities(lambda hook: getattr(entry, hook)),
        package=entry.package,
        file=entry.file,
        line=entry.line,
        options=entry.options,
        presets=entry.presets,
    )


def _capabilities(of: Callable[[str], Any]) -> dict[str, frozenset[str]]:
    return {hook: capabilities(of(hook)) for hook in ("needs", "provides", "destroys")}
