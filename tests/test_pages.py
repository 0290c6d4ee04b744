"""What the site's pages and notebooks show runs: in order, each page in a folder of its own, without network.

Blocks of a page: `python` runs in one namespace; `sh` line by line, each a command of `zoo`; `yaml` and `python` that
begin with the name of a file are written to it; lines of `text` must have been printed by then, `...` standing for
anything. What cannot run here (a hub, several GPUs) is indented, and shown only.
"""

import base64
import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from zoo.cli.entry import main

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [
    DOCS / "index.md",
    DOCS / "tutorial.md",
    *sorted(DOCS.glob("how_to/*.md")),
    *sorted(DOCS.glob("concepts/*.md")),
]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:# @package _global_\n)?# ([\w/]+\.(?:py|yaml|sh|json))\b")


def named(files):
    return pytest.mark.parametrize("file", files, ids=[f.relative_to(DOCS).with_suffix("").as_posix() for f in files])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("ZOO_PLUGINS", raising=False)


@named([page for page in PAGES if BLOCK.search(page.read_text())])
@pytest.mark.fixes  # pages show what a refusal says
def test_what_a_page_shows_runs(file):
    names: dict = {"__name__": "page"}
    printed = io.StringIO()
    for language, code in BLOCK.findall(file.read_text()):
        place = FILE.match(code)
        with contextlib.redirect_stdout(printed):
            if place and language in ("python", "yaml"):
                Path(place[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(place[1]).write_text(code)
            elif language == "python":
                exec(compile(code, file.name, "exec"), names)
            elif language == "sh":
                for line in code.replace("\\\n", " ").splitlines():
                    command, *words = shlex.split(line, comments=True)
                    assert command == "zoo" and main(words) == 0, line
        if language == "text":
            seen = " ".join(printed.getvalue().split())
            missing = [line for line in code.splitlines() if not re.search(pattern(line), seen)]
            assert not missing, f"{missing} not in\n{printed.getvalue()}"


def pattern(line: str) -> str:
    return r".*".join(re.escape(" ".join(part.split())) for part in line.split("..."))


@pytest.mark.fixes
@named(NOTEBOOKS)
def test_a_notebook_shows_what_is_stored_in_it(file, notebooks):
    names: dict = {"__name__": "__main__"}
    for cell in json.loads(file.read_text())["cells"]:
        if cell["cell_type"] == "code":
            made = notebooks.run("".join(cell["source"]), names)
            assert list(map(shown, made)) == list(map(shown, cell["outputs"]))


def shown(output: dict):
    """What a person sees of an output: text, or pixels (their compression may change)."""
    data = output.get("data", {})
    if "image/png" in data:
        image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
        return image.size, image.convert("RGB").tobytes()
    return "".join(output.get("text", data.get("text/plain", [])))


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "site"))
    return importlib.import_module("notebooks")
