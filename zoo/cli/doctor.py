"""`zoo doctor`: versions, devices, attention backends and plugins of this machine, and what is worth installing."""

import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zoo.cli.proposals import OPTIONAL, Proposal, part_of, proposals
from zoo.pretrained.cache import RECORD, cache
from zoo.pretrained.known import KNOWN
from zoo.registry import ZooError, plugins
from zoo.registry.versions import TESTED
from zoo.text.command_line import Parser
from zoo.text.terminal import Answer, columns, say, wrapped

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
READERS = ("gguf", "onnx")  # of files with weights
EXTRA = tuple(name for proposal in OPTIONAL for name in proposal.packages if name not in READERS)
LIBRARIES = tuple(name for name in TESTED if name not in EXTRA)
DRIVER = Path("/proc/driver/nvidia/version")
Row = dict[str, Any]  # of a section; `name` and what is known


def main(words: Sequence[str] = ()) -> Answer:
    """Print the report; the status is 1 if a library is missing or a plugin fails."""
    parser = Parser(
        "doctor",
        "Show versions, packages of weights, devices, attention backends and plugins, and what is worth installing.",
        """zoo doctor
        zoo doctor plugins=[./my_pruner.py]""",
        json=True,
        options="plugins=[./my_pruner.py] loads one of your own",
    )
    args = parser.read(words)
    plugins.load_installed()
    if left := plugins.load_words(args.options):
        raise ZooError(f"zoo doctor takes plugins=[...], got {' '.join(left)!r}.")
    about = {"zoo": _version("zoo-vlm"), "python": platform.python_version(), "platform": platform.platform()}
    say(f"zoo {about['zoo'] or 'from a checkout'}  python {about['python']}  {about['platform']}")
    sections = {"libraries": _libraries, "weights": _weights, "devices": _devices, "attention": _attention}
    found: dict[str, list[Row]] = {}
    for title, rows in sections.items():
        found[title] = list(rows())
        say(f"\n{title}")
        say(columns([(row["name"], _text(row)) for row in found[title]], widest=18), None)
    wanted = list(proposals(_version, any(str(row["name"]).startswith("cuda:") for row in found["devices"])))
    _show_plugins()
    _show_proposals(wanted)
    bad = plugins.failed()
    known = [
        {"name": p.name, "origin": p.origin, "ok": p.ok, "adds": p.adds, "error": p.error} for p in plugins.status()
    ]
    install = [{k: v for k, v in asdict(p).items() if k not in ("cuda", "either")} for p in wanted]
    missing = [name for name in LIBRARIES if not _version(name)]
    return Answer({**about, **found, "plugins": known, "install": install}, status=1 if bad or missing else 0)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _text(row: Row) -> str:
    """Return what is known of a row, for people."""
    if "text" in row:
        return str(row["text"])
    if row.get("version") is None:
        return "MISSING" if row.get("needed") else "not installed"
    outside = row.get("tested") is False
    return f"{row['version']:<12}NOT TESTED: {row['range']} is" if outside else str(row["version"])


def _libraries() -> Iterator[Row]:
    for package in (*LIBRARIES, *EXTRA):
        tested = TESTED.get(package)
        yield {
            "name": package,
            "version": _version(package) or None,
            "needed": package in LIBRARIES,
            "range": tested.range if tested else None,
            "tested": not _is_outside(package) if tested and _version(package) else None,
        }


def _weights() -> Iterator[Row]:
    """Yield packages of pretrained weights, what reads them, and where they are kept."""
    for name, known in KNOWN.items():
        about = {"megabytes": known.megabytes, "license": known.licence, "use": part_of(name) or None}
        yield {"name": name, "version": _version(name) or None, **about}
    for reader in READERS:
        yield {"name": reader, "version": _version(reader) or None}
    kept = len([path for path in cache().glob("*-*-*") if (path / RECORD).is_file()])
    yield {"name": "converted", "count": kept, "folder": str(cache()), "text": f"{kept} in {cache()}"}


def _is_outside(package: str) -> bool:
    found = _version(package)
    return bool(found) and package in TESTED and not TESTED[package].covers(found)


def _devices() -> Iterator[Row]:
    import torch

    cores, threads = os.cpu_count(), torch.get_num_threads()
    text = f"{cores} cores, {threads} threads for torch"
    yield {"name": "cpu", "cores": cores, "threads": threads, "text": text}
    if not torch.cuda.is_available():
        unused = DRIVER.exists() and torch.version.cuda is None
        yield {
            "name": "cuda",
            "text": "none: this torch is built without CUDA, though a driver is here" if unused else "none",
        }
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        about = {"gpu": facts.name, "bytes": facts.total_memory, "capability": f"{facts.major}.{facts.minor}"}
        text = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}"
        yield {"name": f"cuda:{i}", **about, "text": text}
    if torch.backends.mps.is_available():
        yield {"name": "mps", "text": "available"}


def _attention() -> Iterator[Row]:
    import torch

    from zoo.fusion.llm.attention import resolve_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        chosen = resolve_attention("auto", device, dtype)
        yield {"name": f"auto, {str(dtype)[6:]}", "chosen": chosen, "text": chosen}
    for name in ATTENTION:
        try:
            resolve_attention(name, device, torch.bfloat16)
            yield {"name": name, "available": True, "text": "available"}
        except ZooError as error:
            why = str(error).partition("cannot run: ")[2].partition(". Use")[0] or str(error)
            yield {"name": name, "available": False, "text": why}


def _show_plugins() -> None:
    found, bad = plugins.status(), plugins.failed()
    say(f"\nplugins: {len(found)} found, {len(found) - len(bad)} ok, {len(bad)} failed")
    for plugin in found:
        head = f"  {'ok  ' if plugin.ok else 'FAIL'}  {plugin.name} ({plugin.origin})  "
        say(f"{head}{plugin.error or _added(plugin)}", subsequent=" " * 8)


def _show_proposals(wanted: Iterable[Proposal]) -> None:
    """Print what is worth installing, and on stderr what keeps the zoo from running."""
    if wanted:
        say("\nworth installing, for what is not here yet")
        for proposal in wanted:
            say(f"  {proposal.text}", subsequent="    ")
            say(f"      {proposal.command}", None)
    if missing := [name for name in LIBRARIES if not _version(name)]:
        print(wrapped(f"zoo: missing: {', '.join(missing)}"), file=sys.stderr)
    if outside := [f"{name}{TESTED[name].range}" for name in TESTED if _is_outside(name)]:
        asked = " ".join(f"'{name}'" for name in outside)
        print(wrapped(f"zoo: versions that were not tested may fail. Tested: pip install {asked}"), file=sys.stderr)


def _added(plugin: plugins.Plugin) -> str:
    return f"adds {', '.join(plugin.adds)}" if plugin.adds else "adds nothing"
