"""`zoo check`: check whether the parts and data of a run fit together."""

from dataclasses import asdict, replace
from typing import Any

from zoo.checking.checker import CheckReport, check, show
from zoo.checking.data_check import check_data
from zoo.checking.devices import scale_text, share_of
from zoo.checking.kept_size import kept_note
from zoo.checking.plan import plan_from
from zoo.checking.stage_check import Stagecheck, window_of
from zoo.loading.build import processor_alone
from zoo.registry import ZooError
from zoo.runs.batches import Batches
from zoo.runs.data import RunData
from zoo.runs.lengths import room_of
from zoo.runs.order import ShardPosition
from zoo.settings.parallel import ParallelConfig
from zoo.settings.scale import Devices
from zoo.settings.stage import stages_of
from zoo.text.terminal import say

PASSES = 4  # of each stage, whose batches are made; the memory is that of the largest


def main(cfg: Any) -> CheckReport:
    """Print and return the report; a misfit is raised as an error."""
    plan = plan_from(cfg)
    report = check(plan)
    unread = check_data(cfg, report.stages)
    report.notes += unread
    if not unread:
        report.notes += _of_features(cfg, report)
    if not unread and plan.tokenizer is not None:  # else the data set is large, or the tokenizer is trained on it
        add_batches(cfg, report)
    show(report, "The composition fits.")
    if cfg.scale.devices:
        show_devices(cfg, report)
    return report


def _of_features(cfg: Any, report: CheckReport) -> list[str]:
    trained = {stage.name for stage in report.stages if any(part.startswith("vision") for part in stage.trainable)}
    frozen = {name: stage for name, stage in stages_of(cfg).items() if name not in trained}
    vision = report.parts.vision if report.parts else None
    return kept_note(cfg, frozen, vision, RunData(cfg.data, skip_broken=True)) if frozen else []


def show_devices(cfg: Any, report: CheckReport) -> None:
    """Print what each device of `scale.devices` holds and sends in each stage."""
    scale, parallel = scale_of(cfg), ParallelConfig(**cfg.parallel)
    for found in report.stages:
        try:
            shared = found.spread(scale, parallel, found.share_batch, found.placeholder)
        except ZooError as error:
            raise ZooError(f"Stage {found.name!r}: {error}") from error
        say(f"stage {found.name} on {scale_text(scale, parallel)}", subsequent="  ")
        for line in shared.lines(scale):
            say(f"  {line}", subsequent="    ")
        report.devices.append({"stage": found.name, **asdict(shared), "total": shared.total})


def add_batches(cfg: Any, report: CheckReport) -> None:
    """Give the stages of a report batches of their data, whose lengths and labels decide about memory."""
    stages = stages_of(cfg)
    try:
        processor, positions = processor_alone(cfg)
        data = RunData(cfg.data, skip_broken=True)
    except ZooError:  # what keeps training from starting is found by the check, and this is not a part of it
        return
    for index, found in enumerate(report.stages):
        stage = stages[found.name]
        try:
            mix = data.mix(stage, cfg.seed * 1000 + index)
            room = room_of(stage, positions, processor)
            found.batch = _largest(Batches(mix, processor, stage, 1, ShardPosition(), room=room))
            if cfg.scale.devices:
                samples, passes = share_of(stage, scale_of(cfg), [])
                share = replace(stage, batch_size=samples * passes, accumulate=passes)
                found.share_batch = _largest(Batches(mix, processor, share, 1, ShardPosition(), room=room))
        except ZooError:  # a broken record: `zoo data` finds them all
            continue
        _require_window(found, report.parts)
        found.placeholder = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.image_token)


def _require_window(stage: Stagecheck, parts: Any) -> None:
    """Refuse rows of several dialogs or samples that are longer than the window in which the LLM attends."""
    window, batch = window_of(parts), stage.batch
    if window and batch is not None and "block_ids" in batch and (length := batch["labels"].shape[1]) > window:
        raise ZooError(
            f"Stage {stage.name!r}: a row of {length} tokens holds several dialogs or samples, and is longer than the "
            f"LLM's sliding window of {window}. Set stages.{stage.name}.pack=none, and no pack_length."
        )


def scale_of(cfg: Any) -> Devices:
    """Return the devices of a config, and how they share the model."""
    return Devices(**cfg.scale, replicate=cfg.parallel.replicate, tensor=cfg.parallel.tensor)


def _largest(batches: Batches) -> Any:
    """Return the batch of most positions among the first; None: none has labels."""
    made = [batches[i]["batch"] for i in range(min(PASSES, len(batches)))]
    made = [batch for batch in made if batch is not None and "labels" in batch]
    return max(made, key=lambda batch: batch["labels"].numel()) if made else None
