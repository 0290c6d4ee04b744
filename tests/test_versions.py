"""Which versions of libraries are allowed, installed and tested: one statement, in all the places where it stands."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo.registry.versions import TESTED, Versions, blocks_of, numbers

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(file: str) -> dict[str, str]:
    """Name -> version of each line of a list of exact versions."""
    lines = [line for line in (ROOT / "requirements" / file).read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.+!]+", line) for line in lines), file
    return {plain(name): version for name, version in (line.split("==") for line in lines)}


def test_the_package_states_the_ranges_that_were_tested():
    stated = {}
    for line in REQUIRED:
        name, bounds = re.match(r"([\w-]+)(?:\[[\w,]+\])?([^;]*)", line).groups()
        stated[name] = bounds.strip()
    assert {name: stated.get(name) for name in TESTED} == {name: tested.range for name, tested in TESTED.items()}
    assert {name for name, bounds in stated.items() if "<" in bounds} == set(TESTED)


@pytest.mark.parametrize("name", TESTED)
def test_what_counts_as_run_is_what_the_lists_install(name):
    tested, oldest, locked = TESTED[name], listed("oldest.txt")[plain(name)], listed("locked.txt")[plain(name)]
    assert tested.covers(oldest) and tested.covers(locked)
    assert oldest == tested.oldest, "make lock test-oldest, then write what ran into registry/versions.py"
    assert locked == tested.newest, "make lock test-newest, then write what ran into registry/versions.py"
    newer = tested.in_part
    assert not newer or (tested.covers(newer) and numbers(newer) > numbers(tested.newest)), "it is all run by now"


def test_the_lists_hold_exact_versions_of_all_that_is_required_and_nowhere_to_get_them_from():
    for file in ("locked.txt", "oldest.txt"):
        found = listed(file)
        extras = PROJECT["optional-dependencies"]
        docs = extras["docs"] if file == "locked.txt" else []  # the site is built on those alone
        for line in [
            *PROJECT["dependencies"],
            *(x for e in ("dev", "video", "datasets", "serve") for x in extras[e]),
            *docs,
        ]:
            name = plain(re.match(r"[\w-]+", line).group())
            assert name in found or name == plain(PROJECT["name"]), f"{name} is not in {file}: make lock"
    assert listed("torch.txt").items() <= listed("locked.txt").items()


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("2.10.1", False),
        ("2.11", True),
        ("2.11.0", True),
        ("2.14.1+cu132", True),
        ("2.14.99", True),
        ("2.15.0.dev20261101", False),
        ("2.15", False),
        ("3.0", False),
    ],
)
def test_a_range_ends_where_it_says(version, inside):
    assert Versions("2.11", "2.14.1", "2.15").covers(version) is inside


def test_nothing_but_versions_py_asks_for_a_version():
    """Differences between versions are found in one file; others may show a version, never compare one."""
    asks = "|".join(
        [
            r"__version__ *(<|>|==|!=)",
            r"versions import .*\b(at_least|numbers)\b",
            r"\bVersion\(|parse_version",
            r"is_\w+_(greater|less)_",
        ]
    )
    for folder in ("zoo", "registry", "vision", "fusion", "distill"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != ROOT / "registry" / "versions.py":
                assert not re.search(asks, path.read_text()), path


def test_an_encoders_layers_are_counted_by_either_name():
    both = SimpleNamespace(depth=3, num_hidden_layers=3)
    assert (
        blocks_of(SimpleNamespace(depth=3)) == blocks_of(both) == blocks_of(SimpleNamespace(num_hidden_layers=3)) == 3
    )
