"""A plugin runs where a person named it for the run: starting a run is remembered on the machine, not in its folder."""

import json
import shutil
import sys

import pytest
import yaml

from tests.train_builders import config, recipe, train_up_to
from zoo import ZooError
from zoo.registry import plugins
from zoo.runs.folder import RunFolder
from zoo.training.loop import Run

STAGES = {"a": "steps: 2, batch_size: 4, checkpoint_every: 1"}
DATA = """
from dataclasses import dataclass
from pathlib import Path
from zoo.data.scenes import Scenes, ScenesConfig
from zoo.registry import register

Path(__file__).with_suffix(".ran").touch()

@dataclass
class Config(ScenesConfig):
    pass

@register("dataset", "mine")
class Mine(Scenes):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
"""


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A state folder of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "zoo" / "runs"


def new_process() -> None:
    """Forget which plugins were loaded, as a process that starts has none."""
    from zoo.registry import table as core

    plugins._plugins.clear()
    core._entries["dataset"].pop("mine", None)
    for name in [n for n in sys.modules if n.startswith("zoo_plugin_")]:
        del sys.modules[name]


def started(tmp_path, monkeypatch):
    """A run with a plugin, named by a path from its own folder, that was stopped after its first step."""
    place = tmp_path / "work"
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    (place / "mine.py").write_text(DATA)
    words = [*recipe(tmp_path, STAGES), "plugins=[./mine.py]", "data=[mine]", "data.mine.scenes=8"]
    with Run(config(words, f"run.folder={tmp_path / 'run'}", "data.mine.eval_scenes=2", "data.mine.size=32")) as run:
        train_up_to(run)
    new_process()
    (place / "mine.ran").unlink()
    return place, RunFolder(tmp_path / "run")


def resumed(tmp_path, folder, *words):
    return Run(config(recipe(tmp_path, STAGES), f"resume={folder}", *words))


def test_ones_own_run_goes_on_from_any_folder(tmp_path, monkeypatch, state, capsys):
    place, folder = started(tmp_path, monkeypatch)
    assert yaml.safe_load(folder.config.read_text())["plugins"] == ["./mine.py"]
    (note,) = state.iterdir()
    assert json.loads(note.read_text())["plugins"] == {"./mine.py": str(place / "mine.py")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.py").write_text("raise SystemExit('another file of the same name')")
    monkeypatch.chdir(elsewhere)
    (place / "mine.py").write_text(DATA + "# changed since\n")
    capsys.readouterr()
    with resumed(tmp_path, folder.path) as run:
        run.train()
    assert (place / "mine.ran").exists() and run.is_trained
    said = " ".join("".join(capsys.readouterr()).split())
    assert "Since the run began: plugin ./mine.py: its file is another (hash " in said and "data mine" not in said


def test_a_copied_run_asks(tmp_path, monkeypatch, state):
    place, folder = started(tmp_path, monkeypatch)
    copy = tmp_path / "copy"
    shutil.copytree(folder.path, copy)
    ask = r"asks for the plugins './mine.py'.*plugins=\[./mine.py\]"
    with pytest.raises(ZooError, match=ask):
        resumed(tmp_path, copy)
    assert not (place / "mine.ran").exists() and not (copy / "run.lock").exists()
    with resumed(tmp_path, copy, "plugins=[./mine.py]") as run:  # the person names it
        run.train()
    assert run.is_trained and (place / "mine.ran").exists()


def test_what_is_put_in_the_place_of_a_run_asks(tmp_path, monkeypatch, state):
    """Another number, none, one of another kind, or another plugin in the config."""
    place, folder = started(tmp_path, monkeypatch)
    number, saved = (folder.path / "run.id").read_text(), folder.config.read_text()
    for text in ("0" * 32, "", "../../x", "0" * 5000):
        (folder.path / "run.id").write_text(text)
        with pytest.raises(ZooError, match="asks for the plugins"):
            resumed(tmp_path, folder.path)
    (folder.path / "run.id").unlink()
    with pytest.raises(ZooError, match="asks for the plugins"):
        resumed(tmp_path, folder.path)
    (folder.path / "run.id").write_text(number)
    evil = tmp_path / "evil.py"
    evil.write_text(DATA)
    for named, said in (([str(evil)], "evil.py"), (["./mine.py", "antigravity"], "antigravity"), ("os", "a list")):
        folder.config.write_text(yaml.safe_dump({**yaml.safe_load(saved), "plugins": named}))
        with pytest.raises(ZooError, match=said):
            resumed(tmp_path, folder.path)
    assert not evil.with_suffix(".ran").exists() and not (place / "mine.ran").exists()
    assert "antigravity" not in sys.modules


def test_a_finished_run_leaves_no_note(tmp_path, monkeypatch, state):
    from zoo.training.finish import write_report

    _, folder = started(tmp_path, monkeypatch)
    with resumed(tmp_path, folder.path) as run:
        run.train()
        write_report(run, None)
    assert not list(state.iterdir())


def test_a_state_folder_that_cannot_be_written(tmp_path, monkeypatch, state):
    """The run starts, and says that it will ask."""
    from zoo.runs.consent import remember

    (tmp_path / "state").write_text("a file where the folder would be")
    (tmp_path / "run").mkdir()
    assert "will ask for its plugins" in remember(tmp_path / "run", {"./mine.py": str(tmp_path / "mine.py")})


def test_what_a_model_names_is_no_plugin_of_the_run(tmp_path, monkeypatch, state):
    """Training from a downloaded model, killed and resumed: its plugin neither runs nor stands in the run's config."""
    from importlib.resources import files

    model, evil = tmp_path / "downloaded", tmp_path / "helper.py"
    shutil.copytree(str(files("zoo.model_cards") / "scenes_tiny"), model)
    evil.write_text(DATA)
    stated = json.loads((model / "config.json").read_text()) | {"plugins": [str(evil)]}
    (model / "config.json").write_text(json.dumps(stated))
    words = [*recipe(tmp_path, STAGES), f"model=dir:{model}", f"run.folder={tmp_path / 'run'}"]
    text = (tmp_path / "conf" / "recipe" / "tiny.yaml").read_text()
    head, _, stages = text.partition("vision:")
    (tmp_path / "conf" / "recipe" / "tiny.yaml").write_text(
        head.replace("  - override /model: scenes_tiny\n", "")
        + "data: {scenes: {scenes: 8, eval_scenes: 2}}\ndevice: cpu\nprecision: fp32\nstages:"
        + stages.partition("stages:")[2]
    )
    with Run(config(words)) as run:
        assert list(run.cfg.plugins) == []
    with resumed(tmp_path, tmp_path / "run") as run:
        assert list(run.cfg.plugins) == []
    assert not evil.with_suffix(".ran").exists() and not state.exists()
