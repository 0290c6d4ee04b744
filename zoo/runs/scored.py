"""Select the dialogs that are scored, and the tasks that score them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from zoo.registry import Dialog, RecordError, Sample, ZooError, build, placed, read_sample

DEFAULT_TASK = "exact"  # for dialogs that name no task
CHECKED = 2000  # samples of each data set that are searched for a dialog of the tasks before a model is loaded


def nothing_to_score(datasets: Iterable[str], tasks: Iterable[str] | None) -> ZooError:
    """Return the error for data without a dialog for the tasks."""
    return ZooError(
        f"No dialog in data {', '.join(datasets) or 'none'} is for the tasks {', '.join(tasks or ['any'])}."
    )


def require_dialogs(datasets: Mapping[str, Any], tasks: Mapping[str, Any] | None, limit: int | None = None) -> None:
    """Refuse data without a dialog for the tasks, as far as its first samples show, before a model is loaded.

    Raises:
        ZooError: the data, read to the end or to `limit`, has no dialog for the tasks.
    """
    table = Tasks(tasks)
    whole = True
    for name, dataset in datasets.items():
        most = CHECKED if limit is None else min(limit, CHECKED)
        for sample in islice(samples_of(name, dataset, most, 0, 1), most):
            if any(table.of(d) for d in getattr(sample, "dialogs", ()) if d.preference != "rejected"):
                return
        length = most + 1 if dataset.is_stream else len(dataset)
        whole = whole and (length if limit is None else min(length, limit)) <= most
    if whole and datasets:
        raise nothing_to_score(datasets, tasks)


class Tasks:
    """The tasks of the config, or without any, the task that each dialog names."""

    def __init__(self, asked: Mapping[str, Any] | None = None) -> None:
        self.asked = dict(asked or {})
        self.made = dict(self.asked)

    def of(self, dialog: Dialog) -> list[str]:
        """Return the names of the tasks that score a dialog."""
        if self.asked:
            return [dialog.task] if dialog.task in self.asked else [] if dialog.task else list(self.asked)
        return [dialog.task or DEFAULT_TASK]

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            self.made[name] = build("task", {"name": name})
        return self.made[name]


def samples_of(
    data: str, dataset: Any, limit: int | None, rank: int, world: int
) -> Iterator[Sample | RecordError | None]:
    """Iterate over every `world`-th sample, with None for those of other processes."""
    if dataset.is_stream:
        for i, sample in enumerate(dataset.stream(0, 0)):
            yield placed(sample, data, f"record {i} of the stream") if i % world == rank else None
    else:
        for place, i in enumerate(chosen(data, dataset, limit)):
            yield read_sample(data, dataset, i) if place % world == rank else None


def chosen(data: str, dataset: Any, limit: int | None) -> Sequence[int]:
    """Return which samples are scored: with a limit a drawn part, the same for every model, and within a larger one's.

    Files are often sorted, and the first samples then of one class. Samples of groups (`meta["group"]`) follow each
    other, and a group in parts is scored wrongly: of such data the first ones are taken.
    """
    n = len(dataset)
    if limit is None or limit >= n:
        return range(n)
    first = read_sample(data, dataset, 0)
    if isinstance(first, Sample) and any("group" in dialog.meta for dialog in first.dialogs):
        return range(limit)
    drawn: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:limit].sort().values.tolist()
    return drawn
