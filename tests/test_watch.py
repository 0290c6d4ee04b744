"""A process of a run that is gone, or hangs, is noticed by the others, whatever they wait for."""

import functools
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests import killed_runs
from zoo.runs.watch import GONE, Watch, as_gone


def watched(how: str) -> None:
    """In two processes: the second one goes or hangs, the first one waits for something that never comes."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    watch = Watch(SimpleNamespace(process_index=rank, num_processes=2), "zoo train resume=x", every=0.1, patience=10)
    torch.distributed.barrier()
    if how == "leave":
        if rank == 1:
            watch.stop()
        time.sleep(2.5 if rank == 0 else 2.0)  # longer than patience lasts
        watch.stop()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return
    if how == "fail" and rank == 1:
        watch.stop(failed=True)
        time.sleep(1)  # an error whose process does not end at once
        sys.exit(3)
    if rank == (0 if how == "first" else 1):
        os.kill(os.getpid(), signal.SIGKILL if how != "hang" else signal.SIGSTOP)
    time.sleep(50)
    sys.exit(3)


@pytest.mark.parametrize(
    ("how", "codes"), [("kill", [GONE, -9]), ("first", [-9, GONE]), ("fail", [GONE, 3]), ("leave", [0, 0])]
)
def test_the_others_leave(how, codes, tmp_path):
    with killed_runs.served():
        ended = killed_runs.call_in_two(tmp_path, watched, how)
    assert ended.codes == codes, ended.said
    assert ("zoo train resume=x" in ended.said) == (how != "leave"), ended.said


def scoring(command: str, how: str) -> None:
    """`zoo eval` or `zoo teach` in two processes, the second of which goes, or hangs, as models are loaded."""
    from zoo.cli.entry import main
    from zoo.loading import build
    from zoo.runs import watch
    from zoo.training import teach

    def load(*args, **options):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        torch.distributed.barrier()
        pytest.fail("the other process is gone")

    watch.Watch = functools.partial(Watch, every=0.1, patience=10)  # type: ignore[misc]
    build.build, teach.load_teacher = load, load  # type: ignore[assignment]
    words = ["model=scenes_tiny", "data=[scenes]"] if command == "eval" else ["recipe=llava_kd_tiny", "teach.stage=dpt"]
    sys.exit(main([command, *words, "device=cpu", "run.dir=runs"]))


@pytest.mark.parametrize(("command", "how"), [("eval", "hang"), ("teach", "kill")])
def test_the_others_leave_an_evaluation(command, how, tmp_path):
    with killed_runs.served():
        ended = killed_runs.call_in_two(tmp_path, scoring, command, how, until=0)
    assert ended.codes[0] == GONE and "To go on: " in ended.said, ended.said
    assert ("evaluation again" if command == "eval" else "samples that are stored stay so") in ended.said


def test_errors_of_the_network_are_of_a_process_that_is_gone():
    two = SimpleNamespace(process_index=1, num_processes=2)
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert "process 1 of 2 leaves" in str(as_gone(closed, two, "zoo train resume=x"))
    assert as_gone(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), two, "") is None
    assert as_gone(closed, SimpleNamespace(process_index=0, num_processes=1), "") is None
