"""Contradictions between a checkpoint's config and its files, reported with both values."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.registry import ZooError
from zoo.registry.versions import blocks_of
from zoo.storage.safetensors_file import Joined, Stored, value_of

_LAYER = re.compile(r"^(?:vision\.(?:frame_)?tower|llm\.lm)\.(?:\D+\.)?(\d+)\.")  # the first number in a name
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EMBEDDING = re.compile(r"^llm\.lm\.model\.(embed_tokens|wte|embed_in|embeddings?)\.weight$")


def between(hf: Any, tensors: Mapping[str, Stored | Joined]) -> dict[str, list[str]]:
    """Compare counts of a transformers config with those of the files: part -> lines with both values.

    What files lack is found when parts are filled; here, what would be left over without a word.
    """
    text, vision = hf.text_config, hf.vision_config
    lines: dict[str, list[str]] = {}
    for part, name, stated in (
        ("llm", "text_config.num_hidden_layers", text.num_hidden_layers),
        ("vision", "vision_config.num_hidden_layers", blocks_of(vision)),
    ):
        held = _count(tensors, part, _LAYER)
        if held > stated:
            lines.setdefault(part, []).append(f"{name} is {stated}, and the files hold {held} layers")
    experts = next((v for n in _EXPERTS if isinstance(v := getattr(text, n, None), int)), 0)
    if (held := _count(tensors, "llm", _EXPERT)) > experts:
        lines.setdefault("llm", []).append(f"text_config states {experts} experts, and the files hold {held}")
    rows = next((t.shape[0] for n, t in tensors.items() if _EMBEDDING.match(n) and t.shape), text.vocab_size)
    if rows != text.vocab_size:
        lines.setdefault("llm", []).append(
            f"text_config.vocab_size is {text.vocab_size}, and the files hold {rows} rows"
        )
    return lines


def _count(tensors: Mapping[str, Any], part: str, pattern: re.Pattern[str]) -> int:
    """Return one more than the largest number that a pattern finds in names of a part; 0 without a match."""
    found = (pattern.search(name) for name in tensors if name.startswith(f"{part}."))
    return max((int(match[1]) + 1 for match in found if match), default=0)


def refuse_untied(lm: Any, tensors: Mapping[str, Stored | Joined], folder: Path) -> None:
    """Refuse two different matrices if the config ties input and output embeddings, and the reverse.

    Args:
        lm: the causal language model that was built from the config.
        tensors: by the names of its modules.
        folder: of the checkpoint.

    Raises:
        ZooError: with the option that keeps what the files hold.
    """
    inside, outside = lm.get_input_embeddings(), lm.get_output_embeddings()
    names = {id(module): name for name, module in lm.named_modules()}
    first, second = (tensors.get(f"llm.lm.{names[id(module)]}.weight") for module in (inside, outside))
    tied, stated = inside.weight is outside.weight, f"tie_word_embeddings of {folder}/config.json"
    if first is None:
        return
    if not tied and second is None:
        raise ZooError(
            f"{stated} is false, and the files hold input embeddings only. If the output embeddings are the same, say "
            f"so: llm.tie_embeddings=true."
        )
    if tied and second is not None and not _equal(first, second):
        raise ZooError(
            f"{stated} is true, and the files hold two different matrices as input and as output embeddings. "
            f"llm.tie_embeddings=false keeps both."
        )


def _equal(one: Stored | Joined, two: Stored | Joined) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(value_of(one), value_of(two))
