"""Which dialogs of the data are scored, and by which tasks."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from zoo.registry import Dialog, RecordError, Sample, ZooError, build, placed, read_sample

DEFAULT_TASK = "exact"  # for dialogs that name no task
LOOKED = 2000  # samples of each data set in which a dialog for the tasks is looked for ahead


def nothing_to_score(datasets: Iterable[str], tasks: Iterable[str] | None) -> ZooError:
    """The error for data of which no dialog is for the tasks that were asked for."""
    return ZooError(
        f"No dialog in data {', '.join(datasets) or 'none'} is for the tasks {', '.join(tasks or ['any'])}."
    )


def require_dialogs(datasets: Mapping[str, Any], tasks: Mapping[str, Any] | None, limit: int | None = None) -> None:
    """Refuse tasks that no dialog of the data is for, as far as the first samples show it, before a model is loaded.

    Raises:
        ZooError: no dialog is for them, in data that were looked through to the end or to `limit`.
    """
    table = Tasks(tasks)
    whole = True
    for name, dataset in datasets.items():
        most = LOOKED if limit is None else min(limit, LOOKED)
        for sample in islice(samples_of(name, dataset, most, 0, 1), most):
            if any(table.of(d) for d in getattr(sample, "dialogs", ()) if d.preference != "rejected"):
                return
        length = most + 1 if dataset.is_stream else len(dataset)
        whole = whole and (length if limit is None else min(length, limit)) <= most
    if whole and datasets:
        raise nothing_to_score(datasets, tasks)


class Tasks:
    """The tasks that were asked for, or any that a dialog names."""

    def __init__(self, asked: Mapping[str, Any] | None = None) -> None:
        self.asked = dict(asked or {})
        self.made = dict(self.asked)

    def of(self, dialog: Dialog) -> list[str]:
        """Names of the tasks that score a dialog."""
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
    """Every `world`-th sample, and None in place of those that other processes see to."""
    if dataset.is_stream:
        for i, sample in enumerate(dataset.stream(0, 0)):
            yield placed(sample, data, f"record {i} of the stream") if i % world == rank else None
    else:
        for i in range(len(dataset) if limit is None else min(limit, len(dataset))):
            yield read_sample(data, dataset, i) if i % world == rank else None
