"""Models composed from own parts, exported: transformers alone gives the same ids, logits and answers, and so do we.

Every layout with each kind of encoder and of language model that it has a place for. What is exported is loaded in a
process that never imports zoo, by AutoProcessor and AutoModelForImageTextToText.
"""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image

import zoo
from tests import published_builders as build
from tests.conftest import tiny_slots
from zoo.composed.model import ZooModel
from zoo.published.export import merge_adapters
from zoo.registry import ZooError

SIZES = ["vision.width=16", "vision.depth=3", "vision.heads=2", "vision.image_size=32", "vision.patch_size=8"]
LLM = ["llm=hf", "llm.hidden_size=32", "llm.num_layers=2", "llm.num_heads=4", "llm.max_positions=2048"]
PINPOINTS = ["layout=anyres", "layout.pinpoints=[[32,64],[64,32],[64,64],[32,96]]"]
FAKE = "'<fake_token_around_image>'"
GRID = ["layout=tiles", "layout.style=grid", f"layout.begin={FAKE}", f"layout.end={FAKE}", "layout.most=10"]
TILES = ["layout=tiles", "layout.begin='<img>'", "layout.end='</img>'", "layout.most=7"]
SHUFFLE = ["projector=pixel_shuffle", "projector.norm=true", "projector.depth=2", "projector.bias=true"]


def encoder(kind, *words):
    """Options of a small encoder: of transformers by its type, or `timm` and `open_clip`."""
    if kind in ("timm", "open_clip"):
        return [f"vision={kind}", "vision.resample_by=torchvision", *SIZES, *words]
    return ["vision=hf", f"vision.model_type={kind}", *SIZES, *words]


def llm(kind, *words):
    experts = ["llm.num_experts=4", "llm.top_k=2"] if "moe" in kind or kind == "mixtral" else []
    return [*LLM, f"llm.model_type={kind}", *experts, *words]


MLP, LAST, NORM = ["projector=mlp"], "vision.layer=-1", "vision.norm=true"
NO_CLS = ("vision.cls_token=false", "vision.activation=gelu_tanh")
CASES = {  # layout that is found -> encoders, what lies between, language models; combined in turn
    "llava clip llama": [*encoder("clip"), *MLP, *llm("llama")],
    "llava siglip qwen2": [*encoder("siglip"), *MLP, *llm("qwen2", "llm.tie_embeddings=true", "llm.num_kv_heads=2")],
    "llava dinov2 qwen3": [*encoder("dinov2"), *MLP, *llm("qwen3")],
    "llava timm mixtral": [*encoder("timm"), "projector=mlp", "projector.activation=silu", *llm("mixtral")],
    "llava timm-without-cls qwen2_moe": [*encoder("timm", *NO_CLS), *MLP, *llm("qwen2_moe")],
    "llava open_clip qwen3_moe": [*encoder("open_clip"), "projector=mlp", "projector.bias=false", *llm("qwen3_moe")],
    "llava clip gemma": [*encoder("clip", LAST), *MLP, *llm("gemma", "llm.tie_embeddings=true")],
    "llava siglip gpt2": [*encoder("siglip", "vision.layer=1"), *MLP, *llm("gpt2")],
    "llava clip phi3": [*encoder("clip", "vision.fit=squash", "vision.resample=bilinear"), *MLP, *llm("phi3")],
    "llava_next clip mistral": [*encoder("clip"), *MLP, *PINPOINTS, *llm("mistral")],
    "llava_next siglip qwen3_moe": [*encoder("siglip"), *MLP, *PINPOINTS, *llm("qwen3_moe")],
    "llava_onevision siglip qwen2": [
        *encoder("siglip", LAST), *MLP, *PINPOINTS, "layout.max_crops=2", "layout.frames=bilinear", *llm("qwen2")
    ],
    "llava_onevision clip mixtral": [
        *encoder("clip"), *MLP, *PINPOINTS, "layout.max_crops=2", "layout.frames=bilinear", *llm("mixtral")
    ],
    "idefics3 idefics3_vision llama": [
        *encoder("idefics3_vision", LAST, NORM), "projector=pixel_shuffle", *GRID, *llm("llama")
    ],
    "idefics3 siglip qwen2_moe": [*encoder("siglip", NORM), "projector=pixel_shuffle", *GRID, *llm("qwen2_moe")],
    "internvl internvl_vision qwen3": [*encoder("internvl_vision", LAST), *SHUFFLE, *TILES, *llm("qwen3")],
    "internvl internvl_vision qwen3_moe": [*encoder("internvl_vision"), *SHUFFLE, *TILES, *llm("qwen3_moe")],
}  # fmt: skip

# What is asked: images by number, in messages of parts.
TALKS = {
    "one image": [("user", [0, "is there a red circle?"])],
    "several turns": [
        ("system", ["describe the picture."]),
        ("user", ["yes no", 1, "what color is the square?", 0]),
        ("assistant", ["blue"]),
        ("user", ["and  two? "]),
    ],
    "text only": [("user", ["describe the picture."])],
}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def messages(talk, photos):
    """A talk as messages."""
    return [{"role": role, "content": [_part(p, photos) for p in parts]} for role, parts in TALKS[talk]]


def _part(part, photos):
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": photos[part]}


# What another process does with the folders: nothing of zoo, nor of tests.
PLAIN = """
import json, sys
sys.modules["zoo"] = None  # importing it would be an error
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging
logging.disable_progress_bar()
root, talks = Path(sys.argv[1]), json.loads(sys.argv[2])
photos = [Image.open(root / f"{i}.png") for i in (0, 1)]
def part(p):
    return {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": photos[p]}
found = {}
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(folder)
        seen = {"class": type(model).__name__, "keys": [*info["missing_keys"], *info["unexpected_keys"]]}
        for name, talk in talks.items():
            asked = [{"role": r, "content": [part(p) for p in parts]} for r, parts in talk]
            batch = processor.apply_chat_template(
                asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            with torch.no_grad():
                logits = model(**batch).logits
            torch.save(logits, folder / f"{name}.pt")
            answer = model.generate(**batch, max_new_tokens=12, do_sample=False)
            seen[name] = [batch["input_ids"].tolist(), answer.tolist()]
        found[folder.name] = seen
    except Exception as error:
        found[folder.name] = {"error": f"{type(error).__name__}: {error}"}
print("FOUND", json.dumps(found))
"""


def ask(model, processor, photos):
    """Ids, logits and answers of every talk."""
    found = {}
    for name in TALKS:
        batch = processor.apply_chat_template(
            messages(name, photos), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**batch).logits
        found[name] = batch["input_ids"].tolist(), logits, model.generate(**batch, **GREEDY).tolist()
    return found


def composed(words, seed=0):
    """A model of the parts with moved weights, and its processor."""
    model, processor = zoo.compose(*words, "tokenizer.chat_template=chatml", texts=build.WORDS * 3)
    return build.shake(model, seed), processor


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folders of all cases, what our models gave, and what transformers alone gives."""
    root = tmp_path_factory.mktemp("exports")
    photos = [build.photo(40, 56), build.photo(70, 30, seed=1)]
    for i, photo in enumerate(photos):
        photo.save(root / f"{i}.png")
    ours = {}
    for name, words in CASES.items():
        model, processor = composed(words)
        ours[name] = ask(model, processor, photos)
        zoo.export(model, processor, root / name)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(root), json.dumps(TALKS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return root, photos, ours, json.loads(line.removeprefix("FOUND "))


@pytest.mark.parametrize("case", CASES)
def test_transformers_alone_gives_the_same(exports, case):
    root, _, ours, theirs = exports
    assert "error" not in theirs[case], theirs[case]
    assert json.loads((root / case / "config.json").read_text())["model_type"] == case.partition(" ")[0]
    assert theirs[case]["keys"] == []
    for talk, (ids, logits, answer) in ours[case].items():
        assert theirs[case][talk][0] == ids, talk
        torch.testing.assert_close(torch.load(root / case / f"{talk}.pt"), logits, atol=1e-5, rtol=0)
        assert theirs[case][talk][1] == answer, talk
        assert logits.std() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_it_comes_back(exports, case):
    root, photos, ours, _ = exports
    model, processor = zoo.load(f"dir:{root / case}")
    for talk, (ids, logits, answer) in ask(model, processor, photos).items():
        assert ids == ours[case][talk][0], talk
        torch.testing.assert_close(logits, ours[case][talk][1], atol=1e-5, rtol=0)
        assert answer == ours[case][talk][2], talk
    assert ("moe" in model.llm.provides) == ("moe" in case or "mixtral" in case)


def test_the_folder_says_what_processors_ask(exports):
    root, _, _, _ = exports
    folder = root / "llava clip phi3"
    values = json.loads((folder / "processor_config.json").read_text())
    assert values["patch_size"] == 8 and values["num_additional_image_tokens"] == 1
    pixels = values["image_processor"]
    assert pixels["size"] == {"height": 32, "width": 32} and pixels["resample"] == 2 and not pixels["do_center_crop"]
    words = json.loads((folder / "tokenizer_config.json").read_text())
    assert words["image_token"] == "<image>" and words["padding_side"] == "left"  # as batches of `generate` need it
    files = {file.name for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".safetensors")}
    assert files >= {"generation_config.json", "chat_template.jinja", "model.safetensors", "tokenizer.json"}


# ---- what has no place ---------------------------------------------------------------------------------------------

CLIP, LLAMA = encoder("clip"), llm("llama")
REFUSED = {
    "a projector of one layer": ([*CLIP, "projector=linear", *LLAMA], "", "is 'linear'.*train with projector"),
    "a deeper projector": ([*CLIP, "projector=mlp", "projector.depth=3", *LLAMA], "llava", "'mlp' of 3 layers"),
    "a wider projector": ([*CLIP, "projector=mlp", "projector.hidden_size=48", *LLAMA], "llava", "48 wide inside"),
    "the final norm": ([*encoder("clip", NORM), *MLP, *LLAMA], "llava", "final norm"),
    "registers": ([*encoder("timm", "vision.registers=2"), *MLP, *LLAMA], "llava", "2 register tokens"),
    "a stem": ([*encoder("timm", "vision.stem=conv"), *MLP, *LLAMA], "llava", "embedded by a ConvStem"),
    "an encoder that is no ViT of theirs": (
        [*encoder("dinov2_with_registers"), *MLP, *LLAMA], "llava", "5 tokens ahead of the patches"
    ),
    "a pruner": ([*CLIP, "pruner=[random]", *MLP, *LLAMA], "", "the model has random.*pruner=\\[\\]"),
    "an adapter that cannot be merged": (
        [*CLIP, *MLP, *LLAMA, "adapter=[mole]"], "", "adapter 'mole' cannot be merged"
    ),
    "logits with a cap": ([*CLIP, *MLP, *llm("gemma2")], "", "Gemma2ForCausalLM has a bias, a factor or a cap"),
    "a layout": ([*CLIP, *MLP, *PINPOINTS, *LLAMA], "llava", "layout of its images is 'anyres', and it takes none"),
    "no layout": ([*CLIP, *MLP, *LLAMA], "llava_next", "layout of its images is none, and it takes 'anyres'"),
    "an encoder of another family": (
        [*encoder("clip", LAST), *SHUFFLE, *TILES, *LLAMA], "internvl", "'clip_vision_model'.*takes internvl_vision"
    ),
    "padded images": ([*encoder("clip", "vision.fit=pad"), *MLP, *LLAMA], "llava", "vision.fit=crop or squash"),
    "images that an adapter sees": (
        [*CLIP, *LLAMA, "adapter=[vlora]", "adapter.vlora.skip=1"], "", "the model has no projector"
    ),
    "no such layout": ([*CLIP, *MLP, *LLAMA], "lava", "'lava'. Did you mean 'llava'"),
    "videos": ([*CLIP, *MLP, *PINPOINTS, "layout.frames=average", *LLAMA], "llava_next_video", "no token for videos"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_with_the_reason(tmp_path, case):
    words, family, why = REFUSED[case]
    model, processor = composed(words)
    with pytest.raises(ZooError, match=f"(?s){why}"):
        zoo.export(model, processor, tmp_path / "out", family=family)
    assert not (tmp_path / "out").exists()


def test_every_layout_is_named_with_its_reason(tmp_path):
    model, processor = composed([*CLIP, "projector=linear", *LLAMA])
    with pytest.raises(ZooError, match=r"(?s)No published layout.*llava: .*'linear'.*internvl: .*'clip_v"):
        zoo.export(model, processor, tmp_path)


def test_a_refusal_merges_nothing(tmp_path):
    model, processor = composed([*CLIP, *MLP, *LLAMA, "adapter=[lora]", "pruner=[random]"])
    with pytest.raises(ZooError, match="the model has random"):
        zoo.export(model, processor, tmp_path)
    assert "lora" in model.adapter


def test_a_failure_leaves_a_folder_as_it_was(tmp_path, monkeypatch):
    model, processor = composed([*CLIP, *MLP, *LLAMA])
    zoo.export(model, processor, tmp_path / "there", max_shard_size="100KB")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    other, prepares = composed([*CLIP, *MLP, *llm("qwen2")], seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", lambda *a, **k: 1 / 0)
        for name in ("there", "new"):
            with pytest.raises(ZeroDivisionError):
                zoo.export(other, prepares, tmp_path / name)
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before
    assert not (tmp_path / "new").exists()
    zoo.export(other, prepares, tmp_path / "there")  # no shard of the first one is left
    assert [path.name for path in (tmp_path / "there").glob("model*")] == ["model.safetensors"]


def test_parts_of_several_data_types_are_noted(tmp_path):
    model, processor = composed([*CLIP, *MLP, *LLAMA])
    model.llm.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"vision float32, projector float32, llm bfloat16.* loads all .* as bfloat16"):
        zoo.export(model, processor, tmp_path)
    model.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.export(model, processor, tmp_path)


# ---- more ways to get there ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An encoder and language models as people have them: folders, with processors and tokenizers of their own."""
    import transformers as t

    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    build.shake(t.CLIPVisionModel(t.CLIPVisionConfig(**build.VISION))).save_pretrained(root / "clip")
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    t.CLIPImageProcessor(**sides, image_mean=[0.1, 0.2, 0.3]).save_pretrained(root / "clip")
    tok = build.tokenizer(bos=True)
    plain = t.PreTrainedTokenizerFast(
        tokenizer_object=tok.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    written = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '</s>' }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    for name, template in (("begun", "{{ bos_token }}" + written), ("not begun", written)):
        model = build.shake(t.LlamaForCausalLM(t.LlamaConfig(**build.TEXT, vocab_size=len(plain) - 1)))
        model.generation_config.eos_token_id = [plain.eos_token_id, plain.bos_token_id]
        model.save_pretrained(root / name)
        plain.chat_template = template
        plain.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("size", ["", "vision.image_size=48"])
@pytest.mark.parametrize("text", ["begun", "not begun"])
def test_own_checkpoints_grown_vocabularies_and_end_tokens(parts, tmp_path, text, size):
    """The tokenizer begins texts, the template may not; the vocabulary grows by <image>; images may be larger."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    words = ["vision=hf", f"vision.checkpoint={parts / 'clip'}", *MLP, "llm=hf", f"llm.checkpoint='{parts / text}'"]
    model, processor = zoo.compose(*words, *([size] if size else []))
    build.shake(model, seed=1)
    photos = [build.photo(40, 56), build.photo(70, 30, seed=1)]
    want = ask(model, processor, photos)
    zoo.export(model, processor, tmp_path)
    theirs, prepares = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    got = ask(theirs, prepares, photos)
    for talk in TALKS:
        assert got[talk][0] == want[talk][0] and got[talk][2] == want[talk][2], talk
        torch.testing.assert_close(got[talk][1], want[talk][1], atol=1e-5, rtol=0)
    assert theirs.generation_config.eos_token_id == [2, 1]
    assert str(parts) not in (tmp_path / "config.json").read_text(), "folders of this machine"
    assert (want["one image"][0][0][0] == processor.tokenizer.bos_token_id) == (text == "begun")
    assert theirs.config.vision_config.image_size == (48 if size else 32)


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "dinov3_vit"])
def test_encoders_with_a_cls_token_and_no_registers_come_back(kind, tmp_path):
    words = [*encoder(kind, "vision.registers=0"), *MLP, *llm("llama"), "tokenizer.chat_template=chatml"]
    model, processor = zoo.compose(*words, texts=build.WORDS * 3)
    zoo.export(model, processor, tmp_path)
    again, _ = zoo.load(f"dir:{tmp_path}")
    batch = processor(images=[build.photo(40, 56)], text="<image>a")
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-5)
    content = json.loads((tmp_path / "config.json").read_text())
    content["vision_config"]["num_register_tokens"] = 4
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ZooError, match="puts 5 ahead of the patches: register tokens would be image tokens"):
        zoo.load(f"dir:{tmp_path}")


def test_merged_lora_is_exported(parts, tmp_path):
    from transformers import AutoModelForImageTextToText

    words = ["vision=hf", f"vision.checkpoint={parts / 'clip'}", *MLP, "llm=hf", f"llm.checkpoint={parts / 'begun'}"]
    model, processor = zoo.compose(*words, "adapter=[lora]", "adapter.lora.rank=2")
    build.shake(model, seed=1)
    photos = [build.photo(40, 56), build.photo(70, 30, seed=1)]
    before = ask(model, processor, photos)["one image"]
    zoo.export(model, processor, tmp_path)
    assert not model.adapter
    batch = processor.apply_chat_template(
        messages("one image", photos), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(**batch).logits, before[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)


def test_merged_experts_are_exported(tmp_path):
    from transformers import AutoModelForImageTextToText

    words = ["adapter=[moextend]", "adapter.moextend.calibration_width=0", "adapter.moextend.layers=[0,1]"]
    model, processor = composed([*CLIP, *MLP, *llm("mixtral"), *words])
    photos = [build.photo(40, 56), build.photo(70, 30, seed=1)]
    _, logits, _ = ask(model, processor, photos)["one image"]
    zoo.export(model, processor, tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert theirs.config.text_config.num_local_experts == 5
    batch = processor.apply_chat_template(
        messages("one image", photos), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    torch.testing.assert_close(theirs(**batch).logits, logits, atol=1e-5, rtol=0)
    assert zoo.load(f"dir:{tmp_path}")[0].llm.num_experts == 5


def test_end_texts_are_said_and_not_written(tmp_path):
    model, processor = composed([*CLIP, *MLP, *LLAMA])
    model.generation_config.stop_strings = ["USER:"]
    with pytest.warns(UserWarning, match="end with \\['USER:'\\]"):
        zoo.export(model, processor, tmp_path)
    assert "stop_strings" not in json.loads((tmp_path / "generation_config.json").read_text())
    assert model.generation_config.stop_strings == ["USER:"]


def test_pixels_of_pillow_differ_by_a_step(tmp_path):
    """Encoders of timm and open_clip are shown what their libraries show unless told: answers are near, not equal."""
    from transformers import AutoProcessor

    words = [word for word in encoder("timm") if "resample_by" not in word]
    model, processor = composed([*words, *MLP, *LLAMA])
    zoo.export(model, processor, tmp_path)
    photo = build.photo(40, 56)
    talk = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "yes"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(talk, **options)["pixel_values"]
    ours = processor.apply_chat_template(talk, **options)["pixel_values"]
    assert 0 < (theirs - ours).abs().max() <= 2.01 / 255 / 0.5
    same = Image.new("RGB", (32, 32), (9, 80, 200))
    talk[0]["content"][0]["image"] = same
    theirs = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(talk, **options)["pixel_values"]
    torch.testing.assert_close(
        processor.apply_chat_template(talk, **options)["pixel_values"], theirs, atol=1e-6, rtol=0
    )


def test_a_failed_export_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    model, processor = composed([*CLIP, *MLP, *LLAMA])
    zoo.export(model, processor, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        patch.setattr("transformers.LlavaProcessor.save_pretrained", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            zoo.export(build.shake(model), processor, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_is_left_after_a_refusal_on_the_way_is_saved(make_model, tmp_path):
    experts = {**tiny_slots()["llm"], "model_type": "mixtral", "num_experts": 4, "top_k": 2}
    adapters = {"lora": {"name": "lora", "rank": 2, "targets": ["q_proj"]}, "moextend": {"name": "moextend"}}
    model, _ = make_model(llm=experts, adapter=adapters)
    with pytest.raises(ZooError, match="adapter 'moextend' cannot be merged"):
        merge_adapters(model)
    model.save_pretrained(tmp_path)
    assert list(ZooModel.from_pretrained(tmp_path).adapter) == ["moextend"]
