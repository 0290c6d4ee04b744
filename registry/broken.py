"""Records that cannot be used: which one, where it is, and why, whatever it was that raised."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zoo.registry.data_parts import Dataset
from zoo.registry.errors import ImageError, LengthError, RecordError, ZooError
from zoo.registry.values import Sample


@contextmanager
def naming(data: str, where: str = "", sample: str = "", kind: str = "record") -> Iterator[None]:
    """Turn what is raised about one record into a `RecordError` that names it; the original is its cause.

    Data sets, templates, tokenizers, decoders and file systems raise what they like. What is not the record's fault
    passes as it is: no memory, an interrupt.

    Args:
        data: name of the data set in the run.
        where: file and line, row or member.
        sample: id of the record.
        kind: what was done with it, one of `KINDS_BROKEN`.
    """
    try:
        yield
    except RecordError as error:
        if error.data or not data:
            raise
        raise _completed(error, data, where, sample) from error.__cause__
    except BaseException as error:
        if not _of_record(error):
            raise
        kind = "missing image" if isinstance(error, ImageError) else kind
        kind = "length" if isinstance(error, LengthError) else kind
        raise RecordError(_reason(error), data=data, where=where, sample=sample, kind=kind) from error


def read_sample(data: str, dataset: Dataset, index: int, epoch: int = 0) -> Sample | RecordError:
    """Take sample `index` of a data set, and note on it where it is from; what cannot be read comes as the error."""
    return sample_or_error(data, dataset.place(index), lambda: dataset.get(index, epoch))


def sample_or_error(data: str, where: str, make: Callable[[], Sample]) -> Sample | RecordError:
    """What `make` gives, with where it is from; or what it raises, as an error that says so."""
    try:
        with naming(data, where):
            return placed(make(), data, where)
    except RecordError as error:
        return error


def placed(sample: Sample | RecordError, data: str, where: str) -> Sample | RecordError:
    """Note on a sample, or on the error in its place, which data set it is of, and where it is if it does not say."""
    if isinstance(sample, RecordError):
        error = _completed(sample, data, where)
        error.__cause__ = sample.__cause__
        return error
    sample.data, sample.where = data, sample.where or where
    return sample


def _completed(error: RecordError, data: str, where: str, sample: str = "") -> RecordError:
    named = {"where": error.where or where, "sample": error.sample or sample, "kind": error.kind}
    return RecordError(error.reason, data=data, **named)


def _of_record(error: BaseException) -> bool:
    """Whether an error says something about the record; a panic of a Rust library (a tokenizer) is no Exception."""
    if type(error).__name__ == "PanicException":
        return True
    return isinstance(error, Exception) and not isinstance(error, MemoryError)


def _reason(error: BaseException) -> str:
    if isinstance(error, ZooError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__
