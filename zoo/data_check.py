"""Whether the data of a run are there, and hold what the stages and tasks of the run ask for; no image is looked at."""

from pathlib import Path
from typing import Any

from zoo.checker import size_text
from zoo.evaluate import require_dialogs
from zoo.registry import build
from zoo.run_data import RunData

_LARGE = 64 * 2**20  # bytes of a file that is not read through by a check that is to be quick


def check_data(cfg: Any) -> list[str]:
    """Open the data sets of a run, and look for dialogs that its tasks are for.

    Args:
        cfg: of the run.

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
    return notes


def _unread(node: Any) -> str:
    """Why a data set is left alone; empty where it is not."""
    if node.get("name") == "hf" and not Path(str(node.get("path"))).expanduser().exists():
        return f"{node.get('path')} is not on this machine"
    texts = [str(value).replace("{split}", str(node.get("split", ""))) for value in node.values() if value]
    sizes = [Path(text).stat().st_size for text in texts if len(text) < 1024 and Path(text).is_file()]
    return f"its file has {size_text(max(sizes))}B" if max(sizes, default=0) > _LARGE else ""
