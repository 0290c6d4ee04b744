"""Whether the data of a run are there, and hold what the stages and tasks of the run ask for; no image is looked at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.checker import size_text
from zoo.evaluate import require_dialogs
from zoo.registry import ZooError, build
from zoo.run_data import RunData
from zoo.stage_check import Stagecheck

_LARGE = 64 * 2**20  # bytes of a file that is not read through by a check that is to be quick


def check_data(cfg: Any, stages: Sequence[Stagecheck] = ()) -> list[str]:
    """Open the data sets of a run, and look for dialogs that its tasks are for.

    Args:
        cfg: of the run.
        stages: what the check of its parts found of each.

    Returns:
        What was not looked at, and why: large files, and what lies on the hub.

    Raises:
        ZooError: a data set cannot be opened, or no dialog is for the tasks.
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
    for stage in stages:
        if stage.one_dialog:
            _require_single(stage, data.all if cfg.stages[stage.name].data else data.training, cfg.stages[stage.name])
    return notes


def _require_single(stage: Stagecheck, datasets: Mapping[str, Any], settings: Any) -> None:
    """Refuse a stage whose samples have several dialogs where a row can hold one only, as the first sample shows."""
    for name, dataset in datasets.items():
        if settings.data and not settings.data.get(name):
            continue
        first = next(iter(dataset.stream(0, 0)), None) if hasattr(dataset, "stream") else dataset.get(0)
        if first is not None and len(first.dialogs) > 1:
            raise ZooError(
                f"Stage {stage.name!r}: {stage.one_dialog}, and data {name!r} puts {len(first.dialogs)} dialogs about "
                f"one image into a row. Set stages.{stage.name}.pack=none."
            )


def _unread(node: Any) -> str:
    """Why a data set is left alone; empty where it is not."""
    if node.get("name") == "hf" and not Path(str(node.get("path"))).expanduser().exists():
        return f"{node.get('path')} is not on this machine"
    texts = [str(value).replace("{split}", str(node.get("split", ""))) for value in node.values() if value]
    sizes = [Path(text).stat().st_size for text in texts if len(text) < 1024 and Path(text).is_file()]
    return f"its file has {size_text(max(sizes))}B" if max(sizes, default=0) > _LARGE else ""
