"""Without messages of libraries about things that a person cannot act on."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Suppress transformers' progress bars: reading for a comparison or a conversion would look like a second load."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def errors_alone() -> Iterator[None]:
    """Suppress what transformers logs below an error: how new rows are drawn, names of weights that are not used."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def no_warning_of(*patterns: str) -> Iterator[None]:
    """Suppress warnings whose message begins with one of the patterns (regular expressions)."""
    with warnings.catch_warnings():
        for pattern in patterns:
            warnings.filterwarnings("ignore", message=pattern)
        yield


@contextmanager
def for_people() -> Iterator[None]:
    """Show warnings on a command line as a line without file and code, and none that are for authors of libraries.

    With `python -W`, or PYTHONWARNINGS, all are shown as Python does.
    """
    if sys.warnoptions:
        yield
        return
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _shown
        yield


def _shown(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
    print(f"zoo: {' '.join(str(message).split())}", file=sys.stderr)
