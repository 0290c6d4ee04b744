"""`zoo bench distill`: what learning from a teacher costs, in memory and time, against doing it the plain way.

The divergence of two vocabularies in chunks against both logits in full; the relation of image tokens against their
logits; a LLaVA-KD step against the student's step and the teacher's forward pass; a step from a stored teacher against
the student's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from zoo.benches import divergence as kl
from zoo.benches import llava
from zoo.benches.distill_mod import preference_rows, upcycle_row
from zoo.benches.llava import SIZES, Sizes
from zoo.benches.measure import Clock, Plain, Times, Value
from zoo.benches.place import StepPlace, at_least_one, chosen, torch_threads
from zoo.benches.report import Report, Row, machine, short
from zoo.benches.steps import turns_of
from zoo.composed.assembly import build_distiller
from zoo.distill.losses.relation import gram_of, relation_loss, relations
from zoo.registry import LinearHead, unknown
from zoo.runs import allocator as memory
from zoo.runs.processes import start_accelerator
from zoo.settings.stage import Stage
from zoo.storage.precision import autocast, fast_products, resolve_precision
from zoo.teaching.teacher import Teacher
from zoo.text.batch import to_device
from zoo.training.step import Engine

SECTIONS = ("kl", "relation", "step", "stored", "preference", "upcycle")


@dataclass
class Options:
    positions: int = 2048  # supervised tokens of the divergence
    vocab: int = 32000  # of the divergence and of the relation
    width: int = 512  # of both models' hidden states there
    image_tokens: int = 576  # of the relation
    student: str = "sketch"  # sizes of the student of the steps: sketch, scenes_tiny, tiny
    teacher_depth: int = 2  # times the student's layers and width: the teacher of the steps
    batch: int = 8  # images of a step
    length: int = 96  # positions of a row, image tokens included
    labels: int = 32  # of them, at the end of a row
    k: int = 64  # tokens that the stored teacher keeps
    threads: int = 2  # of torch on the CPU
    rounds: int = 7  # turns of each variant
    steps: int = 2  # in a turn
    device: str = "auto"  # auto | cpu | cuda
    only: str = ""  # sections, with commas between: kl, relation, step, stored, preference, upcycle; empty: all

    def __post_init__(self) -> None:
        if self.student not in SIZES:
            raise unknown("sizes", self.student, SIZES)
        at_least_one(self, "positions", "vocab", "width", "batch", "threads", "rounds", "steps", "teacher_depth")
        self.sections = chosen("section", self.only, SECTIONS)


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure what `options.only` asks for; `show` is told what is going on."""
    with torch_threads(options.threads):
        accelerator = start_accelerator(options.device)
        device = accelerator.device
        fast_products()
        if device.type == "cpu":
            memory.keep_memory()
        clock, precision = Clock(device, options.threads), resolve_precision("auto", device)
        place = StepPlace(options, clock, show, accelerator, precision)
        report = Report("zoo bench distill", machine=machine(device, options.threads))
        report.setting = [
            f"divergence: {options.positions} positions, vocabulary {options.vocab}, width {options.width}, float32",
            f"steps: student {options.student}, teacher {options.teacher_depth} times as deep and wide, "
            f"batch {options.batch}, {place.precision}",
            f"ratios of {place.clock.name} time within a round; {options.rounds} rounds, {options.steps} steps a turn",
        ]
        work = {"kl": _kl, "relation": _relation, "step": _step, "stored": _stored}
        work |= {"preference": _preference, "upcycle": _upcycle}
        for section in options.sections:
            show(f"measuring: {section}")
            report.add(*work[section](place))
        return report


def _preference(place: StepPlace) -> list[Row]:
    sizes = SIZES[place.options.student]
    return preference_rows(place, sizes, _larger(sizes, place.options.teacher_depth))


def _upcycle(place: StepPlace) -> list[Row]:
    return [upcycle_row(place, SIZES[place.options.student])]


def _kl(place: StepPlace) -> list[Row]:
    o = place.options
    sizes = (o.positions, o.vocab, o.width)
    peaks = kl.peaks(*sizes)
    x = kl.inputs(*sizes, place.accelerator.device)
    exact, mine = (kl.step(way, x) for way in ("naive", "chunked"))
    value = float((mine[0] - exact[0]).abs() / exact[0].abs())
    gradient = max(float((a - b).norm() / b.norm()) for a, b in zip(mine[1:], exact[1:], strict=True))
    del exact, mine
    times = place.time({way: Plain(partial(kl.step, way, x)) for way in kl.WAYS})
    naive = f"{peaks['naive']:.0f} MB with both logits in full, {peaks['chunked']:.0f} MB in chunks"
    share = Value.of([peaks["chunked"] / peaks["naive"]])
    return [
        Row("divergence: peak extra memory over naive", share, bound=0.2, at_most=True, note=naive),
        Row("divergence: time over naive", times.ratio("chunked", "naive"), bound=1.15, at_most=True),
        Row("divergence: difference of the loss, relative", Value.of([value]), "", bound=1e-5, at_most=True),
        Row("divergence: difference of gradients, relative", Value.of([gradient]), "", bound=1e-4, at_most=True),
    ]


def _relation(place: StepPlace) -> list[Row]:
    """The student's relations and their gradients, through the Gram matrix and through logits."""
    o, device = place.options, place.accelerator.device
    x = kl.inputs(o.image_tokens, o.vocab, o.width, device)
    llm = SimpleNamespace(vocab_size=o.vocab, linear_head=lambda: LinearHead(x.weight))
    teacher = SimpleNamespace(vocab_size=o.vocab, linear_head=lambda: LinearHead(x.other))
    with torch.no_grad():
        gram = gram_of(teacher, o.vocab)  # once for a run
        wanted = relations(teacher, x.theirs[None], o.vocab, gram=gram)

    def through_logits() -> torch.Tensor:
        logits, theirs = F.linear(x.rows, x.weight), F.linear(x.theirs, x.other).detach()  # (N, V)
        return relation_loss((logits @ logits.T)[None], (theirs @ theirs.T)[None]).sum()

    def ours() -> torch.Tensor:
        return relation_loss(relations(llm, x.rows[None], o.vocab), wanted).sum()

    def step(loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x.rows.grad = x.weight.grad = None
        value = loss()
        value.backward()
        return value.detach(), x.rows.grad

    a, b = step(through_logits), step(ours)
    gap = short(float((a[0] - b[0]).abs()))
    times = place.time({"logits": Plain(lambda: step(through_logits)), "ours": Plain(lambda: step(ours))})
    note = f"{o.image_tokens} image tokens, head trains; the losses differ by {gap}"
    return [Row("relation: time over the same with logits held", times.ratio("ours", "logits"), note=note)]


def _models(place: StepPlace) -> tuple[Sizes, Any, Any, dict[str, Any]]:
    """Student, teacher, and a batch that both read."""
    o, device = place.options, place.accelerator.device
    sizes = SIZES[o.student]
    student, teacher = (llava.composed(s).to(device) for s in (sizes, _larger(sizes, o.teacher_depth)))
    return sizes, student, teacher, llava.ours_of(llava.batch(sizes, o.batch, o.length, o.labels))


def _larger(sizes: Sizes, n: int) -> Sizes:
    """`n` times as wide and deep."""
    return replace(
        sizes, text_width=n * sizes.text_width, text_depth=n * sizes.text_depth, intermediate=n * sizes.intermediate
    )


def _trains(place: StepPlace, student: Any, batch: dict[str, Any], teacher: Any = None, **options: Any) -> Plain:
    """The step of `zoo train`, with a distiller where there are options of one."""
    stage = Stage(
        steps=1_000_000,
        batch_size=place.options.batch,
        lr=1e-4,
        schedule="constant",
        distiller=options or None,
        teacher="the teacher" if options else "",
    )
    distiller = build_distiller(student, stage.distiller_node) if stage.distiller_node else None
    engine = Engine(
        place.accelerator, student, stage, 1_000_000, precision=place.precision, distiller=distiller, teacher=teacher
    )
    return turns_of(engine, [batch])


def _step(place: StepPlace) -> list[Row]:
    device = place.accelerator.device
    sizes, student, model, batch = _models(place)
    twin = llava.composed(sizes).to(device)
    needs = frozenset({"teacher.response", "teacher.visual", "teacher.relation"})
    teacher = Teacher(model, needs, sizes.vocab)
    on_device = to_device({k: v for k, v in batch.items() if k != "labels"}, device)

    def forward() -> None:
        with torch.no_grad(), autocast(place.precision, device):
            model(**on_device)  # a forward pass as it comes: with logits

    variants = {
        "student": _trains(place, twin, batch),
        "teacher": Plain(forward),
        "kd": _trains(place, student, batch, teacher, name="llava_kd"),
        "kl": _trains(place, llava.composed(sizes).to(device), batch, teacher, name="kl"),
    }
    times = place.time(variants)
    parts = ", ".join(f"{name} {times.milliseconds(name).median:.0f} ms" for name in times)
    one, other = times["student"], times["teacher"]
    pairs = ((one.cpu, other.cpu), (one.wall, other.wall))
    times["both"] = Times(*([a + b for a, b in zip(*pair, strict=True)] for pair in pairs))
    return [
        Row(
            "llava_kd step over student step + teacher forward",
            times.ratio("kd", "both"),
            bound=1.1,
            at_most=True,
            note=parts,
        ),
        Row("kl step over student step + teacher forward", times.ratio("kl", "both")),
    ]


def _stored(place: StepPlace) -> list[Row]:
    """A step from a stored teacher, answers alone and with image tokens, over the plain step."""
    o, device = place.options, place.accelerator.device
    sizes, student, _, batch = _models(place)
    generator = torch.Generator().manual_seed(0)

    def said(positions: int) -> dict[str, torch.Tensor]:
        probs = torch.rand(positions, o.k, generator=generator).softmax(-1) * 0.9
        ids = torch.rand(positions, sizes.vocab, generator=generator).topk(o.k, -1).indices
        return {
            "ids": ids.int(),
            "log_probs": probs.log().half(),
            "log_rest": torch.full((positions,), 0.1).log().half(),
        }

    told = {"response": said(o.batch * o.labels), "visual": said(o.batch * sizes.image_tokens)}
    targets = {f"teacher.{p}.{what}": t for p, kept in told.items() for what, t in kept.items()}
    targets["teacher.visual.cells"] = torch.tensor([sizes.image_tokens])
    full = {**batch, "targets": targets}
    store = SimpleNamespace(vocab_size=sizes.vocab, outputs_for=lambda batch, out: None)
    variants = {
        "plain": _trains(place, student, batch),
        "answers": _trains(place, llava.composed(sizes).to(device), full, store, name="kl"),
        "both": _trains(place, llava.composed(sizes).to(device), full, store, name="llava_kd", relation_weight=0.0),
    }
    times = place.time(variants)
    note = f"{o.k} tokens kept at each position"
    return [
        Row(
            "step from a stored teacher over the plain step, answers",
            times.ratio("answers", "plain"),
            bound=1.15,
            at_most=True,
            note=note,
        ),
        Row(
            "step from a stored teacher over the plain step, answers and image tokens",
            times.ratio("both", "plain"),
            note=note,
        ),
    ]
