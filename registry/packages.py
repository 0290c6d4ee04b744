"""The installed distribution behind a module, and its licence."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, metadata, packages_distributions
from typing import Any

from zoo.registry.source_text import stated

OWN = "zoo-vlm"  # the distribution of the zoo itself
FILE_PLUGIN = "zoo_plugin_"  # begins the module of a plugin that is a file


@cache  # it reads what every installed distribution holds: 0.14 s
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def package_of(module: str) -> str:
    """Return the installed distribution that a module belongs to, or the module's first name where there is none.

    A plugin that is a file has neither.
    """
    top = module.partition(".")[0]
    if top.startswith(FILE_PLUGIN):
        return ""
    if top == __name__.partition(".")[0] and _is_installed(OWN):
        return OWN
    return (_distributions().get(top) or [top])[0]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def licence_of(doc: str, package: str) -> str:
    """Return the licence that a module's docstring states; else that of the package."""
    if found := stated(doc, "Licence"):
        return found
    if not package:
        return ""
    try:
        facts: Any = metadata(package)
    except PackageNotFoundError:
        return ""
    return facts.get("License-Expression") or facts.get("License") or ""
