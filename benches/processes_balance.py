"""How unequal the processes' shares of a step are on real data, in the order of the samples and dealt by cost."""

import re

import numpy as np

from zoo.benches.measure import Value
from zoo.benches.real_data import lacking
from zoo.benches.report import Row
from zoo.registry import RecordError, Sample, ZooError
from zoo.runs.dealing import cost_of, deal
from zoo.runs.order import Mix

MIX = {"vqa_rad": 0.5, "bccd": 0.2, "fashion_mnist": 0.3}  # dialogs of a radiograph, of a photo of cells, and clothes
IMAGE, STEPS, PROCESSES, SIZE = 64, 30, 8, 4


def balance_rows() -> list[Row]:
    """The largest share of a step over the mean one, in words and marks of the text and tokens of images.

    Raises:
        ZooError: the data is not there.
    """
    from zoo.runs.data import RunData
    from zoo.settings.config import compose

    if missing := lacking(list(MIX)):
        raise ZooError(f"Section balance: {missing}.")
    data = RunData(compose("train", ["recipe=vqa_rad", f"data=[{','.join(MIX)}]"]).data, skip_broken=False)
    mix = Mix({name: data.all[name] for name in MIX}, MIX, seed=0)
    shares: dict[str, list[float]] = {"in order": [], "dealt": []}
    for step in range(STEPS):
        count = PROCESSES * SIZE
        samples = [mix.read(*where) for where in mix.places(step * count, (step + 1) * count)]
        true = np.array([_counted(sample) for sample in samples])
        dealt = deal(np.array([cost_of(sample, IMAGE) for sample in samples]), PROCESSES)
        for name, order in (("in order", np.arange(count)), ("dealt", dealt)):
            sums = true[order].reshape(PROCESSES, SIZE).sum(1)
            shares[name].append(sums.max() / sums.mean())
    what = f"largest share of {PROCESSES} processes over the mean, {'+'.join(MIX)}"
    return [Row(f"{what}, {name}", Value.of(found)) for name, found in shares.items()]


def _counted(sample: Sample | RecordError) -> float:
    """Count words and marks, four tokens around each turn, and the tokens of images."""
    if isinstance(sample, RecordError):
        return 0.0
    turns = [m["content"] for d in sample.dialogs for m in d.messages]
    texts = [t if isinstance(t, str) else "".join(p.get("text", "") for p in t) for t in turns]
    return sum(4.0 + len(re.findall(r"\w+|[^\w\s]", text)) for text in texts) + IMAGE * len(sample.images)
