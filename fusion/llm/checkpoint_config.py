"""Read the config of a language model's checkpoint safely, before transformers acts on it.

A config.json may name kernels, adapters and quantisation methods for which transformers would fetch code or another
repository. The user asked for weights; everything else is ignored or refused.
"""

from pathlib import Path
from typing import Any

import torch

from zoo.fusion.llm.text_model import causal_class
from zoo.registry import ZooError, one_line
from zoo.registry.foreign import read_model_config, require_plausible

# Quantisation methods that need only an installed package and plain values, and those for which transformers fetches
# kernels if the package `kernels` is installed.
QUANTIZED = ("awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "compressed-tensors", "gptq")
_WITH_KERNELS = ("fp8", "mxfp4")


def read_config(checkpoint: str, where: dict[str, Any]) -> Any:
    """Read the transformers config of a checkpoint, without its choice of kernels.

    Args:
        checkpoint: hub name or folder.
        where: options of `from_pretrained`: the revision.

    Raises:
        ZooError: it names code, has absurd sizes, is an adapter, or is quantised by an unsupported method.
        OSError, ValueError, KeyError: raised by transformers if the checkpoint does not exist.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    quiet: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, **where}
    file = cached_file(checkpoint, "config.json", **quiet)
    content = read_model_config(Path(file)) if file else {}
    if cached_file(checkpoint, "adapter_config.json", **quiet):
        raise ZooError(
            f"llm checkpoint {checkpoint!r} holds a PEFT adapter, whose file names the model to load: merge it into "
            "its model, and name that folder."
        )
    _require_known_quantisation(content, checkpoint)
    hf = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **where)
    hf._attn_implementation = hf._experts_implementation = None  # the run chooses
    return hf


def require_filled(hf: Any, checkpoint: str) -> None:
    """Refuse a config far larger than the folder's weights: missing ones would be allocated at random.

    Raises:
        ZooError: the files are too small. Files of a hub repository are not checked.
    """
    from zoo.registry.foreign import require_file

    files = sorted(Path(checkpoint).glob("*.safetensors")) if Path(checkpoint).is_dir() else []
    if not files:
        return
    for file in files:
        require_file(file)
    try:
        with torch.device("meta"):
            model = causal_class(hf).from_config(hf)
    except Exception as error:  # an activation that does not exist, heads that do not divide: a class of its own each
        raise ZooError(f"llm checkpoint {checkpoint!r} cannot be used: {one_line(error)}") from error
    numbers = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    require_plausible(numbers, files, f"The config of the llm checkpoint {checkpoint!r}")


def _require_known_quantisation(content: dict[str, Any], checkpoint: str) -> None:
    from transformers.utils import is_kernels_available

    stated = content.get("quantization_config") or (content.get("text_config") or {}).get("quantization_config")
    if not stated:
        return
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if method is None and isinstance(stated, dict) and (stated.get("load_in_4bit") or stated.get("load_in_8bit")):
        method = "bitsandbytes"
    known = QUANTIZED + (() if is_kernels_available() else _WITH_KERNELS)
    if method not in known:
        raise ZooError(
            f"llm checkpoint {checkpoint!r} is quantised by {method!r}, for which transformers may run code that the "
            f"file names or that it fetches. Supported: {', '.join(known)}, and unquantised weights."
        )
