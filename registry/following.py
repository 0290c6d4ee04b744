"""Whether the weights of a model that is being built are read from a file afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_follow: ContextVar[bool] = ContextVar("zoo_weights_follow", default=False)


def weights_follow() -> bool:
    """Whether new weights are replaced by those of a file, so that initial values which take long can be left out.

    `start` of an adapter is called outside, where the file turns out to lack them.
    """
    return _follow.get()


@contextmanager
def before_weights(on: bool = True) -> Iterator[None]:
    """Build parts whose weights are read afterwards."""
    token = _follow.set(on)
    try:
        yield
    finally:
        _follow.reset(token)
