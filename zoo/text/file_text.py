"""Texts of files as a terminal shows them: YAML and Markdown no wider than its columns."""

import re
from collections.abc import Iterator

from zoo.text.terminal import NARROW, columns, width, wrapped

_COMMENT = re.compile(r"""^((?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*?)\s+#\s?(.*)$""")  # behind a value
_RULE = re.compile(r"[|\s:-]+")


def yaml_text(text: str) -> str:
    """Wrap YAML: comments that do not fit go above their line, and values on over several lines.

    What is returned means the same to YAML; where wrapping would change that (in a block of literal text), the text is
    returned as it is.
    """
    import yaml

    shown = "\n".join(line for given in text.splitlines() for line in _yaml_lines(given))
    try:
        same = yaml.safe_load(shown) == yaml.safe_load(text)
    except yaml.YAMLError:
        same = False
    return shown if same else text.rstrip("\n")


def _yaml_lines(line: str) -> Iterator[str]:
    if len(line) <= width():
        yield line
        return
    indent = line[: len(line) - len(line.lstrip())]
    if line.lstrip().startswith("#"):
        yield wrapped(line.lstrip().lstrip("#").lstrip(), f"{indent}# ", f"{indent}# ")
        return
    if found := _COMMENT.match(line):
        yield wrapped(found[2], f"{indent}# ", f"{indent}# ")
        line = found[1]
    yield wrapped(line, subsequent=f"{indent}    ")


def markdown_text(text: str) -> str:
    """Wrap Markdown: paragraphs anew, wide tables in columns; code stays as it is."""
    shown: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if max(map(len, lines)) <= width() or block.startswith(("    ", "```")):
            shown.append(block)
        elif all(line.startswith("|") for line in lines):
            shown.append(_table(lines))
        elif any(re.match(r"\s*([-*]|\d+\.) ", line) for line in lines):
            shown.append("\n".join(wrapped(line, subsequent="  ") for line in lines))
        else:
            shown.append(wrapped(" ".join(line.strip() for line in lines)))
    return "\n\n".join(shown)


def _table(lines: list[str]) -> str:
    """Return a table in columns; a wide one as a line for each row, with the heads at their cells."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    most = max(map(len, rows))
    rows = [row + [""] * (most - len(row)) for row in rows if any(row) and not _RULE.fullmatch(" ".join(row))]
    fixed = [max(len(row[i]) for row in rows) for i in range(most - 1)]
    if sum(fixed) + 2 * most <= width() - NARROW:
        return columns(rows, indent=0, widest=width())
    heads = rows[0]
    told = [[f"{head} {cell}" for head, cell in zip(heads, row, strict=True)] for row in rows[1:]]
    return "\n".join(wrapped(", ".join(cells), subsequent="  ") for cells in told)
