"""The command `zoo`: what it prints, its exit status, sweeps, and that it leaves nothing behind."""

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType

import pytest

from zoo import ZooError
from zoo.cli import entry as cli
from zoo.cli import new
from zoo.cli.entry import main
from zoo.settings import presets

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("ZOO_DEBUG", "HYDRA_FULL_ERROR", "COMP_LINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ran(monkeypatch) -> list:
    """Configs that `zoo train` was run with; nothing is trained."""
    configs: list = []
    module = ModuleType("pretend")
    module.main = lambda cfg: configs.append(cfg)
    monkeypatch.setitem(sys.modules, "pretend", module)
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command("pretend:main", "train", composed=True))
    return configs


def test_help_names_every_command_and_fits_a_terminal(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out for name in cli.COMMANDS)
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["train", "eval", "check"])
def test_help_of_a_composed_command(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    words = ("pruner=[...]", "random", "scenes_tiny", "--multirun", "--config-dir", "seed=")
    for word in (f"usage: zoo {command}", *words):
        assert word in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No command named 'trian'. Did you mean 'train'? Available: train, eval,"),
        (["train", "--multrun"], "zoo train has no flag '--multrun'. Did you mean '--multirun'?"),
        (["train", "--lr", "3"], "Options have no dashes: lr=<value>."),
        (["train", "--cfg"], "--cfg needs a value."),
        (["train", "--config-dir", "nowhere"], "--config-dir 'nowhere': no such folder."),
        (["train", "--experimental-rerun", "x.pickle"], "no flag '--experimental-rerun'."),
        (["train", "--config-path", "/etc"], "no flag '--config-path'."),
        (["list", "prunr"], "No kind named 'prunr'. Did you mean 'pruner'?"),
        (["list", "pruner", "zzz*"], "Nothing matches 'pruner zzz*'."),
        (["info", "pruner/rndom"], "No pruner named 'rndom'. Did you mean 'random'?"),
        (["info", "rndom"], "Nothing is called 'rndom'. Did you mean 'pruner/random'?"),
        (["info", "plugins=[]"], "takes the name of a component beside plugins="),
        (["info", "pruner/mine", "plugins=[./mine.py]"], "Plugin './mine.py' does not load: FileNotFoundError"),
        (["list", "plugins=no_such_module"], "Plugin 'no_such_module' does not load: ModuleNotFoundError"),
        (["info", "prunr/random"], "No kind named 'prunr'. Did you mean 'pruner'?"),
        (["new", "prunr", "x"], "No kind named 'prunr'. Did you mean 'pruner'?"),
        (
            ["new", "merger", "x"],
            "The list of kinds is fixed, and a plugin adds parts to it; what others call 'merger'",
        ),
        (
            ["info", "reranker/x"],
            "is a task here: it may ask for texts, choices, log-probabilities of answers",
        ),
        (
            ["check", "merger=x"],
            "No option named 'merger'. The list of kinds is fixed, and a plugin adds parts to it; ",
        ),
        (
            ["new", "recipe", "x"],
            "A recipe is a file of YAML, not a component: `zoo info recipe/scenes_tiny` shows one",
        ),
        (["new", "pruner", "torch"], "torch.py would hide the module 'torch'"),
        (["new", "pruner", "My-Pruner"], "lower case letters, digits and underscores, got 'My-Pruner'"),
        (["new", "pruner", "half"], "pruner 'half': every torch module has an attribute"),
        (["new", "pruner", "random"], "pruner 'random' exists already"),
        (["new", "pruner", "null"], "pruner 'null': in pruner=null the word is a value, not a name"),
        (["new", "vision", "none"], "'none' is a word of Python"),  # its class would be None
        (["-sc", "install=tcsh"], "shells: bash, fish, zsh"),
    ],
)
def test_mistakes(words, message, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("zoo: ") and said.err.count("\n") == 1 and message in said.err
    assert said.out == ""


def test_debugging_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(ZooError):
        main(["trian"])


@pytest.mark.parametrize(("given", "then"), [(None, "1"), ("3", "3")])
def test_numpy_leaves_the_cores_to_the_step(given, then, monkeypatch, capsys):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", given or "")  # so that it is put back
    if given is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    assert main(["version"]) == 0
    assert os.environ["OPENBLAS_NUM_THREADS"] == then


def test_a_run_gets_its_config_and_leaves_nothing_behind(ran, tmp_path):
    assert main(["train", "pruner=random", "seed=3"]) == 0
    (cfg,) = ran
    assert list(cfg.pruner) == ["random"] and cfg.seed == 3 and "hydra" not in cfg
    assert list(tmp_path.iterdir()) == []


def test_a_users_own_folder_of_presets(ran, tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [scenes_tiny, {override /projector: linear}]\n"
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(text)
    for words in (["--config-dir", "conf"], ["--config-dir=conf"], ["-cd", "conf"]):
        assert main(["train", "model=mine", *words]) == 0
    assert main(["train", "-m", "model=mine,scenes_tiny", "--config-dir", "conf"]) == 0
    assert [cfg.projector.name for cfg in ran][:4] == ["linear"] * 4
    assert [cfg.model.name for cfg in ran] == ["mine"] * 4 + ["scenes_tiny"]


@pytest.mark.parametrize("group", ["model", "recipe", "data"])
def test_a_users_preset_of_a_name_that_is_there_is_not_passed_over(group, ran, tmp_path, capsys):
    name = "scenes" if group == "data" else "scenes_tiny"
    (own := tmp_path / "conf" / group).mkdir(parents=True)
    (own / f"{name}.yaml").write_text("# @package _global_\nseed: 3\n")
    assert main(["train", f"{group}={name}", "--config-dir", "conf"]) == 2
    what = "data set" if group == "data" else group
    assert f"there is a {what} '{name}' already, so yours needs another name" in capsys.readouterr().err
    if group != "data":  # a copy of the zoo's folder
        shutil.copy(presets.preset_files(group)[name], own)
        assert main(["train", f"{group}={name}", "--config-dir", "conf"]) == 0


def test_the_config_is_shown(ran, capsys):
    assert main(["train", "--cfg", "job", "-p", "run", "run.name=x"]) == 0
    assert "name: x" in capsys.readouterr().out
    assert ran == []


def test_a_sweep_drops_options_that_a_job_does_not_have(ran, capsys, tmp_path):
    assert main(["train", "-m", "pruner=null,random,pool", "pruner.random.keep_ratio=0.5"]) == 0
    assert [list(cfg.pruner) for cfg in ran] == [[], ["random"], ["pool"]]
    assert ran[1].pruner.random.keep_ratio == 0.5
    said = capsys.readouterr().err
    assert "pruner.random.keep_ratio=0.5 is left out of 2 of 3 runs that have no such option" in said
    folders = [Path(cfg.run.folder) for cfg in ran]
    assert [f.name for f in folders] == ["0", "1", "2"] and len({f.parent for f in folders}) == 1
    assert folders[0].parts[:2] == ("runs", "sweeps")
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
    assert main(["train", "-m", "pruner=random,pool"]) == 0
    assert Path(ran[-1].run.folder).parent != folders[0].parent  # a sweep never writes into another


@pytest.mark.parametrize("root", ["it's", "läufe (1)", "a=b,{c}"])
def test_a_sweep_in_a_folder_of_any_name(root, ran, tmp_path):
    assert main(["train", "-m", f'run.dir="{root}"', "seed=1,2"]) == 0
    assert [Path(cfg.run.folder).parts[0] for cfg in ran] == [root] * 2
    assert {p.name for p in tmp_path.iterdir()} == {root}


def test_a_job_that_fails_leaves_its_model_to_the_next(monkeypatch, tmp_path, capsys):
    held = []

    class Model:
        pass

    def job(cfg):
        model = Model()
        assert not [there for there in held if there() is not None]
        held.append(weakref.ref(model))
        try:
            raise OSError("out of memory")
        except OSError as error:
            raise ValueError(f"seed {cfg.seed} is too large") from error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zoo.training.loop.main", job)
    assert main(["train", "-m", "seed=1,2"]) == 2 and len(held) == 2
    said = capsys.readouterr().err
    assert "0 failed: seed 1 is too large" in said and "in job" in said and "2 of 2 runs" in said


def test_two_sweeps_that_are_planned_at_once_do_not_share_a_folder(ran, monkeypatch, capsys):
    monkeypatch.setattr("zoo.cli.sweep._folder", lambda root: Path(root, "sweeps", "1"))
    assert main(["train", "-m", "seed=1"]) == 0
    assert main(["train", "-m", "seed=2"]) == 2 and len(ran) == 1
    assert "Another sweep has begun in 'runs/sweeps/1' meanwhile" in capsys.readouterr().err


def test_a_sweep_runs_equal_jobs_once(ran, capsys):
    assert main(["train", "-m", "pruner=null,random", "pruner.keep_ratio=0.25,0.5"]) == 0
    assert [cfg.pruner.random.keep_ratio if cfg.pruner else None for cfg in ran] == [None, 0.25, 0.5]
    assert "3 of 4 runs are different" in capsys.readouterr().err


def test_a_sweep_over_single_slots_and_their_options(ran):
    assert main(["train", "-m", "projector=linear,mlp", "projector.depth=3", "seed=1,2"]) == 0
    assert [(cfg.projector.name, cfg.projector.get("depth"), cfg.seed) for cfg in ran] == [
        ("linear", None, 1),
        ("linear", None, 2),
        ("mlp", 3, 1),
        ("mlp", 3, 2),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pruner=null,random", "pruner.random.kep_ratio=1"], "named 'kep_ratio'. Did you mean 'keep_ratio'"),
        (["pruner=null,rndom"], "No pruner named 'rndom'. Did you mean 'random'?"),
        (["pruner=random", "pruner.random.keep_ratio=0.5,2"], "keep_ratio must be in (0, 1], got 2"),
        (["seed=1,x"], "Option 'seed' of the run takes int"),
        (["run.dir=a,b", "seed=1,2"], "run.dir=a,b: it is the folder of the whole sweep"),
    ],
)
def test_a_mistake_in_a_sweep(words, message, ran, capsys):
    assert main(["train", "-m", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_failing_job_stops_no_other_of_a_sweep(monkeypatch, capsys):
    module, seeds = ModuleType("pretend"), []

    def fails_with_2(cfg):
        seeds.append(cfg.seed)
        if cfg.seed == 2:
            raise ZooError("The disk is full.")

    module.main = fails_with_2
    monkeypatch.setitem(sys.modules, "pretend", module)
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command("pretend:main", "train", composed=True))
    assert main(["train", "-m", "seed=1,2,3"]) == 2
    assert seeds == [1, 2, 3]
    *_, which, last = capsys.readouterr().err.splitlines()
    assert which.endswith("/1 failed: The disk is full.") and last == "zoo: 1 of 3 runs of the sweep failed: 1."


@pytest.mark.parametrize(
    "words",
    [["resume=last", "seed=1"], ["-m", "resume=a,b", "seed=1,2"], ["recipe=nlvr", "resume=runs/x", "device=cpu"]],
)
def test_a_resumed_run_takes_no_options_that_it_would_ignore(words, ran, capsys):
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert "goes on with the options that the run was started with" in said and "Allowed beside it: device, log" in said
    assert ran == []
    assert main(["train", "resume=last", "device=cpu"]) == 0 and main(["train", "resume=null", "seed=1"]) == 0


def test_a_zoo_error_of_a_command_is_one_line(monkeypatch, capsys):
    module = ModuleType("pretend")

    def fails(cfg):
        raise ZooError("The disk is full.")

    module.main = fails
    monkeypatch.setitem(sys.modules, "pretend", module)
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command("pretend:main", "train", composed=True))
    assert main(["train"]) == 2
    assert capsys.readouterr().err.splitlines() == ["zoo: The disk is full."]


def test_list_and_info(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for line in ("vision\n", "pruner\n", "model\n", "recipe\n", "data\n", "  random "):
        assert line in out
    assert main(["list", "*tiny*"]) == 0
    assert "scenes_tiny" in capsys.readouterr().out
    assert main(["info", "pruner/random", "model/scenes_tiny"]) == 0
    out = capsys.readouterr().out
    for part in (
        "licence   Apache-2.0",
        "destroys  grid",
        "pruners/random.py:",
        "keep_ratio  float  0.25",
        "share of image",
    ):
        assert part in out
    assert "override /vision:" in out


def test_a_word_is_found_anywhere_in_a_name(capsys):
    assert main(["list", "llava_kd"]) == 0
    found = capsys.readouterr().out
    assert main(["list", "*llava_kd*"]) == 0
    assert capsys.readouterr().out == found and "distiller\n" in found and "llava_kd_tiny" in found
    assert main(["list", "model", "kd_tiny"]) == 0
    assert "llava_kd_tiny" in capsys.readouterr().out


def test_list_and_info_know_a_plugin(tmp_path, capsys):
    assert main(["new", "pruner", "informed"]) == 0
    assert "zoo info pruner/informed plugins=[./informed.py]" in capsys.readouterr().out
    assert main(["info", "pruner/informed", "plugins=[./informed.py]"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "informed.py") in out and "share of image tokens kept, in (0, 1]" in out
    assert main(["list", "pruner", "inf*", "plugins=[./informed.py]"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["pruner", "informed"]


def test_what_raised_in_a_plugin_has_a_line(tmp_path, capsys):
    (tmp_path / "early.py").write_text("import json\n\njson.loads(missing)\n")
    assert main(["info", "pruner/early", "plugins=['./early.py']"]) == 2
    said = capsys.readouterr().err
    assert (
        said == "zoo: Plugin './early.py' does not load: NameError: name 'missing' is not defined (early.py, line 3)\n"
    )


def test_completion_script_is_for_zoo(capsys):
    assert main(["-sc", "install=bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("hydra_bash_completion zoo")


def test_real_bash_completion(tmp_path):
    """Bash itself, with the script installed and `zoo` on the path."""
    command = tmp_path / "zoo"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m zoo "$@"\n')
    command.chmod(0o755)
    script = """
eval "$(zoo -sc install=bash)"
COMP_LINE="zoo train pruner=ran" COMP_POINT=20 COMP_CWORD=2
COMP_WORDS=(zoo train pruner=ran)
hydra_bash_completion
echo "${COMPREPLY[@]}"
"""
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["pruner=random"], done.stderr


def test_what_zoo_new_writes_works(tmp_path, capsys):
    """Every kind; their tests run in one process, most of whose time is importing."""
    for kind in new.TEMPLATES:
        assert main(["new", kind, f"my_{kind}"]) == 0
        out = capsys.readouterr().out
        files = (
            f"my_{kind}.py, test_my_{kind}.py and my_task.jsonl"
            if kind == "task"
            else f"my_{kind}.py and test_my_{kind}.py"
        )
        assert f"wrote {files}" in out and f"python -m pytest test_my_{kind}.py" in out
        lines = (tmp_path / f"my_{kind}.py").read_text().splitlines()
        assert 15 <= len(lines) <= 60
        assert main(["new", kind, f"my_{kind}"]) == 2
        assert f"'my_{kind}.py' exists and is not overwritten" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"test_my_{k}.py" for k in new.TEMPLATES)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert f"{len(new.TEMPLATES)} passed" in done.stdout and "failed" not in done.stdout, done.stdout


def test_the_training_that_zoo_new_prints_composes(ran, capsys):
    for kind in ("pruner", "projector", "adapter", "data", "vision"):
        assert main(["new", kind, f"my_{kind}"]) == 0
        *_, train, _ = capsys.readouterr().out.splitlines()
        assert main(train.split()[1:]) == 0, train
        node = ran[-1][kind]
        assert f"my_{kind}" in (node if kind in ("pruner", "adapter", "data") else node.values())


def test_python_3_14_checks_help_that_is_no_string():
    import argparse

    from zoo.cli.launch import skip_lazy_help

    class Lazy:
        def __repr__(self) -> str:
            return "lazy"

    skip_lazy_help()
    parser = argparse.ArgumentParser()
    if hasattr(parser, "_check_help"):
        parser.add_argument("--x", help=Lazy())


def test_the_program_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "version"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, __import__("zoo").__version__)
