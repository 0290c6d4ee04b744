"""`zoo eval`: scores of a model on data sets, each with the number of samples and the standard error.

Two baselines without images are scored as well: the majority, which gives the most frequent training answer of each
kind of question, and the blind model, which is the model with images of zeros. Combinations that the training split
does not contain (`meta["held_out"]`) are scored separately.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from zoo.evaluation.predict import Question, answer
from zoo.evaluation.result import EvalResult, Line
from zoo.evaluation.score_table import score_table
from zoo.evaluation.shares import Row, everywhere, join
from zoo.registry import Dialog, RecordError, Sample, Score, ZooError, build, naming, read_sample, whole
from zoo.runs.data import RunData
from zoo.runs.folder import new_folder
from zoo.runs.left_out import Sieve
from zoo.runs.processes import by_first, start_accelerator
from zoo.runs.progress import clock
from zoo.runs.scored import Tasks, nothing_to_score, require_dialogs, samples_of
from zoo.runs.sharding import gathered
from zoo.runs.watch import watched
from zoo.storage.atomic import write_text, writing
from zoo.storage.precision import autocast, fast_products
from zoo.tasks.baselines import Commonest
from zoo.text.terminal import console, say

TRAIN_SAMPLES = 2000  # samples of the training split whose answers the majority baseline counts


def main(cfg: DictConfig) -> EvalResult:
    """Score the model of the config on its data, print the table, and write scores and predictions."""
    accelerator = start_accelerator(cfg.device)
    with watched(accelerator, "start the evaluation again; answers of one that did not end are not kept"):
        result = _evaluated(cfg, accelerator)
        accelerator.wait_for_everyone()
    return result


def _evaluated(cfg: DictConfig, accelerator: Any) -> EvalResult:
    from zoo.loading.build import build as build_model
    from zoo.settings.config import typed_of
    from zoo.settings.source import source_of

    data = RunData(cfg.data, skip_broken=cfg.skip_broken)
    datasets = _to_score(data, typed_of(cfg))
    if not datasets:
        raise ZooError("There is no data to evaluate on. Set it with data=[...].")
    tasks = {str(name): build("task", node) for name, node in cfg.task.items()}
    require_dialogs(datasets, tasks, cfg.limit)
    if accelerator.is_main_process and _on_default_data(cfg):
        say(f"Model {cfg.model.name!r} names no data: scored on {', '.join(datasets)}, of recipe {cfg.run.recipe!r}.")
        say("data=[...] chooses others; zoo list data shows them.")
    model, processor = build_model(source_of(cfg), device=accelerator.device)
    began = time.monotonic()
    folder = None
    if accelerator.num_processes > 1:  # their rows lie there until they are joined
        folder = Path(by_first(accelerator, lambda: str(_folder_for(cfg))))
    result = evaluate(
        model,
        processor,
        datasets,
        tasks,
        folder=folder,
        batch_size=cfg.batch_size,
        limit=cfg.limit,
        accelerator=accelerator,
        precision="bf16" if cfg.precision == "bf16" else "fp32",
        skip_broken=cfg.skip_broken,
        max_broken=cfg.max_broken,
    )
    if accelerator.is_main_process:
        screen = console()
        # Printed before writing, since the disk may be full.
        screen.print(score_table(result.lines, f"{cfg.model.name}, in per cent"))
        with writing("scores", "Choose another place with run.dir=<folder>."):
            folder = folder or _folder_for(cfg)
            result.save(folder)
            if result.skipped:
                write_text(folder / "skipped.jsonl", "".join(json.dumps(line) + "\n" for line in result.skipped))
            OmegaConf.save(cfg, folder / "eval.yaml", resolve=True)
        result.model, result.folder, result.seconds = cfg.model.name, str(folder), round(time.monotonic() - began, 2)
        if result.skipped:
            say(f"{len(result.skipped)} records were left out; skipped.jsonl has the reasons.")
        say(f"{len(result.predictions)} answers in {clock(result.seconds)}, all in {folder}", None)
    return result


def _to_score(data: RunData, typed: Any) -> dict[str, Any]:
    """Return the data sets to score: those for evaluation, and any whose split was typed, as it is."""
    words = set(typed.options_of("data")) if typed else set()
    asked = {n: d for n, d in data.all.items() if f"{n}.split" in words and f"{n}.eval_split" not in words}
    return {**data.evaluation, **asked} or data.all


def _on_default_data(cfg: DictConfig) -> bool:
    """Return whether a typed model is scored on data that neither it nor the user names: the default recipe's."""
    from zoo.settings.config import typed_of

    keys = {word.partition("=")[0] for word in typed.overrides} if (typed := typed_of(cfg)) else set()
    return bool(cfg.run.recipe) and "model" in keys and not {"recipe", "data"} & keys


def _folder_for(cfg: DictConfig) -> Path:
    name = "eval-" + Path(cfg.model.name).as_posix().removesuffix("/model").rpartition("/")[2]
    with writing("scores", "Choose another place with run.dir=<folder>."):
        return Path(cfg.run.folder) if cfg.run.folder else new_folder(cfg.run.dir, name)


def evaluate(
    model: Any,
    processor: Any,
    datasets: Mapping[str, Any],
    tasks: Mapping[str, Any] | None = None,
    *,
    folder: Path | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    baselines: bool = True,
    accelerator: Any = None,
    precision: str = "fp32",
    skip_broken: bool = False,
    max_broken: float = 0.1,
) -> EvalResult:
    """Score a model.

    Args:
        model: put in eval mode.
        processor: of the model.
        datasets: data name -> data set.
        tasks: task name -> task. Dialogs that name another task are left out; None scores each by the task it names.
        folder: for rows of several processes until they are joined, which all of them see; None: a temporary one.
        batch_size: dialogs at once; None chooses by the size of the model. The scores do not depend on it.
        limit: samples of each data set, drawn the same for every model (the first ones of a stream, and of data with
            groups); None takes all.
        baselines: also score the majority and the blind model.
        accelerator: of a run with several processes, which divide the samples.
        precision: fp32, or bf16 for autocast.
        skip_broken: leave out broken records; `skipped` of the result lists them.
        max_broken: share of the records that may be left out, checked from the 100th on.

    Raises:
        ZooError: no dialog is for these tasks, or records are broken and may not be left out.
    """
    fast_products()
    datasets = {name: whole("dataset", dataset, name) for name, dataset in datasets.items()}
    model.eval()
    world = 1 if accelerator is None else accelerator.num_processes
    batch_size = batch_size or _batch_size(model)
    table = Tasks(tasks)
    sieve = Sieve(skip_broken, max_broken, "zoo eval")

    def joined(rows: dict[str, list[Row]], left_out: Sieve) -> EvalResult:
        return _result(rows.get("rows", []), rows.get("blind", []), left_out, datasets, table, tasks, baselines)

    with torch.no_grad(), autocast(precision, model.device), gathered(accelerator, model) as apart:
        model.set_attention(model.config.attention)
        rank, of = (accelerator.process_index, world) if world > 1 and apart else (0, 1)
        asked = _Questions(datasets, table, limit, rank, of, sieve)
        first = accelerator is None or accelerator.is_main_process
        guesses = commonest_of(datasets, say if first else None) if baselines else {}
        groups = [("rows", _rows(model, processor, asked, batch_size, guesses, blind=False))]
        groups += [("blind", _rows(model, processor, asked, batch_size, {}, blind=True))] if baselines else []
        if world == 1:
            return joined({name: list(rows) for name, rows in groups}, sieve)
        # Where a shared-out model is not whole anywhere, all processes answer all questions together.
        found = join(accelerator, folder, groups, sieve, joined, shares=of)
    lines, skipped = everywhere(accelerator, None if found is None else (found.lines, found.skipped))
    return found or EvalResult(lines, skipped=skipped)


def _result(
    rows: list[Row],
    blind: list[Row],
    sieve: Sieve,
    datasets: Mapping[str, Any],
    table: Tasks,
    tasks: Mapping[str, Any] | None,
    baselines: bool,
) -> EvalResult:
    """Compute scores from the rows of all processes."""
    if (error := sieve.excess()) is not None:
        raise error
    if not rows and sieve.broken:
        raise ZooError(f"None of {sieve.seen} records can be scored. The first: {next(iter(sieve.lines))['reason']}")
    if not rows:
        raise nothing_to_score(datasets, tasks)
    rows.sort(key=lambda r: r["order"])  # the same predictions.jsonl for any number of processes
    lines = _lines(rows, table, "scores")
    if baselines:
        _add(lines, _lines(blind, table, "scores"), "blind")
        _add(lines, _lines([row for row in rows if row["guess"] is not None], table, "guess"), "majority")
    for row in rows:
        row.pop("order"), row.pop("guess"), row.pop("state")
    return EvalResult(lines, rows, sieve.lines)


@dataclass
class _Questions:
    """The questions of this process; those that the model could not answer are left out for the blind model too."""

    datasets: Mapping[str, Any]
    tasks: Tasks
    limit: int | None
    rank: int
    world: int
    sieve: Sieve
    without: set[tuple[Any, ...]] = field(default_factory=set)  # `order` of the questions that are left out

    def questions(self, blind: bool) -> Iterator[Question]:
        """Yield the questions, grouped by sample, so that its images are encoded once."""
        for at, (data, dataset) in enumerate(self.datasets.items()):
            samples = islice(samples_of(data, dataset, self.limit, self.rank, self.world), self.limit)
            for index, sample in enumerate(samples):
                if sample is None:
                    continue
                if not blind:  # the second pass reads the same records
                    self.sieve.seen += 1
                if isinstance(sample, RecordError):
                    self.sieve.leave_out(sample)
                    continue
                for number, dialog in enumerate(sample.dialogs):
                    if dialog.preference == "rejected" or (at, index, number) in self.without:
                        continue
                    # Tasks that want the same share one answer.
                    asked = {_wanted(self.tasks[t], dialog): None for t in self.tasks.of(dialog)}
                    for mode, most, candidates, layer in asked:
                        yield Question(sample, dialog, mode, most, (at, index, number), candidates, layer)

    def leave_out(self, question: Question, error: RecordError) -> None:
        """Leave out a question."""
        self.sieve.leave_out(error)
        self.without.add(question.order)


Wanted = tuple[str, int, tuple[str, ...] | None, int]  # mode, max_new_tokens, candidates, layer


def _wanted(task: Any, dialog: Dialog) -> Wanted:
    """Return what a task wants of a model: two that want the same share an answer."""
    if task.mode in ("choice", "scores"):
        return task.mode, task.max_new_tokens, tuple(task.candidates(dialog)), -1
    return task.mode, task.max_new_tokens, None, task.layer if task.mode == "hidden" else -1


def _rows(
    model: Any, processor: Any, asked: _Questions, batch_size: int, guesses: Mapping[str, Commonest], *, blind: bool
) -> Iterator[Row]:
    """Answer the questions, and score each answer, and the commonest training answer where `guesses` has one."""
    names, tasks = list(asked.datasets), asked.tasks
    answers = answer(
        model, processor, asked.questions(blind), batch_size=batch_size, blind=blind, leave_out=asked.leave_out
    )
    for question, said in answers:
        wanted = question.mode, question.max_new_tokens, question.candidates, question.layer
        dialog, data = question.dialog, names[question.order[0]]
        for name in tasks.of(dialog):
            task = tasks[name]
            if _wanted(task, dialog) != wanted:
                continue
            try:  # the reference may not be an answer that the task can parse
                with naming(data, question.sample.where, question.sample.id):
                    scores = task.score(dialog, said)
            except RecordError as error:
                asked.leave_out(question, error)
                continue
            guessed = data in guesses and task.mode in ("generate", "choice")  # a guess is an answer, and no number
            hidden = task.mode == "hidden"
            yield {
                "data": data,
                "id": question.sample.id,
                "kind": dialog.kind or data,
                "task": name,
                "prompt": prompt_of(dialog),
                "prediction": f"{len(said)} numbers" if hidden else said,
                "answers": dialog.answers or [reference_of(dialog)],
                "scores": scores,
                "meta": dialog.meta,
                "order": [*question.order, name],
                "guess": task.score(dialog, guesses[data].guess(dialog, task)) if guessed else None,
                "state": said if hidden else None,
            }


Key = tuple[str, str, str, bool]  # data, kind, task, held out


def _by_key(rows: list[Row]) -> dict[Key, list[Row]]:
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        key = (row["data"], row["kind"], row["task"], bool(row["meta"].get("held_out")))
        groups.setdefault(key, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][3])))


def _lines(rows: list[Row], tasks: Tasks, scores: str) -> list[Line]:
    return [
        Line(data, kind, task, metric, held_out, Score(float(score.value), int(score.n), float(score.stderr)))
        for (data, kind, task, held_out), some in _by_key(rows).items()
        for metric, score in tasks[task].summarise([_with_state(r, scores) for r in some]).items()
    ]


def _with_state(row: Row, scores: str) -> dict[str, Any]:
    """What a task gave of a prediction, with the hidden state where it asked for one."""
    found: dict[str, Any] = row[scores]
    return found if row["state"] is None else found | {"_state": row["state"]}


def _add(lines: list[Line], others: list[Line], what: str) -> None:
    found = {(o.data, o.kind, o.task, o.held_out, o.metric): o.score for o in others}
    for line in lines:
        setattr(line, what, found.get((line.data, line.kind, line.task, line.held_out, line.metric)))


def commonest_of(datasets: Mapping[str, Any], note: Callable[[str], None] | None = None) -> dict[str, Commonest]:
    """Count the answers of each data set's training split, where it has one of known length.

    Args:
        datasets: data name -> data set.
        note: called with the reason where a training split cannot be opened, as of data that are for evaluation alone.
    """
    found = {}
    for data, dataset in datasets.items():
        try:
            train = dataset.train_split()
        except ZooError as error:
            if note is not None:
                note(f"No majority for data {data!r}, whose training split cannot be opened: {error}")
            continue
        if train is None or (train := whole("dataset", train, data)).is_stream:
            continue
        # At equal distances, since data sets are often sorted by kind.
        count = min(TRAIN_SAMPLES, len(train))
        samples = (read_sample(data, train, i * len(train) // count) for i in range(count))
        dialogs = (d for sample in samples if isinstance(sample, Sample) for d in sample.dialogs)
        found[data] = Commonest(d for d in dialogs if d.preference != "rejected")
    return found


def _batch_size(model: Any) -> int:
    parameters = sum(p.numel() for p in model.parameters())
    return 512 if parameters < 50e6 else 64 if parameters < 1e9 else 16


def prompt_of(dialog: Dialog) -> str:
    """Return the text before the last assistant turn, with images as `<image>` and videos as `<video>`."""
    turns = dialog.messages
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    return "\n".join(_text(turn["content"]) for turn in turns)


def reference_of(dialog: Dialog) -> str:
    """Return the text of the last assistant turn."""
    last = dialog.messages[-1] if dialog.messages else {"role": ""}
    return _text(last["content"]) if last["role"] == "assistant" else ""


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(p["text"] if p["type"] == "text" else f"<{p['type']}> " for p in content)
