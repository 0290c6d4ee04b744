"""Runs in processes of their own, to their end or to a chosen moment, and what their folders then hold.

The processes are forked from a server that has imported everything, so that a run of a few steps takes a second. The
moments are met by means of the system: real signals, and a real limit on the size of files.
"""

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.train_builders import REPO
from zoo.cli.entry import main
from zoo.runs.folder import read_metrics
from zoo.training.step import Engine

SERVER = multiprocessing.get_context("forkserver")
# What a run imports when it first needs it: forked processes would each import it anew.
PRELOADED = [
    "tests.killed_runs", "zoo.training.loop", "zoo.loading.build", "pytest", "zoo.cli.launch", "hydra.compose",
    "zoo.data.scenes", "zoo.tasks.answers", "zoo.tasks.exact", "zoo.tasks.groups", "zoo.distill.dense", "timm.data",
    "zoo.vision.encoders.timm", "zoo.fusion.projectors.mlp", "zoo.fusion.llm.hf", "tqdm.contrib.logging",
    "transformers.models.starcoder2.modeling_starcoder2",
]  # fmt: skip
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}  # and "open" for writing
PATIENCE = 300  # seconds, on a machine that has other things to do
TIMED = {"images_per_s", "samples_per_s", "wait", "seconds"}


@contextlib.contextmanager
def served() -> Iterator[None]:
    """Start the server that the processes are forked from, where it does not run yet."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    path = os.pathsep.join(filter(None, (str(REPO), before["PYTHONPATH"])))
    os.environ |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        SERVER.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@dataclass
class Ended:
    """How the processes of a run ended, and what they said."""

    codes: list[int]
    said: str

    @property
    def code(self) -> int:
        assert len(set(self.codes)) == 1, f"the processes ended apart: {self.codes}\n{self.said}"
        return self.codes[0]


def train(
    place: Path,
    words: list[str],
    *moment: Any,
    processes: int = 1,
    ranks: tuple[int, ...] = (0,),
    launcher: bool = True,
) -> Ended:
    """Run `zoo train` with these words in the folder `place`.

    Args:
        place: working folder; the run's folder is `run` in it.
        words: after `zoo train`.
        moment: name of one of the functions below, and its arguments.
        processes: that make up the run.
        ranks: of those that the moment is for.
        launcher: kill the other processes where one is gone, as a launcher does.
    """
    place.mkdir(exist_ok=True)
    port = _free_port()
    children = []
    for rank in range(processes):
        env = {} if processes == 1 else _environment(rank, processes, port)
        children.append(begin(place, words, *(moment if rank in ranks else ()), env=env, said=f"said.{rank}"))
    first = children[ranks[0]]
    first.join(PATIENCE)
    for child in children:
        if launcher and first.exitcode and first.exitcode < 0 and child is not first:
            child.kill()
        child.join(PATIENCE)
    return _ended(place, children)


def call_in_two(
    place: Path, function: Callable[..., Any], *args: Any, processes: int = 2, until: int | None = None
) -> Ended:
    """Call a function in processes that make up one group; `place` is their working folder.

    Args:
        place: working folder.
        function: to call with `args`.
        args: of the function.
        processes: how many.
        until: the process that is waited for, where others hang; they are killed behind it.
    """
    port = _free_port()
    children = []
    for rank in range(processes):
        env = _environment(rank, processes, port)
        children.append(SERVER.Process(target=_call, args=(str(place), env, f"said.{rank}", function, args)))
        children[-1].start()
    if until is not None:
        children[until].join(PATIENCE)
        for child in children:
            child.kill()
    for child in children:
        child.join(PATIENCE)
    return _ended(place, children)


def _ended(place: Path, children: list[Any]) -> Ended:
    hang = [child for child in children if child.exitcode is None]
    for child in hang:
        child.kill()
    said = "".join((place / f"said.{rank}").read_text() for rank in range(len(children)))
    assert not hang, f"the processes hang:\n{said}"
    return Ended([c.exitcode for c in children], said)


def begin(place: Path, words: list[str], *moment: Any, env: Mapping[str, str] | None = None, said: str = "said") -> Any:
    """Start one process of a run, and return it; what it says goes to the file `said`."""
    child = SERVER.Process(target=_child, args=(str(place), words, moment, dict(env or {}), said))
    child.start()
    return child


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves that must be the same, however often it was stopped: all but times."""
    files = [p for name in ("model", "tokenizer") for p in sorted((folder / name).rglob("*"))]
    files += [p for p in (folder / "scores.json", folder / "predictions.jsonl") if p.is_file()]
    found: dict[str, Any] = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    found["summary"] = _untimed(json.loads((folder / "summary.json").read_text()))
    found["metrics"] = [_untimed(row) for row in read_metrics(folder / "metrics.jsonl")]
    found["leftovers"] = sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name != ".running")
    return found


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in TIMED}


# ---- moments, in the process of the run --------------------------------------------------------------------------


def noting_writes(into: str) -> None:
    """Note every event of writing below `run`, one a line."""
    file = Path(into).open("w", buffering=1)  # noqa: SIM115  # to the end of the process
    _at_writes(lambda number, what: print(what, file=file))


def killed_at_write(which: int | str) -> None:
    """SIGKILL just before the write event of this number, or the first that reads so."""
    _at_writes(lambda number, what: os.kill(os.getpid(), signal.SIGKILL) if which in (number, what) else None)


def killed_at_shard(which: int) -> None:
    """SIGKILL just before the shard of this number of a store gets its name."""
    seen = [0]

    def act(_: int, what: str) -> None:
        if what.startswith("os.rename") and "/.shard-" in what:
            seen[0] += 1
            if seen[0] == which:
                os.kill(os.getpid(), signal.SIGKILL)

    _at_writes(act)


def killed_within_write(size: int) -> None:
    """Let the system kill the process in the middle of writing the first file of more than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def on_a_full_disk(size: int) -> None:
    """Let no file become larger than `size` bytes: the writer gets an error and half a file, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def terminated_at_step(number: int, when: str) -> None:
    """SIGTERM ahead of what the processes agree on in optimiser step `number`, or behind it."""
    inner, calls = Engine.run, [0]

    def run(self: Engine, *args: Any) -> Any:
        calls[0] += 1
        if when == "before" and calls[0] == number:
            args = (*args[:3], True, *args[4:])  # as the handler leaves it for the step
            os.kill(os.getpid(), signal.SIGTERM)
        result = inner(self, *args)
        if when == "behind" and calls[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Engine.run = run  # type: ignore[method-assign]


def killed_in_step(number: int) -> None:
    """SIGKILL ahead of optimiser step `number`, while the other processes go into theirs."""
    inner, calls = Engine.run, [0]

    def run(self: Engine, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, *args)

    Engine.run = run  # type: ignore[method-assign]


def killed_while_scoring(times: int) -> None:
    """SIGKILL as the model is scored for the time of this number."""
    from zoo.training import finish

    inner, calls = finish.evaluate, [0]

    def evaluate(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **options)

    finish.evaluate = evaluate  # type: ignore[assignment]


def _at_writes(act: Callable[[int, str], Any]) -> None:
    seen = [0]
    below = f"{Path.cwd()}/run"

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in WRITES and event != "open":
            return
        path = str(args[0])
        if event == "open":
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(args[2], int) else 0
            if not writes:
                return
        within_folder = event in ("os.remove", "os.rmdir") and args[1] != -1  # a folder is emptied by its handle
        if within_folder or os.path.abspath(path).startswith(below):  # noqa: PTH100  # resolving would open files
            seen[0] += 1
            act(seen[0], f"{event} {path}")

    sys.addaudithook(hook)


def _child(place: str, words: list[str], moment: tuple[Any, ...], env: dict[str, str], said: str) -> None:
    _settle(place, env, said)
    if moment:
        globals()[moment[0]](*moment[1:])
    code = main(["train", *words])
    sys.stdout.flush()
    sys.exit(code)


def _call(place: str, env: dict[str, str], said: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _settle(place, env, said)
    function(*args)


def _settle(place: str, env: dict[str, str], said: str) -> None:
    os.chdir(place)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= env
    os.fsync = unflushed  # type: ignore[assignment]
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a run that a person starts
    gc.freeze()  # what was imported is not looked through again


def unflushed(_: int) -> None:
    """In place of `os.fsync`, 4 ms each: what a killed process wrote is there; a machine that fails is not tried."""


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {k: str(v) for k, v in names.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]
