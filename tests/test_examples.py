"""examples/: the package is found by its entry point and keeps all rules; the pictures are trained on and exported."""

import importlib.util
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import forget_plugins
from zoo.cli.entry import main
from zoo.registry import packages, plugins

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def commands(readme):
    """The commands of a README, without their comments."""
    lines = re.findall(r"^    (\S.*?)(?:  +#.*)?$", readme.read_text(), re.M)
    return [line.split() for line in lines]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The pruner's package as pip leaves it: its folder on the path, and what its pyproject.toml states."""
    folder = EXAMPLES / "own_pruner"
    stated = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = tmp_path / "zoo_even-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {stated['name']}\nVersion: {stated['version']}\n")
    (info / "top_level.txt").write_text("zoo_even\n")
    points = stated["entry-points"]["zoo.plugins"]
    (info / "entry_points.txt").write_text("[zoo.plugins]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    shutil.copytree(folder / "zoo_even", tmp_path / "zoo_even")
    monkeypatch.setattr(plugins, "_plugins", {})
    packages._distributions.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    packages._distributions.cache_clear()
    forget_plugins()
    for name in [name for name in sys.modules if name.split(".")[0] == "zoo_even"]:
        del sys.modules[name]


def test_the_pruner_is_found_tried_and_used(installed, capsys):
    assert main(["list", "pruner", "even"]) == 0
    assert "keep image tokens at equal distances" in capsys.readouterr().out
    assert "zoo_even.pruner" not in sys.modules  # listing a name imports no torch
    for words in commands(installed / "README.md"):
        if words[:2] in (["zoo", "info"], ["zoo", "test"], ["zoo", "check"]):
            assert main(words[1:]) == 0, words
    out = capsys.readouterr().out
    assert "zoo-even" in out and ", 0 broken" in out
    spec = importlib.util.spec_from_file_location("own_test_even", installed / "tests" / "test_even.py")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    own.test_kept_tokens_are_at_equal_distances()
    assert main(["bench", "compatibility", "parts=pruner/even", "pairs=1", "triples=0"]) == 0


def test_own_data_is_trained_scored_and_exported(tmp_path, monkeypatch, capsys):
    here = tmp_path / "own_data"
    shutil.copytree(EXAMPLES / "own_data", here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    lines = commands(here / "README.md")
    assert lines[0] == ["python", "draw.py"]
    spec = importlib.util.spec_from_file_location("own_data_draw", here / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    draw.main()
    assert "records.json has 120 questions" in capsys.readouterr().out and len(list(Path("pictures").iterdir())) == 60
    small = {
        "train": [
            "limit=8",
            "stages.answer.epochs=null",
            "stages.answer.steps=1",
            "vision.depth=1",
            "llm.num_layers=1",
        ],
        "eval": ["limit=3"],
    }
    for words in lines[1:]:
        if words[:2] == ["zoo", "serve"]:
            continue  # it serves until it is stopped: tests/test_serve.py
        assert words[0] == "zoo"
        assert main([*words[1:], *small.get(words[1], [])]) == 0, capsys.readouterr().err
    assert (here / "shapes" / "model.safetensors").is_file()
    assert [words for words in lines if words[:2] == ["zoo", "serve"]]
