"""The folder of a run: resolved config, versions, metrics, checkpoints, final model. Safe to kill at any time.

runs/2026-11-22/14-03-55-scenes_tiny/
    config.yaml          the resolved config
    run.id               of a run with plugins: the key of the user's note of them (`zoo.runs.consent`)
    zoo.lock             versions, weights and their hashes, commit, plugins
    metrics.jsonl        one line per step
    skipped.jsonl        one line per record that was left out, with the reason
    checkpoints/         step-00000500/, ...
    model/               the trained model, for `zoo.load` and `model=`
    scores.json          the final scores
    summary.json         written last; marks the run as finished
runs/last -> the newest run
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoo.registry import ZooError
from zoo.storage.atomic import WriteError, flush, remove, remove_leftovers, write_json, writing, written_beside

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
    """Paths of one run, and functions that write its files."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.lock = self.path / "zoo.lock"
        self.metrics = self.path / "metrics.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.scores = self.path / "scores.json"
        self.summary = self.path / "summary.json"
        self.error = self.path / "error.json"

    @property
    def is_finished(self) -> bool:
        """Whether the run ended: its model is saved, and scored if the run has data for evaluation."""
        return self.summary.is_file()

    @property
    def has_model(self) -> bool:
        """Whether the final model is saved. The folder appears only when it is complete."""
        return (self.model / "config.json").is_file()

    @classmethod
    def create(cls, root: Path | str, name: str, exact: str = "", now: datetime | None = None) -> "RunFolder":
        """Make root/<date>/<time>-<name>, numbered if two runs start in the same second; or the folder `exact`.

        Raises:
            ZooError: `exact` holds a run, or a folder cannot be made there.
        """
        folder = cls(exact) if exact else None
        if folder is not None:
            folder.require_empty()
        with writing(f"a run folder, {exact!r}" if exact else f"a run folder in {str(root)!r}", "Choose another one."):
            folder = folder or cls(new_folder(root, name, now))
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
        return folder

    def require_empty(self) -> None:
        """Refuse a folder that holds a run, or a saved model, among whose files a run would be lost.

        Raises:
            ZooError: it has a config.yaml, or a config.json.
        """
        if self.config.exists():
            raise ZooError(
                f"{str(self.path)!r} holds a run already. To go on with it: resume={self.path}; "
                "else choose another folder."
            )
        if (self.path / "config.json").exists():
            raise ZooError(f"{str(self.path)!r} holds a saved model. Choose another folder for the run.")

    @classmethod
    def open(cls, name: str, root: Path | str = "runs") -> "RunFolder":
        """Open an existing run: `last`, or a path.

        Raises:
            ZooError: there is no run of that name.
        """
        path = last(root) if name == "last" else Path(name).expanduser()
        if not (path / "config.yaml").is_file():
            known = ", ".join(str(p) for p in sorted(runs(root))[-5:]) or "none"
            raise ZooError(f"{str(path)!r} is not a run: no config.yaml. Newest runs in {str(root)!r}: {known}.")
        return cls(path)

    def point_last(self, root: Path | str) -> None:
        """Let `last` point to this run: a link, or a file with the path if links are not allowed."""
        here, beside = Path(root) / "last", Path(root) / f".last.{os.getpid()}"
        here.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Without links in between, which a relative path would not lead back through.
            beside.symlink_to(os.path.relpath(self.path.resolve(), here.parent.resolve()), target_is_directory=True)
        except OSError:
            beside.write_text(str(self.path.resolve()), encoding="utf-8")
        beside.replace(here)  # a link cannot be changed in place

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a full disk or a read-only folder into an error that names what is safe and how to continue."""
        try:
            with writing(f"{what} to {str(self.path)!r}"):
                yield
        except WriteError as error:
            there = self.list_checkpoints()
            whole = f"The checkpoint {there[-1].name} is whole" if there else "What was there before is whole"
            raise WriteError(
                f"{error} {whole}; when there is room again, zoo train resume={shlex.quote(str(self.path))} goes on."
            ) from error.__cause__

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def list_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first. Unfinished ones have another name."""
        found = [p for p in self.checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    @contextlib.contextmanager
    def checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """Yield a folder to write to; after the block it is the newest checkpoint, and all but `keep` are removed."""
        final = self.checkpoints / f"step-{step:08d}"
        with self.writing(f"the checkpoint of step {step}"):
            # Renamed when complete, so that a killed process never leaves half a checkpoint under this name.
            with written_beside(final, folder=True) as beside:
                yield beside
            for old in self.list_checkpoints()[:-keep] if keep else []:
                remove(old)

    def set_aside(self, checkpoint: Path) -> Path:
        """Rename a damaged checkpoint, so that it is not loaded again and can be inspected."""
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        remove(aside)
        return checkpoint.rename(aside)

    def note_error(self, error: BaseException) -> None:
        """Write why the run ended, for `zoo report`; a disk that is full keeps no note."""
        with contextlib.suppress(OSError, ZooError):
            text = " ".join(str(error).split()) or type(error).__name__
            write_json(self.error, {"error": text, "type": type(error).__name__})

    def clean(self) -> None:
        """Remove unfinished files of a killed process, and its error."""
        with self.writing("anything"):
            remove(self.error)
            remove_leftovers(self.path)
            remove_leftovers(self.checkpoints)

    # ---- metrics -----------------------------------------------------------------------------------------------

    def log(self, *records: Mapping[str, Any]) -> None:
        """Append lines to metrics.jsonl."""
        self._append(self.metrics, records)

    def log_skipped(self, *records: Mapping[str, Any]) -> None:
        """Append lines to skipped.jsonl."""
        if records:
            self._append(self.skipped, records)

    def _append(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        with self.writing(path.stem), path.open("ab+") as file:
            text = "".join(json.dumps(record) + "\n" for record in records).encode()
            if file.tell():
                # A kill may leave half a line: a line break in front keeps it from damaging the next one.
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else b"\n" + text
            file.write(text)

    def flush_metrics(self) -> None:
        """Wait until metrics and skipped records are on the disk."""
        for path in filter(Path.is_file, (self.metrics, self.skipped)):
            with self.writing(path.stem):
                flush(path)

    def rewind(self, step: int) -> int:
        """Remove the lines after `step`, since those steps run again, unreadable lines, and duplicates.

        Returns:
            The number of unreadable lines of metrics.jsonl.
        """
        self._rewind(self.skipped, step, lambda row: (row["step"], *(str(row.get(k)) for k in ("data", "where", "id"))))
        return self._rewind(self.metrics, step, lambda row: (row["step"], *sorted(row)))

    def _rewind(self, path: Path, step: int, key: Callable[[dict[str, Any]], Any]) -> int:
        rows, broken = _rows(path)
        kept = {key(r): r for r in rows if r["step"] <= step}  # of duplicates the last one
        if broken or len(kept) < len(rows):
            with self.writing(path.stem), written_beside(path) as beside:
                beside.write_text("".join(json.dumps(r) + "\n" for r in kept.values()), encoding="utf-8")
        return broken

    def write_lock(self, **more: Any) -> None:
        """Write zoo.lock: versions, machine and commit of this run, and `more`."""
        with self.writing("zoo.lock"):
            write_json(self.lock, environment() | more)


def new_folder(root: Path | str, name: str, now: datetime | None = None) -> Path:
    """Make root/<date>/<time>-<name>, numbered if the name exists."""
    now = now or datetime.now()
    label = re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", name).strip("._") or "run"
    day = Path(root) / now.strftime("%Y-%m-%d")
    for number in range(1, 1000):
        path = day / (now.strftime("%H-%M-%S-") + label + (f"-{number}" if number > 1 else ""))
        # mkdir fails if the folder exists: of two processes that start at once, each gets its own.
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
    raise ZooError(f"There is no last run: {str(pointer)!r} does not exist. Train a model, or give the path of a run.")


def runs(root: Path | str) -> list[Path]:
    """Return the runs below `root`, oldest first; `root` itself if it is a run."""
    root = Path(root)
    if (root / "config.yaml").is_file():
        return [root]
    depths = ("*", "*/*", "*/*/*", "*/*/*/*")  # of jobs of a sweep: sweeps/2026-11-30/1/0
    return sorted({p.parent for depth in depths for p in root.glob(depth + "/config.yaml") if _own(root, p)})


def _own(root: Path, path: Path) -> bool:
    """Return whether a path is reached without links: `last` would list its run twice."""
    return not any(p.is_symlink() for p in path.parents if p != root and root in p.parents)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, also during a run, without unreadable ones."""
    return _rows(path)[0]


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the readable lines, and the number of others."""
    rows: list[dict[str, Any]] = []
    broken = 0
    if path.is_file():
        with path.open("rb") as file:
            for line in filter(bytes.strip, file):
                try:
                    row = json.loads(line)
                    rows.append({**row, "step": int(row["step"])})
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    broken += 1
    return rows, broken


def environment() -> dict[str, Any]:
    """Return versions of libraries, the machine, and the commit of the working folder if it is in git."""
    import torch

    return {
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": _commit(),
    }


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    versions = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
