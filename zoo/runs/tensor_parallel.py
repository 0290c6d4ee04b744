"""Tensor parallelism: processes share each layer of the LLM, by the plan that transformers has for its family.

A plan names linear layers and how each is divided: by columns (its output, heads of attention say) or by rows (its
input), so that a layer needs one sum over the processes behind attention and one behind the feed-forward. transformers'
own styles divide the weights and put these sums around the layers' forwards. Embedding, norms, head, encoder and
projector stay whole, since losses, images and prompts read them; what is between layers is the same in each process.

The processes of a group read the same samples. FSDP2 divides weights further, over the readers, also where that is one.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError

DIVIDED = {"colwise": 0, "rowwise": 1}  # styles of transformers that divide a linear layer -> side of its weight
SUMMED = "replicated_with_grad_allreduce"  # of a norm that reads the heads of one process: its gradients add up
MESH = ("replicate", "shard", "tensor")


def tensor_size(accelerator: Any) -> int:
    """Return the number of processes that share each layer of the LLM."""
    mesh = getattr(accelerator, "torch_device_mesh", None)
    return mesh[MESH[-1]].size() if mesh is not None and MESH[-1] in (mesh.mesh_dim_names or ()) else 1


def reader_of(accelerator: Any) -> tuple[int, int]:
    """Return which reader of data this process is, and of how many: processes that share layers read the same."""
    size = tensor_size(accelerator)
    return accelerator.process_index // size, accelerator.num_processes // size


def planned(llm: Any, tensor: int) -> dict[str, str]:
    """Return the modules that a plan changes, and how: name in the language model -> a key of `DIVIDED`, or `SUMMED`.

    Args:
        llm: language model, on any device.
        tensor: processes that share a layer.

    Raises:
        ZooError: there is no plan, it divides in ways that are not supported here, or something does not divide.
    """
    lm, config = llm.lm, llm.lm.config.get_text_config()
    plan = {k: str(v) for k, v in (getattr(config, "base_model_tp_plan", None) or {}).items() if "layers" in k}
    asked = f"parallel.tensor={tensor}"
    if not plan:
        raise ZooError(f"{asked}: transformers has no plan of tensor parallelism for {type(lm).__name__}.")
    if others := sorted({way for way in plan.values() if way not in (*DIVIDED, SUMMED)}):
        raise ZooError(
            f"{asked}: transformers' plan for {type(lm).__name__} divides by {', '.join(others)}; "
            f"{', '.join(DIVIDED)} and {SUMMED} alone are supported (of Llama, Mistral, Qwen2 and Qwen3, say)."
        )
    for what in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(config, what, None) or tensor) % tensor:
            raise ZooError(f"{asked} does not divide the {heads} {what.replace('num_', '')} of the LLM.")
    found = {}
    for name, module in lm.named_modules():
        for pattern, way in plan.items():
            if not re.search(rf"(^|[.]){pattern.replace('.', '[.]').replace('*', '[0-9]+')}$", name):
                continue
            if way != SUMMED and not isinstance(module, nn.Linear):
                raise ZooError(f"{asked} divides linear layers, and {name} is a {type(module).__name__}.")
            if way != SUMMED and module.weight.shape[DIVIDED[way]] % tensor:
                raise ZooError(f"{asked} does not divide {name}, {tuple(module.weight.shape)}.")
            found[name] = way
    return found


def require_divisible(model: Any, tensor: int, stages: Mapping[str, Any]) -> None:
    """Refuse what cannot be trained with layers that processes share.

    Args:
        model: composed, on any device.
        tensor: processes that share a layer.
        stages: name -> settings.

    Raises:
        ZooError: the LLM has no plan, or a part or a stage reads whole layers.
    """
    if tensor == 1:
        return
    asked = f"parallel.tensor={tensor}"
    if names := list(model.adapter):
        raise ZooError(
            f"{asked} divides the linear layers of the LLM, whose inputs and outputs adapter {names[0]!r} takes whole: "
            "train it with parallel.shard=fsdp2 and parallel.tensor=1."
        )
    if names := [name for name, pruner in model.pruner.items() if pruner.inside]:
        raise ZooError(
            f"{asked} leaves each process some heads of the LLM, and pruner {names[0]!r} scores image tokens by all of "
            "them: processes would keep different tokens. Choose one that acts before the LLM."
        )
    planned(model.llm, tensor)
    for name, stage in stages.items():
        if stage.optimizer == "muon_adamw":
            raise ZooError(f"Stage {name!r}: Muon needs whole matrices, which {asked} divides: set optimizer=adamw.")
        if stage.compile:
            raise ZooError(f"Stage {name!r}: compile=true is not supported with {asked}.")


def divide(llm: Any, mesh: Any) -> None:
    """Divide the layers of a language model over the processes of a mesh, in place, by transformers' own styles.

    Args:
        llm: language model, with parameters on the meta device.
        mesh: of one dimension.
    """
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    # It notes, at each saving, that weights that are divided twice are gathered in two steps.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for name, way in planned(llm, mesh.size()).items():
        module, style = llm.lm.get_submodule(name), ALL_PARALLEL_STYLES[way]
        if way == SUMMED:
            _add_up(module, mesh.get_group())
            continue
        for key in list(module._parameters):
            style.shard_param(module, key, mesh)
        style.install_forward(module, mesh)


def _add_up(module: nn.Module, group: Any) -> None:
    """Sum the gradients of a module's parameters over a group, as each is done.

    Not by transformers' style: before 5.23 it sums in a hook of the module, which may run ahead of the gradients.
    """
    hooked: dict[int, Any] = {}

    def hook(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):  # FSDP2 puts the gathered one here for a pass
            if torch.is_grad_enabled() and parameter.requires_grad and id(parameter) not in hooked:
                hooked[id(parameter)] = parameter
                parameter.register_post_accumulate_grad_hook(
                    lambda p: torch.distributed.all_reduce(p.grad, group=group)
                )

    module.register_forward_pre_hook(hook)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Any], most: float) -> None:
    """Clip the norm of all gradients, as `torch.nn.utils.clip_grad_norm_` does, over weights on several meshes."""
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    world = torch.distributed.get_world_size()
    squares = [_local(g).float().square().sum() * (_shards(g) / world) for g in gradients]  # copies count once
    total = torch.stack(squares).sum()
    torch.distributed.all_reduce(total)
    factor = (most / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        _local(gradient).mul_(factor)


def _shards(tensor: Any) -> int:
    """Return into how many parts a tensor is divided."""
    sides = zip(tensor.device_mesh.shape, tensor.placements, strict=True) if hasattr(tensor, "placements") else ()
    return math.prod(size for size, placement in sides if not placement.is_replicate())


def _local(tensor: Any) -> Tensor:
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
