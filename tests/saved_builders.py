"""Models on tiny checkpoints in folders, for tests of what is saved."""

import torch
from safetensors.torch import load_file, save_file

import zoo
from tests import published_builders, vision_builders
from tests.conftest import ANSWERS, QUESTIONS, sample

WHERE = "llm.lm.model.layers.1.mlp.down_proj.weight"


def checkpoints(root):
    """Write tiny checkpoints: encoders of three libraries, language models, a published model."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from zoo.text.tokenizer import train_tokenizer

    vision_builders.hf_model("clip").save_pretrained(root / "hf")
    (root / "timm").mkdir()
    vision_builders.save_timm(vision_builders.timm_model("vit_tiny_patch16_224"), root / "timm")
    vision_builders.save_open_clip(*vision_builders.open_clip_model(), root / "open_clip")
    tokenizer = train_tokenizer([f"{q} {a}" for q in QUESTIONS for a in ANSWERS] * 3, 360, "plain")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    for name, more in (("llm", {}), ("tied", {"tie_word_embeddings": True}), ("small", {"vocab_size": 300})):
        torch.manual_seed(0)
        config = LlamaConfig(**{"vocab_size": len(tokenizer) + 8, **sizes, **more})
        vision_builders.shake(LlamaForCausalLM(config)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    mixtral = MixtralConfig(**sizes, vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4)
    vision_builders.shake(MixtralForCausalLM(mixtral)).save_pretrained(root / "moe")
    tokenizer.save_pretrained(root / "moe")
    published_builders.llava(root / "llava")
    return root


def composed(places, vision="hf", llm="llm", *words):
    """A model of parts with checkpoints of their own, and a projector without."""
    parts = [f"vision={vision}", f"vision.checkpoint={places / vision}", f"llm.checkpoint={places / llm}"]
    return zoo.compose(*parts, "llm=hf", "projector=linear", "device=cpu", *words)


def published(places, *words, **options):
    return zoo.load(f"dir:{places / 'llava'}", *words, device="cpu", **options)


SOURCES = {"parts": composed, "published": published}


def saved(model, folder, **options):
    """Save, and give back the names that the folder holds."""
    model.save_pretrained(folder, **options)
    return set(load_file(folder / "model.safetensors"))


def answers(model, processor):
    batch = processor.collate([processor.encode(sample((QUESTIONS[0], ANSWERS[0])))])
    with torch.no_grad():
        return model(**batch, all_logits=True).logits


def weight(model, name=WHERE):
    return model.state_dict(keep_vars=True)[name]


def in_place(model):
    with torch.no_grad():
        weight(model).view(-1)[-1].add_(1e-3)


def by_data(model):
    weight(model).data.mul_(1.001)


def other_numbers(folder):
    file = folder / "model.safetensors"
    state = {n: t + 1 for n, t in load_file(file).items()}
    file.unlink()
    save_file(state, file, metadata={"format": "pt"})
