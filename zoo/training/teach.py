"""`zoo teach`: run a stage's teacher once over its samples and store its outputs (`zoo.teaching.teacher_store`).

    zoo teach recipe=llava_kd_tiny teach.stage=dft teach.k=32
    zoo train recipe=llava_kd_tiny 'stages.dft.teacher={store: runs/teach/llava_kd_tiny-dft}'

An interrupted command continues behind the stored samples; under torchrun the processes divide the samples and write
separate shards. At the end it prints how much of the teacher's probability mass was kept, and the error of the loss
gradient that the truncation to K tokens causes.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from zoo.checking.teachers import check_storable
from zoo.composed.assembly import build_distiller
from zoo.composed.outputs import DistillView
from zoo.distill.losses.chunked import AT_ONCE, TopKTeacher, value_and_gradient, with_rest
from zoo.distill.losses.logprobs import answer_logprobs
from zoo.loading.build import load_teacher
from zoo.registry import IGNORE_INDEX, RecordError, Sample, ZooError, naming, unknown
from zoo.runs.batches import Batches, pieces_of
from zoo.runs.data import RunData
from zoo.runs.kept_features import weights_hash
from zoo.runs.left_out import Sieve
from zoo.runs.lengths import require_room
from zoo.runs.order import Mix, ShardPosition
from zoo.runs.processes import gather, start_accelerator
from zoo.runs.progress import clock
from zoo.runs.watch import watched
from zoo.settings.stage import Stage, stages_of
from zoo.storage.atomic import write_text
from zoo.storage.precision import autocast, fast_products, resolve_precision
from zoo.teaching.teacher import Teacher
from zoo.teaching.teacher_store import (
    FILES,
    PAIRS,
    RESPONSE,
    STORED,
    VISUAL,
    Writer,
    data_hash,
    draws_pictures,
    files_of,
    sample_key,
)  # fmt: skip
from zoo.text.batch import EncodedSample, collate, to_device
from zoo.text.tokenizer import tokens_hash

SKIPPED = "skipped.jsonl"  # in the store: the records that were left out
NOISE = 1.0  # standard deviation of the student's logits around the teacher's, where the truncation error is measured


@dataclass
class Truncation:
    """The cost of keeping K tokens, over all stored positions."""

    positions: int = 0
    mass: float = 0.0  # sum of the kept probability mass
    least: float = 1.0
    error: list[float] = field(default_factory=list)  # |gradient kept - gradient whole| / |gradient whole|, by batch

    def add(self, other: "Truncation") -> None:
        """Add the positions of another process."""
        self.positions += other.positions
        self.mass += other.mass
        self.least = min(self.least, other.least)
        self.error += other.error

    def text(self, k: int) -> str:
        """Return the cost in one line."""
        if not self.positions:
            return "nothing new was written"
        line = (
            f"{self.positions:,} positions, the {k} likeliest tokens of each: {self.mass / self.positions:.4f} of the "
            f"teacher's mass on average, {self.least:.4f} at least"
        )
        mean = sum(self.error) / max(1, len(self.error))
        return line + f"; the gradient of the loss is off by {mean:.2%} (a student whose logits differ by {NOISE:g})"


def main(cfg: DictConfig) -> Path:
    """Store the outputs of a stage's teacher; return the folder."""
    name, stage = stage_of(cfg)
    accelerator = start_accelerator(cfg.device)
    with watched(accelerator, "give the same command again; samples that are stored stay so"):
        return _stored(cfg, name, stage, accelerator)


def _stored(cfg: DictConfig, name: str, stage: Stage, accelerator: Any) -> Path:
    rank, world = accelerator.process_index, accelerator.num_processes
    fast_products()
    precision = resolve_precision(stage.precision or cfg.precision, accelerator.device)
    data = RunData(cfg.data, skip_broken=bool(stage.skip_broken))
    mix = data.mix(stage, cfg.seed * 1000 + list(cfg.stages).index(name))
    needs = needs_of(name, stage)
    model, processor = load_teacher(stage.teacher_node or {}, device=accelerator.device, precision=precision)
    teacher = Teacher(model, needs)
    k = min(cfg.teach.k, len(processor.tokenizer) - 1)  # at least one token is left for `log_rest`
    # What the stored numbers depend on; training refuses a store whose data or tokenizer differs.
    about = {
        "teacher": stage.teacher_node,
        "precision": precision,
        "weights": weights_hash(model),
        FILES: files_of(stage.teacher_node or {}),
        "k": k,
        "dtype": cfg.teach.dtype,
        "positions": [p for p in STORED if f"teacher.{p}" in needs],
        "vocab_size": len(processor.tokenizer),
        "tokens": tokens_hash(processor.tokenizer),
        "slots": dict(model.config.slots),
        "cells": (None if model.layout is None else model.layout.row_tokens) or model.num_image_tokens,
        "data": {n: data_hash(d) for n, d in zip(mix.names, mix.datasets, strict=True)},
    }
    drawn = [n for n, d in zip(mix.names, mix.datasets, strict=True) if draws_pictures(d)]
    if drawn:  # no word of it else, so that stores of an earlier version are gone on with
        about["pictures"] = drawn
    if len(mix.names) > 1:
        about["by_data"] = True
    folder = Path(cfg.teach.folder or Path(cfg.run.dir) / "teach" / f"{cfg.run.recipe or cfg.model.name}-{name}")
    with accelerator.main_process_first():
        writer = Writer(folder, about, rank, world)
    known, began, cost = writer.known(), time.monotonic(), Truncation()
    accelerator.wait_for_everyone()  # every process must have listed the stored samples before the first shard is added
    say = accelerator.print
    say(f"{len(known):,} samples are stored already." if known else f"Writing to {folder}", flush=True)
    if drawn:
        say(f"{', '.join(drawn)}: pictures are drawn anew in each epoch, so that each epoch is stored.")
    kept: list[Any] = []
    count = 0
    sieve = Sieve(bool(stage.skip_broken), cfg.max_broken, "zoo teach")
    # Each process iterates over all samples and takes every `world`-th batch, so that no communication is needed.
    source = sieve.sound(samples(mix, stage, cfg.teach.limit))
    groups = batches(source, stage.batch_size // stage.accumulate, known, drawn, len(mix.names) > 1)
    for group in islice(groups, rank, None, world):
        batch = encoded(processor, group, sieve, stage, model.llm.max_positions, VISUAL in about["positions"])
        if (error := sieve.excess()) is not None:
            raise error
        if not batch:
            continue
        with autocast(precision, accelerator.device):
            kept += outputs_of(teacher, processor, batch, k, about, cost)
        count += len({key for key, _ in batch})
        if len(kept) >= cfg.teach.shard:
            writer.write(kept)
            kept = []
            rate = count / (time.monotonic() - began)
            say(f"{count:,} samples, {rate:.1f} a second" + (" and process" if world > 1 else ""), flush=True)
    if kept:
        writer.write(kept)
    for more, seen, sieved in gather(accelerator, (count, cost, sieve))[1:]:  # also waits until all have written
        count += more
        cost.add(seen)
        sieve.broken |= sieved.broken
    if rank == 0 and sieve.broken:
        write_text(folder / SKIPPED, "".join(json.dumps(line) + "\n" for line in sieve.lines))
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    say(f"{count:,} samples in {clock(time.monotonic() - began)}; {size / 1e6:.1f} MB in {folder}")
    if sieve.broken:
        say(f"{len(sieve.broken):,} records were left out; {folder / SKIPPED} lists them with the reasons.")
    say(cost.text(k))
    say(f"To train from it: 'stages.{name}.teacher={{store: {folder}}}'")
    return folder


def stage_of(cfg: DictConfig) -> tuple[str, Stage]:
    """Return the stage of `teach.stage`, or the only one with a teacher.

    Raises:
        ZooError: there is no such stage, or its teacher is not a model.
    """
    stages = stages_of(cfg)
    taught = {n: s for n, s in stages.items() if s.teacher_node and s.teacher_node["model"]}
    if cfg.teach.stage:
        if cfg.teach.stage not in stages:
            raise unknown("stage of this run", cfg.teach.stage, stages)
        if cfg.teach.stage not in taught:
            raise ZooError(f"Stage {cfg.teach.stage!r} has no model as its teacher: set its teacher to a model's name.")
        return cfg.teach.stage, taught[cfg.teach.stage]
    if len(taught) != 1:
        given = ", ".join(taught) or "none"
        raise ZooError(f"zoo teach needs one stage with a teacher; this run has: {given}. Set teach.stage=<name>.")
    return next(iter(taught.items()))


def needs_of(name: str, stage: Stage) -> frozenset[str]:
    """Return the capabilities that the stage's distiller needs, as far as a store can provide them.

    Raises:
        ZooError: a store cannot provide any, or not as the distiller's options or the teacher's parts are.
    """
    from types import SimpleNamespace

    # A distiller's needs follow from its options; building it takes a model's widths only.
    blank = SimpleNamespace(vision=None, llm=SimpleNamespace(hidden_size=1, vocab_size=1))
    distiller = build_distiller(blank, stage.distiller_node or {})
    check_storable(name, stage, distiller)
    return frozenset(distiller.needs) & {f"teacher.{positions}" for positions in STORED}


def encoded(
    processor: Any,
    batch: list[tuple[bytes, Sample]],
    sieve: Sieve,
    stage: Stage,
    positions: int | None = None,
    visual: bool = False,
) -> list[tuple[bytes, EncodedSample]]:
    """Encode the samples of a batch, to the rows that the stage makes of each; what is broken goes to the sieve.

    So do samples of more than `positions` positions, those of the teacher; and with `visual`, for which image tokens
    are stored, those whose rows have unlike text in front of their images.
    """
    rows: list[tuple[bytes, EncodedSample]] = []
    for key, sample in batch:
        try:
            with naming(sample.data, sample.where, sample.id, "text"):
                made = [processor.encode(piece) for piece in pieces_of(sample, stage)]
                if visual and len({_up_to_image(processor, row) for row in made}) > 1:
                    raise ZooError(
                        "its dialogs do not begin alike, and a store has one set of image tokens for all of a "
                        "sample: set visual_weight=0 in the stage's distiller, or train with the teacher itself."
                    )
                rows += [(key, require_room(row, positions, "the teacher's positions")) for row in made]
        except RecordError as error:
            sieve.leave_out(error)
    return rows


def _up_to_image(processor: Any, row: EncodedSample) -> bytes:
    """Return the tokens of a row up to its last image token."""
    ids = row.input_ids
    where = np.flatnonzero((ids == processor.image_token_id) | (ids == processor.video_token_id))
    return ids[: where[-1] + 1].tobytes() if len(where) else b""


def samples(mix: Mix, stage: Stage, limit: int | None) -> Iterator[Sample | RecordError]:
    """Iterate over the samples of a stage in its order, up to `limit`; samples that cannot be read are errors.

    Raises:
        ZooError: the data is a stream, and the stage has epochs instead of steps.
    """
    steps = stage.steps or -(-mix.samples_in(stage.epochs or 1) // stage.batch_size)
    reader = Batches(mix, None, stage, steps, ShardPosition())
    found = (sample for step in range(steps) for sample in reader.samples(step))
    return islice(found, limit)


def batches(
    source: Iterator[Sample], size: int, known: set[bytes], drawn: Sequence[str] = (), by_data: bool = False
) -> Iterator[list[tuple[bytes, Sample]]]:
    """Group samples that are not stored yet, without repetitions in later epochs; of data `drawn` each picture once.

    With `by_data`, a sample of another data set is another one.
    """
    group: list[tuple[bytes, Sample]] = []
    for sample in source:
        key = sample_key(sample, sample.data in drawn, by_data)
        if key in known:
            continue
        known.add(key)
        group.append((key, sample))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@torch.no_grad()
def outputs_of(
    teacher: Teacher,
    processor: Any,
    batch: list[tuple[bytes, EncodedSample]],
    k: int,
    about: dict[str, Any],
    cost: Truncation,
) -> list[tuple[bytes, dict[str, dict[str, Tensor]]]]:
    """Run the teacher on a batch of rows; return for each key the tokens to store, by kind of position."""
    rows = [row for _, row in batch]
    made = collate(rows, pad_id=processor.tokenizer.pad_token_id)
    seen = teacher.outputs_for(to_device(made, teacher.device), None)  # type: ignore[arg-type]
    hidden, vocab = seen.last_hidden_state, about["vocab_size"]
    result: list[dict[str, dict[str, Tensor]]] = [{} for _ in rows]
    for positions in about["positions"]:
        if positions == PAIRS:
            for row, kept in zip(result, _of_answers(seen, made, rows), strict=True):
                row[positions] = kept
            continue
        if positions == RESPONSE:
            where = seen.labels[:, 1:] != IGNORE_INDEX  # the state at t predicts the label at t + 1
            states, counts = hidden[:, :-1][where], where.sum(1).tolist()
        else:
            index = seen.image_index
            assert index is not None, "visual positions are those of a model with image tokens"
            where = index >= 0
            states, counts = hidden[where], where.sum(1).tolist()
        kept = top_tokens(seen, states, vocab, k, about["dtype"], cost)
        for row, *parts in zip(result, *(kept[w].split(counts) for w in kept), strict=True):
            row[positions] = dict(zip(kept, parts, strict=True))
    return _by_sample([(key, row) for (key, _), row in zip(batch, result, strict=True)])


def _by_sample(rows: list[tuple[bytes, dict[str, dict[str, Tensor]]]]) -> list[tuple[bytes, Any]]:
    """Join what is stored of the rows of a sample, which come one behind the other; its image tokens are of each."""
    result: list[tuple[bytes, Any]] = []
    for key, row in rows:
        if not result or result[-1][0] != key:
            result.append((key, row))
            continue
        for positions in row.keys() - {VISUAL}:
            before = result[-1][1][positions]
            before |= {what: torch.cat([before[what], row[positions][what]]) for what in before}
    return result


def _of_answers(seen: DistillView, batch: dict[str, Any], rows: list[Any]) -> Iterator[dict[str, Tensor]]:
    """Yield the log-probabilities of a row's answers, in the form of one token per position."""
    sums = answer_logprobs(seen, to_device(batch, seen.last_hidden_state.device))[0].float().cpu()
    counts = [0 if row.pairs is None else len(set(row.pairs.tolist()) - {-1}) for row in rows]
    for some in sums.split(counts):
        nothing = torch.zeros(len(some))
        yield {"ids": nothing.int().unsqueeze(-1), "log_probs": some.unsqueeze(-1), "log_rest": nothing}


def top_tokens(
    seen: DistillView, states: Tensor, vocab: int, k: int, dtype: str, cost: Truncation
) -> dict[str, Tensor]:
    """Return the `k` most likely tokens after each of `states` (S, C), and the logarithm of the others' mass."""
    # Logits of all positions at once would not fit: 2 000 positions of 150 000 tokens are 1.2 GB in float32.
    chunk = max(1, AT_ONCE.get(states.device.type, AT_ONCE["cuda"]) // vocab)
    parts = []
    for piece in states.split(chunk):
        logits = seen.llm.head(piece)[:, :vocab].float()  # (S, V)
        log_probs = logits.log_softmax(-1)
        top = log_probs.topk(k, -1)
        # log(1 - sum of the top) would cancel where the top holds nearly all mass.
        rest = log_probs.scatter(1, top.indices, float("-inf")).logsumexp(-1)  # (S,)
        wide = getattr(torch, dtype)
        kept = TopKTeacher(top.indices, top.values.to(wide), rest.clamp(min=-60.0).to(wide))  # -inf times 0 is NaN
        mass = top.values.exp().sum(-1)
        cost.positions += len(piece)
        cost.mass += float(mass.sum())
        cost.least = min(cost.least, float(mass.min()))
        if len(cost.error) < 8:  # a sample of chunks: the error takes a second pass over the vocabulary
            cost.error.append(_error(log_probs[:64], kept))
        parts.append({"ids": kept.ids.int().cpu(), "log_probs": kept.log_probs.cpu(), "log_rest": kept.log_rest.cpu()})
    if not parts:
        wide = getattr(torch, dtype)
        return {"ids": torch.zeros(0, k, dtype=torch.int32), "log_probs": torch.zeros(0, k, dtype=wide),
                "log_rest": torch.zeros(0, dtype=wide)}  # fmt: skip
    return {what: torch.cat([p[what] for p in parts]) for what in parts[0]}


def _error(log_probs: Tensor, kept: TopKTeacher) -> float:
    """Return the relative error of the forward KL's gradient with the kept tokens, for a student near the teacher."""
    generator = torch.Generator().manual_seed(0)
    noise = NOISE * torch.randn(log_probs.shape, generator=generator).to(log_probs)
    student = F.log_softmax(log_probs + noise, -1)
    ids = kept.ids[: len(log_probs)]
    probs = student.exp()
    rest = probs.scatter(1, ids, 0.0).sum(-1).clamp(min=1e-30)
    few = torch.cat([student.gather(1, ids), rest.log().unsqueeze(-1)], -1)
    teacher = with_rest(kept.log_probs[: len(ids)], kept.log_rest[: len(ids)])
    _, gradient = value_and_gradient(few, teacher, 0.0)
    # The gradient by the rest's mass is divided over the tokens in it, in proportion to the student's probabilities.
    mine = (probs * gradient[:, -1:] / rest.unsqueeze(-1)).scatter(1, ids, gradient[:, :-1])
    whole = student.exp() - log_probs.exp()
    return float((mine - whole).norm() / whole.norm())
