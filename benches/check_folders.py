"""Checkpoints without weights, most of them with something wrong: what misfits of `zoo bench check` name."""

import json
from pathlib import Path
from typing import Any

from zoo.text.tokenizer import train_tokenizer

_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}


def write_checkpoints(folder: Path) -> None:
    """Write the folders that the words of misfits name as `{at}/...`."""
    from transformers import BartConfig, BertConfig, CLIPVisionConfig, LlamaConfig, MixtralConfig

    tokenizer = train_tokenizer(["a red circle", "a blue square"], 300, "chatml")
    wide = {**_SIZES, "intermediate_size": 64}
    configs = {
        "llama": LlamaConfig(**wide),
        "alone": LlamaConfig(**wide),  # without a tokenizer
        "bert": BertConfig(**wide),
        "bart": BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, vocab_size=400),
        "clip": CLIPVisionConfig(**{k: v for k, v in wide.items() if k != "vocab_size"}),
        "pickled": LlamaConfig(**wide),
        "short": LlamaConfig(**wide, max_position_embeddings=32),
        "experts": MixtralConfig(**wide, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=9),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)
        if name != "alone":
            tokenizer.save_pretrained(folder / name)
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (folder / "empty").mkdir()
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama", ', encoding="utf-8")
    (broken / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "no_such_class"}), encoding="utf-8")
