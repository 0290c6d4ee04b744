"""Write the site's pages to a folder: those of docs/, the ones that lie elsewhere, and what is generated from code.

`make docs` runs this, and Sphinx on what it wrote. Links are written for a reader of the repository; here they are
turned to where the pages lie in the site, and one that leads nowhere is an error.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent
ROOT = DOCS.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import notebooks  # noqa: E402  beside this file
import reference  # noqa: E402

LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2 *$", re.MULTILINE | re.DOTALL)


def pages() -> dict[Path, str]:
    """Files of the repository that are pages or pictures of the site, and where each lies in it."""
    found = {file: file.relative_to(DOCS).as_posix() for file in sorted(DOCS.rglob("*")) if _shown(file)}
    found |= {ROOT / f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG")}
    return found | {card: f"models/{card.name}" for card in sorted((ROOT / "model_cards").glob("*.md"))}


def _shown(file: Path) -> bool:
    return file.suffix in (".md", ".png", ".svg", ".ipynb") and HERE not in file.parents and ".ipynb_" not in str(file)


def stage(folder: Path) -> list[str]:
    """Write all pages into `folder`, which is emptied first.

    Returns:
        Links that lead nowhere, as `page: link`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    places, wrong = pages(), []
    for file, place in places.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".md", ".ipynb"):
            text = file.read_text("utf-8") if file.suffix == ".md" else notebooks.page(file)
            text, lost = turned(text, file, place, places)
            target.with_suffix(".md").write_text(text, encoding="utf-8")
            wrong += [f"{file.relative_to(ROOT)}: {link}" for link in lost]
        else:
            shutil.copyfile(file, target)
    for place, text in reference.pages():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return wrong


def turned(text: str, file: Path, place: str, places: dict[Path, str]) -> tuple[str, list[str]]:
    """Return the text of a page with its links as the site has them, and the links that lead nowhere."""
    lost: list[str] = []

    def turn(match: re.Match[str]) -> str:
        shown, link = match.groups()
        path, mark, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return match.group()
        target = (file.parent / path).resolve()
        if target in places:
            to = places[target]
        elif not target.exists() and file.is_relative_to(DOCS) and "reference/" in link:  # generated: Sphinx looks
            to = target.relative_to(DOCS).as_posix()
        elif target.exists():  # a file that is no page: its name is said, as the text of the link
            return shown[1:-1]
        else:
            lost.append(link)
            return match.group()
        to = re.sub(r"\.ipynb$", ".md", to)
        return f"{shown}({os.path.relpath(to, Path(place).parent)}{mark}{anchor})"

    return "".join(part if code else LINK.sub(turn, part) for part, code in _parts(text)), lost


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a page into text and fenced blocks, which are kept as they are."""
    at = 0
    for fence in FENCE.finditer(text):
        yield text[at : fence.start()], False
        yield fence.group(), True
        at = fence.end()
    yield text[at:], False


if __name__ == "__main__":
    if lost := stage(Path(sys.argv[1])):
        sys.exit("links that lead nowhere:\n  " + "\n  ".join(lost))
