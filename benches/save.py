"""`zoo bench save`: what it costs to save a model whose weights came from checkpoints and did not change.

Saving reads the checkpoints once more and compares (see `zoo.composed.bases`), so it is measured against saving all
weights, which writes as many bytes. Each model is loaded and saved in a process of its own; every weight was touched
once, and files are in the system's cache as far as they fit. Memory is what saving takes beyond the model: pages of no
file (what is held), and of files (what the system may drop).
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.benches.measure import Value
from zoo.benches.peak import in_process, memory
from zoo.benches.place import at_least_one
from zoo.benches.published import SIZES, write
from zoo.benches.report import Report, Row, machine
from zoo.registry import unknown

KINDS = ("published", "parts")


@dataclass
class Options:
    sizes: str = "100m"  # tiny | 100m | 1b | 7b: of a LLaVA with random weights
    dtype: str = "bfloat16"  # of the files and of the parameters
    kinds: str = "published,parts"  # a published model; encoder and language model from checkpoints of their own
    whole: bool = True  # measure saving all weights too, which writes as many bytes as the model has
    rounds: int = 3  # turns of each
    threads: int = 1  # of torch on the CPU

    def __post_init__(self) -> None:
        if self.sizes not in SIZES:
            raise unknown("sizes", self.sizes, SIZES)
        at_least_one(self, "rounds", "threads")


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Save what did not change, and all, in turns."""
    report = Report("zoo bench save", machine=machine(torch.device("cpu"), options.threads))
    kinds = [kind for kind in options.kinds.split(",") if kind]
    if odd := [kind for kind in kinds if kind not in KINDS]:
        raise unknown("kind of model", odd[0], KINDS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        show(f"writing checkpoints of sizes {options.sizes}")
        weights = {kind: _WRITE[kind](options, root) for kind in kinds}
        report.setting = [f"{SIZES[options.sizes].describe()}, {options.dtype}: {max(weights.values()) / 1e9:.2f} GB"]
        for kind in kinds:
            seen: list[dict[str, float]] = []
            for _ in range(options.rounds):
                seen.append(in_process("save", kind, str(root), options.dtype, options.threads, options.whole))
                show(f"{kind}: {json.dumps({k: round(v, 4) for k, v in seen[-1].items()})}")
            _add(report, kind, seen, weights[kind], options)
    return report


def _add(report: Report, kind: str, seen: list[dict[str, float]], weights: int, options: Options) -> None:
    def of(key: str, scale: float = 1.0) -> Value:
        return Value.of([row[key] * scale for row in seen])

    speed = Value.of([weights / 1e9 / row["cpu"] for row in seen])
    report.add(Row(f"{kind}: seconds of saving what did not change", of("seconds"), unit=" s"))
    report.add(Row(f"{kind}: of which the processor works", of("cpu"), unit=" s"))
    report.add(Row(f"{kind}: compared in a second of its work", speed, unit=" GB"))
    report.add(Row(f"{kind}: memory that it holds meanwhile", of("held", 1e-6), unit=" MB"))
    report.add(Row(f"{kind}: pages of files that it reads, over weights", of("paged", 1 / weights)))
    report.add(Row(f"{kind}: bytes of the weights that it writes", of("bytes"), unit=" B"))
    if options.whole:
        report.add(Row(f"{kind}: seconds of saving all weights", of("whole"), unit=" s"))
        ratio = Value.of([row["cpu"] / row["whole_cpu"] for row in seen])
        report.add(Row(f"{kind}: unchanged over all, work of the processor", ratio))


def _published(options: Options, root: Path) -> int:
    return write(SIZES[options.sizes], root / "published", getattr(torch, options.dtype))


def _parts(options: Options, root: Path) -> int:
    """The encoder and the language model of the same sizes, each in a folder that transformers loads."""
    import transformers as t

    from zoo.benches.llava import config
    from zoo.benches.random_files import write_random
    from zoo.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a picture of a red circle"], 320, "chatml")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    whole = config(SIZES[options.sizes], positions=4096, image_token=tokenizer.image_token_id, eos=end, pad=pad)
    total = 0
    for name, cls, part in (
        ("vision", t.CLIPVisionModel, whole.vision_config),
        ("llm", t.LlamaForCausalLM, whole.text_config),
    ):
        part.dtype = options.dtype
        with torch.device("meta"):
            shapes = {n: tuple(p.shape) for n, p in cls(part).state_dict().items()}
        part.architectures = [cls.__name__]
        part.save_pretrained(root / name)
        total += write_random(shapes, root / name / "model.safetensors", getattr(torch, options.dtype))
    tokenizer.save_pretrained(root / "llm")
    return total


_WRITE: dict[str, Callable[[Options, Path], int]] = {"published": _published, "parts": _parts}


def write_kind(kind: str, sizes: str, dtype: str, root: Path) -> list[str]:
    """Write the files of a model of one of KINDS, and return the words that load it."""
    _WRITE[kind](Options(sizes=sizes, dtype=dtype), root)
    if kind == "published":
        return [f"model=dir:{root / kind}"]
    words = ["vision=hf", f"vision.checkpoint={root / 'vision'}", "llm=hf", f"llm.checkpoint={root / 'llm'}"]
    return [*words, "projector=mlp", "device=cpu"]


def measure(kind: str, root: str, dtype: str, threads: int, whole: bool) -> None:
    """Load a model, save it, and print seconds and memory."""
    torch.set_num_threads(threads)
    model = _load(kind, Path(root), dtype)
    for weight in model.state_dict().values():
        weight.reshape(-1).view(torch.uint8)[::1024].sum().item()  # at least once a page
    with tempfile.TemporaryDirectory(dir=root) as folder, _Watch() as watch:
        seconds, cpu = _seconds(lambda: model.save_pretrained(Path(folder) / "saved"))
        found = {"seconds": seconds, "cpu": cpu, "held": float(watch.held), "paged": float(watch.paged)}
        found["bytes"] = float(sum(f.stat().st_size for f in (Path(folder) / "saved").glob("*.safetensors")))
        if whole:
            whole_at = Path(folder) / "whole"
            found["whole"], found["whole_cpu"] = _seconds(lambda: model.save_pretrained(whole_at, include_base=True))
    print(json.dumps(found))


def _load(kind: str, root: Path, dtype: str) -> Any:
    import zoo

    if kind == "published":
        return zoo.load(f"dir:{root / kind}", device="cpu", dtype=dtype)[0]
    words = ["vision=hf", f"vision.checkpoint={root / 'vision'}", "llm=hf", f"llm.checkpoint={root / 'llm'}"]
    model = zoo.compose(*words, "projector=mlp", "device=cpu")[0]
    return model.to(getattr(torch, dtype))


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor's work for this process."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


class _Watch:
    """The most memory beyond what there was at the start, looked at every five milliseconds."""

    def __enter__(self) -> "_Watch":
        self.before = memory("RssAnon"), memory("RssFile")
        self.held = self.paged = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.done.wait(0.005):
            self.held = max(self.held, memory("RssAnon") - self.before[0])
            self.paged = max(self.paged, memory("RssFile") - self.before[1])
