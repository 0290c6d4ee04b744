"""Share a model out over processes so that none of them ever holds all of its values.

A model that was built on the CPU has most of its values in files, whose pages are read when they are used (see
`zoo.storage.safetensors_file`; transformers maps its files as well). Sharding parameters that have values would read
them all. Here they are sharded without values, on the meta device, and each process then copies the part that it holds
out of the files.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from zoo.storage.pages import CleanPages
from zoo.storage.sharded import offsets_of


@contextlib.contextmanager
def streamed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In the block, parameters have no values; behind it, each process holds the values of its parts.

    Args:
        model: whole, on the CPU; the block shards it. Names of parameters must stay.
        device: of the parts.
    """
    if detect_fake_mode(list(model.parameters())) is not None:  # an estimate: there are no values
        yield
        return
    values = _take(model)
    pages = CleanPages()
    for value in values.values():  # what has been read so far, the head in a check of it, say
        pages.give_back(value)
    yield
    # Through `_apply`, by which FSDP takes note of new storage. Buffers keep their values.
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for name, parameter in model.named_parameters():
        value = values.pop(name)
        _fill(parameter, value)
        pages.give_back(value)
    assert not values, f"left without a parameter: {sorted(values)[:3]}"


def _take(model: nn.Module) -> dict[str, Tensor]:
    """Replace parameters by such without values, tied ones by one; return the values by name."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by id: the old one, kept alive, and the new one
    for module in model.modules():
        for key, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                made[id(old)] = old, nn.Parameter(torch.empty_like(old, device="meta"), old.requires_grad)
            module._parameters[key] = made[id(old)][1]
    return values


@torch.no_grad()
def _fill(parameter: Any, value: Tensor) -> None:
    if not hasattr(parameter, "to_local"):
        parameter.copy_(value)
        return
    local = parameter.to_local()
    if local.numel():
        box = tuple(slice(o, o + n) for o, n in zip(offsets_of(parameter), local.shape, strict=True))
        local.copy_(value[box])
