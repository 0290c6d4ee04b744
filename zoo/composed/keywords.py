"""Keywords of transformers' `from_pretrained` and `save_pretrained`: those that a composed model takes, and the others.

Each is used or refused: a keyword that is ignored silently loads other weights than were asked for.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from zoo.registry import ZooError, unknown

HUB = ("cache_dir", "force_download", "local_files_only", "token")  # where and how a repository is fetched
# Without effect here: weights are safetensors that are memory-mapped anyway, and code is never fetched.
_LOAD_IDLE = {
    "adapter_kwargs", "allow_all_kernels", "code_revision", "disable_mmap", "low_cpu_mem_usage", "mirror", "proxies",
    "resume_download", "tqdm_class", "trust_remote_code", "weights_only",
}  # fmt: skip
_LOAD_REFUSED = {
    "device_mesh": "torchrun and a recipe share a model out",
    "distributed_config": "torchrun and a recipe share a model out",
    "from_flax": "weights are safetensors",
    "from_tf": "weights are safetensors",
    "fusion_config": "parts are used as they are",
    "generation_config": "set model.generation_config after loading",
    "gguf_file": "weights are safetensors",
    "ignore_mismatched_sizes": "fresh=[<part>] starts a part without its weights",
    "kernel_config": "attention is chosen by attn_implementation=",
    "key_mapping": "names are those of the parts; give renamed weights as state_dict=",
    "load_in_4bit": "zoo.load(..., bits=4)",
    "load_in_8bit": "zoo.load(..., bits=8)",
    "max_memory": "device_map= as a dict assigns parts to devices",
    "offload_buffers": "nothing is offloaded",
    "offload_folder": "nothing is offloaded",
    "offload_state_dict": "nothing is offloaded",
    "quantization_config": "zoo.load(..., bits=4) or bits=8",
    "subfolder": "name the folder itself",
    "tp_plan": "torchrun and a recipe share a model out",
    "tp_size": "torchrun and a recipe share a model out",
    "use_kernels": "attention is chosen by attn_implementation=",
    "variant": "a folder holds one set of weights",
}
_SAVE_IDLE = {"save_function", "save_original_format", "save_peft_format", "token"}  # safetensors, by us, of own names
_SAVE_REFUSED = {
    "distributed_checkpoint": "weights are written whole",
    "variant": "a folder holds one set of weights; name another folder",
}
_WRAPPED = re.compile(r"\.(?:base_layer|original_module)\.")  # in names of weights below a wrapper of PEFT
_PUSH = {"commit_description", "commit_message", "create_pr", "private", "repo_id", "revision", "tags", "token"}


def split_load(given: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort further keywords of `from_pretrained`.

    Args:
        given: beside those that its signature names.
        config: of the model; its fields are set by their names, as in transformers.

    Returns:
        Fields of the config, and how a repository is fetched.

    Raises:
        ZooError: a keyword is unknown, or not supported here.
    """
    rest = {k: v for k, v in given.items() if not k.startswith("_") and k not in _LOAD_IDLE and k not in HUB}
    if rest.pop("use_safetensors", None) is False:
        raise ZooError("from_pretrained: use_safetensors=False is not possible: nothing pickled is read.")
    fields = {k: v for k, v in rest.items() if k not in _LOAD_REFUSED and _is_field(config, k)}
    named = {"config", "fresh", "dtype", "device_map", "attn_implementation", "base", "state_dict", "use_safetensors"}
    named |= {*HUB, *_LOAD_IDLE, "revision", "output_loading_info"}
    _require("from_pretrained", {k: v for k, v in rest.items() if k not in fields}, _LOAD_REFUSED, named)
    return fields, {k: given[k] for k in HUB if given.get(k) is not None}


def require_save(given: Mapping[str, Any], pushed: bool) -> None:
    """Refuse keywords of `save_pretrained` that are unknown, or not supported here.

    Raises:
        ZooError: with the keyword, and the nearest one or the reason.
    """
    rest = dict(given)
    if rest.pop("safe_serialization", True) is False:
        raise ZooError("save_pretrained: safe_serialization=False is not possible: weights are safetensors.")
    allowed = _SAVE_IDLE | (_PUSH if pushed else set())
    named = {"is_main_process", "state_dict", "push_to_hub", "max_shard_size", "include_base", "safe_serialization"}
    _require("save_pretrained", {k: v for k, v in rest.items() if k not in allowed}, _SAVE_REFUSED, named | allowed)


def require_own_layers(model: Any, names: Iterable[str]) -> None:
    """Refuse to save a model whose layers are wrapped by PEFT: a folder with their names could not be loaded.

    Args:
        model: a composed model, whose weights are saved.
        names: of the weights; adapters of the zoo keep those of the layers that they wrap.

    Raises:
        ZooError: with a wrapped weight, and how to save it.
    """
    wrappers = {path for path, module in model.named_modules() if type(module).__module__.startswith("peft.")}
    own = {f"llm.lm.{name}" for adapter in model.adapter.values() for name in adapter.adapter_state_dict()}
    for name in names if wrappers else ():
        parts = _WRAPPED.split(name)
        if len(parts) > 1 and parts[0] in wrappers and name not in own:
            raise ZooError(
                f"{name!r} is inside a layer of PEFT, from get_peft_model: save the adapter by the save_pretrained of "
                "the PeftModel, or the whole by peft_model.merge_and_unload().save_pretrained(...)."
            )


def put(model: nn.Module, state: Mapping[str, Tensor], where: str) -> set[str]:
    """Load a state dict into a built model, each tensor in the data type of the model.

    Returns:
        The names in the state dict, and those tied to one of them.

    Raises:
        ZooError: a name that the model does not have, or a different shape.
    """
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise unknown(f"tensor of the model in {where}", name, own)
        if tensor.shape != own[name].shape:
            raise ZooError(f"{where}: {name} is {tuple(tensor.shape)}, and {tuple(own[name].shape)} in the model.")
    model.load_state_dict(state, strict=False)
    places = {own[name].data_ptr() for name in state}
    return {name for name, tensor in own.items() if tensor.data_ptr() in places}


def _is_field(config: Any, name: str) -> bool:
    return hasattr(config, name) and not callable(getattr(config, name))


def _require(method: str, given: Mapping[str, Any], refused: Mapping[str, str], named: set[str]) -> None:
    """Raise for the first unknown keyword, or refused one with a value other than transformers' default."""
    for name, value in given.items():
        if name not in refused:
            raise unknown(f"keyword of {method}", name, named)
        if value not in (None, False, "", {}):
            raise ZooError(f"{method}: {name}= is not possible here: {refused[name]}.")
