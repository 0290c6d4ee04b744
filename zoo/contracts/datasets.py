"""Rules for data sets that are read by index, with the options that they are given."""

import json
import pickle
from typing import Any

from zoo.contracts.case import Case, add_options_rule
from zoo.contracts.rules import NotForThisPart, Rules, expect
from zoo.registry import Dataset, Sample, StreamingDataset, build, names
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
    data, ids = case.build(), set()
    count = min(len(data), _LOOKED_AT)
    for index in range(count):
        sample = data.get(index)
        expect(
            isinstance(sample, Sample) and sample.dialogs, f"get({index}) is {sample!r:.60}", "a Sample with dialogs"
        )
        ids.add(sample.id)
        for image in sample.images:
            mode = open_image(image).mode
            expect(mode == "RGB", f"an image of sample {index} is {mode}", "RGB")
        for key, value in sample.targets.items():
            expect(
                len(value) == len(sample.images),
                f"target {key!r} of sample {index} has {len(value)} rows",
                "a row an image",
            )
        for dialog in sample.dialogs:
            turns = dialog.messages
            where = f"a dialog of sample {index}"
            roles = {turn["role"] for turn in turns}
            expect(
                roles <= {"system", "user", "assistant"},
                f"{where} has roles {sorted(roles)}",
                "system, user, assistant",
            )
            last = turns[-1]
            answered = last["role"] == "assistant" and "".join(p.get("text", "") for p in last["content"]).strip()
            expect(answered, f"{where} ends with {last!r:.60}", "a turn of the assistant with text")
            parts = [part["type"] for turn in turns for part in turn["content"]]
            expect(set(parts) <= {"text", "image"}, f"{where} has parts {sorted(set(parts))}", "text and image")
            images = parts.count("image")
            expect(images == len(sample.images), f"{where} shows {images} images of {len(sample.images)}", "each once")
            expect(json.loads(json.dumps(dialog.meta)) == dialog.meta, f"meta of {where}", "plain values")
            known = names("task")
            expect(not dialog.task or dialog.task in known, f"{where} names task {dialog.task!r}", ", ".join(known))
    expect(len(ids) == count, f"{count} samples have {len(ids)} ids", "an id each")
    return f"{count} looked at"


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


@RULES.add("splits", "train_split, if it has one, is a data set with samples")
def splits(case: DatasetCase) -> str:
    train = case.build().train_split()
    if train is None:
        raise NotForThisPart("it has no train_split")
    expect(len(train) > 0 and shown(train.get(0)), f"its train_split has {len(train)} samples", "one or more")
    return f"{len(train)} samples"


add_options_rule(RULES)
