"""Random models of real sizes, made on the device, and the same weights again behind another pruner."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zoo.benches.llava import Sizes, composed
from zoo.registry import ZooError, get

# Pixels and patch of the encoder, its width, depth, heads, layer; of the LLM width, depth, heads, feed-forward, words.
SIZES = {
    "full": {
        "05b": Sizes(336, 14, 1024, 24, 16, -2, 896, 24, 14, 4864, 152000, text_kv_heads=2, tied=True),
        "7b": Sizes(336, 14, 1024, 24, 16, -2, 3584, 28, 28, 18944, 152128, text_kv_heads=4),
    },
    "tiny": {
        "05b": Sizes(16, 4, 16, 2, 2, -2, 32, 2, 2, 64, 96, text_kv_heads=1, tied=True),
        "7b": Sizes(16, 4, 16, 2, 2, -2, 32, 6, 4, 64, 96, text_kv_heads=2),
    },
}
LLM = {"model_type": "qwen2", "max_positions": 8192}


@contextlib.contextmanager
def made_on(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Make tensors on a device, weights in a data type: a model of 7B on a GPU takes seconds."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def made(sizes: Sizes, device: torch.device, dtype: torch.dtype, **slots: Any) -> Any:
    """Make a model with random weights; its attention is the fastest one that is installed."""
    torch.manual_seed(0)
    with made_on(device, dtype):
        model = composed(sizes, llm=LLM, **slots)
    torch.nn.Module.to(model, device)
    model.set_attention("auto")
    return model


def with_pruner(base: Any, sizes: Sizes, name: str, node: Mapping[str, Any]) -> Any:
    """Make a model with a pruner and the weights of `base`, which they share.

    A pruner whose options do not fit this encoder is tried by other values that it states.
    """
    first: ZooError | None = None
    for instead in ({}, *({o: v} for o, values in get("pruner", name).choices.items() for v in values)):
        try:
            return _with_pruner(base, sizes, name, {**node, **instead})
        except ZooError as error:
            first = first or error
    assert first is not None, "something was tried"
    raise first


def _with_pruner(base: Any, sizes: Sizes, name: str, node: Mapping[str, Any]) -> Any:
    device, dtype = base.device, base.dtype
    with made_on("meta", dtype):
        model = composed(sizes, llm=LLM, pruner={name: {"name": name, **node}})
    model.load_state_dict(base.state_dict(), assign=True, strict=False)
    there = dict(base.named_buffers())
    for path, buffer in list(model.named_buffers()):
        if buffer.is_meta and path in there:  # not in the state: rotary frequencies
            part, _, last = path.rpartition(".")
            model.get_submodule(part)._buffers[last] = there[path]
    if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):  # the pruner has weights of its own
        model = made(sizes, device, dtype, pruner={name: {"name": name, **node}})
        model.load_state_dict(base.state_dict(), assign=True, strict=False)
    model.tie_weights()
    model.to(device).eval().requires_grad_(False)
    model.set_attention("auto")
    return model
