"""AIM's walk along attention beside the fused kernel, against eager attention, which has the matrix at hand."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from zoo.benches.costs import DecoderSizes
from zoo.benches.measure import Turns, Value
from zoo.benches.peak import peak_bytes
from zoo.benches.report import Row
from zoo.fusion.pruners.inside.attention_flow import attention_flow

JUDGED_TOKENS = 2048  # from which on the walk is held to bounds: shorter sequences are dominated by calls


def scoring_rows(
    time: Callable[[Mapping[str, Callable[[], object]]], Turns],
    sizes: DecoderSizes,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    judged: bool = True,
) -> list[Row]:
    """Time the walk for one layer of a decoder.

    Args:
        time: times steps in turns.
        sizes: of the decoder.
        tokens: of the sequence.
        device: of the model.
        dtype: of its weights.
        judged: hold it to its bounds.
    """
    shape = (1, sizes.heads, tokens, sizes.head_dim)
    query, key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    start = torch.full((1, tokens), 1 / tokens, device=device)
    mask = torch.full((tokens,) * 2, -torch.inf, device=device, dtype=dtype).triu(1)
    scale = sizes.head_dim**-0.5

    def eager() -> torch.Tensor:
        return (query @ key.mT * scale + mask).softmax(-1) @ value

    def eager_scored() -> torch.Tensor:
        scores = query @ key.mT * scale + mask
        walk = (scores.float() / 0.1).softmax(-1)
        u = start[:, None, None].expand(1, sizes.heads, 1, -1)
        for _ in range(5):
            u = u @ walk
        return scores.softmax(-1) @ value

    def fused() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def walk() -> torch.Tensor:
        return attention_flow(query, key, start, scaling=scale, steps=5, temperature=0.1)

    work = {"eager": eager, "eager scored": eager_scored, "fused": fused, "walk": walk}
    with torch.no_grad():
        times = time({**work, "both": lambda: (fused(), walk())})
        peaks = {name: peak_bytes(step, device) for name, step in work.items()}
    at = f"at {tokens} tokens, {sizes.heads} heads"
    memory = Value.of([peaks["walk"] / peaks["eager"]])
    note = f"{peaks['walk'] / 1e6:.0f} and {peaks['eager'] / 1e6:.0f} MB"
    took = {k: f"{times.milliseconds(k).median:.0f} ms" for k in times}
    return [
        Row(
            f"aim: scoring over eager attention, time {at}",
            times.ratio("walk", "eager"),
            bound=0.8 if judged else None,
            at_most=True,
            note=f"{took['walk']} and {took['eager']}",
        ),
        Row(f"aim: scoring over eager attention, memory {at}", memory, "x", 0.15 if judged else None, True, note),
        Row(
            f"aim: fused attention and scoring over eager attention and dense scoring, time {at}",
            times.ratio("both", "eager scored"),
            note=f"{took['both']} and {took['eager scored']}; fused attention alone {took['fused']}",
        ),
    ]
