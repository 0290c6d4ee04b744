"""Which stages have weights that a pass may leave without a gradient: DDP then looks for them in every pass.

It waits for a gradient of each weight that trains, from each process. A text alone runs the encoder on a blank image
where one trains, and adapters of the zoo connect idle experts, so that most stages need no search.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from zoo.registry import Distiller, Encoder
from zoo.settings.stage import Stage


def why_unused(
    model: Any, stage: Stage, distiller: Distiller | None, *, run_llm: bool = True, run_head: bool = True
) -> str | None:
    """Say which weights that train may have no gradient behind a pass; None: all have one.

    Args:
        model: composed, with the parameters that train set.
        stage: its settings.
        distiller: of the stage.
        run_llm, run_head: whether the stage runs the LLM, and its vocabulary projection.
    """
    return next(_reasons(model, stage, distiller, run_llm, run_head), None)


def _reasons(model: Any, stage: Stage, distiller: Distiller | None, run_llm: bool, run_head: bool) -> Iterator[str]:
    if _trains(distiller):
        yield "the distiller trains, and a batch without images or labels lacks some of its losses"
    adapters = [a for a in model.adapter.values() if _trains(a)]
    if not run_llm and (_trains(model.llm) or adapters):
        yield "the LLM or an adapter trains, and the stage does not run the LLM"
    head = model.get_output_embeddings()
    if not run_head and head is not None and _trains(head) and head.weight is not model.get_input_embeddings().weight:
        yield "the vocabulary projection trains, and the stage does not run it"
    for name in stage.detach:
        if _trains(model.adapter[name]):
            yield f"adapter {name!r} trains and is detached"
    behind = [model.vision, model.projector, model.layout]  # run on a blank image where a batch has none
    if any(_trains(p) for p in model.pruner.values()) and not any(map(_trains, behind)):
        yield "a pruner trains, and runs on images alone"
    if (experts := next(_separate_experts(model.llm), None)) is not None:
        yield f"the experts in {experts!r} are modules of their own, and one without tokens has no gradient"
    parts = [p for p in behind if p is not None]
    for part in [*parts, model.llm, *model.pruner.values(), *model.adapter.values()]:
        for one in _members(part):
            if _trains(one) and _may_skip(one):
                yield f"{type(one).__name__} may leave weights out of a pass (skips_weights)"


def _members(part: Any) -> list[Any]:
    """The encoders of a part that has several, else the part."""
    return list(part.members.values()) or [part] if isinstance(part, Encoder) else [part]


def require_gradients(step: nn.Module) -> None:
    """Raise where weights that train have no gradient: other processes would wait for it.

    Raises:
        RuntimeError: naming the first, and what a part declares that leaves weights out.
    """
    without = [name for name, p in step.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise RuntimeError(
            f"{without[0].removeprefix('model.')}{more} train and have no gradient behind a pass, which other "
            "processes wait for. A part that may leave weights out of a pass has the attribute skips_weights = True."
        )


def _trains(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(p.requires_grad for p in module.parameters())


def _may_skip(part: Any) -> bool:
    """What the part declares; of parts from elsewhere that declare nothing it is not known."""
    declared = part.skips_weights
    return not type(part).__module__.startswith("zoo.") if declared is None else bool(declared)


def _separate_experts(llm: nn.Module) -> Iterator[str]:
    """Name lists of modules that are experts: transformers keeps those of most families in one tensor, used whole."""
    for name, module in llm.named_modules():
        several = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1
        if several and name.endswith("experts") and _trains(module):
            yield name
