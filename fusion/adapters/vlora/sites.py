"""Locate the weights q, k, v, o and the feed-forward block, around which m leads, in the layers of an LLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.fusion.adapters.plain_layer import require_plain
from zoo.registry import ZooError

# Last parts of names. A fused layer makes q, k and v side by side in this order (Phi-3).
_LINEARS = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj", "out_proj", "dense")}
_FUSED = ("qkv_proj",)
_BLOCKS = ("mlp", "feed_forward", "block_sparse_moe")


@dataclass(frozen=True)
class Site:
    """One layer that changes."""

    layer: str  # name of the decoder layer in the transformers model
    attention: str  # name of its attention
    linears: list[tuple[str, str]]  # name of a module, and the types whose terms are added to its output
    widths: Mapping[str, tuple[int, int]]  # type -> width in and out

    def change(self, types: str, factors: Mapping[str, tuple[Tensor, Tensor]], row: int) -> Tensor:
        """Compute the change of a linear layer's weight (out, in) for one row of the batch, in float64."""
        parts = []
        for t in types:
            width, out = self.widths[t]
            if t in factors:
                a, b = (x.double() for x in factors[t])
                parts.append(b @ a[row].T)  # (out, R) @ (R, in)
            else:
                parts.append(
                    torch.zeros(out, width, dtype=torch.float64, device=next(iter(factors.values()))[0].device)
                )
        return torch.cat(parts)


def find_sites(llm: Any, types: str, skip: int, who: str) -> list[Site]:
    """Name the sites of the layers l with (l + 1) % skip == 0.

    Args:
        llm: a language model of the zoo.
        types: letters of q, k, v, o, m.
        skip: every skip-th layer.
        who: the adapter, for messages.

    Raises:
        ZooError: there are fewer layers than `skip`, the LLM has no such weights, or they differ in size.
    """
    if llm.num_layers < skip:
        raise ZooError(f"{who}: skip={skip} is more than the {llm.num_layers} layers of the LLM.")
    names = {id(module): name for name, module in llm.lm.named_modules()}
    chosen = [layer for number, layer in enumerate(llm.layers) if (number + 1) % skip == 0]
    sites = [_site(llm, layer, names[id(layer)], types, who) for layer in chosen]
    for site in sites:
        for t in types:
            if site.widths[t] != sites[0].widths[t]:
                (a, b), (c, d) = sites[0].widths[t], site.widths[t]
                raise ZooError(
                    f"{who}: {t!r} of {site.layer!r} is {c} to {d} wide and that of {sites[0].layer!r} {a} to {b}, and "
                    "factors of a type are of one size. Take another skip, or types without it."
                )
    return sites


def _site(llm: Any, layer: Any, prefix: str, types: str, who: str) -> Site:
    found = {name.rpartition(".")[2]: name for name, _ in layer.named_modules()}
    if attention := next((name for name, _ in layer.named_children() if "attn" in name or "attention" in name), None):
        found = {k: v for k, v in found.items() if v.startswith(f"{attention}.")} | {
            name: name for name, _ in layer.named_children()
        }
    linears: dict[str, str] = {}  # name -> types
    widths: dict[str, tuple[int, int]] = {}
    fused = next((found[n] for n in _FUSED if n in found), None)
    for t in types:
        words = _BLOCKS if t == "m" else _LINEARS[t]
        name = fused if fused and t in "qkv" else next((found[n] for n in words if n in found), None)
        if attention is None or name is None:
            raise ZooError(
                f"{who} finds no {' or '.join(words)} for {t!r} in the layers of {type(llm.lm).__name__}: set types to "
                f"letters that it has."
            )
        module = layer.get_submodule(name)
        if t == "m":
            require_plain(module, llm.hidden_size, who)
            widths[t] = (llm.hidden_size, llm.hidden_size)
        elif name == fused:
            widths |= _fused_widths(llm, module)
        else:
            widths[t] = (module.in_features, module.out_features)
        linears[name] = "qkv" if name == fused else t
    return Site(prefix, f"{prefix}.{attention}", [(f"{prefix}.{n}", t) for n, t in linears.items()], widths)


def _fused_widths(llm: Any, module: Any) -> dict[str, tuple[int, int]]:
    text = llm.lm.config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * head
    assert heads * head + 2 * keys == module.out_features, "queries, keys and values fill the fused layer"
    width = module.in_features
    return {"q": (width, heads * head), "k": (width, keys), "v": (width, keys)}
