"""What `zoo new` prints as next steps is run as printed; one kind is trained, in few steps, and scored afterwards."""

import pytest

from tests.conftest import forget_plugins
from zoo.cli import new
from zoo.cli.entry import main
from zoo.registry import plugins


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(plugins, "_plugins", {})


@pytest.mark.parametrize("kind", new.TEMPLATES)
def test_each_line_runs(kind, tmp_path, capsys):
    assert main(["new", kind, f"own_{kind}"]) == 0
    _, _, lines = capsys.readouterr().out.partition("\nnext:\n")
    first, second, *commands = [line.split() for line in lines.splitlines()]
    assert first[:3] == ["zoo", "test", f"own_{kind}"] and second[:3] == ["python", "-m", "pytest"]  # by other tests
    for words in commands:
        assert words[0] == "zoo"
        if words[1] == "train" and kind != "dataset":
            break  # the check before it composes the same run; training takes longer
        more = ["limit=8", "stages.answer.epochs=null", "stages.answer.steps=1"] if words[1] == "train" else []
        assert main([*words[1:], *more]) == 0, capsys.readouterr().err
    if kind == "dataset":
        forget_plugins()
        assert main(["eval", "model=last"]) == 2
        said = capsys.readouterr().err
        assert "needs dataset 'own_dataset', which the model got from a plugin that is not loaded" in said
        assert "If you trust it, add plugins=[./own_dataset.py]." in said
    if kind == "inside_pruner":
        assert main(["train", "plugins=[./own_inside_pruner.py]", "pruner=own_inside_pruner"]) == 2
        assert "Set stages.name.pack=none." in capsys.readouterr().err and not (tmp_path / "runs").exists()
