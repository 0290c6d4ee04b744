"""Tiny sources of weights: GGUF files of a Llama, and installed packages that hold a file."""

from collections.abc import Callable
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["a red circle  12 is left of 3 blue squares\n\n", "what color is the square 2024?", "yes   7 no"] * 3


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE that has never seen two digits together, as SmolLM's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    import json

    model = json.loads(bpe.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return tokens, [" ".join(merge) for merge in model["merges"]]


def tiny_gguf(
    file: Path,
    kind: str = "Q4_1",
    pre: str = "smollm",
    template: str = TEMPLATE,
    left_out: str = "",
    layers: int = 2,
    more: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """Write a Llama of two layers with random weights, its matrices in blocks or numbers of a kind.

    `more` adds to the writer of the package gguf.
    """
    gguf = pytest.importorskip("gguf", reason="GGUF files are written by the package gguf: pip install gguf")
    tokens, merges = vocabulary()
    wide, inner, heads = 64, 96, 4
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(wide)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(wide // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)
    noise = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = noise.normal(size=shape).astype(np.float32) * 0.3
        if name == left_out:
            return
        if len(shape) == 1:
            writer.add_tensor(name, np.abs(values) + 0.5)
        elif kind == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)

    add("token_embd.weight", len(tokens), wide)
    for i in range(layers):
        add(f"blk.{i}.attn_norm.weight", wide)
        add(f"blk.{i}.ffn_norm.weight", wide)
        for name, rows in (("attn_q", wide), ("attn_k", wide // 2), ("attn_v", wide // 2), ("attn_output", wide)):
            add(f"blk.{i}.{name}.weight", rows, wide)
        add(f"blk.{i}.ffn_gate.weight", inner, wide)
        add(f"blk.{i}.ffn_up.weight", inner, wide)
        add(f"blk.{i}.ffn_down.weight", wide, inner)
    add("output_norm.weight", wide)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def package(place: Path, name: str, files: dict[str, Path], version: str = "1.0") -> None:
    """Write an installed distribution below `place`, which has to be in `sys.path`."""
    module = name.replace("-", "_")
    info = place / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code = place / module / "__init__.py"
    code.parent.mkdir()
    code.write_text("raise RuntimeError('the code of the package was imported')\n")
    for inside, source in files.items():
        target = place / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    listed = [str(path.relative_to(place)) for path in [*code.parent.rglob("*"), *info.iterdir()] if path.is_file()]
    (info / "RECORD").write_text("".join(f"{line},,\n" for line in listed))
    invalidate_caches()


def theirs(file: Path) -> torch.nn.Module:
    """The model of a GGUF file by transformers alone, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
