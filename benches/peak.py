"""Peak memory of a piece of work, beside what was there before; and work in a process of its own."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.registry import ZooError

_QUIET = "99"  # above all that the profiler's library says; it writes a line for each start and stop


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors made by `work` held at once.

    On CUDA the allocator says it. On a CPU the profiler's record of every allocation and release is added up, so that
    what a kernel takes for itself counts as well.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)  # read when the first profile of the process starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def in_process(module: str, *words: object, **env: str) -> dict[str, Any]:
    """Run `measure` of a bench in a process of its own; returns what it prints as JSON.

    Raises:
        ZooError: the process failed.
    """
    code = f"from zoo.benches.{module} import measure; measure(*{words!r})"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, **env})
    if done.returncode:
        raise ZooError(f"bench {module} {words[0]} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory(what: str) -> int:
    """What this process holds in bytes, by a name of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise ZooError(f"This system does not state {what} in /proc/self/status: memory cannot be measured here.")


def forget_peak() -> int:
    """Start to count the highest resident memory, VmHWM, anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")


def give_back() -> None:
    """Give freed memory back to the system, or what takes its place would not count."""
    with contextlib.suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
