"""docs/pains.md: all thirty-one are there, and what is named beside each exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(r"^\| P(\d+) \| (.*) \| (.*) \| `(tests/.*)` \|$", (ROOT / "docs" / "pains.md").read_text(), re.M)


def test_every_pain_has_a_source_and_an_answer():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 32))
    for number, pain, answer, _ in ROWS:
        assert re.search(r"\([\w.-]+/[\w.-]+#\d+\)$", pain), f"P{number} has no source"
        assert answer, f"P{number} has no answer"


def test_every_test_that_is_named_exists():
    for number, test in [(number, test) for number, *_, named in ROWS for test in named.split("`, `")]:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), f"P{number}: {file} does not exist"
        tree = ast.parse((ROOT / file).read_text())
        tests = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
        assert tests and (not name or name in tests), f"P{number}: {file} has no {name}"
