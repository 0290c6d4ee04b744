"""Routed adapters on two CPU processes, where some experts get no token: no hang, the gradients of one process."""

from tests import two_processes_adapters
from tests.killed_runs import call_in_two, served


def test_idle_experts_get_the_gradients_of_one_process(tmp_path):
    with served():
        done = call_in_two(tmp_path, two_processes_adapters.main)
    assert done.code == 0 and "all as one process" in done.said, done.said
