"""A folder that plain PEFT wrote is an adapter here: equal logits, saved and loaded without it, or refused with why."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from tests.conftest import ANSWERS, QUESTIONS
from tests.train_builders import config, recipe
from tests.vision_builders import shake
from zoo.registry import ZooError
from zoo.runs.replay import replayed
from zoo.text.tokenizer import train_tokenizer
from zoo.training.loop import Run

SOME = ["q_proj", "down_proj"]
METHODS = {
    "lora": peft.LoraConfig(r=2, lora_alpha=6, target_modules=SOME, init_lora_weights=False),
    "by a regular expression": peft.LoraConfig(r=2, target_modules=r".*layers\.1\..*_proj", init_lora_weights=False),
    "rslora, dora": peft.LoraConfig(
        r=4, use_rslora=True, use_dora=True, target_modules="all-linear", init_lora_weights=False
    ),
    "ranks": peft.LoraConfig(r=2, target_modules=SOME, rank_pattern={"down_proj": 5}, init_lora_weights=False),
    "pissa": peft.LoraConfig(r=2, target_modules=SOME, init_lora_weights="pissa"),
    "alphas: the first key counts": peft.LoraConfig(
        r=2,
        lora_alpha=5.5,
        target_modules=SOME,
        alpha_pattern={
            r"model\.layers\.0\.self_attn\.q_proj": 3,
            "q_proj": 8,
            "layers.1.self_attn.q_proj": 64,
            "^layers.1.mlp.down_proj": 64,
            "^model.layers.0.mlp.down_proj": 7.5,
            "k_proj": 64,
        },
        init_lora_weights=False,
    ),
    "some layers": peft.LoraConfig(r=2, target_modules=SOME, layers_to_transform=[1], init_lora_weights=False),
    "all but some": peft.LoraConfig(
        r=2, target_modules=SOME, exclude_modules=r".*layers\.1\..*_proj", init_lora_weights=False
    ),
    "embeddings": peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
    "ia3": peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "oft": peft.OFTConfig(target_modules=SOME, oft_block_size=4, init_weights=False),
    "loha": peft.LoHaConfig(r=2, target_modules=SOME, init_weights=False),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], init_weights=False),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "tiny_llama"
    tokenizer = train_tokenizer([f"{q} {a}" for q in QUESTIONS for a in ANSWERS] * 3, 320, "plain")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    shake(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(base, config, folder):
    """What plain PEFT writes of an adapter whose weights have moved."""
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def composed(base, folder, *words):
    own = ["llm=hf", f"llm.checkpoint={base}", "projector=linear", "vision=timm", "vision.image_size=32"]
    own += [
        "vision.width=16",
        "vision.depth=2",
        "vision.heads=2",
        "adapter=[peft]",
        f"adapter.peft.checkpoint={folder}",
    ]
    return zoo.compose(*own, *words, "device=cpu")


def logits(model):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model(input_ids=ids, **({"all_logits": True} if hasattr(model, "llm") else {})).logits


@pytest.mark.parametrize("method", METHODS)
def test_it_computes_what_peft_does_and_needs_the_folder_no_more_once_saved(method, base, tmp_path):
    folder = written(base, METHODS[method], tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    model, processor = composed(base, folder)
    torch.testing.assert_close(logits(model.eval()), logits(theirs), atol=1e-5, rtol=1e-5)
    for adapter in model.adapter.values():
        adapter.start()  # as ahead of a first stage
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    again, _ = zoo.load(f"dir:{tmp_path / 'saved'}", device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_it_may_be_put_into_a_model_that_is_saved(base, tmp_path):
    folder = written(base, METHODS["lora"], tmp_path / "adapter")
    model, processor = composed(base, folder)
    bare, _ = composed(base, folder, "adapter=null")
    bare.save_pretrained(tmp_path / "bare")
    processor.save_pretrained(tmp_path / "bare")
    words = ["adapter=[peft]", f"adapter.peft.checkpoint={folder}"]
    again, _ = zoo.load(f"dir:{tmp_path / 'bare'}", *words, device="cpu")
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), logits(bare))


def test_it_may_be_a_repository_of_the_hub(base, tmp_path, monkeypatch):
    """In its cache, in two commits; nothing can be reached here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--adapter"
    folders = []
    for commit, method in (("a", "lora"), ("b", "loha")):
        (repository / "snapshots").mkdir(parents=True, exist_ok=True)
        folders.append(written(base, METHODS[method], repository / "snapshots" / (commit * 40)))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for folder, words in zip(folders, ([], [f"adapter.peft.revision={'b' * 40}"]), strict=True):
        model, _ = composed(base, "org/adapter", *words)
        assert torch.equal(logits(model), logits(composed(base, folder)[0]))
        model.save_pretrained(tmp_path / "saved")
        config = (tmp_path / "saved" / "config.json").read_text()
        assert "org/adapter" not in config and "b" * 40 not in config  # a saved model has the weights
    for words, why in {
        ("org/other",): "there is no folder 'org/other' here. The hub repository 'org/other' is not in the cache",
        (folders[0], "adapter.peft.revision=main"): "is of a hub repository, and .* is a folder",
        ("", "adapter.peft.revision=main"): "name it, checkpoint=org/name",
    }.items():
        with pytest.raises(ZooError, match=why):
            composed(base, *words)


def test_a_base_of_another_name_is_noted(base, tmp_path):
    folder = written(base, METHODS["lora"], tmp_path / "adapter")
    change(folder, base_model_name_or_path="org/another_llama")
    with pytest.warns(UserWarning, match="was trained on 'org/another_llama', and this language model is from"):
        composed(base, folder)


def change(folder, **fields):
    content = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(content))


def other_layers(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k.replace("model.model.", "model.", 1): v for k, v in weights.items()}, folder / "adapter_model.safetensors"
    )


def other_embedding(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(400, 32)
    save_file(weights, folder / "adapter_model.safetensors")


REFUSED = {
    "no folder": (lambda f: shutil.rmtree(f), "it has no adapter_config.json"),
    "pickled": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "are not read"),
    "xlora": (lambda f: change(f, peft_type="XLORA"), "does not work here: it runs the whole model twice"),
    "prompts": (lambda f: change(f, peft_type="PROMPT_TUNING"), "virtual tokens"),
    "unknown": (lambda f: change(f, peft_type="LORAX"), "Did you mean"),
    "task": (lambda f: change(f, task_type="SEQ_CLS"), "is for SEQ_CLS"),
    "trained whole": (
        lambda f: change(f, modules_to_save=["lm_head"]),
        "trains copies of whole modules.*Or merge the adapter in",
    ),
    "a regular expression for scales": (lambda f: change(f, alpha_pattern={".*q_proj": 3}), "which is not run"),
    "no such layers": (lambda f: change(f, layers_to_transform=[7]), r"layers_to_transform=\[7\] leaves none"),
    "another embedding": (other_embedding, "base was resized or trained, too"),
    "bias": (lambda f: change(f, bias="all"), "'bias' of PEFT's LoraConfig does not work here"),
    "another decoder": (other_layers, "weights for which this language model has no layer"),
    "another rank": (lambda f: change(f, r=3), r"has shape \(2, 64\), and the layer here \(3, 64\)"),
    "fewer layers": (lambda f: change(f, target_modules=["q_proj"]), "has no layer"),
    "more layers": (lambda f: change(f, target_modules=[*SOME, "k_proj"]), "lacks 4 weights"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(what, base, tmp_path):
    folder = written(base, METHODS["lora"], tmp_path / "adapter")
    spoil, why = REFUSED[what]
    spoil(folder)
    with pytest.raises(ZooError, match=why):
        composed(base, folder)


def test_a_run_goes_on_from_the_weights_that_it_began_on(base, tmp_path):
    folder = written(base, METHODS["lora"], tmp_path / "adapter")
    words = recipe(tmp_path, {"a": "steps: 1, batch_size: 2"})
    file = tmp_path / "conf" / "recipe" / "tiny.yaml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(x for x in lines if not x.startswith(("llm:", "tokenizer:"))) + "\n")
    given = ["llm=hf", f"llm.checkpoint={base}", "adapter=[peft]", f"adapter.peft.checkpoint={folder}"]
    run = Run(config(words, *given, f"run.folder={tmp_path / 'run'}"))
    run.close()
    noted = json.loads(run.folder.lock.read_text())["adapters"]["peft"]
    assert noted["checkpoint"] == str(folder) and len(noted["fingerprint"]) == 64
    Run(config(words, f"resume={tmp_path / 'run'}")).close()
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ZooError, match=r"began on the adapter in .*adapter', and its weights are others now"):
        Run(config(words, f"resume={tmp_path / 'run'}"))
    with pytest.raises(ZooError, match=r"another run than .*\n  weights of adapter peft in .*: fingerprint"):
        replayed(config(words, f"lock={tmp_path / 'run'}"))
