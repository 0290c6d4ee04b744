"""Log of optimiser steps: losses, learning rates and speed, averaged over processes, several steps at a time.

Reading a loss waits for the GPU, so the losses of several steps are read together; before a checkpoint, an evaluation
and the end of a stage all are. A loss that is not finite ends the run here.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from zoo.registry import ZooError
from zoo.runs.folder import RunFolder
from zoo.runs.left_out import LeftOut
from zoo.runs.processes import by_first, gather, stop_all
from zoo.runs.progress import Display
from zoo.runs.tensor_parallel import tensor_size

SHOWN = 10  # records that were left out are printed; further ones are only listed in the file
FLUSH = 10  # steps between readings of losses on a GPU or with several processes


class StepLog:
    """Collects the steps of a run, and writes them.

    Args:
        accelerator: of the run.
        folder: whose metrics.jsonl the first process writes.
        display: for messages to the user.
        left_out: counts and lists broken records.
    """

    def __init__(self, accelerator: Any, folder: RunFolder, display: Display, left_out: LeftOut) -> None:
        self.accelerator, self.folder, self.display, self.left_out = accelerator, folder, display, left_out
        self.newest: dict[str, Any] = {}  # record of the last step
        self._shown = 0  # number of records printed as left out
        self._pending: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []

    def add(self, record: dict[str, Any], losses: dict[str, torch.Tensor], *, allow_nonfinite: bool) -> None:
        """Add a step of this process.

        Args:
            record: figures of the step.
            losses: still on the device.
            allow_nonfinite: continue if a loss is not finite.
        """
        self.newest = record
        self._pending.append((record, losses))
        # On a CPU reading a loss costs nothing, and with one process there is nothing to gather.
        eager = self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1
        if eager or len(self._pending) >= FLUSH:
            self.flush(allow_nonfinite=allow_nonfinite)

    def flush(self, *, allow_nonfinite: bool) -> None:
        """Write the metrics of the steps since the last time, averaged over processes; every process calls this.

        Raises:
            ZooError: a loss of any process is not finite; all processes end.
        """
        if not self._pending:
            return
        own = [(record, {k: v.item() for k, v in losses.items()}) for record, losses in self._pending]
        now, self._pending = time.perf_counter(), []
        # All processes decide on the same figures, so that either all of them stop or none.
        everyone = gather(self.accelerator, own)[:: tensor_size(self.accelerator)]  # one process of each reader
        seconds = (now - own[0][0]["start"]) / len(own)
        lines = [_line(at, everyone, seconds) for at in range(len(own))]
        skipped = [row for at, line in enumerate(lines) for row in self._skipped(line, at, everyone)]
        bad = next((at for at, line in enumerate(lines) if not math.isfinite(line.get("loss", 0.0))), None)
        if bad is not None and not allow_nonfinite:
            lines = lines[: bad + 1]  # later steps are of a model whose weights are not finite

        def write() -> None:
            self.folder.log_skipped(*skipped)
            self.folder.log(*lines)

        by_first(self.accelerator, write)
        self._show_skipped(skipped)
        for (record, _), line in zip(own, lines, strict=False):
            self._show(record["step"], line)
        if bad is not None and not allow_nonfinite:
            stop_all(self.accelerator, self._not_finite(lines[bad]))
        if (error := self.left_out.excess(own[-1][0]["stage"])) is not None:
            stop_all(self.accelerator, error)

    def end_stage(self, name: str, *, allow_nonfinite: bool) -> None:
        """Write the remaining steps of a stage.

        Raises:
            ZooError: all records of the stage were left out; all processes end.
        """
        self.flush(allow_nonfinite=allow_nonfinite)
        if (error := self.left_out.nothing_left(name)) is not None:
            stop_all(self.accelerator, error)

    def _skipped(self, line: dict[str, Any], at: int, everyone: list[Any]) -> list[dict[str, Any]]:
        """Count the records that a step left out, and return those that are not listed yet."""
        records = [ranks[at][0] for ranks in everyone]
        broken = [row for record in records for row in record["broken"]]
        self.left_out.add(sum(record["samples"] for record in records) + len(broken), len(broken))
        if broken:
            line["skipped"] = len(broken)
        return [{"step": line["step"], "stage": line["stage"], **row} for row in self.left_out.new(broken)]

    def _show_skipped(self, skipped: list[dict[str, Any]]) -> None:
        """Print the first `SHOWN` records that were left out."""
        room, self._shown = max(0, SHOWN - self._shown), self._shown + len(skipped)
        for row in skipped[:room]:
            self.display.note(f"skipped {row['where']} {row['id']}: {row['reason']}")
        if 0 < room <= len(skipped):
            self.display.note(f"Further ones are listed in {self.folder.skipped}")

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send figures to the trackers, if there are any."""
        if self.accelerator.log_with:
            self.accelerator.log(dict(values), step=step)

    def _show(self, step: int, line: dict[str, Any]) -> None:
        self.track({k: v for k, v in line.items() if isinstance(v, float)} | line["losses"], step)
        rate, unit = line["images_per_s"], "images"
        if not rate:
            rate, unit = line["samples_per_s"], "samples"
        self.display.update(line["stage_step"], line["losses"], rate, unit, line["wait"])

    def _not_finite(self, line: dict[str, Any]) -> ZooError:
        bad = {name: value for name, value in line["losses"].items() if not math.isfinite(value)}
        what = " and ".join(f"{name!r} is {value}" for name, value in (bad or {"sum": line["loss"]}).items())
        return not_finite(f"The loss {what}", line, self.folder)


def not_finite(what: str, at: Mapping[str, Any], folder: RunFolder) -> ZooError:
    """Return the error that ends a run: what is not finite, at which step, the newest checkpoint, what may help."""
    there = folder.list_checkpoints()
    left = f"the newest checkpoint, {there[-1].name}, is from before" if there else "there is no checkpoint yet"
    return ZooError(
        f"{what} at step {at['step']} (stage {at['stage']!r}, its step {at['stage_step']}): the run "
        f"{str(folder.path)!r} stops, and nothing of that step is saved; {left}. What may help, in a new run: a lower "
        f"lr, clip=1.0, precision=fp32. To go on all the same: stages.{at['stage']}.allow_nonfinite=true."
    )


def _line(at: int, everyone: list[list[tuple[dict[str, Any], dict[str, float]]]], seconds: float) -> dict[str, Any]:
    """Return the line of metrics.jsonl for a step: losses are means over processes, as their gradients are.

    A step whose records are all left out has no loss.
    """
    record = everyone[0][at][0]
    losses = _mean([ranks[at][1] for ranks in everyone])
    images, samples = (sum(ranks[at][0][key] for ranks in everyone) for key in ("images", "samples"))
    total = {"loss": sum(record["weights"].get(n, 1.0) * v for n, v in losses.items())} if losses else {}
    return {
        "step": record["step"],
        "stage": record["stage"],
        "stage_step": record["stage_step"],
        **total,
        "losses": losses,
        "lr": record["lr"],
        "images_per_s": round(images / seconds, 1),
        "samples_per_s": round(samples / seconds, 1),
        "wait": round(min(1.0, record["wait"] / seconds), 4),
    }


def _mean(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """Average each loss over processes; one without it, as without an image in its batches, adds nothing to the sum."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {n: sum(row.get(n, 0.0) for row in rows) / len(rows) for n in names}
