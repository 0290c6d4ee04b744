"""Routed adapters on two CPU processes, where some experts get no token: no hang, the gradients of one process."""

import os
import subprocess
import sys

from tests.train_builders import REPO


def test_idle_experts_get_the_gradients_of_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    script = [str(REPO / "tests" / "two_processes_adapters.py")]
    done = subprocess.run([*command, *script], cwd=REPO, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "all as one process" in done.stdout, done.stdout + done.stderr
