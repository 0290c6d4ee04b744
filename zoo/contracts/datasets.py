"""Rules for data sets, with the options that they are given."""

import json
import pickle
from collections.abc import Sequence
from itertools import islice
from typing import Any

from zoo.contracts.case import Case, add_options_rule
from zoo.contracts.rules import NotForThisPart, Rules, expect
from zoo.registry import Dataset, RecordError, Sample, StreamingDataset, build, names
from zoo.registry.hooks import whole
from zoo.vision.images.decode import open_image

RULES = Rules()
_LOOKED_AT = 20  # samples


class DatasetCase(Case):
    """A data set with its options."""

    def build(self, seed: int = 0, **options: Any) -> Any:
        data = build("dataset", {**self.node, **options})
        if isinstance(data, StreamingDataset) or data.is_stream:
            raise NotForThisPart("it is a stream")
        return data


def shown(sample: Sample) -> Any:
    """All of a sample that can be compared."""
    pixels = [open_image(image).tobytes() for image in sample.images]
    return sample.id, pixels, sample.dialogs, {k: v.tolist() for k, v in sample.targets.items()}


@RULES.add("length", "it has a length, and an index behind it is an IndexError")
def length(case: DatasetCase) -> str:
    data = case.build()
    expect(isinstance(data, Dataset), f"its class is {type(data).__mro__[1].__name__}", "a Dataset")
    expect(len(data) > 1, f"it has {len(data)} samples", "more than 1")
    try:
        found = f"a sample: {data.get(len(data)).id!r}"
    except IndexError:
        return f"{len(data)} samples"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    expect(False, f"get({len(data)}) gives {found}", "IndexError, as for a list of that length")
    return ""


@RULES.add("samples", "a sample has its images, and dialogs that end with an answer and show each image once")
def samples(case: DatasetCase) -> str:
    data = case.build()
    count = min(len(data), _LOOKED_AT)
    _look_at([data.get(index) for index in range(count)])
    return f"{count} looked at"


def _look_at(samples: Sequence[Any]) -> None:
    """Break the rule where samples are of another form than their class states."""
    ids, known = set(), names("task")
    for index, sample in enumerate(samples):
        right = isinstance(sample, Sample) and sample.dialogs
        expect(right, f"sample {index} is {sample!r:.60}", "a Sample with dialogs")
        expect(isinstance(sample.id, str), f"the id of sample {index} is {sample.id!r:.60}", "a text")
        ids.add(sample.id)
        for image in sample.images:
            mode = open_image(image).mode
            expect(mode == "RGB", f"an image of sample {index} is {mode}", "RGB")
        for key, value in sample.targets.items():
            rows = f"target {key!r} of sample {index} has {len(value)} rows"
            expect(len(value) == len(sample.images), rows, "a row an image")
        for dialog in sample.dialogs:
            where = f"a dialog of sample {index}"
            _look_at_turns(dialog.messages, len(sample.images), where)
            expect(json.loads(json.dumps(dialog.meta)) == dialog.meta, f"meta of {where}", "plain values")
            expect(not dialog.task or dialog.task in known, f"{where} names task {dialog.task!r}", ", ".join(known))
    expect(len(ids) == len(samples), f"{len(samples)} samples have {len(ids)} ids", "an id each")


def _look_at_turns(turns: Any, images: int, where: str) -> None:
    for turn in turns:
        parts = turn["content"]
        plain = isinstance(parts, list) and all(isinstance(part, dict) and "type" in part for part in parts)
        expect(
            plain, f"{where} has the content {parts!r:.60}", 'a list of parts, {"type": "text", "text": ...} for one'
        )
    roles = {turn["role"] for turn in turns}
    expect(roles <= {"system", "user", "assistant"}, f"{where} has roles {sorted(roles)}", "system, user, assistant")
    last = turns[-1]
    answered = last["role"] == "assistant" and "".join(p.get("text", "") for p in last["content"]).strip()
    expect(answered, f"{where} ends with {last!r:.60}", "a turn of the assistant with text")
    kinds = [part["type"] for turn in turns for part in turn["content"]]
    expect(set(kinds) <= {"text", "image"}, f"{where} has parts {sorted(set(kinds))}", "text and image")
    shown = kinds.count("image")
    expect(shown == images, f"{where} shows {shown} images of {images}", "each once")


@RULES.add("stream", "a stream gives samples, the same ones again, and from number `start` on those that follow it")
def stream(case: DatasetCase) -> str:
    data, again = (build("dataset", case.node) for _ in range(2))
    if not data.is_stream:
        raise NotForThisPart("it is read by index")
    for epoch in (0, 3):
        first = list(islice(data.stream(epoch), _LOOKED_AT))
        whole = [s for s in first if not isinstance(s, RecordError)]
        expect(whole, f"epoch {epoch} gives {len(first)} records that cannot be read", "a sample")
        _look_at(whole)
        for start in (0, 1, len(first) - 1):
            rest = list(islice(again.stream(epoch, start), len(first) - start))
            alike = [_read(s) for s in rest] == [_read(s) for s in first[start:]]
            expect(alike, f"stream({epoch}, start={start}) gives other samples", "those of stream() behind as many")
    return f"{len(first)} looked at"


def _read(sample: Any) -> Any:
    return str(sample) if isinstance(sample, RecordError) else shown(sample)


@RULES.add("same again", "a sample follows from seed, epoch and index alone, in any order")
def same_again(case: DatasetCase) -> str:
    data, again = case.build(), case.build()
    order = [1, 0, len(data) - 1]
    for epoch in (0, 3):
        one = [shown(data.get(i, epoch)) for i in order]
        other = [shown(again.get(i, epoch)) for i in order[::-1]][::-1]
        unlike = [i for i, a, b in zip(order, one, other, strict=True) if a != b]
        expect(not unlike, f"sample {unlike[:1]} of epoch {epoch} differs, asked in another order", "the same sample")
    return "epochs 0 and 3"


@RULES.add("workers", "it can be sent to a loader worker (pickle), and gives the same there")
def workers(case: DatasetCase) -> str:
    data = case.build()
    try:
        copy = pickle.loads(pickle.dumps(data))  # of our own, in this process
    except Exception as error:
        expect(False, f"{type(error).__name__}: {error}", "that it can be pickled")
        raise
    expect(shown(copy.get(1, 2)) == shown(data.get(1, 2)), "sample 1 of the copy differs", "the same sample")
    return "pickled"


@RULES.add("splits", "train_split and eval_split, if it has them, are data sets with samples")
def splits(case: DatasetCase) -> str:
    data = build("dataset", case.node)
    there = {"train_split": data.train_split(), "eval_split": data.eval_split()}
    found = {name: split for name, split in there.items() if split is not None}
    if not found:
        raise NotForThisPart("it has neither")
    for name, split in found.items():
        split = whole("dataset", split, name)
        first = next(iter(split.stream()), None) if split.is_stream else split.get(0) if len(split) else None
        expect(first is not None, f"its {name} has no samples", "one or more")
        _look_at([first])
    return ", ".join(found)


add_options_rule(RULES)
