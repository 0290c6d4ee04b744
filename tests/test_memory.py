"""What a step frees is there for the next one without asking the system."""

import subprocess
import sys

import pytest

# One import of torch for both; what each of the two forked processes sets is its own.
STEPS = """
import os, resource, sys
import torch
from zoo.runs.allocator import keep_memory
def step():
    for megabytes in (1, 3, 40):
        torch.ones(megabytes * 2**18)
def faults(keep):
    if keep and not keep_memory():
        sys.exit("no mallopt")
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
for keep in (True, False):
    if not (child := os.fork()):
        faults(keep)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_freed_memory_is_not_fetched_again():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=False)
    if "no mallopt" in done.stderr:
        pytest.skip("this C library has no mallopt")
    assert done.stdout.count("\n") == 2, done.stderr
    kept, fetched = map(int, done.stdout.split())
    assert kept < fetched / 20
