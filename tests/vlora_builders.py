"""VLoRA on a tiny language model, and images for it."""

from dataclasses import replace

import torch

from tests.fusion_builders import SMALL, adapter_on, features, padded_batch, tiny_llm

DIM, GRID = 24, (4, 4)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "smollm3"]


def vlora_on(llm, seed=0, attach=True, moved=True, **options):
    node = {"name": "vlora", **SMALL["vlora"], **options}
    scale = 0.1 if moved else 0.0  # B starts at zero
    adapter = adapter_on(llm, node, seed, attach=attach, shaken=scale, vision_dim=DIM, grid=GRID)
    return adapter.to(llm.lm.dtype)


def double(model_type="llama", **options):
    llm = tiny_llm(model_type, **options)
    llm.lm.double()
    return llm


def images(m=2, seed=0, dtype=torch.float32):
    image = features(m=m, grid=GRID, dim=DIM, seed=seed)
    return replace(image, tokens=image.tokens.to(dtype), cls_attention=None)


def pick(image, *which):
    return replace(image, tokens=image.tokens[list(which)])


def logits(llm, ids=None, mask=None):
    ids = padded_batch()[0] if ids is None else ids
    mask = torch.ones_like(ids) if mask is None else mask
    return llm.lm(input_ids=ids, attention_mask=mask).logits
