"""The folder of a run: resolved config, versions, metrics, checkpoints, final model. A kill never harms it.

runs/2026-11-22/14-03-55-scenes_tiny/
    config.yaml          everything that was set, resolved
    zoo.lock             versions, weights and their hashes, commit, plugins
    metrics.jsonl        one line per step
    checkpoints/         step-00000500/, the newest last
    model/               the trained model, for `zoo.load` and `model=`
    scores.json          the table of the end
runs/last -> the newest of them
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from zoo.registry import ZooError

LIBRARIES = (
    "zoo-vlm",
    "torch",
    "transformers",
    "accelerate",
    "timm",
    "open_clip_torch",
    "peft",
    "tokenizers",
    "numpy",
    "pillow",
)


class RunFolder:
    """Paths of one run, and the ways to write there."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.lock = self.path / "zoo.lock"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.scores = self.path / "scores.json"

    @classmethod
    def create(cls, root: Path | str, name: str, exact: str = "", now: datetime | None = None) -> "RunFolder":
        """Make root/<date>/<time>-<name>, with a number where two runs start in the same second; or the folder `exact`.

        Raises:
            ZooError: `exact` holds a run already.
        """
        if exact:
            if (Path(exact) / "config.yaml").exists():
                raise ZooError(
                    f"{exact!r} holds a run already. To go on with it: resume={exact}; else choose another folder."
                )
            (Path(exact) / "checkpoints").mkdir(parents=True, exist_ok=True)
            return cls(exact)
        folder = cls(new_folder(root, name, now))
        folder.checkpoints.mkdir()
        return folder

    @classmethod
    def open(cls, name: str, root: Path | str = "runs") -> "RunFolder":
        """Open an existing run: `last`, or a path.

        Raises:
            ZooError: there is no run of that name.
        """
        path = last(root) if name == "last" else Path(name)
        if not (path / "config.yaml").is_file():
            known = ", ".join(str(p) for p in sorted(runs(root))[-5:]) or "none"
            raise ZooError(f"{str(path)!r} is no run: it has no config.yaml. Newest runs in {str(root)!r}: {known}.")
        return cls(path)

    def point_last(self, root: Path | str) -> None:
        """Let `last` mean this run: a link, or a file with the path where links are not allowed."""
        here, beside = Path(root) / "last", Path(root) / f".last.{os.getpid()}"
        here.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.symlink_to(os.path.relpath(self.path, root), target_is_directory=True)
        except OSError:
            beside.write_text(str(self.path.resolve()), encoding="utf-8")
        beside.replace(here)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def list_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first. While one is being written it has another name."""
        found = [p for p in self.checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    @contextlib.contextmanager
    def checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """Give a folder to write to; when the block ends it becomes the newest checkpoint, and all but `keep` go."""
        final = self.checkpoints / f"step-{step:08d}"
        with written_beside(final, folder=True) as beside:
            yield beside
        for old in self.list_checkpoints()[:-keep] if keep else []:
            shutil.rmtree(old, ignore_errors=True)

    # ---- metrics -----------------------------------------------------------------------------------------------

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, and the half line that a kill may leave: those steps are run again."""
        kept = [r for r in read_metrics(self.metrics) if r["step"] <= step]
        with written_beside(self.metrics) as beside:
            beside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")

    def write_lock(self, **more: Any) -> None:
        """Write zoo.lock: what this run ran on."""
        write_json(self.lock, environment() | more)


def new_folder(root: Path | str, name: str, now: datetime | None = None) -> Path:
    """Make root/<date>/<time>-<name>, with a number where that is taken."""
    now = now or datetime.now()
    label = re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", name).strip("._") or "run"
    day = Path(root) / now.strftime("%Y-%m-%d")
    for number in range(1, 1000):
        path = day / (now.strftime("%H-%M-%S-") + label + (f"-{number}" if number > 1 else ""))
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise ZooError(f"No free name for {name!r} in {day}.")


def last(root: Path | str) -> Path:
    """Return the path that `last` points to."""
    pointer = Path(root) / "last"
    if pointer.is_dir():
        return pointer.resolve()
    if pointer.is_file():
        return Path(pointer.read_text(encoding="utf-8").strip())
    raise ZooError(f"There is no last run: {str(pointer)!r} does not exist. Train one, or give the path of a run.")


def runs(root: Path | str) -> list[Path]:
    """Return every run below `root`, oldest first; `root` itself where it is one."""
    root = Path(root)
    if (root / "config.yaml").is_file():
        return [root]
    return sorted(
        {p.parent for depth in ("*", "*/*", "*/*/*") for p in root.glob(depth + "/config.yaml") if _own(root, p)}
    )


def _own(root: Path, path: Path) -> bool:
    return not any(p.is_symlink() for p in path.parents if p != root and root in p.parents)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without a last line that is not whole."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


@contextlib.contextmanager
def written_beside(final: Path, *, folder: bool = False) -> Iterator[Path]:
    """Give a file or folder to write to beside `final`; it takes that name when the block ends, whole and on disk."""
    beside = final.with_name(f".{final.name}.writing")
    _remove(beside)
    beside.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        beside.mkdir()
    try:
        yield beside
        for path in [*(beside.rglob("*") if beside.is_dir() else []), beside]:
            _flush(path)
        if beside.is_dir():
            _remove(final)
        beside.replace(final)
        _flush(final.parent)
    except BaseException:
        _remove(beside)
        raise


def _flush(path: Path) -> None:
    with contextlib.suppress(OSError):  # folders cannot be opened on every system
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Return versions of the libraries, the machine, and the commit of the working folder if it is in git."""
    import torch

    versions = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by name."""
    result = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            result[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result
