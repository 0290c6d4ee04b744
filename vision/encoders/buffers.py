"""Weights that never train, as buffers: data parallelism does not wait for their gradients."""

from torch import nn


def as_buffers(module: nn.Module) -> None:
    """Turn all parameters of a module into buffers of the same names."""
    for inner in module.modules():
        for name, parameter in list(inner._parameters.items()):
            del inner._parameters[name]
            inner.register_buffer(name, None if parameter is None else parameter.detach())
