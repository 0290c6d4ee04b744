"""What a step frees is there for the next one without asking the system."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from zoo.runs.allocator import keep_memory
if "keep" in sys.argv and not keep_memory():
    sys.exit("no mallopt")
def step():
    for megabytes in (1, 3, 40):
        torch.ones(megabytes * 2**18)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, *words], capture_output=True, text=True, check=False)
    if "no mallopt" in done.stderr:
        pytest.skip("this C library has no mallopt")
    assert not done.returncode, done.stderr
    return int(done.stdout)


def test_freed_memory_is_not_fetched_again():
    assert faults("keep") < faults() / 20
