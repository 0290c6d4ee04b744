"""Records that cannot be used: which one, where it is, and why, whatever it was that raised."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zoo.registry.data_parts import Dataset
from zoo.registry.errors import ImageError, LengthError, RecordError, ZooError
from zoo.registry.values import Sample


@contextmanager
def naming(data: str, where: str = "", sample: str = "", kind: str = "record") -> Iterator[None]:
    """Turn what is raised about one record into a `RecordError` that names it; the original is its cause.

    Data sets, templates, tokenizers, decoders and file systems raise errors of many classes. What is not the record's
    fault is raised unchanged: memory errors, interrupts.

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
    """Return sample `index` of a data set with its place noted; or the error, for one that cannot be read."""
    return sample_or_error(data, dataset.place(index), lambda: dataset.get(index, epoch))


def sample_or_error(data: str, where: str, make: Callable[[], Sample]) -> Sample | RecordError:
    """Return the sample that `make` returns, with its place noted; or the error that it raises, with the place too."""
    try:
        with naming(data, where):
            return placed(make(), data, where)
    except RecordError as error:
        return error


def placed(sample: Sample | RecordError, data: str, where: str) -> Sample | RecordError:
    """Note the data set on a sample, or on the error that replaces it; and the place, where it has none yet."""
    if isinstance(sample, RecordError):
        error = _completed(sample, data, where)
        error.__cause__ = sample.__cause__  # the traceback of the library that failed
        return error
    sample.data, sample.where = data, sample.where or where
    return sample


def _completed(error: RecordError, data: str, where: str, sample: str = "") -> RecordError:
    named = {"where": error.where or where, "sample": error.sample or sample, "kind": error.kind}
    return RecordError(error.reason, data=data, **named)


def _of_record(error: BaseException) -> bool:
    """Whether an error is about the record, rather than about the process."""
    if type(error).__name__ == "PanicException":  # of a Rust library, a tokenizer say: a BaseException, no Exception
        return True
    return isinstance(error, Exception) and not isinstance(error, MemoryError)


def _reason(error: BaseException) -> str:
    if isinstance(error, ZooError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__
