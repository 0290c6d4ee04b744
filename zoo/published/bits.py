"""Language model layers in 8 or 4 bits, by bitsandbytes on CUDA, for inference and for training adapters.

Weights are read whole to host memory, and each layer is made small on its way to the device: LLM.int8() (Dettmers et
al., arXiv:2208.07339) or NF4 with its scales quantised too (QLoRA, arXiv:2305.14314). Embeddings, norms, biases and the
vocabulary projection stay as they are. `zoo.composed.quantized` is another thing: a frozen teacher's weights, on any
device.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from zoo.registry import ZooError
from zoo.storage.safetensors_file import same

BITS = (8, 4)


def require_bits(bits: int, device: torch.device) -> None:
    """Refuse a model or device that bitsandbytes does not support.

    Raises:
        ZooError: no such number of bits, a device other than CUDA, or the package is not there.
    """
    if bits not in BITS:
        raise ZooError(f"The language model can be held in 8 or 4 bits, got bits={bits}.")
    if device.type != "cuda":
        raise ZooError(
            f"bits={bits} needs CUDA: bitsandbytes, which holds the weights and multiplies with them, is used there "
            f"only, and the model goes to {device.type!r}. Leave bits out; dtype='bfloat16' halves the memory."
        )
    if find_spec("bitsandbytes") is None:
        raise ZooError(f"bits={bits} needs bitsandbytes: pip install bitsandbytes.")


def in_bits(llm: Any, bits: int, device: torch.device) -> list[nn.Parameter]:
    """Replace the linear layers of the decoder, and bring the language model to the device.

    Adapters that copy whole weights (the words `dense` and `moe`) are no longer served.

    Args:
        llm: the part, with its weights on the host, ahead of adapters.
        bits: 8 or 4.
        device: CUDA.

    Returns:
        The parameters that hold weights in few bits.
    """
    made = []
    for layer in llm.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    small = _linear(child, bits)
                    setattr(parent, name, small)
                    made.append(small)
        nn.Module.to(layer, device)  # bitsandbytes quantises when moving to CUDA
    nn.Module.to(llm, device)
    setattr(llm.lm, f"is_loaded_in_{bits}bit", True)  # read by PEFT
    llm.provides = frozenset(llm.provides) - {"dense", "moe"}
    return [small.weight for small in made]


def layers_in(llm: Any) -> Iterator[Any]:
    """Yield the quantised layers of a language model."""
    import bitsandbytes as bnb

    kinds = bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
    return (module for module in llm.modules() if isinstance(module, kinds))


def made_of(layer: Any, weight: torch.Tensor, bits: int) -> bool:
    """Whether a quantised layer is bit for bit what quantising the weight (out, in) gives."""
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    whole.weight = nn.Parameter(weight, requires_grad=False)
    again = nn.Module.to(_linear(whole, bits), layer.weight.device).state_dict()
    held = {n: t for n, t in layer.state_dict().items() if n != "bias" and isinstance(t, torch.Tensor)}
    return all(n in again and same(t, again[n].to(t.device)) for n, t in held.items())


def _linear(linear: nn.Linear, bits: int) -> Any:
    """Return the layer as one of bitsandbytes; its weight is quantised when it is moved to CUDA."""
    import bitsandbytes as bnb

    sizes = linear.in_features, linear.out_features
    weight, dtype = linear.weight.detach(), linear.weight.dtype
    if bits == 8:
        small = bnb.nn.Linear8bitLt(*sizes, bias=linear.bias is not None, has_fp16_weights=False)
        small.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": "nf4", "compress_statistics": True}
        small = bnb.nn.Linear4bit(*sizes, bias=linear.bias is not None, compute_dtype=dtype, **options)
        small.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    small.bias = linear.bias
    return small.requires_grad_(False)
