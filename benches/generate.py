"""`zoo bench generate`: prefill and decode speed against transformers on the same folder, in one run, in turns."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.benches.generate_named import named_rows
from zoo.benches.measure import Clock, Plain, Value, interleave
from zoo.benches.place import at_least_one, chosen, torch_threads
from zoo.benches.published import MODELS
from zoo.benches.report import Report, Row, machine


@dataclass
class Options:
    # Models with random weights, with commas between: tiny, 100m, 1b, 7b of LLaVA; qwen2_vl, qwen2_5_vl, qwen3_vl,
    # qwen3_vl_moe.
    sizes: str = "tiny,100m"
    model: str = ""  # a named model with its weights, instead, against its language model in transformers and PEFT
    batch: int = 1  # prompts, each with one image
    text: int = 48  # tokens of text of each
    new: int = 32  # tokens that are generated
    dtype: str = "float32"  # of the parameters; with `model`, those are as saved
    attention: str = "auto"  # auto | eager | sdpa | flash_attention_<n>
    rounds: int = 9  # turns of each
    threads: int = 1  # of torch on the CPU
    device: str = "auto"  # auto | cpu | cuda

    def __post_init__(self) -> None:
        chosen("sizes", self.sizes, MODELS)
        at_least_one(self, "batch", "new", "rounds")


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure each size."""
    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    clock = Clock(device, options.threads)
    report = Report("zoo bench generate", machine=machine(device, options.threads))
    report.setting = [
        f"{options.batch} prompts of one image and {options.text} tokens of text, {options.new} new tokens, "
        f"{options.dtype}; {clock.name} time, {options.rounds} rounds"
    ]
    with torch_threads(options.threads):
        if options.model:
            report.add(*named_rows(options, device, clock))
            return report
        for name in options.sizes.split(","):
            show(f"measuring: {name}")
            report.setting.append(f"{name}: {MODELS[name].describe()}")
            report.add(*_rows(name, options, device, clock))
    return report


def _rows(name: str, options: Options, device: torch.device, clock: Clock) -> list[Row]:
    import transformers

    import zoo

    made, dtype = MODELS[name], getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        made.write(Path(temporary), dtype)
        ours, processor = zoo.load(f"dir:{temporary}", device=device, dtype=dtype, attention=options.attention)
        theirs: Any = transformers.AutoModelForImageTextToText.from_pretrained(temporary, dtype=dtype)
    taken = ours.set_attention(options.attention)
    theirs = theirs.to(device).eval()
    theirs.generation_config = ours.generation_config  # the same end tokens, which cost each step a little
    theirs.set_attn_implementation(taken if not taken.startswith("zoo") else "eager")
    prompts = made.prompts(processor.image_token_id, options.batch, options.text, dtype)
    given = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in prompt.items()} for prompt in prompts]
    batches = {id(ours): given[0], id(theirs): given[1]}

    def answer(model: Any, new: int) -> Callable[[], Any]:
        fixed = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        return lambda: model.generate(**batches[id(model)], **fixed)

    same = torch.equal(answer(ours, options.new)(), answer(theirs, options.new)())
    variants = {
        f"{who} {new}": Plain(answer(model, new))
        for new in (1, 1 + options.new)
        for who, model in (("ours", ours), ("theirs", theirs))
    }
    times = interleave(variants, clock, options.rounds, 1)
    positions, rows = given[0]["input_ids"].numel(), []
    for what, tokens, take in (
        ("prefill", positions, lambda who: times.seconds(f"{who} 1")),
        (
            "decode",
            options.batch * options.new,
            lambda who: _less(times.seconds(f"{who} {1 + options.new}"), times.seconds(f"{who} 1")),
        ),
    ):
        mine, others = take("ours"), take("theirs")
        rows.append(Row(f"{name}: {what}, ours", Value.of([tokens / t for t in mine]), unit=" tokens/s"))
        rows.append(Row(f"{name}: {what}, transformers", Value.of([tokens / t for t in others]), unit=" tokens/s"))
        ratio = Value.of([a / b for a, b in zip(mine, others, strict=True)])
        note = "" if same else "the answers differ"
        rows.append(Row(f"{name}: {what} time over transformers'", ratio, bound=1.03, at_most=True, note=note))
    return rows


def _less(whole: list[float], part: list[float]) -> list[float]:
    return [max(a - b, 1e-9) for a, b in zip(whole, part, strict=True)]
