"""Components from outside: installed, named, from a file; and that a broken one breaks nothing else."""

import copy
import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoo import ZooError
from zoo.cli import doctor
from zoo.cli.entry import main
from zoo.registry import build, packages, plugins
from zoo.registry.versions import TESTED
from zoo.settings.config import compose

ROOT = Path(__file__).resolve().parents[1]
PRUNER = '''
from dataclasses import dataclass
from torch import nn
from zoo.registry import register

@dataclass
class Config:
    keep_ratio: float = 0.5  # share kept

@register("pruner", "NAME")
class Mine(nn.Module):
    """Mine."""
    def __init__(self, config: Config) -> None:
        super().__init__()
    def num_tokens(self, n: int) -> int:
        return n
    def forward(self, image):
        return image
'''
DATA = '''
from dataclasses import dataclass, field
from zoo.registry import Dataset, register

@dataclass
class Config:
    size: int = 2

class Letters:
    def __getitem__(self, index):
        return "abc"[index]

@register("dataset", "mine")
class Mine(Dataset):
    """Letters."""
    def __init__(self, config: Config) -> None:
        self.config, self.letters = config, Letters()
    def __len__(self):
        return self.config.size
    def get(self, index, epoch=0):
        return self.letters[index]
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Each test starts without plugins; what it registers goes again as after every test (`conftest`)."""
    monkeypatch.setattr(plugins, "_plugins", {})
    monkeypatch.delenv("ZOO_PLUGINS", raising=False)


def write(folder: Path, name: str) -> Path:
    file = folder / f"{name}.py"
    file.write_text(PRUNER.replace("NAME", name))
    return file


def test_a_file_on_the_command_line(tmp_path):
    file = write(tmp_path, "mine")
    cfg = compose("train", [f"plugins=[{file}]", "pruner=mine", "pruner.mine.keep_ratio=0.3"])
    assert cfg.pruner.mine == {"name": "mine", "keep_ratio": 0.3}
    assert list(cfg.plugins) == [str(file)]
    assert plugins.status()[0].adds == ["pruner/mine"]
    with pytest.raises(ZooError, match=r"No option of pruner 'mine' named 'kep_ratio'. Did you mean 'keep_ratio'"):
        compose("train", [f"plugins={file}", "pruner=mine", "pruner.mine.kep_ratio=0.3"])


@pytest.mark.parametrize("name", ["it's", "part (1)", "größe", "a=b", "a{b}"])
def test_a_file_of_any_name(name, tmp_path):
    file = write(tmp_path, "mine").rename(tmp_path / f"{name}.py")
    for words in (f"plugins={file}", f"plugins=[{file}]"):
        assert list(compose("load", [words, "model=scenes_tiny", "pruner=[mine]"]).plugins) == [str(file)]


def test_two_files_of_one_name(tmp_path):
    for folder, name in (("a", "first"), ("b", "second")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, name).rename(tmp_path / folder / "part.py")
    plugins.load([str(tmp_path / "a" / "part.py"), str(tmp_path / "b" / "part.py")])
    assert [p.adds for p in plugins.status()] == [["pruner/first"], ["pruner/second"]]


def test_a_module_and_the_environment(tmp_path, monkeypatch):
    write(tmp_path, "by_module")
    write(tmp_path, "by_env")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ZOO_PLUGINS", "by_env, ")
    cfg = compose("train", ["plugins=by_module", "pruner=[by_module,by_env]"])
    assert list(cfg.pruner) == ["by_module", "by_env"]
    for name in ("by_module", "by_env"):
        sys.modules.pop(name)


def test_a_recipe_names_its_plugins(tmp_path):
    file = write(tmp_path, "of_recipe")
    (tmp_path / "recipe").mkdir()
    recipe = "# @package _global_\ndefaults:\n  - override /model: scenes_tiny\n  - override /pruner: [of_recipe]\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(f"{recipe}plugins: [{file}]\n")
    (tmp_path / "recipe" / "child.yaml").write_text("# @package _global_\ndefaults:\n  - mine\n")
    for name in ("mine", "child"):
        cfg = compose("train", [f"recipe={name}"], config_dir=tmp_path)
        assert list(cfg.pruner) == ["of_recipe"] and list(cfg.plugins) == [str(file)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise RuntimeError('no luck today')", "RuntimeError: no luck today"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError: "),
        (PRUNER.replace("NAME", "random"), "ZooError: pruner 'random' is taken: "),
    ],
)
def test_one_that_raises_stops_the_command_that_named_it_and_is_left_out_of_a_shells_list(
    tmp_path, text, error, monkeypatch
):
    good, bad = write(tmp_path, "good"), tmp_path / "bad.py"
    bad.write_text(text)
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(f"# @package _global_\ndefaults:\n  - override /model: scenes_tiny\nplugins: [{bad}]\n")
    for words in (["plugins=[BAD,GOOD]".replace("BAD", str(bad)).replace("GOOD", str(good))], ["recipe=mine"]):
        with pytest.raises(ZooError) as raised:
            compose("train", words, config_dir=tmp_path)
        assert str(raised.value).startswith(f"Plugin {str(bad)!r} does not load: {error}")
        assert "bad.py, line " in str(raised.value) and "Plugins that failed" not in str(raised.value)
    monkeypatch.setattr(plugins, "_plugins", {})
    monkeypatch.setenv("ZOO_PLUGINS", f"{bad},{good}")
    assert list(compose("train", ["pruner=good"]).pruner) == ["good"]
    (failed,) = plugins.failed()
    assert failed.name == str(bad) and failed.error.startswith(error)
    assert plugins.loaded() == [str(good)]


def test_the_line_of_a_module_that_imports_what_is_missing(tmp_path, monkeypatch):
    package = tmp_path / "zoo_deep"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("import os\n\nfrom zoo_deep import missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZooError, match=r"'zoo_deep.parts' does not load: ImportError: .* \(parts.py, line 3\)"):
        plugins.require(["zoo_deep.parts"])
    with pytest.raises(ZooError, match=r"does not load: ModuleNotFoundError: No module named 'zoo_deep.nothing'$"):
        plugins.require(["zoo_deep.nothing"])
    sys.modules.pop("zoo_deep")


@pytest.mark.parametrize(
    ("wanted", "hint"), [("near.parts", "set PYTHONPATH=."), ("beside", "its path: ./beside.py"), ("far", "")]
)
def test_a_module_of_the_working_folder(wanted, hint, tmp_path, monkeypatch):
    """The command `zoo` does not search the working folder, as `python -m` does."""
    (tmp_path / "near").mkdir()
    write(tmp_path, "beside")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])
    (found,) = plugins.load([wanted])
    assert found.error.startswith("ModuleNotFoundError: No module named") and found.error.endswith(hint or "'far'")


def test_a_missing_file():
    plugins.load(["./no_such_plugin.py"])
    assert "FileNotFoundError: no such file: " in plugins.failed()[0].error


def run(*words: str, path: Path, **env: str) -> subprocess.CompletedProcess:
    """Run `zoo` in a process of its own, with `path` before the installed packages."""
    paths = os.pathsep.join([str(path), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "zoo", *words],
        cwd=path,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def install(place: Path, package: str, version: str) -> Path:
    """Make a package be there, as pip would leave it."""
    info = place / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return info


def install_two(place: Path) -> Path:
    """Two packages with entry points, one of them broken."""
    write(place, "zoo_good")
    (place / "zoo_bad.py").write_text("raise ImportError(\"no module named 'foo'\")")
    for package in ("good", "bad"):
        info = install(place, f"zoo-{package}", "1.0")
        (info / "top_level.txt").write_text(f"zoo_{package}\n")
        (info / "entry_points.txt").write_text(f"[zoo.plugins]\n{package} = zoo_{package}\n")
    return place


@pytest.fixture
def installed(tmp_path):
    return install_two(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the doctor says of two plugins and of two libraries in other versions than were tested."""
    place = install_two(tmp_path_factory.mktemp("doctor"))
    for library, version in OTHERS.items():
        install(place, library, version)
    return run("doctor", path=place)


OTHERS = {"timm": "99.1", "peft": "0.1.0"}


def test_the_doctor_names_installed_versions_that_were_not_tested(report):
    for name, version in OTHERS.items():
        bounds = TESTED[name].range
        assert re.search(rf"^  {name} +{version} +NOT TESTED: {re.escape(bounds)} is$", report.stdout, re.MULTILINE)
        assert f"'{name}{bounds}'" in report.stderr
    assert "'torch" not in report.stderr or not TESTED["torch"].covers(__import__("torch").__version__)


def test_installed_plugins_and_the_doctor(report):
    assert "plugins: 2 found, 1 ok, 1 failed" in report.stdout, report.stderr
    assert "ok    zoo-good (installed)  adds pruner/zoo_good" in report.stdout
    assert "FAIL  zoo-bad (installed)  ImportError: no module named 'foo'" in report.stdout
    assert report.returncode == 1


def test_what_is_installed_while_a_process_runs_is_found_by_its_next_config(tmp_path, installed, monkeypatch):
    place = tmp_path / "site"
    place.mkdir()
    os.utime(place, (1, 1))  # else it may have been made within the same tick of the file system's clock
    monkeypatch.syspath_prepend(place)
    compose("load")
    assert not plugins.status()
    shutil.copytree(installed / "zoo_good-1.0.dist-info", place / "zoo_good-1.0.dist-info")
    shutil.copy(installed / "zoo_good.py", place)
    importlib.invalidate_caches()
    assert "zoo_good" in compose("load", ["pruner=zoo_good"]).pruner
    sys.modules.pop("zoo_good", None)


@pytest.fixture
def found(installed, monkeypatch):
    """The two packages on the path of this process, which knows nothing of them afterwards."""
    packages._distributions.cache_clear()
    monkeypatch.syspath_prepend(installed)
    yield
    packages._distributions.cache_clear()
    for name in ("zoo_good", "zoo_bad"):
        sys.modules.pop(name, None)


def test_installed_plugins_are_listed_and_explained(found, capsys):
    assert main(["list", "pruner"]) == 0
    listed = capsys.readouterr().out
    assert "zoo_good" in listed and "random" in listed
    assert main(["info", "pruner/zoo_good"]) == 0
    shown = capsys.readouterr().out
    assert "keep_ratio  float  0.5  share kept" in shown
    assert "zoo-good" in shown


def test_the_doctor_takes_a_plugin(tmp_path, monkeypatch, capsys):
    file = write(tmp_path, "for_doctor")
    for report in ("_libraries", "_weights", "_devices", "_attention"):
        monkeypatch.setattr(doctor, report, lambda: ())
    assert main(["doctor", f"plugins=[{file}]"]) == 0
    assert f"ok {file} (named) adds pruner/for_doctor" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "plugins=[./nowhere.py]"]) == 2
    assert "Plugin './nowhere.py' does not load: FileNotFoundError" in capsys.readouterr().err
    assert main(["doctor", "word"]) == 2


def test_a_missing_component_names_the_plugins_that_failed(found, capsys):
    assert main(["train", "pruner=from_bad"]) == 2
    said = capsys.readouterr().err
    assert "No pruner named 'from_bad'." in said
    assert "Plugins that failed to load: 'zoo-bad' (ImportError: no module named 'foo' (zoo_bad.py, line 1))." in said


def test_a_neighbour_that_a_file_imports(tmp_path):
    (tmp_path / "helping.py").write_text("x = 1")
    (tmp_path / "mine.py").write_text("import helping")
    (found,) = plugins.load([str(tmp_path / "mine.py")])
    said = "No module named 'helping' (mine.py, line 1). 'helping' lies beside the file, where Python does not look"
    assert found.error == f"ModuleNotFoundError: {said}: set PYTHONPATH={tmp_path}"


def test_a_part_of_a_file_goes_to_a_process_that_has_not_loaded_it(tmp_path):
    """As a data set to loader workers that are spawned."""
    file = tmp_path / "mine.py"
    file.write_text(DATA)
    plugins.require([str(file)])
    part = build("dataset", {"name": "mine", "size": 3})
    assert copy.deepcopy(part).get(1) == part.get(1) and len(plugins.status()) == 1
    program = "import pickle, sys; part = pickle.load(sys.stdin.buffer); print(len(part), part.get(1))"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(part), capture_output=True, check=False)
    assert done.stdout.decode().split(maxsplit=1) == ["3", f"{part.get(1)}\n"], done.stderr.decode()


def test_a_file_that_was_changed_since_is_named_once(tmp_path, recwarn):
    """A notebook went on with the class that it had loaded, without a word."""
    file = tmp_path / "mine.py"
    file.write_text("x = 1")
    for text, said in (("x = 1", 0), ("x = 2", 1), ("x = 2", 1)):
        file.write_text(text)
        plugins.load([str(file)])
        assert len(recwarn) == said
    assert "mine.py' was changed since it was loaded" in str(recwarn[0].message)
