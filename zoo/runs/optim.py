"""Optimisers of a stage: Muon on matrices, AdamW on other parameters; learning rates by part and by step.

Muon: Jordan et al., https://kellerjordan.github.io/posts/muon/, as `torch.optim.Muon` computes it. Ours differs in
speed only: matrices of one shape are orthogonalised in one batched product.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from zoo.composed.trainable import meant
from zoo.registry import ZooError, unknown
from zoo.runs.checkpoint import shared_as
from zoo.runs.shared_matrices import worked_on
from zoo.settings.stage import Stage

MATRIX_BYTES = 256 * 2**20  # the most that one stack of matrices may hold, in float32


class StackedMuon(Muon):
    """`torch.optim.Muon` with matrices of the same shape stacked, each worked on in one of several processes.

    Torch's own loop takes 131 ms for the 38 matrices of a 1.5 M-parameter model on two cores, this one 10 ms.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._turn = 0  # matrices of this step so far
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor] = []
        self._init_group(group, params, grads, buffers)
        if not params:
            return
        momentum, lr = group["momentum"], float(group["lr"])
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = [g.lerp(b, momentum) for g, b in zip(grads, buffers, strict=True)] if group["nesterov"] else buffers
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        coefficients, steps, eps = group["ns_coefficients"], group["ns_steps"], group["eps"]

        def work(stack: Tensor) -> Tensor:
            return orthogonalise(stack, coefficients, steps, eps)

        for rows in _stacks(updates):
            found = worked_on([updates[i] for i in rows], work, self._turn)
            self._turn += len(rows)
            height, width = updates[rows[0]].shape
            rate = lr * math.sqrt(max(1.0, height / width))  # torch's adjust_lr_fn "original"
            for i, update in zip(rows, found, strict=True):
                params[i].add_(_as_share(update.to(params[i].dtype), params[i]), alpha=-rate)


def _as_share(update: Tensor, like: Any) -> Tensor:
    """Return an update, whole or this process's share, in the form of its parameter."""
    if not hasattr(like, "to_local") or update.shape == like.shape != like.to_local().shape:
        return shared_as(update, like)
    return DTensor.from_local(
        update, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def orthogonalise(stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Make each matrix of (n, rows, columns) nearly orthogonal by Newton-Schulz iteration, in bfloat16 like torch."""
    a, b, c = coefficients
    # The Gram matrix is the smaller one if rows <= columns.
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.to(torch.bfloat16)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _stacks(updates: list[Tensor]) -> Iterable[list[int]]:
    """Indices of matrices that share shape and device, in stacks that fit the memory limit."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, update in enumerate(updates):
        alike[(update.shape, update.device)].append(i)
    for (shape, _), rows in alike.items():
        most = max(1, MATRIX_BYTES // (4 * shape.numel()))
        for start in range(0, len(rows), most):
            yield rows[start : start + most]


def build_optimizers(
    modules: dict[str, nn.Module], stage: Stage, part_of: Callable[[str], Iterable[str]]
) -> list[Optimizer]:
    """Return the optimisers for every parameter that requires a gradient.

    Args:
        modules: prefix -> module ("" for the model, "distiller" for its loss head).
        stage: with the optimiser and its settings.
        part_of: name of a parameter -> the parts it belongs to, for `lr_scale`.

    Raises:
        ZooError: nothing trains, or `lr_scale` names a part that does not train.
    """
    named = {
        f"{prefix}.{name}" if prefix else name: p
        for prefix, module in modules.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    if not named:
        raise ZooError(f"Nothing trains: no parameter is left by train={stage.train} and freeze={stage.freeze}.")
    scales = rate_scales(list(named), stage.lr_scale, part_of)
    matrices = matrices_in(modules) if stage.optimizer == "muon_adamw" else set()
    # By their kind, since not all are called so: GPT-2's are wte and wpe.
    still = {id(m.weight) for root in modules.values() for m in root.modules() if isinstance(m, nn.Embedding)}
    still |= {i for root in modules.values() for i in _scales_of_peft(root)}
    muon: dict[float, list[nn.Parameter]] = defaultdict(list)
    adamw: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, p in named.items():
        if name in matrices:
            muon[scales[name]].append(p)
        else:
            adamw[scales[name], _decays(name, p) and id(p) not in still].append(p)
    result: list[Optimizer] = []
    if muon:
        groups = [{"params": ps, "lr": stage.matrix_lr * scale} for scale, ps in muon.items()]
        result.append(StackedMuon(groups, momentum=stage.momentum, weight_decay=stage.weight_decay))
    if adamw:
        groups = [
            {"params": ps, "lr": stage.lr * scale, "weight_decay": stage.weight_decay if decay else 0.0}
            for (scale, decay), ps in adamw.items()
        ]
        first, second = stage.betas
        result.append(AdamW(groups, betas=(first, second), fused=True))
    for optimizer in result:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # `set_rate` multiplies this one
    return result


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for a parameter, by its name and shape.

    Not for biases, norms and embeddings: a token that does not occur would shrink without a gradient. Biases of stacked
    experts have two dimensions, and [CLS] three.
    """
    return parameter.ndim >= 2 and "embed" not in name and not name.endswith(("bias", "_token"))


def matrices_in(modules: dict[str, nn.Module]) -> set[str]:
    """Return the names of the weights for Muon: those of linear layers, except vocabulary heads and low-rank factors.

    The rows of a head are separate classifiers, like those of an embedding, and a low-rank factor is only
    half of a map between two layers.
    """
    found = set()
    for prefix, module in modules.items():
        tables: list[Any] = [m for m in module.modules() if hasattr(m, "get_output_embeddings")]
        heads = {id(m.get_output_embeddings()) for m in tables}
        factors = _layers_of_peft(module)
        for name, layer in module.named_modules():
            # By size, since factors of other adapters are plain linear layers.
            low_rank = isinstance(layer, nn.Linear) and (min(layer.weight.shape) < 32 or id(layer) in factors)
            if isinstance(layer, nn.Linear) and id(layer) not in heads and not low_rank and prefix != "distiller":
                found.add(".".join(word for word in (prefix, name, "weight") if word))
    return found


def _added_by_peft(root: nn.Module) -> list[nn.Module]:
    """What PEFT put beside the layers of a model: modules, or dicts of parameters."""
    added = [getattr(m, name, None) for m in root.modules() for name in getattr(m, "adapter_layer_names", ())]
    return [part for part in added if isinstance(part, nn.Module)]


def _layers_of_peft(root: nn.Module) -> set[int]:
    """The ids of the layers that PEFT put beside those of a model: factors of LoRA of any rank."""
    return {id(layer) for part in _added_by_peft(root) for layer in part.modules()}


def _scales_of_peft(root: nn.Module) -> set[int]:
    """The ids of PEFT's vectors, which scale: those of IA3 have two dimensions, and begin at 1."""
    factors = {id(m.weight) for m in root.modules() if isinstance(m, nn.Linear)}  # also of rank 1
    own = {id(p): p for part in _added_by_peft(root) for p in part.parameters() if id(p) not in factors}
    return {i for i, p in own.items() if p.numel() == max(p.shape, default=0)}


def parts_of(model: Any) -> Callable[[str], tuple[str, str]]:
    """Return a function from a parameter's name to the parts it belongs to, the innermost first."""

    def parts(name: str) -> tuple[str, str]:
        part = "distiller" if name.startswith("distiller.") else model.part_of(name)
        return part, part.partition(".")[0]

    return parts


def rate_scales(
    names: list[str], wanted: dict[str, float], part_of: Callable[[str], Iterable[str]]
) -> dict[str, float]:
    """Return the factor on each parameter's learning rate: the last entry of `lr_scale` that matches name or part."""
    result = dict.fromkeys(names, 1.0)
    for pattern, factor in wanted.items():
        hit = [n for n in names if pattern in part_of(n) or meant(pattern, n)]
        if not hit:
            raise unknown("trainable part for lr_scale", pattern, {p for n in names for p in part_of(n)})
        result |= dict.fromkeys(hit, factor)
    return result


def rate_at(step: int, steps: int, stage: Stage) -> float:
    """Return the factor on the peak learning rates at optimiser step `step` of `steps`."""
    # No state of a scheduler: a resumed run computes the rate of its step.
    warmup = round(stage.warmup_ratio * steps)
    flat = max(warmup, round(stage.flat_ratio * steps))
    if step < warmup:
        return (step + 1) / warmup
    if step < flat or stage.schedule == "constant":
        return 1.0
    done = (step - flat) / max(1, steps - flat)
    fall = 1 - done if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return stage.final_ratio + (1 - stage.final_ratio) * fall


def set_rate(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
