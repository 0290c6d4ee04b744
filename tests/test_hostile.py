"""Configs from elsewhere may name registered components and hold plain values. Nothing else, and nothing runs."""

import json
import pickle
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from zoo import ZooError
from zoo.registry import build, refuse_code
from zoo.settings.config import compose


@pytest.fixture(scope="module")
def harmless() -> dict:
    """What a saved model's config.json says."""
    cfg = compose("load")
    slots = {k: OmegaConf.to_container(cfg[k]) for k in ("vision", "pruner", "projector", "llm", "adapter")}
    return {"model_type": "zoo", "slots": slots, "tokenizer": {"vocab_size": 300}, "plugins": []}


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that appears if somebody's code runs."""
    monkeypatch.setenv("ZOO_SECRET", "a secret")
    return tmp_path / "executed"


def store(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def changed(content: dict, path: str, value: object) -> dict:
    """A copy with `value` at the dotted path."""
    copy = json.loads(json.dumps(content))
    *parents, last = path.split(".")
    node = copy
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return copy


SHELL = {"_target_": "os.system", "command": "touch MARKER"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("slots.vision._target_", "os.system", "holds '_target_'"),
        ("slots.llm.extra", SHELL, "holds '_target_'"),
        ("slots.pruner.random", {"name": "random", "keep_ratio": SHELL}, "holds '_target_'"),
        ("slots.projector.hidden_size", "${oc.env:ZOO_SECRET}", "holds the interpolation"),
        ("slots.llm.extra", {"x": ["${oc.env:ZOO_SECRET}"]}, "holds the interpolation"),
        ("tokenizer.checkpoint", "${oc.env:ZOO_SECRET}", "holds the interpolation"),
        ("plugins", ["${oc.env:ZOO_SECRET}"], "holds the interpolation"),
        ("data", {"x": {"name": "scenes", "split": "${oc.env:ZOO_SECRET}"}}, "holds the interpolation"),
        ("slots.vision.name", "../../etc/passwd", "No vision named '../../etc/passwd'"),
        ("slots.vision.name", "os.system", "No vision named 'os.system'"),
        ("slots.pruner", {"../../x": {"name": "random"}}, "'../../x' is not a valid name"),
        ("slots.pruner", {"x": {"name": "os:system"}}, "No pruner named 'os:system'"),
        ("slots.pruner", ["random"], "'pruner' must be a mapping"),
        ("slots.vision", "timm", "must be a mapping with a 'name'"),
        ("slots.vision.name", ["timm"], "must be a mapping with a 'name'"),
        ("slots.vision.no_such_option", 1, "No option of vision 'timm' named 'no_such_option'"),
        ("slots.projector.depth", {"a": 1}, "projector 'mlp'"),
        ("tokenizer.no_such_option", 1, "No option of 'tokenizer' named 'no_such_option'"),
    ],
)
def test_a_saved_config_that_is_refused(path, value, message, harmless, tmp_path, marker):
    text = json.dumps(changed(harmless, path, value)).replace("MARKER", str(marker))
    with pytest.raises(ZooError) as error:
        compose("load", [f"model=dir:{store(tmp_path / 'model', text)}"])
    assert message in str(error.value)
    assert "a secret" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["[]", "not json", '"x"', "{}", '{"slots": []}', '{"slots": null}', "{" * 1000])
def test_a_saved_config_that_is_none(text, tmp_path):
    with pytest.raises(ZooError, match="holds no saved model"):
        compose("load", [f"model=dir:{store(tmp_path / 'model', text)}"])


def test_keys_beside_the_slots_reach_nothing(harmless, tmp_path):
    """A config cannot set the run's folder, Hydra's settings, or the defaults list."""
    extra = {
        "hydra": {"run": {"dir": "/"}},
        "run": {"folder": "/"},
        "defaults": [{"override /vision": "hf"}],
        "seed": 5,
    }
    content = {**harmless, **extra, "seed": 5}
    content["slots"] = {**harmless["slots"], "run": {"folder": "/"}, "hydra": {"verbose": True}}
    cfg = compose("load", [f"model=dir:{store(tmp_path / 'model', content)}"])
    assert (cfg.run.folder, cfg.seed, cfg.vision.name) == ("", 0, harmless["slots"]["vision"]["name"])


def test_a_plugin_that_a_config_names_is_not_loaded(harmless, tmp_path, marker):
    plugin = tmp_path / "evil.py"
    plugin.write_text(f"open({str(marker)!r}, 'w')")
    folder = store(tmp_path / "model", {**harmless, "plugins": [str(plugin)]})
    compose("load", [f"model=dir:{folder}"])
    assert not marker.exists()
    content = changed(harmless, "slots.pruner", {"evil": {"name": "evil"}})
    store(folder, {**content, "plugins": [str(plugin)]})
    with pytest.raises(ZooError, match="If you trust it, add plugins="):
        compose("load", [f"model=dir:{folder}"])
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt", "model.pkl"])
def test_pickles_are_never_read(name, harmless, tmp_path, marker):
    """A folder whose weights are a pickle is one without weights."""
    import zoo

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    folder = store(tmp_path / "model", harmless)
    (folder / name).write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises((ZooError, OSError)):
        zoo.load(f"dir:{folder}")
    assert not marker.exists()


@pytest.mark.parametrize(
    "override",
    [
        "model=../../etc/passwd",
        "recipe=../recipe/scenes_tiny",
        "recipe=/etc/passwd",
        "data=[../data/scenes]",
        "vision=../vision/timm",
        "pruner=[random/../pool]",
        "task=/exact",
    ],
)
def test_names_are_no_paths(override):
    with pytest.raises(ZooError, match=r"No .* named|is not a preset"):
        compose("train", [override])


@pytest.mark.parametrize(
    "place", ["dir:../../etc", "dir:/etc", "dir:", "hub:../..", "hub:a/b/c", "hub:", "dir:/etc/passwd"]
)
def test_places_that_hold_no_model(place):
    with pytest.raises(ZooError, match=r"no saved model|no such folder|write a repository"):
        compose("load", [f"model={place}"])


def test_odd_characters_in_a_folder_are_only_characters(harmless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "it's ${oc.env:ZOO_SECRET}", harmless)
    cfg = compose("load", ["model=last", "run.dir=."])
    assert OmegaConf.to_container(cfg, resolve=True)["model"]["name"] == "it's ${oc.env:ZOO_SECRET}"


RUN = "model: {name: x}\nstages: {}\nplugins: []\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RUN + "seed: ${oc.env:ZOO_SECRET}", "holds the interpolation"),
        (RUN + "log: ['${oc.env:ZOO_SECRET,x}']", "holds the interpolation"),
        (RUN + "device: ${oc.decode:${oc.env:ZOO_SECRET}}", "holds the interpolation"),
        (RUN + "device: '\\${oc.env:ZOO_SECRET}'", "holds the interpolation"),
        (RUN + "seed: ${oc.select:model.name}", "holds the interpolation"),
        (RUN + "data: {x: {name: scenes, '_target_': os.system}}", "holds '_target_'"),
        (RUN + BOMB, "holds the alias '\\*a0'"),
        (RUN + "a: &a {b: 1}\nc: {<<: *a}", "holds the alias"),
        (RUN + "x: !!python/object/apply:os.system ['touch MARKER']", "cannot be read"),
        (RUN + "x: !!python/name:os.system", "cannot be read"),
        (RUN + "plugins: []", "duplicate key"),
        (RUN + "x: " + "[" * 5000, "cannot be read"),
        (RUN + "x: " + "9" * 10000, "cannot be read"),
        ("- a\n", "not a mapping"),
        ("", "not a mapping"),
        ("x: [", "cannot be read"),
        ("\0", "cannot be read"),
        ("#" * (2 << 20), "bytes; at most"),
    ],
)
def test_a_run_folder_that_is_refused(text, message, tmp_path, marker):
    """The same file is read to resume, and to evaluate the model beside it."""
    from zoo.settings.model_names import from_folder
    from zoo.training.loop import Run

    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(text.replace("MARKER", str(marker)))
    store(folder / "model", {"slots": {}})
    for use in (lambda: Run(compose("train", [f"resume={folder}"])), lambda: from_folder(folder, "dir:x")):
        with pytest.raises(ZooError, match=message) as error:
            use()
        assert "a secret" not in str(error.value)
    assert not marker.exists()


def test_refuse_code_looks_everywhere():
    for value in ({"a": [{"_target_": "x"}]}, {"a": ({"_partial_": True},)}, [["${x}"]], {"a": {"b": "x${y}z"}}):
        with pytest.raises(ZooError):
            refuse_code(value, "It")
    refuse_code({"a": ["$", "{x}", 1, None, {"_target": 1}]}, "It")


def test_a_python_call_is_as_careful():
    with pytest.raises(ZooError, match="holds '_target_'"):
        build("pruner", {"name": "random", "_target_": "os.system"})
