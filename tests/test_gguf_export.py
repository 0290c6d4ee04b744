"""GGUF files: what transformers reads of the language model answers alike, and clip's file holds encoder and projector.

llama.cpp itself is not run here. Its graph of LLaVA is written down once more below, in torch, on the file's tensors.
"""

import re
from pathlib import Path

import pytest
import torch

import zoo
from tests.test_export import CLIP, LLAMA, MLP, NO_CLS, PINPOINTS, composed, encoder, llm
from zoo.cli.entry import main
from zoo.published.gguf_export import architecture, compare, export_gguf
from zoo.published.gguf_llm import cut_name
from zoo.registry import ZooError
from zoo.text.tokenizer import fit_tokenizer

gguf = pytest.importorskip("gguf")
QWEN = llm("qwen2", "llm.tie_embeddings=true", "llm.num_kv_heads=2")
MODELS = {
    "clip llama": [*CLIP, *MLP, *llm("llama", "llm.num_kv_heads=2")],
    "siglip qwen2": [*encoder("siglip"), *MLP, *QWEN],
    "open_clip qwen3": [
        *encoder("open_clip", "vision.layer=-1"),
        *MLP,
        *llm("qwen3", "llm.extra={head_dim: 128}"),
    ],  # transformers reads no other
    "timm mistral": [*encoder("timm", *NO_CLS), *MLP, *llm("mistral")],
    "siglip smollm2": [  # the shape of SmolLM2: tied, several queries to a key, a theta of its own
        *encoder("siglip"),
        *MLP,
        *llm(
            "llama",
            "llm.tie_embeddings=true",
            "llm.num_kv_heads=1",
            "llm.extra={rope_parameters: {rope_type: default, rope_theta: 100000.0}}",
        ),
    ],
    "clip starcoder2": [*CLIP, *MLP, *llm("starcoder2")],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(case) -> (model, processor, files)`, each made once."""
    made, root = {}, tmp_path_factory.mktemp("gguf")

    def make(case):
        if case not in made:
            model, processor = composed(MODELS[case])
            made[case] = model, processor, export_gguf(model, processor, root / case.replace(" ", "-"), name="mine")
        return made[case]

    return make


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tensors(file):
    return {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type).copy()).reshape(
            [*reversed(t.shape.tolist())]
        )
        for t in gguf.GGUFReader(file).tensors
    }


@pytest.mark.parametrize("case", MODELS)
def test_transformers_reads_the_language_model(written, case):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, processor, (file, _) = written(case)
    assert file.name == "mine-F32.gguf"
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor([[5, 9, 30, 2, 7, 60, 8]])
    with torch.no_grad():
        got, want = theirs(input_ids=ids).logits, model.llm.lm(input_ids=ids).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert want.std() > 0.1
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "is there a red circle?  two\nblue"
    assert words(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    assert fields(file)["tokenizer.chat_template"] == processor.tokenizer.chat_template
    assert fields(file)["tokenizer.ggml.eos_token_id"] in [
        model.generation_config.eos_token_id,
        processor.tokenizer.eos_token_id,
    ]


def test_a_beginning_that_prompts_do_not_have_is_not_asked_for(tmp_path):
    """The tokenizer begins a text with <s>; the chat template, which is of text, does not."""
    from tokenizers.processors import TemplateProcessing

    model, processor = composed(MODELS["clip llama"])
    tokenizer = processor.tokenizer
    tokenizer.bos_token = begin = tokenizer.eos_token
    marks = [(begin, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=marks)
    assert tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id
    asked = [{"role": "user", "content": [{"type": "text", "text": "red"}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    file, _ = export_gguf(model, processor, tmp_path)
    adds = fields(file)["tokenizer.ggml.add_bos_token"]
    assert adds == (prompt["input_ids"][0][0] == tokenizer.bos_token_id) and not adds
    fit_tokenizer(tokenizer, "", "plain")  # as it is today, it does
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    file, _ = export_gguf(model, processor, tmp_path / "begins")
    assert fields(file)["tokenizer.ggml.add_bos_token"] and prompt["input_ids"][0][0] == tokenizer.bos_token_id


def as_clip(file, pixels):
    """Image tokens as llama.cpp's clip computes those of LLaVA (tools/mtmd/models/llava.cpp), in torch."""
    f, w = fields(file), tensors(file)
    heads, eps = f["clip.vision.attention.head_count"], f["clip.vision.attention.layer_norm_epsilon"]
    gelu = torch.nn.functional.gelu
    act = (lambda x: gelu(x, approximate="tanh")) if f["clip.use_gelu"] else (lambda x: x * torch.sigmoid(1.702 * x))

    def linear(x, name):
        return torch.nn.functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    patch = f["clip.vision.patch_size"]
    x = torch.nn.functional.conv2d(pixels, w["v.patch_embd.weight"], w.get("v.patch_embd.bias"), stride=patch)
    x = x.flatten(2).transpose(1, 2)
    if "v.class_embd" in w:
        x = torch.cat([w["v.class_embd"].reshape(1, 1, -1), x], 1)
    x = x + w["v.position_embd.weight"]
    if "v.pre_ln.weight" in w:
        x = norm(x, "v.pre_ln")
    (deepest,) = f["clip.vision.feature_layer"]
    assert deepest == f["clip.vision.block_count"] and f"v.blk.{deepest}.ln1.weight" not in w
    for i in range(deepest):
        y = norm(x, f"v.blk.{i}.ln1")
        q, k, v = (linear(y, f"v.blk.{i}.attn_{n}").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"v.blk.{i}.attn_out")
        x = x + linear(act(linear(norm(x, f"v.blk.{i}.ln2"), f"v.blk.{i}.ffn_up")), f"v.blk.{i}.ffn_down")
    x = x[:, 1:] if "v.class_embd" in w else x
    return linear(gelu(linear(x, "mm.0"), approximate="tanh"), "mm.2")


@pytest.mark.parametrize("case", MODELS)
def test_clip_computes_the_image_tokens(written, case):
    model, processor, (_, file) = written(case)
    stated = fields(file)
    assert stated["general.architecture"] == "clip" and stated["clip.projector_type"] == "mlp"
    assert stated["clip.vision.image_mean"] == pytest.approx(list(processor.transform.mean))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    got = as_clip(file, pixels)
    with torch.no_grad():
        want = model.encode_images(pixels).tokens
    # clip's gelu is the approximation by tanh.
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)


@pytest.mark.parametrize("case", MODELS)
def test_names_are_those_of_the_package(written, case):
    """Each key and each tensor is one that gguf states for llama.cpp, but for two keys that clip.cpp itself has."""

    def keys_of(holder):
        for name, value in vars(holder).items():
            if isinstance(value, str) and not name.startswith("__"):
                yield value
            elif isinstance(value, type):
                yield from keys_of(value)

    keys = {key for holder in (gguf.Keys.General, gguf.Keys.Clip, gguf.Keys.ClipVision) for key in keys_of(holder)}
    model, _, files = written(case)
    for file, arch in zip(files, (architecture(model.llm.lm.config), "clip"), strict=True):
        about = fields(file)
        assert about["general.architecture"] == arch and about["GGUF.version"] == 3
        model_arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[model_arch]}
        bare = (name.removesuffix(".weight").removesuffix(".bias") for name in tensors(file))
        named = {re.sub(r"\.\d+", ".{bid}", name, count=1) for name in bare}
        assert named <= known, named - known
        if arch == "clip":
            own = {key for key in about if not key.startswith("GGUF.")}
            assert own - keys == {"clip.has_text_encoder", "clip.vision.feature_layer"}
            count = {name.partition("ln1")[0] for name in tensors(file) if ".ln1." in name}
            assert len(count) == about["clip.vision.block_count"]
        else:
            held = about[f"{arch}.rope.freq_base"], about[f"{arch}.attention.head_count_kv"]
            text = model.llm.lm.config
            assert held == (text.rope_parameters["rope_theta"], text.num_key_value_heads)
            assert ("output.weight" in tensors(file)) is not bool(text.tie_word_embeddings)


def test_both_files_are_written_or_none(tmp_path):
    model, processor = composed(MODELS["clip llama"])
    files = export_gguf(model, processor, tmp_path / "old", type="f16")
    before = [file.read_bytes() for file in files]
    with torch.no_grad():
        model.llm.lm.model.norm.weight.mul_(2)
        next(p for p in model.projector.parameters() if p.ndim == 2)[0, 0] = 1e6
    for place in ("old", "new"):
        with pytest.raises(ZooError, match=r"mm\.0\.weight has values beyond what float16 holds: --type bf16 or f32"):
            export_gguf(model, processor, tmp_path / place, type="f16")
    assert not (tmp_path / "new").exists()
    assert [file.read_bytes() for file in files] == before
    assert {file.name for file in (tmp_path / "old").iterdir()} == {*(file.name for file in files), "README.md"}


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types_round_as_they_state(tmp_path, kind):
    model, processor = composed(MODELS["clip llama"])
    files = export_gguf(model, processor, tmp_path, type=kind)
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(files[0]).tensors}
    assert found["blk.0.ffn_up.weight"] == kind.upper() and found["output_norm.weight"] == "F32"
    clip = {t.name: t.tensor_type.name for t in gguf.GGUFReader(files[1]).tensors}
    assert clip["v.patch_embd.weight"] == "F16" and clip["v.position_embd.weight"] == "F32"
    assert clip["v.blk.0.attn_q.weight"] == ("F16" if kind == "q8_0" else kind.upper()), "rows of 16 are no block of 32"
    assert fields(files[0])["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_what_is_read_back_otherwise_is_found(written):
    _, _, (file, _) = written("clip llama")
    held = tensors(file)
    compare(file, held, "f32")
    with pytest.raises(ZooError, match=r"read back, does not hold.*output_norm.weight"):
        compare(file, {**held, "output_norm.weight": held["output_norm.weight"] + 1e-6}, "f32")
    with pytest.raises(ZooError, match="more"):
        compare(file, {**held, "more": held["output_norm.weight"]}, "f32")


REFUSED = {
    "an encoder": ([*encoder("dinov2"), *MLP, *LLAMA], "no names for the encoder 'dinov2'"),
    "an activation": ([*CLIP, "projector=mlp", "projector.activation=relu", *LLAMA], "activation is 'relu'"),
    "no biases": ([*CLIP, "projector=mlp", "projector.bias=false", *LLAMA], "has no biases"),
    "a projector": ([*CLIP, "projector=linear", *LLAMA], "is 'linear'"),
    "a language model": ([*CLIP, *MLP, *llm("gpt2")], "type 'gpt2' is not written as GGUF"),
    "its activation": ([*CLIP, *MLP, *llm("llama", "llm.extra={hidden_act: gelu}")], "hidden_act is 'gelu'"),
    "crops": ([*CLIP, *MLP, *PINPOINTS, *LLAMA], "'anyres', and it takes none"),
    "a pruner": ([*CLIP, "pruner=[random]", *MLP, *LLAMA], "the model has random"),
    "an adapter": ([*CLIP, *MLP, *LLAMA, "adapter=[mole]"], "cannot be merged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_name_for_is_refused(tmp_path, case):
    words, why = REFUSED[case]
    model, processor = composed(words)
    with pytest.raises(ZooError, match=why):
        export_gguf(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cuts_of_text_have_names():
    from tokenizers import Tokenizer, models, pre_tokenizers

    class Has:
        backend_tokenizer = Tokenizer(models.BPE())

    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    Has.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    assert cut_name(Has) == "smollm"
    Has.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ZooError, match="cut by Whitespace"):
        cut_name(Has)


def test_the_command_writes_both_files_and_zoo_reads_the_language_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, processor = composed([*CLIP, *MLP, *QWEN, "adapter=[lora]"])
    model.save_pretrained("mine")
    processor.save_pretrained("mine")
    assert main(["export", "mine", "out", "--format", "gguf-parts", "--type", "f32"]) == 0
    printed = capsys.readouterr().out
    assert "Merged into the language model: lora." in printed
    assert "llama-mtmd-cli -m out/mine-F32.gguf --mmproj out/mmproj-mine-F32.gguf" in printed
    assert {file.name for file in Path("out").iterdir()} == {"mine-F32.gguf", "mmproj-mine-F32.gguf", "README.md"}
    assert "library_name: gguf" in Path("out/README.md").read_text()
    again, _ = zoo.compose(*CLIP, *MLP, "llm=hf", "llm.checkpoint=out/mine-F32.gguf")
    ids = torch.tensor([[5, 9, 30]])
    whole, _ = zoo.load("dir:mine")
    got, want = again.llm.lm(input_ids=ids).logits, whole.llm.lm(input_ids=ids).logits
    # transformers' reader adds <|endoftext|> to every tokenizer of Qwen2.
    torch.testing.assert_close(got[..., : want.shape[-1]], want, atol=1e-5, rtol=0)
    assert main(["push", "out", "me/tiny", "--dry-run"]) == 0
    assert "mmproj-mine-F32.gguf" in capsys.readouterr().out
