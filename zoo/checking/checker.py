"""The check before anything is loaded: build the composition on the meta device, and refuse what does not fit.

A refusal names the part, the reason, what is there instead, and up to three changes that do fit: each of them passed
this check. `zoo train` and `zoo.load` run the same check before a weight is read.
"""

import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from zoo import registry
from zoo.checking.counts import check_counts
from zoo.checking.fixes import AND, candidates
from zoo.checking.left_out import left_adapters, unfit_without, unused_options, unused_weights
from zoo.checking.memory import TEXT
from zoo.checking.plan import Plan, device_of, plan_from, plan_of
from zoo.checking.several_encoders import described
from zoo.checking.stage_check import Stagecheck, check_stage
from zoo.composed.assembly import Parts, assemble
from zoo.composed.own_checkpoints import have_checkpoints, node_at, own_checkpoints
from zoo.fusion.llm.attention import require_attention, require_kernel
from zoo.published import is_published
from zoo.published.folder import read_content, require_same
from zoo.registry import Cut, ZooError
from zoo.registry.devices import require_present
from zoo.registry.quiet import errors_alone
from zoo.runs.tensor_parallel import require_divisible
from zoo.settings.component_presets import explained
from zoo.settings.source import tokenizer_at
from zoo.storage.safetensors_file import listing
from zoo.storage.weights import require_fit, weight_files
from zoo.text.markup import cell
from zoo.text.sizes import bytes_text, count_text, size_text
from zoo.text.terminal import console, say
from zoo.text.tokenizer import CHAT_TEMPLATES, require_variables, require_vocab_size, set_template_options

_MOST_TRIES = 60  # candidate fixes that are tried before the search gives up
_SECONDS = 8.0  # of computing after which it gives up, too
_MOST_BYTES = 64e12  # of weights; above it a size is mistyped


@dataclass
class PartSummary:
    """A part with the shape of its output, its capabilities and its size."""

    kind: str
    name: str
    tokens: int
    grid: tuple[int, int] | None
    width: int
    parameters: int
    trainable: int
    needs: frozenset[str]
    provides: frozenset[str]
    destroys: frozenset[str]
    bytes: int


@dataclass
class CheckReport:
    """The report of a check that found nothing wrong."""

    rows: list[PartSummary]
    num_image_tokens: int
    memory: int  # bytes, inference with one image and the KV cache of a full prompt
    stages: list[Stagecheck] = field(default_factory=list)
    seconds: float = 0.0
    encoders: list[str] = field(default_factory=list)  # a line for each of several
    places: int = 0  # positions that an image takes, where they are kept; 0: as many as it has tokens
    text_tower: int = 0  # parameters of the encoder's text tower, which is loaded where a part needs it
    notes: list[str] = field(default_factory=list)  # what fits, and may surprise
    devices: list[dict[str, Any]] = field(default_factory=list)  # what each of many holds in a stage, in bytes
    parts: Parts | None = None  # on the meta device

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values; memory in bytes."""
        stages = [{"name": s.name, "trainable": dict(s.trainable), "memory_bytes": s.memory.total} for s in self.stages]
        head = {"parts": self.rows, "image_tokens": self.num_image_tokens, "positions": self.places or None}
        sizes = {"parameters": sum(row.parameters for row in self.rows), "memory_bytes": self.memory}
        found = {"stages": stages, "devices": self.devices, "notes": self.notes}
        return {**head, **sizes, **found, "seconds": round(self.seconds, 2)}


class RefusedError(ZooError):
    """The composition does not fit. `reason` is the sentence, `fixes` the overrides that make it fit.

    A fix of two overrides has `zoo.checking.fixes.AND` between them.
    """

    def __init__(self, reason: str, fixes: Sequence[str] = ()) -> None:
        lines = [reason, *(f"  fix {i}: {_for_a_shell(fix)}" for i, fix in enumerate(fixes, 1))]
        super().__init__("\n".join(lines))
        self.reason, self.fixes = reason, list(fixes)


def _for_a_shell(fix: str) -> str:
    return " ".join(map(for_a_shell, fix.split(AND)))


def for_a_shell(override: str) -> str:
    """Quote an override that a shell would split or expand; brackets alone stay unquoted, as in the docs."""
    if not re.search(r"[^\w@%+=:,./\[\]-]", override):
        return override
    plain = "'" in override and not re.search(r'["$`\\!]', override)  # shlex breaks each ' out of its quotes
    return f'"{override}"' if plain else shlex.quote(override)


def check(plan: Plan | str, *overrides: str, fixes: int = 3) -> CheckReport:
    """Check a composition without reading a weight.

    Args:
        plan: what to check, or the name of a model as for `zoo.load`.
        overrides: with a name, further options such as `pruner=random`.
        fixes: how many to search for where something does not fit; the search takes longer than the check.

    Raises:
        RefusedError: something does not fit; the message has the reason and fixes that were tried.
    """
    if isinstance(plan, str):
        plan = plan_of(plan, *overrides)
    start = time.perf_counter()
    with errors_alone():  # what transformers warns of comes again when the model is built with weights
        try:
            report = _report_of(plan)
        except ZooError as error:
            raise RefusedError(str(error), list(_fixes(plan, fixes))) from error
    if plan.typed is not None:
        report.notes += unused_weights(plan.typed, plan.unused if plan.stages else "")
        report.notes += unused_options(plan.typed)
    report.seconds = time.perf_counter() - start
    return report


def _report_of(plan: Plan) -> CheckReport:
    _check_machine(plan)
    vocab_size = _check_tokenizer(plan)
    with torch.device("meta"):
        parts = assemble(plan.slots, vocab_size=vocab_size)
    if plan.placeholders is not None and plan.placeholders != parts.num_image_tokens:
        raise ZooError(
            f"The saved processor writes {plan.placeholders} placeholders for an image, but the parts make "
            f"{parts.num_image_tokens} image tokens of it."
        )
    _check_positions(parts, plan.positions)
    check_counts(parts, plan.slots, plan.positions)
    from zoo.composed.model import ZooModel
    from zoo.model_config import ZooConfig

    require_kernel(plan.attention, parts.llm.lm, device_of(plan))
    attention = "auto" if plan.attention.startswith("flash") else plan.attention  # flash kernels refuse meta tensors
    with torch.device("meta"):
        model = ZooModel(ZooConfig(slots=dict(plan.slots), positions=plan.positions, attention=attention), parts=parts)
    left = _check_stored(plan, model)
    rows = [_summary(step, parts, model) for step in parts.steps]
    weights = sum(r.bytes for r in rows)
    if weights > _MOST_BYTES:
        largest = max(rows, key=lambda row: row.bytes)
        raise ZooError(
            f"{largest.kind} {largest.name!r} has {count_text(largest.parameters)} parameters, "
            f"{size_text(largest.bytes)}B: more than any machine holds. One of its sizes is wrong."
        )
    report = CheckReport(rows, parts.num_image_tokens, weights + _cache_bytes(parts, parts.num_image_tokens + TEXT))
    report.parts = parts
    report.notes = list(explained(plan.typed.overrides, plan.slots)) if plan.typed else []
    report.notes += [note for adapter in parts.adapter.values() for note in adapter.notes]
    require_divisible(model, plan.tensor, plan.stages)
    for name, stage in plan.stages.items():
        report.stages.append(check_stage(name, stage, model, plan, weights))
    report.places = model.unpruned.longest if model.unpruned is not None else 0
    report.text_tower = parts.vision.text_tower if parts.vision is not None else 0
    report.encoders = list(described(parts.vision, plan.slots.get("vision")))
    report.notes += filter(None, [model.decided.why])
    report.notes += left
    report.notes += _idle_pruners(parts)
    report.notes += _untrained(plan, report.stages)
    return report


def _idle_pruners(parts: Parts) -> Iterator[str]:
    """Note pruners that keep every token of this model, such as one with a preset for larger images."""
    n, layers = parts.vision.num_tokens if parts.vision is not None else 0, parts.llm.num_layers
    for step in parts.steps:
        if step.kind == "pruner":
            pruner = parts.pruner[step.name]
            video = Cut(rows=64, kind="frame")
            kept = (pruner.tokens_of_image(n, Cut()), pruner.tokens_of_image(n, video))
            inside = pruner.tokens_per_layer(step.tokens, layers)
            if not pruner.front and kept == (n, 64 * n) and set(inside) == {n}:
                yield f"pruner {step.name!r} keeps all {n} image tokens with these options."
        if step.kind in ("pruner", "projector"):
            n = step.tokens


def _untrained(plan: Plan, stages: list[Stagecheck]) -> Iterator[str]:
    """Note that the encoder has random weights, where that may be a mistake and no stage trains it."""
    encoders = [own for own in own_checkpoints(plan.slots).values() if own.kind == "vision" and not own.inside]
    nodes = {own: node_at(plan.slots, own.path) for own in encoders}
    stated = have_checkpoints(plan.slots) or any(node.get("model") for node in nodes.values())
    if plan.trained or not (stages or stated):
        return  # everything is random, so it is intended: a test, or a model to look at
    for own, node in nodes.items():
        if not node or node.get("checkpoint") or any(own.part in s.trainable for s in stages):
            continue
        if "checkpoint" not in {option.name for option in registry.config_of("vision", node)[0].options}:
            continue
        named = f" ({node['model']})" if node.get("model") else ""
        source = "pretrained" if node["name"] == "timm" and named else "<name>"
        trains = ", and no stage trains it" if stages else ""
        which = "vision" if own.part == "vision" else f"encoder {own.path[-1]!r}:"
        reads = f"{own.module}.checkpoint={source} reads trained ones."
        yield f"{which} {node['name']!r}{named} starts from random weights{trains}: {reads}"


def _check_machine(plan: Plan) -> None:
    """Refuse devices, precisions and kernels that cannot run here."""
    require_present(plan.device)
    device = device_of(plan)
    if plan.precision not in ("auto", "fp32", "bf16"):
        raise registry.unknown("precision", plan.precision, ("auto", "fp32", "bf16"))
    if plan.attention.startswith("flash_attention"):
        if not device.startswith("cuda"):
            raise ZooError(f"attention={plan.attention} runs on CUDA only, and the device is {device}.")
        if plan.precision == "fp32":
            raise ZooError(f"attention={plan.attention} computes in bf16 or fp16, and precision=fp32 was asked for.")
    require_attention(plan.attention, device, None)


def _check_tokenizer(plan: Plan) -> int | None:
    """Refuse a tokenizer without the tokens of its template; returns its number of ids, if known."""
    if plan.template and plan.template not in CHAT_TEMPLATES:
        raise registry.unknown("chat template", plan.template, CHAT_TEMPLATES)
    if plan.tokenizer is not None:
        return len(set_template_options(tokenizer_at(plan.tokenizer, plan.template), plan.template_options))
    if plan.made is None and plan.template:  # else it comes with weights that are still to be fetched, or is trained
        require_variables(plan.template_options, CHAT_TEMPLATES[plan.template][0])
    if plan.vocab_size is not None:
        require_vocab_size(plan.vocab_size, plan.template or "plain")
    return plan.vocab_size


def _check_positions(parts: Parts, positions: str) -> None:
    limit, n = parts.llm.max_positions, parts.num_image_tokens
    if positions == "dense" and parts.layout is None:  # a layout's rows are not those of an image
        n = min([n, *(p.tokens_of_image(n, Cut()) for p in parts.pruner.values() if p.behind)])
    if limit is not None and n and limit < (needed := n + TEXT):
        raise ZooError(
            f"llm {parts.name_of('llm')!r} has {limit} positions; one image of {n} tokens and {TEXT} of text need "
            f"{needed}."
        )


def _check_stored(plan: Plan, model: Any) -> list[str]:
    """Refuse parts that the trained weights do not fit, by the names and shapes in their files. Returns notes."""
    if plan.stored is None:
        return []
    content = read_content(plan.stored)
    if is_published(content):
        require_same(plan.slots, plan.stored, plan.fresh)
        return []
    whole = not content.get("base") and not have_checkpoints(plan.slots)  # else some weights are in those checkpoints
    stated = content.get("slots") or {}
    left = left_adapters(stated, plan.slots)
    try:
        require_fit(model, plan.stored, listing(weight_files(plan.stored)), fresh=plan.fresh, whole=whole)
    except ZooError as error:
        raise ZooError(
            f"{error}\n{unfit_without(left, stated, plan.slots, plan.stored)}" if left else str(error)
        ) from error
    return [f"The trained weights of adapter {', '.join(map(repr, left))} are left out."] if left else []


def _summary(step: Any, parts: Parts, model: Any) -> PartSummary:
    key = step.kind if step.kind in registry.SINGLE_SLOTS else f"{step.kind}.{step.name}"
    own = [p for n, p in model.named_parameters() if (of := model.part_of(n)) == key or of.startswith(f"{key}.")]
    if step.kind == "vision":  # what never trains is held in buffers: a pooling head, a text tower
        saved = model.vision.state_dict()  # without rotary frequencies
        own += [b for n, b in model.vision.named_buffers() if n in saved and b.is_floating_point()]
    return PartSummary(
        step.kind,
        step.name,
        step.tokens,
        step.grid,
        step.width,
        sum(p.numel() for p in own),
        sum(p.numel() for p in own if p.requires_grad),
        step.needs,
        step.provides,
        step.destroys,
        sum(p.numel() * p.element_size() for p in own),
    )


def _cache_bytes(parts: Parts, tokens: int) -> int:
    columns = 0  # of keys, over the layers: heads may differ from one to the next (Gemma 4)
    for layer in parts.llm.lm.config.get_text_config().per_layer_config:
        queries = getattr(layer, "num_attention_heads", 1)
        width = getattr(layer, "head_dim", None) or parts.llm.hidden_size // max(1, queries)
        columns += (getattr(layer, "num_key_value_heads", None) or queries) * width
    return 2 * columns * tokens * next(parts.llm.parameters()).element_size()


# ---- fixes -------------------------------------------------------------------------------------------------------


def _fixes(plan: Plan, most: int) -> Iterator[str]:
    """Yield overrides that make the plan fit, smallest change first; each was checked."""
    found, start = 0, time.thread_time()  # of this thread: time that other processes take must not change the answer
    for tries, (override, candidate) in enumerate(candidates(plan)):
        if found == most or tries >= _MOST_TRIES or time.thread_time() - start > _SECONDS:
            return
        try:
            if AND in override:
                projector = {"projector": candidate.slots["projector"]}
                if _fits(replace(plan, slots={**plan.slots, **projector})):
                    continue  # the second of two changes is enough
            _report_of(candidate)
            _check_as_typed(plan, candidate, override)
        except Exception:  # of any kind: the candidate is then not a fix
            continue
        yield override
        found += 1


def _fits(plan: Plan) -> bool:
    try:
        _report_of(plan)
    except ZooError:
        return False
    return True


def _check_as_typed(plan: Plan, candidate: Plan, override: str) -> None:
    """Check the user's words with a fix appended, and their data, where the plan comes from a command line."""
    if plan.typed is None:
        return
    from zoo.checking.data_check import check_data

    cfg = plan.typed.with_more(*override.split(AND))
    tokens: dict[str, Any] = {
        name: getattr(candidate, name) for name in ("vocab_size", "tokenizer", "made", "placeholders")
    }
    as_before: dict[str, Any] = {"splits": candidate.splits, "origin": candidate.origin, "trained": candidate.trained}
    report = _report_of(replace(plan_from(cfg), **tokens, **as_before))
    check_data(cfg, report.stages)


# ---- command -----------------------------------------------------------------------------------------------------


def show(report: CheckReport, title: str = "") -> None:
    """Print a report as a table."""
    from rich import box
    from rich.table import Table

    table = Table(title=cell(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    for column in ("tokens", "grid", "width", "params", "memory"):
        table.add_column(column, justify="right")
    table.add_column("capabilities", overflow="fold")
    for r in report.rows:
        grid = f"{r.grid[0]}x{r.grid[1]}" if r.grid else "-"
        words = (("needs", r.needs), ("gives", r.provides), ("destroys", r.destroys))
        what = "; ".join(f"{word} {', '.join(sorted(some))}" for word, some in words if some)
        sizes = (count_text(r.parameters), bytes_text(r.bytes))
        table.add_row(cell(f"{r.kind} {r.name}"), str(r.tokens), grid, str(r.width), *sizes, cell(what or "-"))
    console().print(table)
    total = sum(r.parameters for r in report.rows)
    on = f", on {report.places} positions (kept)" if report.places else ""
    say(
        f"{report.num_image_tokens} image tokens = placeholders per image{on}; {count_text(total)} parameters; "
        f"inference takes about {size_text(report.memory)}B; checked in {report.seconds:.1f} s"
    )
    for line in report.encoders:
        say(line, subsequent="  ")
    if report.text_tower:
        line = f"vision includes its text tower, which a part needs: {count_text(report.text_tower)} parameters"
        say(line, subsequent="  ")
    for stage in report.stages:
        parts = ", ".join(f"{part} {count_text(n)}" for part, n in stage.trainable.items())
        line = f"stage {stage.name}: trains {parts}; training takes about {size_text(stage.memory.total)}B"
        line += f" ({stage.memory.describe()})"
        say(line, subsequent="  ")
    for note in report.notes:
        say(f"note: {note}", subsequent="  ")
