"""What parts are given by the rules: random image features, tiny language models, batches with padding."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from zoo.registry import ImageFeatures, Question, build

VOCAB = 97
NO_GROUPS = frozenset({"gpt_neox", "gpt2", "opt", "phi", "stablelm", "cohere"})
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")


def llm_node(model_type: str = "llama", **options: Any) -> dict[str, Any]:
    """A node of two layers of width 32; grouped queries where the family has them, four experts in MoE families."""
    node: dict[str, Any] = {"name": "hf", "model_type": model_type, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    node |= {"intermediate_size": 48, "max_positions": 128}
    node |= {} if model_type in NO_GROUPS else {"num_kv_heads": 2}
    node |= {"num_experts": 4, "top_k": 2} if model_type in MOE else {}
    return node | options


def tiny_llm(model_type: str = "llama", seed: int = 0, attention: str | None = None, **options: Any) -> Any:
    """Build it with weights that follow from the seed, in eval mode."""
    torch.manual_seed(seed)
    return build("llm", llm_node(model_type, **options), vocab_size=VOCAB, attention=attention).eval()


def padded_batch(b: int = 2, t: int = 9, pad: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and a mask whose first row has `pad` positions of padding on the left."""
    ids = torch.randint(0, VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return ids, mask


def features(
    m: int = 3,
    grid: tuple[int, int] = (4, 4),
    dim: int = 24,
    seed: int = 0,
    blocks: tuple[str, ...] = ("key_attention@1", "cls_attention@1"),
    **given: Any,
) -> ImageFeatures:
    """Random tokens on a grid, with all that an encoder may say of each of them, attention of `blocks` included."""
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    known: dict[str, Any] = {}
    for name in ("cls_attention", "key_attention", "pooling_attention"):
        scores = torch.rand(m, n, generator=g)
        known[name] = scores / scores.sum(1, True)
    tokens = torch.randn(m, n, dim, generator=g)
    known["keys"] = torch.randn(m, n, 2, 6, generator=g)
    known["next_attention"] = torch.randn(m, n, generator=g).mul(1.5).softmax(1)
    known["next_keys"] = torch.randn(m, n, 12, generator=g)
    known["block_attention"] = {word: torch.rand(m, n, generator=g).softmax(1) for word in blocks}
    known |= {"patch_embeds": torch.randn(m, n, 5, generator=g), "projected": torch.randn(m, n, 12, generator=g)}
    known["question"] = question(m, g)
    return ImageFeatures(tokens, grid, **{**known, **given})


def question(m: int, g: torch.Generator) -> Question:
    """Another question for each of `m` rows, of one to three words: each a prompt of its own."""
    mask = torch.arange(3).expand(m, -1) < 1 + torch.arange(m).unsqueeze(1) % 3
    words, ids = torch.randn(m, 3, 12, generator=g), torch.randint(9, (m, 3), generator=g)
    asked = Question(torch.arange(m), tuple(f"{i}?" for i in range(m)), ids, mask, words)
    asked.text_embeds, asked.text_mask = torch.randn(m, 2, 5, generator=g), mask[:, :2]
    return asked


def image_row(image: ImageFeatures, i: int) -> ImageFeatures:
    """One row of the features, all that is known of it included."""
    tensors = {f.name: getattr(image, f.name) for f in fields(image)}
    blocks = {word: scores[i : i + 1] for word, scores in image.block_attention.items()}
    rows: dict[str, Any] = {k: v[i : i + 1] for k, v in tensors.items() if isinstance(v, Tensor)}
    asked = None if image.question is None else image.question.picked(slice(i, i + 1))
    return replace(image, **rows, block_attention=blocks, question=asked)


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names and bit-equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
