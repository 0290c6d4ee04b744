"""How long a training step waits for its data: drawn scenes through the loader of `zoo train`."""

from dataclasses import replace
from typing import TYPE_CHECKING

from zoo.benches import llava
from zoo.benches.llava import Sizes
from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.loading.build import processor_for
from zoo.runs.batches import Batches, Loader
from zoo.runs.data import RunData
from zoo.runs.order import ShardPosition as Share
from zoo.settings.stage import Stage
from zoo.text.tokenizer import train_tokenizer
from zoo.training.step import Engine

if TYPE_CHECKING:
    from zoo.benches.train import TrainPlace


def waiting_row(place: "TrainPlace", sizes: Sizes) -> Row:
    """Share of the time that steps wait, over as many steps as the rounds have."""
    o = place.options
    data = RunData({"scenes": {"name": "scenes", "size": max(32, sizes.image_size), "scenes": 512}})
    tokenizer = train_tokenizer(data.texts(), 512)
    model = llava.composed(replace(sizes, vocab=max(sizes.vocab, len(tokenizer))))
    model.config.image_token_id = tokenizer.image_token_id
    processor = processor_for(model, tokenizer)
    warmup, steps = 3, max(3, o.rounds) * o.steps
    stage = Stage(steps=warmup + steps, batch_size=o.batch, lr=1e-4)
    engine = Engine(place.accelerator, model.to(place.accelerator.device), stage, stage.steps or 1)
    loader = Loader(Batches(data.mix(stage, 0), processor, stage, stage.steps or 1, Share()))
    shares, waited, positions = [], 0.0, 0
    before = place.clock.read()[1]
    for number, item in enumerate(loader):
        engine.run(number, number, [item["batch"]], False)
        now, positions = place.clock.read()[1], item["batch"]["input_ids"].shape[1]
        if number >= warmup:
            shares.append((loader.waited - waited) / (now - before))
        before, waited = now, loader.waited
    share = 100 * sum(shares) / len(shares)
    spread = Value.of([100 * s for s in shares])
    note = f"mean of {steps} steps on scenes: {o.batch} rows of {positions} positions, one thread reads"
    return Row("waiting for data", Value(share, spread.low, spread.high), " %", bound=3.0, at_most=True, note=note)
