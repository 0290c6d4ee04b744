"""Which files of this checkout run while something is called, and which of them call which."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import CO_NEWLOCALS
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = tuple(f"{ROOT / top}/" for top in ("registry", "vision", "fusion", "distill", "zoo"))


@dataclass
class Trace:
    """What ran during a call; paths are those of the checkout, `zoo/composed/forward.py`.

    Attributes:
        functions: file -> names of the functions that ran, files in the order in which they were entered.
        calls: (file that calls, file that is called) -> names of the functions called, without calls inside of a file.
    """

    functions: dict[str, set[str]] = field(default_factory=dict)
    calls: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        """A profile function: note the entry of a function of ours."""
        code = frame.f_code
        # Bodies of modules and classes run where something is imported first, which is no part of what is traced.
        if event != "call" or not code.co_filename.startswith(OURS) or _defines(frame):
            return
        # The caller is the nearest function of ours: between the two may lie torch, which calls `forward` and hooks.
        above, caller = frame.f_back, None
        while above is not None:
            if above.f_code.co_filename.startswith("<frozen importlib"):
                return  # so are functions that an import calls
            if caller is None and above.f_code.co_filename.startswith(OURS) and not _defines(above):
                caller = above
            above = above.f_back
        here = _name(code.co_filename)
        self.functions.setdefault(here, set()).add(code.co_qualname)
        if caller is not None and (there := _name(caller.f_code.co_filename)) != here:
            self.calls.setdefault((there, here), set()).add(code.co_qualname)


def traced(call: Callable[[], Any], into: Trace | None = None) -> Trace:
    """Run `call`, and note what of this checkout runs in it: in this thread and in those that it starts.

    Args:
        call: what is run.
        into: a trace to add to; None: a new one.
    """
    trace, before = Trace() if into is None else into, sys.getprofile()
    threading.setprofile(trace.note)
    sys.setprofile(trace.note)
    try:
        call()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]  # the stubs know no None
    return trace


def files_of(call: Callable[[], Any]) -> list[tuple[str, int]]:
    """Run `call`; returns the files of this checkout that ran, in order, with the number of functions of each."""
    return [(file, len(names)) for file, names in traced(call).functions.items()]


def _defines(frame: FrameType) -> bool:
    """Whether a frame is the body of a module or of a class, and no function."""
    return not frame.f_code.co_flags & CO_NEWLOCALS  # functions alone have locals of their own


def _name(path: str) -> str:
    return str(Path(path).relative_to(ROOT))
