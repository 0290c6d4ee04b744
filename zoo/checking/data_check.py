"""Whether the data of a run exist and have what its stages and tasks need; images are not opened."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.checking.stage_check import Stagecheck
from zoo.registry import RecordError, Sample, ZooError, build
from zoo.runs.data import RunData, spread_over
from zoo.runs.scored import require_dialogs
from zoo.settings.stage import stages_of
from zoo.text.sizes import size_text

_LARGE = 64 * 2**20  # bytes; a larger file is not read by the check, which is to be quick
_TRIED = 20  # samples that are read where the first ones are broken, and broken ones are left out


def check_data(cfg: Any, stages: Sequence[Stagecheck] = ()) -> list[str]:
    """Open the data sets of a run, and look for dialogs of its tasks.

    Args:
        cfg: of the run.
        stages: results of `zoo.checking.stage_check`.

    Returns:
        What was not opened, and why: large files, and data sets of the hub.

    Raises:
        ZooError: a data set cannot be opened, or the tasks have no dialog.
    """
    notes, nodes = [], {}
    for name, node in cfg.data.items():
        if why := _unread(node):
            notes.append(f"data {str(name)!r} was not opened: {why}.")
        else:
            nodes[name] = node
    data = RunData(nodes, skip_broken=cfg.skip_broken or any(stage.skip_broken for stage in cfg.stages.values()))
    tasks = {str(name): build("task", node) for name, node in cfg.task.items()}
    if tasks and not notes:
        require_dialogs(data.evaluation or data.all, tasks, cfg.limit)
    settings = stages_of(cfg)
    for stage in stages:
        if not notes:  # else a data set that the stage may name is not there
            data.require_order(stage.name, settings[stage.name])
        mix = settings[stage.name].data
        for name, dataset in (data.all if mix else data.training).items():
            if (not mix or mix.get(name)) and (stage.one_dialog or stage.needs):  # one sample shows its form
                first = _first(str(name), dataset, skip_broken=bool(settings[stage.name].skip_broken))
                if first is not None:
                    _check_sample(stage, str(name), first)
    return notes


def _first(name: str, dataset: Any, skip_broken: bool) -> Sample | None:
    """Return a sample of a data set, the first where it can be read; None: a few that were tried are broken."""
    for sample in spread_over(name, dataset, _TRIED):
        if not isinstance(sample, RecordError):
            return sample
        if not skip_broken:
            raise sample
    return None


def _check_sample(stage: Stagecheck, name: str, sample: Sample) -> None:
    """Refuse data whose first sample lacks what the stage needs."""
    where = f"Stage {stage.name!r}: "
    if stage.one_dialog and len(sample.dialogs) > 1:
        raise ZooError(
            f"{where}{stage.one_dialog}, and data {name!r} puts {len(sample.dialogs)} dialogs about one image into a "
            f"row. Set stages.{stage.name}.pack=none."
        )
    if "teacher.pairs" in stage.needs and not any(dialog.preference for dialog in sample.dialogs):
        raise ZooError(f"{where}the distiller compares pairs of answers, and data {name!r} has single ones.")
    for word in sorted(stage.needs):
        kind, _, key = word.partition(".")
        if kind != "batch":
            continue
        found = sample.targets.get(key)
        if found is None and sample.images:
            there = ", ".join(sorted(sample.targets)) or "none"
            raise ZooError(f"{where}the distiller learns from targets {key!r}, and data {name!r} has {there}.")
        if found is not None and stage.grid and found.shape[1] not in (1, math.prod(stage.grid)):  # 1: of whole images
            raise ZooError(
                f"{where}the targets {key!r} of data {name!r} are of {found.shape[1]} cells, and the encoder's grid "
                f"{list(stage.grid)} has {math.prod(stage.grid)}. Without a recipe of one's own: recipe=null."
            )


def _unread(node: Any) -> str:
    """Return why a data set is not opened; empty where it is."""
    if node.get("name") == "hf" and not Path(str(node.get("path"))).expanduser().exists():
        return f"{node.get('path')} is not on this machine"
    texts = [value.replace("{split}", str(node.get("split", ""))) for value in node.values() if isinstance(value, str)]
    largest = max(map(_size_of_file, texts), default=0)
    return f"its file has {size_text(largest)}B" if largest > _LARGE else ""


def _size_of_file(text: str) -> int:
    """Return the bytes of the file that an option may name; 0 where it names none."""
    try:
        return Path(text).stat().st_size if text and Path(text).is_file() else 0
    except (OSError, ValueError):  # a wording may be too long for a name, or hold what no name may
        return 0
