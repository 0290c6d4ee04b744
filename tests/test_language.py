"""Docstrings, comments and messages are in the field's English: nouns for things, and no tensor that sees or is told.

`FINISHED` lists the folders that are held: all of the package but `benches` and `claims`.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FINISHED = ("fusion", "vision", "distill", "registry", "zoo")

# pattern -> what to write instead
BANNED = {
    r"(?<!there )\b(?:is|are|was|were) no\b(?! (?:longer|more))": "is not a ...; without ...",
    r"\b(?:nobody|somebody|whoever|strangers?)\b": "name the module, tensor, person or process",
    r"\bso many\b": "the number of ..., every n-th ...",
    r"\b(?:stands?|stood|standing)\b": "is, comes before, replaces, means",
    r"\bnone is\b": "no ... is; without ...",
    r"\bof theirs\b": "name whose",
    r"\btold\b": "given, configured",
    r"\bsees\b": "attends to, takes, receives",
    r"\bsays\b": "states, sets, returns",
}


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Lines of docstrings, comments and messages, with their numbers; other texts are data."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr | ast.Raise | ast.JoinedStr):  # docstrings and warnings, errors, messages
            for text in (c for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)):
                for number, line in enumerate(text.value.split("\n")):
                    yield text.lineno + number, line


@pytest.mark.parametrize("room", FINISHED)
def test_the_language_of_a_room_is_the_fields(room):
    found = []
    for file in sorted((ROOT / room).rglob("*.py")):
        for number, line in prose(file.read_text(encoding="utf-8")):
            for pattern, instead in BANNED.items():
                if hit := re.search(pattern, line, re.IGNORECASE):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {hit[0]!r} ({instead}): {line.strip()[:100]}")
    assert not found, "\n".join(["write it in other words:", *found])


def test_the_words_are_found_where_people_read_them_and_nowhere_else():
    source = (
        '"""What it says."""\n\n\ndef nobody():\n    stands = 1  # where it stands\n    return f"{stands} is no list"\n'
    )
    hits = [(n, p) for n, line in prose(source) for p in BANNED if re.search(p, line)]
    assert sorted({n for n, _ in hits}) == [1, 5, 6]
    assert not [p for p in BANNED if re.search(p, "There is no such file, and it is no longer read.", re.IGNORECASE)]
