"""What a checkpoint of a language model says of itself, looked at before transformers acts on it.

A config.json may name kernels, adapters and ways of quantisation for which transformers would fetch code or another
repository. The weights are what a person asked for; the rest is left out or refused.
"""

from pathlib import Path
from typing import Any

import torch

from zoo.registry import ZooError, one_line
from zoo.registry.foreign import read_model_config, require_plausible

# Ways of quantisation that need nothing but an installed package and plain values, and those for which transformers
# fetches kernels where the package `kernels` is there.
QUANTIZED = ("awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "compressed-tensors", "gptq")
_WITH_KERNELS = ("fp8", "mxfp4")


def read_config(checkpoint: str, where: dict[str, Any]) -> Any:
    """Return the config of transformers of a checkpoint; nothing in it chooses a kernel.

    Args:
        checkpoint: hub name or folder.
        where: options of `from_pretrained`: the revision.

    Raises:
        ZooError: it names code, asks for absurd sizes, is an adapter, or is quantised in a way that is not read.
        OSError, ValueError, KeyError: as transformers raises them, where there is no such checkpoint.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    quiet: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, **where}
    file = cached_file(checkpoint, "config.json", **quiet)
    content = read_model_config(Path(file)) if file else {}
    if cached_file(checkpoint, "adapter_config.json", **quiet):
        raise ZooError(
            f"llm checkpoint {checkpoint!r} is an adapter of PEFT, or has one beside it, and its file names the model "
            "that would be loaded: merge it into its model, and name that folder."
        )
    _require_known_quantisation(content, checkpoint)
    hf = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **where)
    hf._attn_implementation = hf._experts_implementation = None  # the run chooses
    return hf


def require_filled(hf: Any, checkpoint: str) -> None:
    """Refuse a config that the weights beside it are too small for: what is missing would be made up in memory.

    Raises:
        ZooError: so it is. The files of a hub repository are looked at once they are in the cache.
    """
    from transformers import AutoModelForCausalLM

    from zoo.registry.foreign import require_file

    files = sorted(Path(checkpoint).glob("*.safetensors")) if Path(checkpoint).is_dir() else []
    if not files:
        return
    for file in files:
        require_file(file)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf)
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
            f"file names or that it fetches. Read are {', '.join(known)}, and whole weights."
        )
