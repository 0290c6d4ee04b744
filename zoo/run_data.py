"""The data sets of a run: which are for training, which for evaluation, and the text a new tokenizer learns from."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from zoo.loader import Mix
from zoo.registry import ZooError, build
from zoo.stage import Stage

TEXTS = 2000  # samples of each data set that a new tokenizer is trained on


class RunData:
    """Built once per run.

    A data set whose option `split` is something else than `train` is for evaluation: no stage trains on it unless it
    says so by name. Where a run has none, training data sets that know a split to evaluate on (`eval_split`) give it.
    """

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self.all = {str(name): build("dataset", node) for name, node in nodes.items()}
        splits = {str(name): str(node.get("split", "train") or "train") for name, node in nodes.items()}
        self.training = {n: d for n, d in self.all.items() if splits[n] == "train"}
        self._mixes: dict[tuple, Mix] = {}

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """Data name -> data set to evaluate on; empty if the run has none."""
        held = {n: d for n, d in self.all.items() if n not in self.training}
        if held:
            return held
        others = {n: d.eval_split() for n, d in self.training.items() if hasattr(d, "eval_split")}
        return {n: d for n, d in others.items() if d is not None}

    def mix(self, stage: Stage, seed: int) -> Mix:
        """Return the order in which a stage sees its samples.

        Raises:
            ZooError: there is no data to train on, or the stage names some that the run does not have.
        """
        datasets = self.all if stage.data else self.training
        if not datasets:
            given = ", ".join(self.all) or "none"
            raise ZooError(
                f"There is no data to train on: data holds {given}. Choose some of the train split, data=[...]."
            )
        return Mix(datasets, stage.data, seed)

    def texts(self) -> Iterator[str]:
        """Yield the text of the training data, every message of samples spread over each data set."""
        for dataset in self.training.values():
            if hasattr(dataset, "stream"):
                samples = (s for s, _ in zip(dataset.stream(0, 0), range(TEXTS), strict=False))
            else:
                size = len(dataset)
                samples = (dataset.get(i) for i in range(0, size, max(1, size // TEXTS)))
            for sample in samples:
                for dialog in sample.dialogs:
                    for message in dialog.messages:
                        yield from _texts_of(message["content"])


def _texts_of(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]
