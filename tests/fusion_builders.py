"""Tiny language models and image features for the tests of what joins vision to language."""

import torch

from zoo import registry
from zoo.benches.processes_work import PEFT
from zoo.contracts.given import (  # noqa: F401  # the tests take them from here
    MOE,
    NO_GROUPS,
    VOCAB,
    features,
    image_row,
    llm_node,
    padded_batch,
    question,
    same_state,
    tiny_llm,
)

DENSE = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "stablelm"]
DENSE += ["granite", "starcoder2", "gpt_neox", "gpt2", "opt", "phi", "cohere"]
# Options for tests of components whose defaults are of a size for large models.
SMALL: dict[str, dict] = {"vlora": {"rank": 4, "skip": 1, "width": 16, "depth": 2, "num_heads": 2}}
# Methods of PEFT with options of a size for tiny models, those that begin from data and on a schedule among them.
PEFT_METHODS: dict[str, dict] = {
    "adalora": {"target_modules": ["q_proj", "v_proj"], "init_r": 4, "target_r": 2},
    "corda": {"r": 4},
    "eva": {"r": 4},
    **PEFT,
}


def peft_node(method: str, **options) -> dict:
    """The options of adapter `peft` for one of these methods."""
    return {"method": method, "options": {**PEFT_METHODS[method], **options}}


def adapter_on(llm, node: dict, seed: int = 0, *, attach: bool = True, shaken: float = 0.2, **derived):
    """Build an adapter for `llm`, in eval mode, its parameters moved by noise of the size `shaken`, as by training."""
    torch.manual_seed(seed)
    adapter = registry.build("adapter", node, llm=llm, **derived).eval()
    if attach:
        adapter.attach()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in adapter.parameters() if shaken else ():
            p.add_(shaken * torch.randn(p.shape, generator=g).to(p))
    return adapter
