"""The lock of a run: held by one living process, and by no dead one."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest

from tests.train_builders import config, recipe
from zoo.registry import ZooError
from zoo.runs import lock as run_lock
from zoo.runs.folder import RunFolder
from zoo.runs.lock import RunLock
from zoo.training.loop import Run

STAGES = {"a": "steps: 1, batch_size: 4, train: [projector]"}
FORK = multiprocessing.get_context("fork")


def hold(folder, pipe):
    """Hold the lock, with a child as a loader's workers are, until somebody kills this process."""
    lock = RunLock(folder)
    worker = FORK.Process(target=time.sleep, args=(60,))
    worker.start()
    pipe.send((lock.path.name, worker.pid))
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`, and the number of its child."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    _, worker = ours.recv()
    yield process, worker
    process.kill()
    process.join()
    os.kill(worker, signal.SIGKILL)


def test_an_error_names_the_process_and_its_death_frees_the_run(tmp_path, holder):
    process, worker = holder
    with pytest.raises(ZooError, match=rf"is alive: process {process.pid} on .* since \d{{4}}-.*trains in it"):
        RunLock(tmp_path)
    process.kill()
    process.join()
    os.kill(worker, 0)  # its child lives on, and does not hold what was its parent's
    RunLock(tmp_path).release()


def test_released_is_free_and_the_file_stays(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(ZooError, match=f"process {os.getpid()} "):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()
    assert json.loads((tmp_path / run_lock.NAME).read_text()) == {}


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_file_says_who_holds_it(tmp_path, holder, monkeypatch):
    process, _ = holder
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ZooError, match=f"process {process.pid} "):
        RunLock(tmp_path)
    process.kill()
    process.join()
    assert "cannot be locked" in RunLock(tmp_path).note


def test_without_locks_another_process_of_the_same_number_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    owner = {"pid": os.getpid(), "host": run_lock.platform.node(), "born": 1.0, "since": "2026-11-22 14:03:55"}
    (tmp_path / run_lock.NAME).write_text(json.dumps(owner))
    RunLock(tmp_path)


def test_a_folder_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ZooError, match=r"cannot be written \(Read-only file system\)"):
        RunLock(tmp_path)


def test_two_runs_do_not_begin_in_one_folder(tmp_path):
    words = [*recipe(tmp_path, STAGES), f"run.folder={tmp_path / 'run'}"]
    lock = RunLock(RunFolder.create(tmp_path, "", str(tmp_path / "run")).path)  # the other one is a moment ahead
    with pytest.raises(ZooError, match="is alive"):
        Run(config(words))
    lock.release()
    Run(config(words)).close()
    with pytest.raises(ZooError, match="holds a run already"):
        Run(config(words))
