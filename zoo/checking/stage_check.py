"""Whether a stage of a recipe can run, checked before a weight is loaded: what trains, data, losses, rates, teacher."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from zoo.checking.devices import OnDevice, on_device
from zoo.checking.memory import Memory, memory_of
from zoo.checking.plan import device_of
from zoo.composed.assembly import build_distiller
from zoo.fusion.llm.attention import require_attention
from zoo.registry import Distiller, ZooError, unknown
from zoo.runs.kept_features import SHARDED
from zoo.runs.lengths import require_positions
from zoo.runs.optim import parts_of, rate_scales
from zoo.runs.sharding import gathers_short, require_one_format

_MASKED = ("eager", "sdpa", "zoo_eager", "auto")  # kernels that take a mask (B, 1, T, T), which packed rows need


@dataclass
class Stagecheck:
    """What a stage of the recipe trains, and its memory."""

    name: str
    trainable: dict[str, int]
    measure: Callable[[Any, int], Memory]  # of a batch, or None for an assumed one, and the id of its placeholders
    spread: Callable[[Any, Any, Any, int], OnDevice]  # the same for many devices, and how they share the model
    one_dialog: str = ""  # why a row can hold one dialog only; empty: it can hold several
    needs: frozenset[str] = frozenset()  # words of the distiller
    grid: tuple[int, int] | None = None  # of the distiller's targets
    batch: Any = None  # of the stage's data, as the processor collates it; None: one is assumed
    share_batch: Any = None  # the same for one of many devices
    placeholder: int = -1  # id of image tokens in it

    @cached_property
    def memory(self) -> Memory:
        """What training takes on one process; computed when it is asked for, in a second or a few."""
        return self.measure(self.batch, self.placeholder)


def check_stage(name: str, stage: Any, model: Any, plan: Any, weights: int) -> Stagecheck:
    """Check a stage.

    Args:
        name, stage: as in the recipe.
        model: on the meta device.
        plan: of the run.
        weights: bytes of the model.

    Raises:
        ZooError: it cannot run.
    """
    where = f"Stage {name!r}: "
    try:
        _check_data(stage, plan)
        _check_rows(stage, model, plan)
        least = model.num_image_tokens if model.layout is None else 0
        require_positions(stage, model.llm.max_positions, least)
        _check_hidden(stage, model)
        _check_shorter(stage, model)
        model.detach_only(stage.detach)
        trainable = model.set_trainable(stage.train, stage.freeze)
        distiller, teacher, alone = _check_distiller(name, stage, model, plan) if stage.distiller else (None, 0, "")
        if not stage.distiller and stage.teacher:
            raise ZooError(f"a teacher is named, but no distiller: set stages.{name}.distiller.")
        _check_shards(stage, model, plan)
        _check_losses(stage, model, distiller)
        _check_rates(stage, model, distiller)
    except ZooError as error:
        raise ZooError(where + str(error)) from error

    def set_up(placeholder: int) -> None:
        """Set the model up for this stage again, since others were checked in between."""
        model.config.image_token_id = placeholder
        model.detach_only(stage.detach)
        model.set_trainable(stage.train, stage.freeze)

    def measure(batch: Any, placeholder: int) -> Memory:
        set_up(placeholder)
        return memory_of(stage, model, plan, weights=weights + teacher, distiller=distiller, batch=batch)

    def spread(scale: Any, parallel: Any, batch: Any, placeholder: int) -> OnDevice:
        set_up(placeholder)
        return on_device(stage, model, plan, scale, parallel, batch, needs)

    needs, grid = (frozenset(), None) if distiller is None else (frozenset(distiller.needs), distiller.grid)
    return Stagecheck(name, trainable, measure, spread, _one_dialog(stage, model, plan) or alone, needs, grid)


def _check_data(stage: Any, plan: Any) -> None:
    """Refuse data sets that the run does not have, and a stage without data to train on."""
    for key in stage.data:
        if key not in plan.data:
            raise unknown("data", key, plan.data)
    if plan.splits is not None and not stage.data:
        splits = {name: plan.splits.get(name, "train") for name in plan.data}
        if "train" in splits.values():
            return
        there = ", ".join(f"{name} (split {split})" for name, split in splits.items()) or "none"
        raise ZooError(f"there is no data to train on. The run has {there}: choose some with data=[...].")


def _check_rows(stage: Any, model: Any, plan: Any) -> None:
    """Refuse rows of several samples where a part, or the attention, cannot keep the samples apart."""
    alone = next((n for n, a in model.adapter.items() if a.per_row), None)
    if alone and stage.pack_length is not None:
        raise ZooError(
            f"pack_length={stage.pack_length} puts several samples into a row, and adapter {alone!r} changes the LLM "
            "for a whole row: set pack_length=null."
        )
    unlike = model.vision is not None and model.vision.native  # an image may have fewer than the most
    if stage.pack_length is not None and stage.pack_length < model.num_image_tokens and not unlike:
        raise ZooError(
            f"pack_length={stage.pack_length} is less than the {model.num_image_tokens} tokens of one image: set "
            "pack_length=null, or more."
        )
    if stage.pack_length is not None and plan.attention not in _MASKED:
        raise ZooError(
            f"pack_length={stage.pack_length} puts several samples into a row, and attention={plan.attention} takes no "
            "mask that keeps them apart: set pack_length=null, or attention=auto."
        )
    if stage.pack_length is not None and model.llm.mixes_rows:
        raise ZooError(
            f"pack_length={stage.pack_length} puts several samples into a row, and {model.llm.mixes_rows}: set "
            "pack_length=null, and pack=none where data has several dialogs about an image."
        )
    window = window_of(model)
    if stage.pack_length is not None and window and stage.pack_length > window:
        raise ZooError(
            f"pack_length={stage.pack_length} makes rows that are longer than the LLM's sliding window of {window}, "
            f"which counts the tokens of other samples too: set pack_length=null, or {window} at most."
        )
    device = device_of(plan)
    if plan.attention == "flex_attention" and not device.startswith("cuda"):
        raise ZooError(f"attention=flex_attention has no backward pass on {device}: it trains on CUDA only.")
    if (stage.precision or plan.precision) == "fp32":
        require_attention(plan.attention, device, torch.float32)


def _check_shorter(stage: Any, model: Any) -> None:
    """Refuse what is incompatible with a pruner that shortens the sequence between layers."""
    ragged = next((n for n, p in model.pruner.items() if p.ragged or p.behind), "")
    if ragged and stage.compile:
        raise ZooError(
            f"pruner {ragged!r} chooses the length of the sequence by the image, which does not compile: set "
            "compile=false."
        )
    inside = _drops_inside(model)
    if not inside:
        return
    if stage.compile:
        raise ZooError(
            f"pruner {inside!r} chooses the length of layers from data, which does not compile: set compile=false."
        )
    if model.llm.router_aux_coef:
        raise ZooError(f"pruner {inside!r} shortens layers, which llm.router_aux_coef cannot follow: set it to 0.")


def _check_hidden(stage: Any, model: Any) -> None:
    """Refuse hidden image tokens where there are none to hide, or a pruner chooses among them."""
    if not stage.keep_range:
        return
    if not model.num_image_tokens:
        raise ZooError("keep_range hides image tokens of the LLM's sequence, and this model has none: leave it out.")
    if inside := next(iter(model.inside_pruners), ""):
        raise ZooError(f"keep_range hides image tokens, and pruner {inside!r} would choose among them: leave one out.")
    if ragged := next((n for n, p in model.pruner.items() if p.ragged or p.behind), ""):
        raise ZooError(
            f"keep_range hides image tokens, and pruner {ragged!r} leaves a number of its own of each image, so that "
            "all of them could be hidden: leave one out."
        )


def _drops_inside(model: Any) -> str:
    """Return the name of the pruner that shortens the sequence between layers, or nothing."""
    return next((n for n, p in model.pruner.items() if p.shortens), "")


def _asks(model: Any) -> str:
    """Return the name of the part that needs the question, or nothing."""
    return next((s.name for s in model.steps if "question" in s.needs), "")


def _one_dialog(stage: Any, model: Any, plan: Any) -> str:
    """Return why a row of this stage can hold one dialog only; empty where it can hold several."""
    if stage.pack != "dialogs" or (stage.loss_weights.get("answer", 1.0) == 0 and not stage.teacher):
        return ""  # rows hold one dialog anyway, or the LLM does not run
    if inside := _drops_inside(model) or _asks(model):
        return f"pruner {inside!r} chooses image tokens by the question"
    if plan.attention not in _MASKED:
        return f"attention={plan.attention} takes no mask that keeps dialogs apart"
    if (window := window_of(model)) and window <= model.num_image_tokens:
        return f"the LLM's sliding window of {window} is shorter than a row with an image"
    return str(model.llm.mixes_rows)


def window_of(model: Any) -> int | None:
    """Return the sliding window of a model's LLM, which counts columns of a row; None: it has none."""
    return getattr(model.llm.lm.config.get_text_config(), "sliding_window", None)


def _check_losses(stage: Any, model: Any, distiller: Distiller | None) -> None:
    """Refuse weights of losses that no part has, where all parts declare theirs; and a stage without a loss."""
    weights = {} if distiller is None else distiller.weights
    terms = set(weights) if isinstance(weights, dict) else set()
    if stage.loss_weights.get("answer", 1.0) == 0 and not distiller:
        raise ZooError("loss_weights.answer is 0 and there is no distiller, so nothing is learnt.")
    givers = [*model.adapter.values(), *([distiller] if distiller is not None and not terms else [])]
    if any(part.losses is None for part in givers):
        return  # not declared: the first batch shows the names
    known = {"answer"} | terms
    for part in [*model.adapter.values(), *([] if distiller is None else [distiller])]:
        known |= set(part.losses or ())
    known |= {"router_balance"} if model.llm.router_aux_coef else set()
    for name in stage.loss_weights:
        if name not in known:
            raise unknown("loss in this stage (loss_weights)", name, known)
    if not any(stage.loss_weights.get(name, 1.0) for name in known):
        raise ZooError(f"all losses weigh 0 ({', '.join(sorted(known))}), so nothing is learnt.")


def _check_shards(stage: Any, model: Any, plan: Any) -> None:
    """Refuse what a model in shards does not do, where the run asks for FSDP2 and not its launcher."""
    if plan.parallel is None or plan.parallel.shard != "fsdp2":
        return
    gathers_short(plan.parallel, [stage.precision or plan.precision])
    if (stage.master_weights or plan.master_weights) == "none":
        require_one_format(model)
    if plan.keep != "live" and model.vision is not None and not any(p.requires_grad for p in model.vision.parameters()):
        raise ZooError(SHARDED)


def _check_rates(stage: Any, model: Any, distiller: Distiller | None) -> None:
    """Refuse learning rates of parts that do not train."""
    if not stage.lr_scale:
        return
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    if isinstance(distiller, nn.Module):
        names += [f"distiller.{n}" for n, _ in distiller.named_parameters()]
    rate_scales(names, stage.lr_scale, parts_of(model))


def _check_distiller(name: str, stage: Any, model: Any, plan: Any) -> tuple[Any, int, str]:
    """Check the needs of a stage's distiller, and its teacher.

    Returns:
        The distiller, the bytes of the teacher, and why rows can hold one dialog only on its account.
    """
    with torch.device("meta"):
        distiller = build_distiller(model, stage.distiller_node)
    needs, who = frozenset(distiller.needs), stage.distiller_node["name"]
    if any(n.startswith("teacher.") for n in needs) and not stage.teacher:
        raise ZooError(f"distiller {who!r} needs a teacher: set stages.{name}.teacher to a model's name.")
    if "student.image" in needs and not model.num_image_tokens and model.vision is None:
        raise ZooError(f"distiller {who!r} needs image features, but the model has no vision encoder.")
    if "student.image" in needs and model.vision is not None and model.vision.native:
        raise ZooError(
            f"distiller {who!r} reads labels of the cells of one grid, which data states for each image alike, and the "
            "images of this encoder keep their shapes: each has a grid of its own."
        )
    if "student.prefix" in needs and (model.vision is None or "prefix_tokens" not in model.vision.provides):
        raise ZooError(f"distiller {who!r} reads [CLS], and the encoder has none: set vision.cls_token=true.")
    if not stage.teacher:
        return distiller, 0, ""
    if not any(n.startswith("teacher.") for n in needs):
        raise ZooError(f"distiller {who!r} asks nothing of a teacher: leave stages.{name}.teacher empty.")
    from zoo.checking.teachers import check_store, check_teacher

    try:
        if folder := stage.teacher_node["store"]:
            check_store(name, stage, folder, distiller, model, plan)
            return distiller, 0, ""
        weights, parts = check_teacher(name, stage, distiller, model, plan)
    except ZooError as error:
        raise ZooError(f"{error}.") from error
    return distiller, weights, _check_teachers_rows(stage, parts, plan)


def _check_teachers_rows(stage: Any, parts: Any, plan: Any) -> str:
    """Refuse rows of several samples that the teacher cannot keep apart; returns why it takes one dialog in a row."""
    of_row = next((f"adapter {n!r} changes its LLM for a whole row" for n, a in parts.adapter.items() if a.per_row), "")
    if stage.pack_length is not None and (why := of_row or parts.llm.mixes_rows):
        raise ZooError(
            f"pack_length={stage.pack_length} puts several samples into a row, and of the teacher {why}: set "
            "pack_length=null, and pack=none where data has several dialogs about an image."
        )
    why = _one_dialog(stage, parts, replace(plan, attention=stage.teacher_node["attention"]))
    return why and f"of the teacher {why}"
