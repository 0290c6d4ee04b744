"""A training step without numbers: the memory that its operations would take.

The model's own code runs, forward and backward, on tensors that have shape and data type and no content (torch's fake
tensors). So whatever a part, an attention kernel, autocast or checkpointing keeps for the backward pass counts as it
is. Integers and masks are real, since shapes depend on where images and labels are. Indices that follow from numbers,
such as the expert of a token, are spread evenly.
"""

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from zoo.storage.precision import autocast

_CPU = torch.device("cpu")
_BY_MASK = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def bytes_of_step(
    model: Any, batch: Mapping[str, Any], precision: str, wide: Mapping[str, Any], *, passes: int = 1, options: Any = ()
) -> tuple[int, int]:
    """Return the most bytes that the passes of a step hold beside the weights, and those of the gradients at its end.

    Args:
        model: on any device, the meta device too; in the mode of training, with the parameters that train set.
        batch: of `ZooProcessor.collate`; floating point tensors count by their shape.
        precision: of products: fp32, or bf16 for autocast.
        wide: names of weights that are float32 in training.
        passes: of the step; from the second on there are gradients to add to.
        options: further arguments of the model's forward.
    """
    mode, peak = FakeTensorMode(allow_non_fake_inputs=True), _Peak()
    with mode:
        held = _empty(model, wide)
        batch = {k: _like(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    peak.know([*held.values(), *batch.values()])
    held = {f"model.{name}": tensor for name, tensor in held.items()}
    once = {id(t): t for t in held.values()}.values()
    step = _Step(model, precision, dict(options))
    with mode, peak, _silent():
        for _ in range(min(passes, 2)):
            torch.func.functional_call(step, held, (batch,), tie_weights=True)
    return peak.most, sum(t.grad.nbytes for t in once if t.grad is not None)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch from logging an operation that refuses fake tensors: it is raised, too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Step(nn.Module):
    """A pass as one module, for `functional_call`; the backward pass too, since checkpointing runs layers in it."""

    def __init__(self, model: Any, precision: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.precision, self.options = model, precision, options

    def forward(self, batch: Mapping[str, Any]) -> None:
        with autocast(self.precision, _CPU):
            out = self.model(**batch, **self.options)
        losses = list((out.losses or {}).values())
        if not losses:  # a distiller compares what is furthest along
            losses = [next(t for t in (out.last_hidden_state, out.image_tokens, out.image.tokens) if t is not None)]
        total = torch.stack([loss.float().sum() for loss in losses]).sum()
        del out, losses  # what nothing needs any more is freed before the backward pass
        total.backward()


def _empty(model: nn.Module, wide: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return fake parameters and buffers on the CPU, tied ones once; integers are zeros."""
    made: dict[int, Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    ids = {id(t) for t in wide.values()}
    for _, tensor in named:
        if id(tensor) not in made:
            made[id(tensor)] = _like(tensor, torch.float32 if id(tensor) in ids else None)
    return {name: made[id(tensor)] for name, tensor in named}


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if tensor.is_floating_point():
        empty = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=_CPU)
        return empty.requires_grad_(tensor.requires_grad)
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


class _Peak(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed.

    Attributes:
        now: bytes that are held.
        most: the most that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def know(self, values: Any) -> None:
        """Leave out tensors that were there before, and their views."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._known[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_real(func, args, kwargs):
            with unset_fake_temporarily():
                return self._counted(func(*args, **kwargs))
        if func.overloadpacket in _BY_MASK:
            args = (args[0], _indices(args[1]), *args[2:])
        if func.overloadpacket is torch.ops.aten._grouped_mm:
            return self._counted(_grouped(*args, **kwargs))
        return self._counted(tree_map(_with_content, func(*args, **kwargs)))

    def _counted(self, made: Any) -> Any:
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self._known:
                    self._known[key] = weakref.finalize(storage, self._free, key, storage.nbytes())
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
        return made

    def _free(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size


def _is_real(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation has integers and masks only, and makes such."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(isinstance(x, FakeTensor) or x.is_floating_point() for x in tensors):
        return False
    if (dtype := kwargs.get("dtype")) is not None:
        return not dtype.is_floating_point
    return bool(tensors) or func.overloadpacket is torch.ops.aten.arange


def _with_content(made: Any) -> Any:
    """Give integers and masks that follow from numbers a content: evenly spread indices, and true."""
    if not isinstance(made, FakeTensor) or made.is_floating_point():
        return made
    with unset_fake_temporarily():
        if made.dtype == torch.bool:
            return torch.ones(tuple(made.shape), dtype=torch.bool)
        # Of the last dimension, up to its length: no index is too large for what it was taken from.
        return (
            torch.arange(made.numel(), dtype=made.dtype)
            .remainder_(max(1, made.shape[-1] if made.dim() else 1))
            .view(tuple(made.shape))
        )


def _indices(given: Any) -> list[Any]:
    """Turn masks among indices into positions, whose number is known."""
    found: list[Any] = []
    with unset_fake_temporarily():
        for index in given:
            is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
            found += index.nonzero().unbind(1) if is_mask else [index]
    return found


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
    """Return a product over groups by its shape: torch's fake kernel takes bfloat16 alone, its real one more."""
    if a.dim() == b.dim() == 2:
        assert offs is not None, "groups of a sum have ends"
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return (
        a.new_empty(*a.shape[:-1], b.shape[-1]) if a.dim() == 2 or b.dim() == 3 else a.new_empty(a.shape[1], b.shape[1])
    )
