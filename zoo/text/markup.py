r"""Escape names and texts for tables of rich, plots of matplotlib, and Markdown.

All three read markup in plain strings: `[/b]` ends a colour that was never begun, `$\frac$` is a formula, `|` ends a
cell and `<b>` is HTML. A name may contain any of these without breaking a table, plot or page.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)  # moves the cursor, or turns the line
COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # to a terminal, but for line breaks and tabs
MARKDOWN = re.compile(r"([\\`*\[\]|$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def printable(text: object) -> str:
    r"""Return a text on one line, with control characters and lone surrogates escaped as `\x1b` or `\ud83d`."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), plain)


def harmless(text: str) -> str:
    r"""Return a text of several lines whose other control characters, which move the cursor, say, are escaped."""
    return COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cell(text: object) -> "Text":
    """Return a text for a table or a title of rich, without markup."""
    from rich.text import Text

    return Text(printable(text))


def label(text: object) -> str:
    """Return a text for matplotlib, without formulas; a leading `_` does not hide it from a legend."""
    plain = printable(text).replace("$", "\\$")
    return f" {plain}" if plain.startswith("_") else plain


def markdown(text: object) -> str:
    """Return a text escaped for a line or a table cell of Markdown."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKDOWN.sub(r"\\\1", plain)


def in_cell(text: object) -> str:
    """Return our own Markdown, escaped for a cell of a table."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
