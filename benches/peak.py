"""Peak memory of a piece of work, beside what was there before."""

import os
from collections.abc import Callable

import torch

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
