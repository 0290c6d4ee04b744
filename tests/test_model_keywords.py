"""Keywords of transformers' `from_pretrained` and `save_pretrained`: each is acted on or refused, none is dropped."""

import inspect

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

import zoo
from tests import published_builders as build
from zoo.composed.keywords import _LOAD_IDLE, _LOAD_REFUSED, _PUSH, _SAVE_IDLE, _SAVE_REFUSED, HUB
from zoo.registry import ZooError

PARTS = ["vision=hf", "vision.width=16", "vision.depth=1", "vision.heads=2", "vision.image_size=16",
         "vision.patch_size=8", "projector=mlp", "llm=hf", "llm.hidden_size=16", "llm.num_layers=1",
         "tokenizer.chat_template=chatml"]  # fmt: skip
ROADS = [zoo.ZooModel.from_pretrained, AutoModelForImageTextToText.from_pretrained]


@pytest.fixture(scope="module")
def model():
    return zoo.compose(*PARTS, texts=build.WORDS)[0]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    model.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


@pytest.mark.parametrize("load", ROADS)
def test_a_state_dict_takes_the_place_of_the_files(model, folder, load):
    wanted = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    again = load(folder, state_dict=wanted).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())


def test_a_state_dict_of_another_model_is_refused(model, folder):
    name, tensor = next(iter(model.state_dict().items()))
    with pytest.raises(ZooError, match="Did you mean"):
        zoo.ZooModel.from_pretrained(folder, state_dict={name + "s": tensor})
    with pytest.raises(ZooError, match=f"{name} is"):
        zoo.ZooModel.from_pretrained(folder, state_dict={name: tensor[:0]})


@pytest.mark.parametrize("load", ROADS)
def test_what_was_missing_is_returned(model, folder, load):
    again, info = load(folder, output_loading_info=True)
    assert isinstance(again, zoo.ZooModel) and not any(info.values())
    theirs = {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    assert theirs <= set(info)


@pytest.mark.parametrize("load", ROADS)
def test_keywords_to_load_by_are_known_or_refused(folder, load):
    for name, near in (("fresch", "fresh"), ("state_dcit", "state_dict"), ("pruner", "")):
        with pytest.raises(ZooError, match=f"from_pretrained named '{name}'.*{near}"):
            load(folder, **{name: ["x"]})
    for name in sorted(_LOAD_REFUSED.keys() - {"subfolder"}):  # that AutoConfig looks for by itself
        with pytest.raises(ZooError, match=f"{name}= is not possible here"):
            zoo.ZooModel.from_pretrained(folder, **{name: "x"})
    with pytest.raises(ZooError, match="nothing pickled"):
        load(folder, use_safetensors=False)
    load(
        folder,
        low_cpu_mem_usage=True,
        trust_remote_code=False,
        use_safetensors=True,
        variant=None,
        local_files_only=True,
    )
    assert load(folder, attention="eager").config.attention == "eager"


def test_keywords_to_save_by_are_known_or_refused(model, tmp_path):
    with pytest.raises(ZooError, match="Did you mean 'max_shard_size'"):
        model.save_pretrained(tmp_path / "x", max_shard_sizes="1GB")
    for name, value in (("variant", "fp16"), ("safe_serialization", False), ("distributed_checkpoint", True)):
        with pytest.raises(ZooError, match=f"{name}=.* is not possible"):
            model.save_pretrained(tmp_path / "x", **{name: value})
    with pytest.raises(ZooError, match="repo_id"):  # nothing is pushed
        model.save_pretrained(tmp_path / "x", repo_id="org/name")
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", safe_serialization=True, save_function=torch.save, variant=None)


def test_every_keyword_of_the_installed_version_is_decided():
    """A keyword that transformers gains is told apart from a misspelt one."""

    def names(method):
        return {n for n, p in inspect.signature(method).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
                or p.kind is p.KEYWORD_ONLY}  # fmt: skip

    ours = names(zoo.ZooModel.from_pretrained) | {*HUB, *_LOAD_IDLE, *_LOAD_REFUSED, "use_safetensors"}
    assert names(PreTrainedModel.from_pretrained) <= ours
    ours = names(zoo.ZooModel.save_pretrained) | {*_PUSH, *_SAVE_IDLE, *_SAVE_REFUSED, "safe_serialization"}
    assert names(PreTrainedModel.save_pretrained) <= ours


def test_where_a_repository_is_fetched_reaches_the_hub(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **o: asked.append(o) or str(folder))
    zoo.ZooModel.from_pretrained("org/name", local_files_only=True, cache_dir="here", token="t")
    assert {"local_files_only": True, "cache_dir": "here", "token": "t"}.items() <= asked[0].items()
