"""`zoo bench threads`: several people who chat with one model at once, against one after the other, and as a batch.

Everybody shows an own picture and asks an own question. At once, each chats in a thread of their own, as a server or a
Gradio page does it; a batch is one `generate` over all their prompts, padded on the left. Weights are random and all
answers are equally long, so that the work is the same in the three. Wall time: who waits does not care for whom.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zoo.benches.measure import Value
from zoo.benches.place import at_least_one, torch_threads
from zoo.benches.report import Report, Row, machine

_QUESTIONS = ("Is there a red circle?", "What is it?", "How many shapes are there in the picture?", "Where is the cat?")


@dataclass
class Options:
    people: int = 8  # who chat at once
    tokens: int = 32  # of an answer
    width: int = 512  # of the language model
    layers: int = 8  # of the language model
    adapter: str = ""  # an adapter that it has, such as mole; empty: none
    rounds: int = 5  # turns of each
    threads: int = 2  # of torch on the CPU, for each product

    def __post_init__(self) -> None:
        at_least_one(self, "people", "tokens", "layers", "rounds", "threads")


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Time the three ways in turns."""
    report = Report("zoo bench threads", machine=machine(torch.device("cpu"), options.threads))
    with torch_threads(options.threads):
        people = People(options)
        report.setting = [people.describe()]
        wanted = people.in_turns()
        ways = {"in turns": people.in_turns, "at once": people.at_once, "batch": people.as_batch}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        same = 0
        for number in range(options.rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                said = way()
                seconds[name].append(time.perf_counter() - begin)
                same += name == "at once" and said == wanted
            show(f"round {number + 1}: " + ", ".join(f"{n} {times[-1]:.2f} s" for n, times in seconds.items()))
    tokens = options.people * options.tokens
    for name, times in seconds.items():
        report.add(Row(f"{name}: tokens a second, of all", Value.of([tokens / t for t in times]), unit=""))
    for name in ("at once", "batch"):
        ratios = [a / b for a, b in zip(seconds["in turns"], seconds[name], strict=True)]
        report.add(Row(f"{name}: times as many as in turns", Value.of(ratios)))
    every = Value.of([same / options.rounds])
    report.add(Row("at once: rounds in which everybody got the answer that they get alone", every, unit="", bound=1.0))
    return report


class People:
    """A model with random weights, and what each of some people asks it."""

    def __init__(self, options: Options) -> None:
        import zoo

        self.options = options
        adapter = [f"adapter=[{options.adapter}]"] if options.adapter else []
        parts = ["vision=timm", "vision.width=192", "vision.depth=6", "vision.heads=3", "projector=mlp", "llm=hf"]
        sizes = [f"llm.hidden_size={options.width}", f"llm.num_layers={options.layers}", "llm.num_heads=8"]
        torch.manual_seed(0)
        self.model, self.processor = zoo.compose(*parts, *sizes, *adapter, texts=list(_QUESTIONS))
        self.model.eval()
        draw = np.random.default_rng(0)
        self.pictures = [draw.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(options.people)]
        self.questions = [_QUESTIONS[i % len(_QUESTIONS)] for i in range(options.people)]
        self.length: dict[str, Any] = {
            "max_new_tokens": options.tokens,
            "min_new_tokens": options.tokens,
            "do_sample": False,
        }

    def describe(self) -> str:
        count, options = sum(p.numel() for p in self.model.parameters()) / 1e6, self.options
        asked = f"{options.people} people, {self.model.num_image_tokens} image tokens, {options.tokens} of each answer"
        return f"{asked}; {count:.0f} M parameters, float32, adapter: {options.adapter or 'none'}"

    def chat(self, i: int) -> str:
        return self.model.chat(self.questions[i], image=self.pictures[i], **self.length)

    def in_turns(self) -> list[str]:
        return [self.chat(i) for i in range(len(self.questions))]

    def at_once(self) -> list[str]:
        said = [""] * len(self.questions)

        def work(i: int) -> None:
            said[i] = self.chat(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(said))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return said

    def as_batch(self) -> list[str]:
        talks = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in zip(self.pictures, self.questions, strict=True)
        ]
        batch: Any = self.processor.apply_chat_template(
            talks, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            padding=True, padding_side="left",
        )  # fmt: skip
        out = self.model.generate(**batch, **self.length)
        new = out[:, batch["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
