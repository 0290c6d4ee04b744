"""`zoo bench load gguf=...`: loading a model whose LLM is a GGUF file a second time, against transformers' of the file.

Ours loads a saved composed model (a small encoder with random weights, a projector, the LLM of the file) from what the
file was converted to; transformers loads the LLM and the tokenizer from the file. A process for each loading, in turns;
the first turn converts, and is not counted.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.benches.measure import Value
from zoo.benches.peak import in_process
from zoo.benches.report import Report, Row, machine
from zoo.pretrained.origin import origin_of
from zoo.registry import ZooError

if TYPE_CHECKING:
    from zoo.benches.load import Options

_AT_MOST = 0.2  # of transformers' time
_SMALL = ("vision=timm", "vision.image_size=32", "vision.width=32", "vision.depth=2", "vision.heads=2")


def run(options: "Options", show: Callable[[str], None] = print) -> Report:
    """Measure both, in turns.

    Raises:
        ZooError: `gguf` names no GGUF file, and no package with one.
    """
    origin = origin_of(options.gguf)
    if origin is None or origin.place.suffix != ".gguf":
        raise ZooError(f"gguf={options.gguf}: a GGUF file, or pypi:<a package with one>, is needed.")
    report = Report("zoo bench load", machine=machine(torch.device("cpu"), options.threads))
    size = origin.place.stat().st_size / 1e6
    report.setting = [
        f"{origin.place.name}: {size:.0f} MB; a saved model on it against transformers' gguf_file, with the tokenizer",
        f"{options.rounds} rounds, a process for each loading, {options.threads} threads; imports are not counted",
    ]
    seen: dict[str, list[float]] = {"ours": [], "transformers": []}
    with tempfile.TemporaryDirectory() as temporary:
        show("converting, where that was not done, and saving a composed model")
        in_process("load_gguf", "write", options.gguf, temporary, options.threads)
        for turn in range(options.rounds):
            for who, found in seen.items():
                place = temporary if who == "ours" else str(origin.place)
                found.append(in_process("load_gguf", who, place, "", options.threads)["seconds"])
                show(f"{turn + 1}/{options.rounds} {who}: {found[-1]:.2f} s")
    for who, found in seen.items():
        report.add(Row(f"seconds, {who}", Value.of(found), unit=" s"))
    ratio = Value.of([a / b for a, b in zip(seen["ours"], seen["transformers"], strict=True)])
    report.add(Row("seconds from GGUF the second time, ours over transformers'", ratio, bound=_AT_MOST, at_most=True))
    return report


def measure(who: str, place: str, into: str, threads: int) -> None:
    """Load once and print the seconds, imports aside."""
    import transformers

    import zoo

    torch.set_num_threads(threads)
    zoo.compose(*_SMALL, "projector=mlp", "llm=hf", texts=["a b"])  # all that is imported is there
    start = time.perf_counter()
    if who == "write":
        model, processor = zoo.compose(*_SMALL, "projector=mlp", "llm=hf", f"llm.checkpoint={place}")
        model.save_pretrained(into)
        processor.save_pretrained(into)
    elif who == "ours":
        kept: Any = zoo.load(f"dir:{place}", device="cpu")
    else:
        file = Path(place)
        options: Any = {"gguf_file": file.name, "dtype": torch.float32}
        lm = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
        kept = lm, transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if who != "write":
        for weight in kept[0].state_dict().values():
            weight.reshape(-1).view(torch.uint8)[::1024].sum().item()  # at least once a page
    print(json.dumps({"seconds": time.perf_counter() - start}))
