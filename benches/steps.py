"""The training steps that are compared: ours, a plain loop around transformers' model, and transformers' Trainer."""

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from zoo.benches.measure import Clock, Plain
from zoo.runs import allocator as memory
from zoo.settings.stage import Stage
from zoo.storage.precision import autocast, fast_products
from zoo.text.batch import to_device
from zoo.training.step import Engine

# What glibc comes to by itself in a process that frees large blocks: it raises both thresholds up to here.
GLIBC_LARGEST, GLIBC_KEPT = 32 * 2**20, 64 * 2**20


@contextlib.contextmanager
def as_shipped() -> Iterator[None]:
    """Undo what `zoo train` sets for the whole process, for those who do not: float32 products, kept memory."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, products.fp32_precision = products.fp32_precision, "none"
    memory.set_thresholds(GLIBC_LARGEST, GLIBC_KEPT)
    try:
        yield
    finally:
        products.fp32_precision = before
        memory.set_thresholds(memory.LARGEST, memory.KEPT)


class AsShipped(Plain):
    """A variant that runs with torch's own settings."""

    def time(self, clock: Clock, steps: int) -> tuple[float, float]:
        with as_shipped():
            return super().time(clock, steps)


def plain_loop(model: Any, batches: list[dict[str, Tensor]], precision: str, device: torch.device) -> Plain:
    """A loop as people write it: default AdamW, gradients clipped at 1."""
    model.to(device).train()
    turns = cycle([to_device(batch, device) for batch in batches])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with autocast(precision, device):
            loss = model(**next(turns)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return AsShipped(step)


def our_step(
    accelerator: Any, model: Any, batches: list[dict[str, Any]], *, precision: str = "auto", compile: bool = False
) -> Plain:
    """The step of `zoo train`, on batches that are there already; one after the other."""
    fast_products()
    memory.set_thresholds(memory.LARGEST, memory.KEPT)
    stage = Stage(
        steps=1_000_000, batch_size=len(batches[0]["input_ids"]), lr=1e-4, schedule="constant", compile=compile
    )
    return turns_of(
        Engine(accelerator, model.to(accelerator.device), stage, stage.steps or 1, precision=precision), batches
    )


def turns_of(engine: Engine, batches: list[dict[str, Any]]) -> Plain:
    """Steps of an engine on batches that are there already; one after the other."""
    count = 0

    def step() -> None:
        nonlocal count
        engine.run(count, count, [batches[count % len(batches)]], False)
        count += 1

    return Plain(step)


class Trained(Plain):
    """transformers' Trainer, timed between the ends of steps, so that its start does not count.

    Its data are batches that are there already, one after the other: nothing is read, nothing is collated.
    """

    def __init__(self, model: Any, batches: list[dict[str, Tensor]], precision: str, device: torch.device) -> None:
        self.model, self.batches, self.precision, self.device = model, batches, precision, device
        self.optimizers: tuple[Any, Any] = (None, None)
        self.folder = tempfile.TemporaryDirectory()

    def time(self, clock: Clock, steps: int) -> tuple[float, float]:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        marks: list[tuple[float, float]] = []

        class Mark(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                marks.append(clock.read())

        rows, turns = len(self.batches[0]["input_ids"]), cycle(self.batches)
        arguments = TrainingArguments(
            output_dir=self.folder.name,
            per_device_train_batch_size=rows,
            max_steps=steps + 1,
            learning_rate=1e-4,
            bf16=self.precision == "bf16",
            use_cpu=self.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=self.model,
            args=arguments,
            train_dataset=list(range(rows * (steps + 1))),  # type: ignore[arg-type]
            data_collator=lambda _: dict(next(turns)),
            callbacks=[Mark()],
        )
        with as_shipped(), _quiet():
            trainer.train()
        first, last = marks[0], marks[-1]
        return (last[0] - first[0]) / steps, (last[1] - first[1]) / steps


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logging.set_verbosity(level)
