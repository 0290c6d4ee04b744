"""EVA and CorDA: initial values of LoRA from activations, on passes that the stage runs.

EVA (Paischer et al., arXiv:2410.07170) takes the first right singular vectors of the inputs of a layer for A, by PEFT's
own code. CorDA (Yang et al., arXiv:2406.05223) splits the weights along the covariance C of the inputs, W C = U S V':
B A is the part with the largest S (`ipm`), or with the smallest (`kpm`), times C^-1. PEFT's code for it takes one row
without padding at a time and needs a package that PEFT does not install, so the decomposition is done here. Padding is
left out, and for EVA what has no label too, where the options want it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import IGNORE_INDEX, ZooError
from zoo.registry.forward_pass import current

MOST = 50  # rounds over the batches until EVA's vectors have to stay the same


@torch.no_grad()
def eva_vectors(lm: Any, config: Any, passes: Sequence[Callable[[], None]]) -> dict[str, Tensor]:
    """Return the vectors (R, I) of each target, by its path.

    Args:
        lm: the language model without the adapter.
        config: PEFT's, with whole names of targets.
        passes: each runs the model on a batch.

    Raises:
        ZooError: the batches have fewer tokens than the rank, or the vectors keep changing.
    """
    from peft.tuners.lora.eva import get_eva_state_dict

    labelled = config.eva_config.use_label_mask
    seen = {"passes": 0, "tokens": 0}

    def inputs(layer_input: Any, model_input: Any, name: str) -> Tensor:
        x = _valid(layer_input[0], labelled)  # (S, I)
        seen["tokens"] = max(seen["tokens"], len(x))
        return x

    def forward(model: Any, number: Tensor) -> None:
        seen["passes"] += 1
        if seen["passes"] > len(passes) and seen["tokens"] < config.r:
            raise ZooError(
                f"EVA needs at least r={config.r} tokens {'with labels ' if labelled else ''}in a batch, and the "
                f"largest of {len(passes)} has {seen['tokens']}: a larger batch_size, or a smaller r."
            )
        if seen["passes"] > MOST * len(passes) + 2:
            raise ZooError(
                f"EVA's vectors still change after {MOST} rounds over {len(passes)} batches: more batches "
                f"(adapter.peft.batches), or a lower eva_config.tau (now {config.eva_config.tau})."
            )
        passes[int(number)]()

    try:
        found: dict[str, Tensor] = get_eva_state_dict(
            lm,
            [torch.tensor(i) for i in range(len(passes))],
            peft_config=config,
            forward_fn=forward,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=inputs,
            gather_distributed_inputs=False,  # every process runs the same batches
            show_progress_bar=False,
        )
    finally:  # PEFT leaves its hooks where a pass raises, and each later pass would run them
        for module in lm.modules():
            for number, hook in [*module._forward_hooks.items()]:
                if type(hook).__module__ == get_eva_state_dict.__module__:
                    del module._forward_hooks[number]
    return found


@contextmanager
def corda_eigens(lm: Any, config: Any, paths: Sequence[str], passes: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Leave on each target what PEFT's `corda_init` reads, within the context."""
    modules = {path: lm.get_submodule(path) for path in paths}
    sums: dict[str, Any] = dict.fromkeys(paths, 0)
    counts = dict.fromkeys(paths, 0)

    def add(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = _valid(args[0], labelled=False).float()  # (S, I)
        x = x / x.max().abs()
        sums[path] = sums[path] + x.T @ x
        counts[path] += 1

    handles = [module.register_forward_pre_hook(partial(add, path)) for path, module in modules.items()]
    try:
        with torch.no_grad():
            for run in passes:
                run()
    finally:
        for handle in handles:
            handle.remove()
    try:
        for path, module in modules.items():
            if not counts[path]:
                raise ZooError(f"CorDA: no batch reached {path}.")
            rank = config.rank_pattern.get(re.escape(path), config.r)
            module.eigens = _split(module, sums.pop(path) / counts[path], rank, config.corda_config.corda_method)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("eigens", None)


@torch.no_grad()
def _split(linear: Any, covariance: Tensor, rank: int, method: str) -> SimpleNamespace:
    """Return the R largest or smallest components of W C, and C^-1 V in place of V, as PEFT calls them."""
    weight = linear.weight.float()
    weight = weight.T if type(linear).__name__ == "Conv1D" else weight  # (O, I)
    if not covariance.isfinite().all() or not covariance.any():
        raise ZooError("CorDA: the inputs of a layer are zero in these batches, or not finite.")
    eye, mean, damp = torch.eye(len(covariance), device=covariance.device), covariance.diagonal().mean(), 0.01
    while True:  # until the inverse is one: inputs of few directions have a covariance without
        damped = covariance + damp * mean * eye  # (I, I)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    left, values, right = torch.linalg.svd(weight @ damped, full_matrices=False)
    chosen = slice(0, rank) if method == "ipm" else slice(len(values) - rank, None)
    right = (right @ inverse).T  # (I, min(O, I))
    return SimpleNamespace(S_WC=values[chosen].clone(), U_WC=left[:, chosen], V_WC=right[:, chosen])


def _valid(x: Tensor, labelled: bool) -> Tensor:
    """The inputs (S, I) of tokens that count, of a layer's (B, T, I); all where a pruner inside has dropped some."""
    now = current()
    sequence = None if now is None else now.sequence
    keep = None if sequence is None else sequence.attention_mask
    if sequence is not None and sequence.segment_ids is not None:
        keep = sequence.segment_ids >= 0
    keep = None if keep is None or keep.ndim != 2 else keep.bool()
    if labelled and sequence is not None and sequence.labels is not None:
        learnt = sequence.labels != IGNORE_INDEX
        keep = learnt if keep is None or keep.shape != learnt.shape else keep & learnt
    if keep is None or keep.shape != x.shape[:-1]:
        return x.detach().flatten(0, -2)
    return x.detach()[keep]
