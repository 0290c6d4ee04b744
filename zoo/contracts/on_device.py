"""A part on a GPU that is not there: torch's fake tensors know devices, and refuse to mix them as a GPU would."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from zoo.contracts.rules import BrokenRuleError, NotForThisPart

GPU = torch.device("cuda")


def devices_of_outputs(part: nn.Module, call: Callable[[nn.Module, Any], Any], given: Any) -> set[str]:
    """Run a part with its weights and its input on a GPU, and return the kinds of device that its tensors are on.

    Where torch has a GPU, on that; elsewhere on fake tensors, which have no numbers.

    Raises:
        BrokenRuleError: it mixes devices.
        NotForThisPart: it reads numbers, so that fake tensors cannot run it.
    """
    part = copy.deepcopy(part)
    if torch.cuda.is_available():
        with torch.no_grad():
            return {t.device.type for t in tensors_of(call(part.to(GPU), placed(given, lambda t: t.to(GPU))))}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in part.modules():
            for table in (module._parameters, module._buffers):
                table.update({k: None if t is None else _like(t) for k, t in table.items()})
        try:
            out = call(part, placed(given, _like))
        except (DataDependentOutputException, DynamicOutputShapeException) as why:
            raise NotForThisPart("it reads numbers of tensors: that is tried where there is a GPU") from why
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            if "device" not in text.lower():
                raise
            raise BrokenRuleError(text, "all tensors on the device of what it is given") from error
        return {t.device.type for t in tensors_of(out)}


def _like(tensor: Tensor) -> Any:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


def placed(value: Any, move: Callable[[Tensor], Any]) -> Any:
    """Return a value with its tensors moved, those of dataclasses, tuples and mappings included."""
    if isinstance(value, Tensor):
        return move(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: placed(getattr(value, f.name), move) for f in fields(value) if f.init})
    if isinstance(value, dict):
        return {k: placed(v, move) for k, v in value.items()}
    return type(value)(placed(v, move) for v in value) if type(value) in (list, tuple) else value


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a value."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    placed(value, keep)
    return found
