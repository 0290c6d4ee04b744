"""A training step without numbers: the memory that its operations would take.

The model's own code runs, forward and backward, on tensors that have shape and data type and no content (torch's fake
tensors). So whatever a part, an attention kernel, autocast or checkpointing keeps for the backward pass counts as it
is. Integers and masks are real, since shapes depend on where images and labels are. Indices that follow from numbers,
such as the expert of a token, are spread evenly.
"""

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from zoo.storage.precision import autocast

_CPU = torch.device("cpu")
_CHOICES = (torch.ops.aten.argmax, torch.ops.aten.argmin, torch.ops.aten.max, torch.ops.aten.min)
_BY_MASK = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


@dataclass
class Trace:
    """What a step took.

    Attributes:
        most: bytes that were held at once beside the weights.
        kinds: of them `activations`, `logits` and `gradients`.
        gradients: bytes of gradients at the end.
        flops: of products and attention, a multiplication with its addition being 2.
    """

    most: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    flops: int = 0


@dataclass
class Unit:
    """Weights that are gathered together, and whose gradients are reduced and divided together.

    Attributes:
        names: of the weights.
        reduce: bytes that the reduction holds.
        share: bytes of this process's gradients, which stay.
    """

    names: Sequence[str]
    reduce: int
    share: int


def bytes_of_step(
    model: Any, batch: Mapping[str, Any], precision: str, wide: Mapping[str, Any], *, passes: int = 1, options: Any = ()
) -> tuple[int, int]:
    """Return the most bytes that the passes of a step hold beside the weights, and those of the gradients at its end.

    See `trace_step`.
    """
    trace = trace_step(model, batch, precision, wide, passes=passes, options=options)
    return trace.most, trace.gradients


def trace_step(
    model: Any,
    batch: Mapping[str, Any],
    precision: str,
    wide: Mapping[str, Any],
    *,
    passes: int = 1,
    options: Any = (),
    units: Sequence[Unit] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    short: Sequence[nn.Module] = (),
) -> Trace:
    """Run the passes of a step, and return what they take on one process.

    Args:
        model: on any device, the meta device too; in the mode of training, with the parameters that train set.
        batch: of `ZooProcessor.collate`; floating point tensors count by their shape.
        precision: of products: fp32, or bf16 for autocast.
        wide: names of weights that are float32 in training.
        passes: of the step; from the second on there are gradients to add to.
        options: further arguments of the model's forward.
        units: gradients of each are freed when all of them are there: FSDP divides them among the processes.
        dtypes: name -> data type that products read the weight in, where it is not that of the model.
        short: modules whose inputs are cast to bfloat16, as FSDP does.
        shapes: name -> shape of the part of the weight that this process has (tensor parallelism).
    """
    mode, peak = FakeTensorMode(allow_non_fake_inputs=True), _Peak(model.llm.vocab_size)
    with mode:
        held = _empty(model, wide, dtypes or {}, shapes or {})
        batch = {k: _like(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    peak.know([*held.values(), *batch.values()])
    once = {id(t): t for t in held.values()}.values()
    peak.watch(once)
    for unit in units:
        peak.divide([held[name] for name in unit.names if held[name].requires_grad], unit)
    held = {f"model.{name}": tensor for name, tensor in held.items()}
    step = _Step(model, precision, dict(options))
    hooks = [module.register_forward_pre_hook(_to_short, with_kwargs=True) for module in short]
    try:
        with mode, peak, _silent():
            for _ in range(min(passes, 2)):
                torch.func.functional_call(step, held, (batch,), tie_weights=True)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = sum(t.grad.nbytes for t in once if t.grad is not None)
    return Trace(peak.most, peak.kinds, gradients, peak.flops // min(passes, 2))


def _to_short(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def cast(x: Any) -> Any:
        return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(cast, args), tree_map(cast, kwargs)


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


def _empty(
    model: nn.Module,
    wide: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Return fake parameters and buffers on the CPU, tied ones once; integers are zeros."""
    made: dict[int, Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    ids = {id(t) for t in wide.values()}
    for name, tensor in named:
        if id(tensor) not in made:
            dtype = dtypes.get(name) or (torch.float32 if id(tensor) in ids else None)
            made[id(tensor)] = _like(tensor, dtype, shapes.get(name))
    return {name: made[id(tensor)] for name, tensor in named}


def _like(tensor: Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    if tensor.is_floating_point():
        empty = torch.empty(shape or tensor.shape, dtype=dtype or tensor.dtype, device=_CPU)
        return empty.requires_grad_(tensor.requires_grad)
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


class _Peak(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed.

    Attributes:
        most: bytes, the most that were held at once.
        kinds: of them `activations`, `logits` and `gradients`.
        flops: of all operations.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.most = self.flops = 0
        self.kinds: dict[str, int] = {}
        self._vocab_size = vocab_size
        self._now = {"activations": 0, "logits": 0, "gradients": 0}
        self._kind: dict[int, str] = {}
        self._known: dict[int, Any] = {}

    def watch(self, weights: Any) -> None:
        """Tell gradients from activations."""
        for tensor in weights:
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(lambda t: self._is_gradient(t.grad))

    def divide(self, weights: Sequence[Tensor], unit: Unit) -> None:
        """Free the gradients of a unit when all are there, but for a share; until it is reduced, they are held."""
        left: set[int] = set()
        share = unit.share

        def there(tensor: Tensor) -> None:
            nonlocal share
            left.discard(id(tensor))
            if not left:
                self._note(unit.reduce)
                for weight in weights:
                    weight.grad = None
                self._now["gradients"] += share
                share = 0  # later passes add to it
                left.update(id(weight) for weight in weights)

        left.update(id(weight) for weight in weights)
        for weight in weights:
            weight.register_post_accumulate_grad_hook(there)

    def _is_gradient(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if (before := self._kind.get(key)) is not None and before != "gradients":
            size = tensor.untyped_storage().nbytes()
            self._now[before] -= size
            self._now["gradients"] += size
            self._kind[key] = "gradients"

    def _note(self, more: int = 0) -> None:
        """Note what is held, if it is the most so far."""
        if (total := sum(self._now.values()) + more) > self.most:
            self.most, self.kinds = total, dict(self._now)
            self.kinds["gradients"] += more

    def know(self, values: Any) -> None:
        """Leave out tensors that were there before, and their views."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._known[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two of three calls: autograd asks it of every tensor that it meets
            return FakeTensor.__torch_dispatch__(func, types, args, kwargs or {})
        kwargs = kwargs or {}
        if _is_real(func, args, kwargs):
            with unset_fake_temporarily():
                return self._counted(func(*args, **kwargs))
        if func.overloadpacket in _BY_MASK:
            args = (args[0], _indices(args[1]), *args[2:])
        if func.overloadpacket is torch.ops.aten._grouped_mm:
            made: Any = _grouped(*args, **kwargs)
        else:
            made = func(*args, **kwargs)
        self.flops += _flops_of(func, args, kwargs, made)
        most = 0
        if func.overloadpacket in _CHOICES:  # of what: an expert, say
            most = args[0].shape[args[1]] if len(args) > 1 and isinstance(args[1], int) else args[0].numel()
        filled = partial(_with_content, most=most)
        return self._counted(filled(made) if isinstance(made, Tensor) else tree_map(filled, made))

    def _counted(self, made: Any) -> Any:
        for tensor in _tensors_in([made]):
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self._known:
                self._known[key] = weakref.finalize(storage, self._free, key, storage.nbytes())
                kind = "logits" if tensor.dim() and tensor.shape[-1] == self._vocab_size else "activations"
                self._kind[key] = kind
                self._now[kind] += storage.nbytes()
                self._note()
        return made

    def _free(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self._now[self._kind.pop(key)] -= size


def _flops_of(func: Any, args: Any, kwargs: Mapping[str, Any], made: Any) -> int:
    """Count the operations of a product or an attention, by torch's formulas; of attention on a CPU it has none."""
    packet, aten = func.overloadpacket, torch.ops.aten
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return 4 * prod(args[0].shape) * args[1].shape[-2]
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 10 * prod(args[1].shape) * args[2].shape[-2]
    if packet is aten._grouped_mm:
        return 2 * prod(args[0].shape) * int(args[1].shape[-1])
    if (formula := flop_registry.get(packet)) is None:
        return 0
    return int(formula(*args, **kwargs, out_val=made))


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors of an operation, which takes and makes no trees but lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def _is_real(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation has integers and masks only, and makes such."""
    tensors = [*_tensors_in(args), *_tensors_in(kwargs.values())]
    if any(isinstance(x, FakeTensor) or x.is_floating_point() for x in tensors):
        return False
    if (dtype := kwargs.get("dtype")) is not None:
        return not dtype.is_floating_point
    return bool(tensors) or func.overloadpacket is torch.ops.aten.arange


def _with_content(made: Any, most: int = 0) -> Any:
    """Give integers and masks that follow from numbers a content: evenly spread indices, and true.

    Args:
        made: by an operation.
        most: number of things that are chosen from; 0: not known.
    """
    if not isinstance(made, FakeTensor) or made.is_floating_point():
        return made
    with unset_fake_temporarily():
        if made.dtype == torch.bool:
            return torch.ones(tuple(made.shape), dtype=torch.bool)
        # Of the last dimension, up to its length: no index is too large for what it was taken from.
        return (
            torch.arange(made.numel(), dtype=made.dtype)
            .remainder_(max(1, most or (made.shape[-1] if made.dim() else 1)))
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
