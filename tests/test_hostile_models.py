"""Checkpoints of others: names of kernels, repositories and code reach no loader; absurd sizes end in an error, soon.

Cases are made by kind from one sound checkpoint; each takes well below a second.
"""

import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.published_builders import tokenizer as fast_tokenizer
from zoo import ZooError
from zoo.fusion.llm.hf import HFLanguageModel, HFLanguageModelConfig
from zoo.registry import build
from zoo.registry.foreign import require_model_config
from zoo.text.tokenizer_files import read_tokenizer

KERNELS = ("user/kernel", "kernels-community/flash-attn2", "user/repo@v1:function", "../x/y", "hub:a", "a.b")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection is an error that no loader swallows."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", refuse)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer, as transformers saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("sound")
    tokenizer = fast_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def state(folder: Path, file: str = "config.json", **values: object) -> None:
    """Write values into a JSON file of a checkpoint."""
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **values}))


def load(folder: Path) -> HFLanguageModel:
    return HFLanguageModel(HFLanguageModelConfig(checkpoint=str(folder)))


REFUSED = [
    *(({"attn_implementation": name}, "names the kernel") for name in KERNELS),
    *(({"_attn_implementation": name}, "names the kernel") for name in KERNELS[:2]),
    *(({"experts_implementation": name}, "names the kernel") for name in KERNELS[:2]),
    ({"attn_implementation": {"": "eager", "text_config": "user/kernel"}}, "names the kernel"),
    ({"text_config": {"attn_implementation": "user/kernel"}}, "names the kernel"),
    ({"_commit_hash": "../../../etc"}, "is not a commit"),
    *(
        ({"quantization_config": {"quant_method": method}}, "is quantised by")
        for method in ("torchao", "auto-round", "quark", "fbgemm_fp8", "metal", "user/method", "", None)
    ),
    ({"quantization_config": "x"}, "is quantised by"),
    *(({key: 10**9}, "at most") for key in ("hidden_size", "intermediate_size", "vocab_size")),
    *(({key: 10**6}, "at most") for key in ("num_hidden_layers", "num_attention_heads", "num_labels")),
    ({"hidden_size": 1e30}, "at most"),
    ({"hidden_size": -(10**12)}, "at most"),
    ({"hidden_size": 1 << 15}, "cannot be used"),
    ({"hidden_size": 1 << 20}, "are not its own"),
    ({"vocab_size": 1 << 27}, "are not its own"),
    ({"intermediate_size": 1 << 26}, "are not its own"),
    ({"model_type": "no_such_type"}, "cannot be used"),
    ({"model_type": "../llama"}, "cannot be used"),
    ({"model_type": "clip"}, "not a causal LM"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda v: str(v)[:50])
def test_a_checkpoint_that_is_refused(values, message, copy):
    state(copy, **values)
    with pytest.raises(ZooError, match=message):
        load(copy)


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "flash_attention_2"},  # without the package transformers looks for a kernel on the hub
        {"_attn_implementation": "flash_attention_3", "_attn_implementation_autoset": True},
        {"experts_implementation": "grouped_mm"},
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        {"auto_map": {"AutoModelForCausalLM": "user/repo--evil.Model"}},
        {"trust_remote_code": True},
        {"kernel_config": {"RMSNorm": "user/kernel:RMSNorm"}, "use_kernels": True},
        {"custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}}},
        {"_name_or_path": "user/other", "architectures": ["Evil"], "tokenizer_class": "evil.Tokenizer"},
        {"label2id": {"tall blocks": 100_000}},
    ],
    ids=lambda v: ",".join(v),
)
def test_what_names_code_is_left_out(values, copy):
    """Many sound checkpoints hold such words; they load, and nothing is fetched, imported or run."""
    for name in ("evil.py", "modeling_evil.py"):
        (copy / name).write_text(f"open({str(copy / 'ran')!r}, 'w')")
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(f"open({str(copy / 'ran')!r}, 'w')")
    state(copy, **values)
    state(copy, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Fast"]})
    llm = load(copy)
    assert llm.lm.config._attn_implementation in ("sdpa", "eager")
    assert llm.hidden(input_ids=torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 16)
    read_tokenizer(str(copy))
    assert not (copy / "ran").exists()


def test_an_adapter_names_no_model(copy):
    state(copy, "adapter_config.json", base_model_name_or_path="user/other", peft_type="LORA")
    with pytest.raises(ZooError, match="holds a PEFT adapter"):
        load(copy)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in ("fifo", "device", "folder", "huge", "deep", "broken")
        for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
        if name.endswith("json") or kind not in ("deep", "broken")  # a template is text of any kind
    ],
)
def test_files_of_a_tokenizer(kind, name, copy):
    """Pipes, devices, sparse files of terabytes, brackets without end: an error, at once."""
    file = copy / name
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "huge":
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    elif kind == "deep":
        file.write_text('{"a":' + "[" * 100_000)
    else:
        file.write_bytes(b"\xff\xfe{")
    with pytest.raises(ZooError):
        read_tokenizer(str(copy))


def test_a_tokenizer_config_that_leads_elsewhere(copy):
    state(copy, "tokenizer_config.json", _commit_hash="../../x")
    with pytest.raises(ZooError, match="is not a commit"):
        read_tokenizer(str(copy))
    state(copy, "tokenizer_config.json", _commit_hash=None, chat_template="x" * 300_000)
    with pytest.raises(ZooError, match="its chat template has 300,000 characters"):
        read_tokenizer(str(copy))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timm_model_name": "hf-hub:user/encoder"}, "names the repository"),
        ({"timm_model_name": "local-dir:/etc"}, "names the repository"),
        ({"layers": 10**6}, "at most 256"),
        ({"width": 10**8}, "at most 16,384"),
        ({"width": 16384, "layers": 64, "head_width": 64}, "are not its own"),
        ({"image_size": 10**9}, "at most"),
    ],
)
def test_a_config_of_open_clip(values, message, tmp_path):
    from safetensors.torch import save_file

    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16, **values}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 32, "vision_cfg": vision}}))
    save_file({"visual.x": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ZooError, match=message):
        build("vision", {"name": "open_clip", "checkpoint": str(tmp_path)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**7}, "at most 256"),
        ({"hidden_size": 1 << 20}, "are not its own"),
        ({"attn_implementation": "user/kernel"}, "names the kernel"),
        ({"image_size": 10**9}, "at most"),
    ],
)
def test_a_config_of_an_encoder(values, message, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    state(tmp_path, **values)
    with pytest.raises(ZooError, match=message):
        build("vision", {"name": "hf", "checkpoint": str(tmp_path)})


MODEL = Path(__file__).parents[1] / "model_cards" / "scenes_tiny"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("slots.llm.num_layers", 10**6, "at most 256"),
        ("slots.llm.hidden_size", 32768, "are not its own"),
        ("slots.projector.hidden_size", 1 << 27, "are not its own"),
        ("slots.vision.width", 10**5, "at most"),
        ("text_vocab_size", 1 << 27, "are not its own"),
        ("slots.llm.extra", {"num_labels": 10**9}, "at most"),
        ("slots.llm._target_", "os.system", "holds '_target_'"),
        ("slots.llm.revision", "${oc.env:HOME}", "holds the interpolation"),
        ("attention", "user/kernel", "No attention named"),
        ("attn_implementation", "kernels-community/flash-attn2", "names the kernel"),
    ],
)
def test_a_composed_model(path, value, message, tmp_path):
    from zoo.composed.model import ZooModel

    shutil.copytree(MODEL, tmp_path / "model")
    content = json.loads((MODEL / "config.json").read_text())
    *parents, last = path.split(".")
    node = content
    for key in parents:
        node = node[key]
    node[last] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ZooError, match=message):
        ZooModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "value", [True, 7, -1.5, float("nan"), "text", ["text"], [3], {"a": 3}, {"a": {"fingerprint": 3}}]
)
@pytest.mark.parametrize("field", ["base", "data", "image_token_id", "plugins", "slots", "tokenizer", "model_type"])
def test_a_field_of_another_type(field, value, tmp_path):
    """An error, or a model as without it; never somebody else's traceback."""
    import zoo

    shutil.copytree(MODEL, tmp_path / "model")
    content = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | {field: value}))
    with suppress(ZooError):
        zoo.load(f"dir:{tmp_path / 'model'}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(f"{name}_token_id", value) for name in ("eos", "pad") for value in (float("nan"), "x", 1.5, True, ["x"])],
        *[("output_hidden_states", value) for value in (float("nan"), "x", 1, [])],
        ("use_cache", "x"), ("do_sample", 1.5), ("temperature", float("nan")), ("top_p", float("inf")),
    ],
)  # fmt: skip
def test_a_field_of_a_generation_config(field, value, tmp_path):
    import zoo

    shutil.copytree(MODEL, tmp_path / "model")
    content = json.loads((MODEL / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(content | {field: value}))
    with pytest.raises(ZooError, match=rf"generation_config.json (states {field}|cannot be read)"):
        zoo.load(f"dir:{tmp_path / 'model'}")


@pytest.mark.parametrize("kind", ["Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor", "Glm4vVideoProcessor"])
def test_bounds_in_pixels_are_taken_where_a_processor_counts_pixels(kind):
    word = "video_processor_type" if "Video" in kind else "image_processor_type"
    stated = {word: kind, "size": {"longest_edge": 47_040_000, "shortest_edge": 12_544}}
    require_model_config({"image_processor": stated}, "a file")  # as repositories of Qwen3-VL and GLM-4.1V state them
    for changed in (
        stated | {word: "CLIPImageProcessor"},
        stated | {"size": {"longest_edge": 1 << 40}},
        stated | {"crop_size": {"longest_edge": 47_040_000}},
    ):
        with pytest.raises(ZooError, match=r"longest_edge=\d+; at most"):
            require_model_config({"image_processor": changed}, "a file")
