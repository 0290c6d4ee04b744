"""The data sets of a run: those for training, those for evaluation, and the text that a new tokenizer is trained on."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

from zoo.data.splits import require_apart
from zoo.registry import RecordError, Sample, ZooError, build, placed, read_sample, source_options
from zoo.runs.dealing import require_even
from zoo.runs.order import Mix
from zoo.settings.source import split_of
from zoo.settings.stage import Stage

TEXTS = 2000  # samples of each data set that a new tokenizer is trained on


class RunData:
    """The data sets of a run, built once.

    A data set whose option `split` is not `train` is for evaluation: a stage trains on it only if it names it. In a run
    without such data, training data sets that have an `eval_split` are evaluated on that split. A part of the train
    split, `train[:90%]` of a Hugging Face data set, is for training where an `eval_split` is beside it.

    Args:
        nodes: data name -> node of the data set.
        skip_broken: accept data sets with broken records, which are reported when they are read.
    """

    def __init__(self, nodes: Mapping[str, Any], skip_broken: bool = False) -> None:
        self.skip_broken, self.nodes = skip_broken, nodes
        self.all = {str(name): build("dataset", self._lenient(node)) for name, node in nodes.items()}
        self.training = {n: d for n, d in self.all.items() if split_of(nodes[n]) == "train"}
        self._mixes: dict[tuple, Mix] = {}

    def _lenient(self, node: Any) -> Any:
        """Turn off the option `check`, which validates all records, of data sets that have it."""
        has = any(option.name == "check" for option in source_options("dataset", str(node["name"])))
        return {**node, "check": False} if self.skip_broken and has else node

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """Data name -> data set to evaluate on; empty if the run has none."""
        held = {n: d for n, d in self.all.items() if n not in self.training}
        if held:
            return held
        others = {n: d.eval_split() for n, d in self.training.items()}
        return {n: d for n, d in others.items() if d is not None}

    def mix(self, stage: Stage, seed: int) -> Mix:
        """Return the order of a stage's samples.

        Raises:
            ZooError: there is no data to train on, a part of its data is for evaluation, or the stage names data that
                the run does not have.
        """
        datasets = self.all if stage.data else self.training
        if not datasets:
            given = ", ".join(self.all) or "none"
            other = f", or let the stage name it: stages.<stage>.data={{{next(iter(self.all))}: 1}}" if self.all else ""
            raise ZooError(
                f"There is no data to train on: data holds {given}. Choose data of the train split, data=[...]{other}."
            )
        mix = Mix(datasets, stage.data, seed)
        for name in mix.names:
            split, other = (str(self.nodes[name].get(option) or "") for option in ("split", "eval_split"))
            require_apart(name, split or "train", other)
        return mix

    def require_order(self, name: str, stage: Stage, world: int = 1) -> None:
        """Refuse a stage whose samples have no order, before those ahead of it are trained.

        Args:
            name: of the stage.
            stage: its settings.
            world: processes that read its data.

        Raises:
            ZooError: as `mix`, or data is a stream and the stage asks for its length; or its samples cannot be divided.
        """
        try:
            require_even(stage, world)
            self.mix(stage, 0).require_lengths(stage)
        except ZooError as error:
            raise ZooError(f"Stage {name!r}: {error}") from error

    def texts(self) -> Iterator[str]:
        """Yield the messages of `TEXTS` samples of each training data set, at equal distances."""
        for name, dataset in self.training.items():
            for sample in spread_over(name, dataset, TEXTS):
                if isinstance(sample, RecordError):
                    if not self.skip_broken:
                        raise sample
                    continue
                for dialog in sample.dialogs:
                    for message in dialog.messages:
                        yield from _texts_of(message["content"])


def spread_over(name: str, dataset: Any, most: int) -> Iterator[Sample | RecordError]:
    """Yield about `most` samples of a data set at equal distances; of a stream the first ones."""
    if dataset.is_stream:
        yield from (
            placed(s, name, f"record {i} of the stream") for i, s in enumerate(islice(dataset.stream(0, 0), most))
        )
    else:
        size = len(dataset)
        yield from (read_sample(name, dataset, i) for i in range(0, size, max(1, size // most)))


def _texts_of(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]
