"""The site's pages, as `make docs` hands them to Sphinx: all reachable, no link broken, all of the code in them."""

import re
import sys
from pathlib import Path

import pytest

import zoo
from zoo.registry import KINDS, entries, get, names

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)(`{3,}|:{3,}).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
TOCTREE = re.compile(r"```\{toctree\}\n((?:.+\n)*)\n((?:.+\n)*)```")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        import stage
    finally:
        sys.path.pop(0)
    assert stage.stage(folder) == []
    return folder


def test_every_page_is_in_the_navigation_once(site):
    listed = ["index"]
    for page in listed:  # grows on the way
        for _, lines in TOCTREE.findall((site / f"{page}.md").read_text()):
            below = [(site / page).parent / re.sub(r".*<(.+)>", r"\1", line) for line in lines.splitlines()]
            listed += [path.resolve().relative_to(site.resolve()).as_posix() for path in below]
    there = sorted(file.relative_to(site).with_suffix("").as_posix() for file in site.rglob("*.md"))
    assert sorted(listed) == there


def test_every_link_leads_to_a_page_and_a_heading_of_it(site):
    wrong = []
    for file in site.rglob("*.md"):
        text = re.sub(r"^```.*?^``` *$", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            if not target.is_file() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{file.relative_to(site)}: {link}")
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """Headings as GitHub and MyST name them."""
    text = re.sub(r"^```.*?^``` *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_reference_has_every_part_with_every_option(site):
    missing = []
    for kind in KINDS:
        text = (site / "reference" / f"{kind}.md").read_text()
        for name in names(kind):
            section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
            assert section, f"{kind}/{name}"
            missing += [f"{kind}/{name}: {o.name}" for o in get(kind, name).options if f"`{o.name}`" not in section[1]]
    assert missing == []


def test_every_option_says_what_it_is():
    """A comment behind the field, or on the lines above it, which `ruff format` can break apart."""
    assert [f"{e.kind}/{e.name}: {o.name}" for e in entries() for o in e.options if not o.doc] == []


def test_the_reference_has_every_public_name_and_command(site):
    from zoo import registry
    from zoo.cli.entry import COMMANDS

    for module, page in ((zoo, "api"), (registry, "api-registry")):
        text = (site / "reference" / f"{page}.md").read_text()
        assert [n for n in module.__all__ if not re.search(rf"\b{n}\b", text)] == []
        # what is documented says what it is
        bare = re.findall(r"^:{3,}\{py:(?:function|class)\} ([\w.]+).*\n\n\n:{3,}$", text, re.MULTILINE)
        assert bare == []
    text = (site / "reference" / "commands.md").read_text()
    assert [name for name in COMMANDS if not re.search(rf"## zoo {name}\n\n```text\n.+\n", text)] == []


def test_nothing_of_a_docstring_is_taken_for_markup():
    from reference import escaped, prose, table

    assert escaped("a * b_c [x] `k_v` <p>") == r"a \* b\_c \[x\] `k_v` \<p\>"
    assert prose("One.\n\n    a^T b\n\n- x\n- y | z") == "One.\n\n```text\na^T b\n```\n\n- x\n- y \\| z"
    assert table(["a"], [["x | `p|q`"]]).splitlines()[-1] == r"| x \| `p\|q` |"
