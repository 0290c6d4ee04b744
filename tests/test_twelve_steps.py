"""The journey of a user in twelve steps, offline, on small models: each command is run, and what it prints is read.

Names and options are those of the product where its first sketch had others: `llava_kd_tiny` for `llava_kd`, whose
weights are 0.5 B, `scenes_tiny` for `tiny/llava-siglip-qwen`, `zoo chat` and `zoo demo` for `--ui`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import zoo
from tests.conftest import forget_plugins
from zoo.cli import doctor
from zoo.cli.entry import main
from zoo.training.step import Engine

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_data"
RECIPE = ["--config-dir", ".", "recipe=own_data"]
# One step on eight records in place of sixty epochs.
SHORT = ["limit=8", "stages.answer.epochs=null", "stages.answer.steps=2", "llm.num_layers=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with sixty pictures, which the steps share."""
    folder = tmp_path_factory.mktemp("journey")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    subprocess.run([sys.executable, "draw.py"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    yield
    forget_plugins()


@pytest.fixture
def say(capsys):
    """Run a command as typed; returns its exit status and all that it prints, with single spaces."""

    def run(line, *more):
        capsys.readouterr()
        status = main([*line.removeprefix("zoo ").split(), *more])
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).split())

    return run


def test_1_self_check(say, monkeypatch):
    for report in ("_weights", "_attention"):
        monkeypatch.setattr(doctor, report, lambda: ())
    status, said = say("zoo doctor")
    assert status == 0 and "plugins: 0 found, 0 ok, 0 failed" in said and "transformers" in said


def test_2_find_things(say):
    status, said = say("zoo list")
    assert status == 0
    for kind in ("vision", "projector", "llm", "adapter", "pruner", "distiller", "recipe", "model", "dataset", "task"):
        assert f" {kind} " in f" {said} ", kind
    status, said = say("zoo list model *llava*", "--where", "params<8B")
    assert status == 0 and "llava15_7b" in said and "llava15_13b" not in said
    assert "fastervlm" in zoo.registry.names("pruner", "*vlm*")


def test_3_inspect_before_running(say):
    status, said = say("zoo info pruner/fastervlm")
    assert status == 0
    for part in ("paper", "arXiv:2412.01818", "licence", "needs cls_attention", "keep_ratio float", "fastervlm.py:"):
        assert part in said, part


def test_4_load_by_name_and_use(place):
    picture = Image.new("RGB", (64, 64), "slategray")
    ImageDraw.Draw(picture).ellipse((8, 8, 26, 26), fill="red")
    picture.save(place / "cat.png")
    model, _ = zoo.load("scenes_tiny")
    assert model.chat("What color is the circle?", image="cat.png") == "red"
    assert "vision" in repr(model) and "llm" in repr(model) and max(map(len, repr(model).splitlines())) <= 80


@pytest.mark.fixes
def test_5_compose_by_config_only(say):
    siglip = (
        "vision=hf vision.model_type=siglip vision.image_size=32 vision.patch_size=8 vision.width=32 vision.depth=2"
    )
    rest = "vision.heads=2 projector=pool pruner=[fastervlm] pruner.fastervlm.keep_ratio=0.25 llm=hf"
    line = f"zoo check recipe=null {siglip} {rest} llm.hidden_size=32 llm.num_heads=2 llm.num_layers=1"
    status, said = say(line)
    assert status == 2 and "pruner 'fastervlm' needs cls_attention, but vision 'hf' does not give it" in said
    fix = "pruner.fastervlm.score=column_mean projector=mlp"  # two: `pool` needs the grid that pruners destroy
    assert f"fix 1: {fix} fix 2: " in said
    status, said = say(line.replace("projector=pool", fix))
    assert status == 0 and "pruner fastervlm 4" in said


def test_6_typos(say):
    status, said = say("zoo train pruner=[fastervml]")
    assert status == 2 and "No pruner named 'fastervml'. Did you mean 'fastervlm'?" in said
    status, said = say("zoo train pruner=[fastervlm] pruner.fastervlm.kep_ratio=0.3")
    assert status == 2 and "named 'kep_ratio'. Did you mean 'keep_ratio'" in said and "+key" not in said


def test_7_check_without_weights(say):
    status, said = say("zoo check recipe=llava_kd_tiny")
    assert status == 0
    for part in ("The composition fits.", "placeholders per image", "inference takes about", "training takes about"):
        assert part in said, part


def test_8_train_and_go_on(say, place):
    status, said = say("zoo train", *RECIPE, *SHORT, "run.dir=journey")
    assert status == 0 and "answer, step 2 of 2" in said, said
    run = next(path.parent for path in (place / "journey").rglob("zoo.lock"))
    assert {"config.yaml", "zoo.lock", "metrics.jsonl"} <= {path.name for path in run.iterdir()}
    status, said = say("zoo train resume=last run.dir=journey")
    assert status == 2 and "finished" in said, said


def test_8_survives_a_kill(say, place, monkeypatch):
    """Killed by SIGTERM in its first step and resumed, it is the run of `test_8_train_and_go_on` to the bit."""
    inner = Engine.run

    def killed(self, number, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(Engine, "run", killed)
        say("zoo train", *RECIPE, *SHORT, "run.dir=killed")
    assert left.value.code == 143
    status, said = say("zoo train resume=last run.dir=killed")
    assert status == 0 and "Trained in" in said, said
    ours, theirs = (next((place / name).rglob("model/model.safetensors")) for name in ("journey", "killed"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_9_evaluate(say):
    status, said = say("zoo eval model=last run.dir=journey batch_size=16 limit=4")
    assert status == 0, said
    for part in ("score", "± s.e.", "blind", "majority"):
        assert part in said, part


def test_10_sweep_and_compare(say, place):
    """A member without the option of another is run all the same."""
    swept = "zoo train -m pruner=null,random pruner.random.keep_ratio=0.25 run.dir=swept"
    status, said = say(swept, *RECIPE, *SHORT)
    assert status == 0 and "keep_ratio=0.25 is left out of 1 of 2 runs that have no such option" in said, said
    status, said = say("zoo report swept")
    assert status == 0, said
    for row in ("null", "random"):
        assert row in said, said
    status, said = say("zoo report swept --json")
    assert status == 0 and len(json.loads(said)["runs"]) == 2, said


def test_11_bring_your_own_part(say):
    status, said = say("zoo new pruner my_pruner")
    assert status == 0 and "wrote my_pruner.py and test_my_pruner.py" in said
    status, said = say("zoo check plugins=[./my_pruner.py] pruner=my_pruner pruner.my_pruner.keep_ratio=0.3")
    assert status == 0 and "pruner my_pruner 19" in said
    status, said = say("zoo test my_pruner plugins=[./my_pruner.py]")
    assert status == 0 and ", 0 broken" in said


def test_12_share(say, place):
    run = next(path.parent for path in (place / "journey").rglob("zoo.lock"))
    status, said = say(f"zoo export {run} shared --merge --format hf")
    assert status == 0 and "AutoModelForImageTextToText.from_pretrained" in said
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (place / "shared").iterdir()}
    status, said = say("zoo push shared org/name --dry-run")
    assert status == 0 and "model.safetensors" in said and "org/name" in said
