"""Data sets and tasks: their base classes, with every method that the zoo calls on them. Plain Python classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.registry.parts import Part

if TYPE_CHECKING:
    from zoo.registry.errors import RecordError
    from zoo.registry.values import Dialog, Sample, Score


class Records(Part):
    """What data sets of both forms have. Randomness is a function of (config.seed, epoch, index) and of nothing else.

    `__init__(config)`. Derive from `Dataset`, or from `StreamingDataset` where the length is not known.
    """

    is_stream: bool = False
    """Whether it has `stream` in place of a length and `get`."""

    def place(self, index: int) -> str:
        """Name the place of a record for a message: file and line, row or member."""
        return f"record {index} of the stream" if self.is_stream else f"record {index}"

    def train_split(self) -> Records | None:
        """Return the training records of the same source, whose most common answers make the column `majority` of an
        evaluation. None: not known.
        """
        return None

    def eval_split(self) -> Records | None:
        """Return the records to evaluate on, of the same source; None: there are none."""
        return None


class Dataset(Records):
    """A data set with a length, read by index and by several workers."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the samples."""

    @abstractmethod
    def get(self, index: int, epoch: int = 0) -> Sample:
        """Return sample `index`; cheap to call in a loader worker, images still undecoded."""


class StreamingDataset(Records):
    """A data set whose length is not known. One thread of each process reads it, in order."""

    is_stream = True

    @abstractmethod
    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Sample | RecordError]:
        """Yield the samples of an epoch from number `start` on; the same in every process.

        A record that cannot be read is yielded as the error, and counts as a sample: a generator that raises has ended.
        """

    def order(self, name: str, size: int, place: Mapping[str, Any]) -> Any | None:
        """Return a `zoo.data.stream_order.StreamOrder`: each process reads only its own rows, and loader workers turn
        them into samples by `sample`. None: the order of `stream`, which every process reads in full.

        Args:
            name: of the data in the run.
            size: rows of an optimiser step.
            place: where to begin, as `StreamOrder.place` returned it.
        """
        return None

    def sample(self, row: Any, number: Any) -> Sample:
        """Make a sample of a row of `order`, which numbered it `number`."""
        raise NotImplementedError(f"{type(self).__name__} has an `order` and no `sample`.")


class Task(Part):
    """Turns predictions into numbers; knows nothing of models. `__init__(config)`."""

    mode: str = "generate"
    """What it is given of a model: generate, a text, greedy; choice, the likeliest of its candidates; scores, the
    log-probability of each candidate; hidden, the hidden state behind the last token of the prompt."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    layer: int = -1
    """With mode hidden, whose state: -1 behind the last norm, as the head reads it; 0 embeddings, k behind layer k."""

    def candidates(self, dialog: Dialog) -> Sequence[str]:
        """Return the answers to compare, with the modes choice and scores; each counts with the end of its turn."""
        return dialog.choices

    @abstractmethod
    def score(self, dialog: Dialog, prediction: Any) -> dict[str, float]:
        """Give metric name -> value of one prediction, each in [0, 1].

        The prediction is a text; with mode scores, candidate -> log-probability; with mode hidden, a list of C numbers,
        which `summarise` finds in the row under `_state`.

        Names that begin with an underscore are not metrics but counts of any size, which `summarise` needs.
        """

    @abstractmethod
    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        """Aggregate the rows of `score` into reported metrics: the mean of each, unless it is defined otherwise."""
