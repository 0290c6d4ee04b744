"""What a model answers, row by row of its score table, on several draws; and in batches against one by one."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zoo.registry import Dataset, Dialog, Sample, Score, ZooError, build
from zoo.runs.data import RunData
from zoo.runs.scored import chosen


@dataclass(frozen=True)
class Ability:
    """The score of one kind of question, in per cent.

    Attributes:
        mean: over the draws.
        stderr: of the mean: of the answers, or of the draws among each other, whichever is larger.
        draws: the score of each.
    """

    mean: float
    stderr: float
    draws: list[float]

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Ability":
        """Put the scores of several draws together."""
        values, k = [100 * s.value for s in scores], len(scores)
        answers = 100 * sum(_error(s) ** 2 for s in scores) ** 0.5 / k
        between = statistics.stdev(values) / k**0.5 if k > 1 else 0.0
        return cls(sum(values) / k, max(answers, between), values)


def _error(score: Score) -> float:
    """The standard error of a score. Where all answers are right, or none, as if one more of each had been seen."""
    if score.stderr or not score.n:
        return score.stderr
    share = (score.value * score.n + 1) / (score.n + 2)
    return float((share * (1 - share) / (score.n + 2)) ** 0.5)


def mean_of(abilities: Mapping[str, Ability]) -> Ability:
    """The mean over abilities, each counted alike; the error is that of independent ones."""
    each, k = list(abilities.values()), len(abilities)
    whole = len({len(a.draws) for a in each}) == 1  # else a draw had no question of some kind
    draws = [sum(some) / k for some in zip(*(a.draws for a in each), strict=True)] if whole else []
    return Ability(sum(a.mean for a in each) / k, sum(a.stderr**2 for a in each) ** 0.5 / k, draws)


@dataclass
class Draws:
    """Scores of several draws, as they come."""

    found: dict[str, list[Score]] = field(default_factory=dict)

    def add(self, scores: Mapping[str, Score]) -> None:
        for kind, score in scores.items():
            self.found.setdefault(kind, []).append(score)

    def abilities(self) -> dict[str, Ability]:
        return {kind: Ability.of(scores) for kind, scores in self.found.items()}


class Some(Dataset):
    """Some samples of a data set."""

    def __init__(self, whole: Any, places: Sequence[int]) -> None:
        self.whole, self.places = whole, places

    def __len__(self) -> int:
        return len(self.places)

    def get(self, index: int, epoch: int = 0) -> Sample:
        sample: Sample = self.whole.get(self.places[index], epoch)
        return sample

    def place(self, index: int) -> str:
        return str(self.whole.place(self.places[index]))

    def train_split(self) -> Any:
        return self.whole.train_split()


def evaluated(config: Any) -> dict[str, Any]:
    """Return the data sets that a config evaluates on.

    Raises:
        ZooError: it has none.
    """
    data = RunData(config.data)
    if not (found := data.evaluation or data.all):
        raise ZooError("The model states no data to be scored on: name some with data=<name>.")
    return dict(found)


def scores(
    model: Any, processor: Any, config: Any, limit: int, draw: int = 0, baselines: bool = False
) -> dict[str, dict[str, Score]]:
    """Score a model on `limit` samples of each data set, by kind of question: the first metric of each.

    Args:
        draw: which `limit` samples: those of different draws are different.
        baselines: score what does not look at the images, too.

    Returns:
        `model`: kind -> score; with `baselines` also `majority`, the commonest training answer, and `blind`, the model
        that is shown zero pixels.

    Raises:
        ZooError: a data set has too few samples for the draw.
    """
    from zoo.evaluation.evaluate import evaluate

    datasets = {name: drawn(name, whole, draw * limit, limit) for name, whole in evaluated(config).items()}
    tasks = {str(name): build("task", node) for name, node in config.task.items()}
    result = evaluate(model, processor, datasets, tasks, limit=limit, baselines=baselines)
    found: dict[str, dict[str, Score]] = {}
    for line in result.lines:
        several = len(datasets) > 1
        kind = f"{line.kind} unseen" if line.held_out else line.kind
        kind = f"{line.data}: {kind}" if several and line.data != line.kind else kind
        for of, score in (("model", line.score), ("majority", line.majority), ("blind", line.blind)):
            if score is not None:
                found.setdefault(of, {}).setdefault(kind, score)
    return found


def drawn(name: str, whole: Any, start: int, count: int) -> Any:
    """Return `count` samples of a data set, behind the first `start` of the order in which a limit draws them."""
    if whole.is_stream or (start == 0 and count >= len(whole)):
        return whole
    if start + count > len(whole):
        raise ZooError(
            f"data {name!r} has {len(whole)} samples, {start + count} are needed for {start // count + 1} draws of "
            f"{count}: lower seeds or limit."
        )
    before, upto = (set(chosen(name, whole, number)) for number in (start, start + count))
    return Some(whole, sorted(upto - before))


# ---- batches -------------------------------------------------------------------------------------------------------


def batches_answer_alike(model: Any, processor: Any, config: Any, questions: int, batch: int) -> tuple[int, int]:
    """Count the questions that get the same answer in a batch as alone, and all of them, by generate and greedily.

    Prompts of a batch are padded on the left, and differ in length and picture.
    """
    asked = _questions(evaluated(config), questions)
    alone = [text for q in asked for text in _answers(model, processor, [q])]
    groups = -(-len(asked) // batch)
    spread = [i for group in range(groups) for i in range(group, len(asked), groups)]  # neighbours share a picture
    together: dict[int, str] = {}
    for first in range(0, len(spread), batch):
        some = spread[first : first + batch]
        together |= dict(zip(some, _answers(model, processor, [asked[i] for i in some]), strict=True))
    return sum(together[i] == text for i, text in enumerate(alone)), len(asked)


def _questions(datasets: Mapping[str, Any], most: int) -> list[tuple[Sample, Dialog]]:
    found: list[tuple[Sample, Dialog]] = []
    for dataset in datasets.values():
        if dataset.is_stream:
            continue
        for index in range(len(dataset)):
            sample = dataset.get(index)
            found += [(sample, dialog) for dialog in sample.dialogs if not dialog.choices]
            if len(found) >= most:
                return found[:most]
    return found


@torch.no_grad()
def _answers(model: Any, processor: Any, asked: Sequence[tuple[Sample, Dialog]]) -> list[str]:
    talks = [_shown(sample, dialog) for sample, dialog in asked]
    given: Any = processor.apply_chat_template(
        talks, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        padding=True, padding_side="left",
    )  # fmt: skip
    given = given.to(model.device) if hasattr(given, "to") else given
    out = model.generate(**given, max_new_tokens=16, do_sample=False)
    texts: list[str] = processor.tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _shown(sample: Sample, dialog: Dialog) -> list[dict[str, Any]]:
    """The messages in front of the answer, with the pictures themselves in their places."""
    turns = dialog.messages
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    images = iter(sample.images)

    def part(given: Mapping[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return dict(given)
        image = next(images)
        return {"type": "image", "image": image() if callable(image) else image}

    return [{**turn, "content": [part(p) for p in turn["content"]]} for turn in turns]
