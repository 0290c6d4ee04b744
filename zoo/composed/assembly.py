"""Slots -> parts. The one place that knows how parts fit together.

Parts are built in the order vision -> pruners -> projector -> layout -> llm -> adapters. Along the way the number of
image tokens, the grid, the width and the set of capabilities that hold are kept, and the first part that does not fit
is refused. `zoo check` does the same on the meta device. Pruners in front of the encoder (`zoo.composed.front`) come
ahead of the others.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import torch

from zoo import registry
from zoo.composed import native
from zoo.composed.behind import windows
from zoo.composed.front import in_front, put_in_front
from zoo.registry import Adapter, Distiller, Encoder, LanguageModel, Layout, Part, Projector, Pruner, ZooError
from zoo.registry.llm_parts import OF_DISTILLERS
from zoo.registry.part import base_of, block_of

# Capabilities that a pruner may need and that hold only once the LLM is built: checked after the adapters.
CHECKED_AFTER_LLM = frozenset({"image_tokens", "moe", "projected"})
# What every part that gets features of images may have.
ALWAYS = frozenset({"image", "question"})
# What a library or a plug-in raises for options that it does not check itself.
_UNFORESEEN = (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError)
# What an encoder computes only where a part needs it: attention scores of every image cost memory.
ON_REQUEST = frozenset({"cls_attention", "key_attention", "keys", "pooling_head", "prefix_tokens", "text_tower"})
ON_REQUEST |= {"next_block", "summary"}
KNOWN = ALWAYS | CHECKED_AFTER_LLM | ON_REQUEST | {"grid", "dense"}  # words of the zoo, for the nearest one
SCORES = frozenset({"cls_attention", "key_attention", "pooling_head"})  # of them, a number for each patch


class MisfitError(ZooError):
    """Two parts do not fit. `part` and `why` are for the checker, which looks for fixes; the message is for people."""

    def __init__(self, part: tuple[str, str], why: str, message: str) -> None:
        super().__init__(message)
        self.part, self.why = part, why


@dataclass
class Step:
    """A part, with the shape of its output and its capabilities: one row of what `zoo check` prints."""

    kind: str
    name: str
    tokens: int  # image tokens per image after this part
    grid: tuple[int, int] | None
    width: int
    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    destroys: frozenset[str] = frozenset()


@dataclass
class Parts:
    """The modules of a composed model, and a `Step` for each in the order of building."""

    vision: Encoder | None = None
    pruner: dict[str, Pruner] = field(default_factory=dict)
    projector: Projector | None = None
    layout: Layout | None = None
    llm: LanguageModel = None  # type: ignore[assignment]  # until it is built
    adapter: dict[str, Adapter] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    projected_grid: tuple[int, int] | None = None  # of the tokens of a row behind the projector

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per image in the LLM's sequence, with a layout the most; 0 where images take none."""
        return next((s.tokens for s in reversed(self.steps) if s.kind in ("projector", "layout")), 0)

    @property
    def requested(self) -> frozenset[str]:
        """Capabilities that the encoder must compute beside tokens."""
        needed = frozenset().union(*(s.needs for s in self.steps)) if self.steps else frozenset()
        return frozenset(word for word in needed if base_of(word) in ON_REQUEST)

    @property
    def asks(self) -> bool:
        """Whether a part needs the question."""
        return any("question" in s.needs for s in self.steps)

    def name_of(self, kind: str) -> str:
        """Registry name of the first part of a kind, or nothing."""
        return next((s.name for s in self.steps if s.kind == kind), "")


class Filler(Protocol):
    """Reads weights into the base parts, once they are built and before adapters are built on them."""

    empty: frozenset[str]  # kinds of parts that are built without weights, where they can be

    def __call__(self, parts: Parts) -> None: ...


def assemble(slots: Mapping[str, Any], *, vocab_size: int | None, fill: Filler | None = None) -> Parts:
    """Build the parts that `slots` names and fit them together; structure only under `torch.device("meta")`.

    Args:
        slots: `vision`, `projector`, `layout`, `llm` a node or None; `pruner`, `adapter` a dict of nodes keyed by
            component name.
        vocab_size: of the tokenizer; an LLM built from sizes gets it, the embedding of a checkpoint is enlarged to it.
        fill: reads weights into the parts before adapters are built; encoder and LLM are then built on the meta device
            where they can be, so that memory is not taken twice.

    Raises:
        MisfitError: two parts do not fit together; the message names them, the reason, and what is there instead.
    """
    parts = Parts()
    holds: frozenset[str] = frozenset()
    tokens, grid, width = 0, None, 0
    derived: dict[str, Any]

    def record_step(kind: str, name: str, part: Part, **output: Any) -> None:
        needs, provides, destroys = (frozenset(words) for words in (part.needs, part.provides, part.destroys))
        parts.steps.append(Step(kind, name, **output, needs=needs, provides=provides, destroys=destroys))

    if not slots.get("llm"):
        raise MisfitError(
            ("llm", ""), "empty", "The slot llm is empty: a model needs a language model, llm=hf for example."
        )
    if node := slots.get("vision"):
        with _device_of("vision", node, fill):
            parts.vision = build_part("vision", node)
        tokens, grid, width = parts.vision.num_tokens, parts.vision.token_grid, parts.vision.hidden_size
        holds = frozenset(parts.vision.provides)
        record_step("vision", node["name"], parts.vision, tokens=tokens, grid=grid, width=width)
    vision_name = parts.steps[0].name if parts.steps else ""

    flow = Flow(tokens, grid, width, holds)
    if parts.vision is not None and parts.vision.native:
        flow.most = parts.vision.grid[0], parts.vision.grid[1]
    _add_pruners(parts, slots, flow, record_step, behind=False)
    tokens, grid, holds = flow.tokens, flow.grid, flow.holds

    # The projector needs the LLM's width, so the LLM is built here; its step is recorded behind the layout.
    with _device_of("llm", slots["llm"], fill):
        parts.llm = build_part("llm", slots["llm"], vocab_size=vocab_size)
    text_dim = parts.llm.hidden_size
    if node := slots.get("projector"):
        name = node["name"]
        if parts.vision is None:
            raise MisfitError(
                ("projector", name), "no vision", f"projector {name!r} has no image tokens: the slot vision is empty."
            )
        grid_now = grid if "grid" in holds else None
        parts.projector = build_part(
            "projector", node, vision_dim=width, text_dim=text_dim, grid=grid_now, num_tokens=tokens
        )
        _require("projector", name, parts.projector, holds, f"vision {vision_name!r}", slots, parts.vision.lacks)
        _require_blocks("projector", name, parts.projector, parts.vision, vision_name)
        before, tokens = tokens, _count("projector", name, parts.projector, tokens)
        holds |= {"image_tokens"}
        record_step("projector", name, parts.projector, tokens=tokens, grid=None, width=text_dim)
        one_by_one = tokens == before and parts.projector.num_tokens(1) == 1
        holds |= {"projected"} if one_by_one else frozenset()
        if flow.ragged and not one_by_one:
            raise _unequal("projector", name, flow.ragged)
        grid_now = grid_now if tokens == before else parts.projector.grid
        parts.projected_grid = (grid_now[0], grid_now[1]) if grid_now else None
        derived = {"grid": grid_now, "num_tokens": tokens, "text_dim": text_dim}
        derived["counted"] = native.counted(parts, slots)
        # Behind a projector of single tokens the layout still gets the encoder's tokens that a pruner kept, with their
        # indices; others (pool, resampler) make new tokens, to which the indices do not apply.
        derived["pruned"] = one_by_one
        _add_layout(parts, slots, record_step, **derived)
        if parts.layout is not None:
            _require("layout", slots["layout"]["name"], parts.layout, holds, f"vision {vision_name!r}", slots)
            _require_blocks("layout", slots["layout"]["name"], parts.layout, parts.vision, vision_name)
        kept = holds
        if not one_by_one:  # scores of patches are no longer there, or their means in windows of the grid
            merged = flow.grid is not None and grid_now and windows(flow.grid, grid_now) != (1, 1)
            kept = holds - (ON_REQUEST - {"summary"} - (SCORES if merged else frozenset()))
        own = parts.vision.native and one_by_one and "grid" in holds  # that of each row
        kept = kept | {"grid"} if grid_now or own else kept - {"grid"}
        _add_pruners(parts, slots, Flow(tokens, grid_now, text_dim, kept, flow.ragged), record_step, behind=True)
    elif late := next((n for n in slots.get("pruner") or {} if _acts_behind(n)), ""):
        raise MisfitError(
            ("pruner", late), "no projector", f"pruner {late!r} acts behind the projector, and there is none."
        )
    if (misfit := native.misfit_of(parts)) is not None:
        raise MisfitError(*misfit)
    if parts.vision is not None and parts.vision.deep:
        with _named(f"llm {slots['llm']['name']!r}"):
            parts.llm.take_deep(parts.vision.deep)
    if fill is not None:
        fill(parts)

    holds |= frozenset(parts.llm.provides)
    record_step("llm", slots["llm"]["name"], parts.llm, tokens=parts.num_image_tokens, grid=None, width=text_dim)
    for name, node in (slots.get("adapter") or {}).items():
        derived = {"vision_dim": width or None, "text_dim": text_dim, "grid": grid}
        grids = (None, None) if parts.vision is None else (tuple(parts.vision.grid), tuple(parts.vision.own_grid))
        derived |= dict(zip(("encoder_grid", "own_grid"), grids, strict=True))
        adapter = build_part("adapter", {**node, "name": name}, llm=parts.llm, **derived)
        _require("adapter", name, adapter, holds, f"llm {slots['llm']['name']!r}", slots)
        if parts.vision is not None:
            _require_blocks("adapter", name, adapter, parts.vision, vision_name)
        if flow.ragged and _uses_image(adapter):
            raise _unequal("adapter", name, flow.ragged)
        if parts.vision is not None and parts.vision.native and _uses_image(adapter):
            why = f"adapter {name!r} reads images on one grid, and those of vision {vision_name!r} keep their shapes"
            raise MisfitError(("adapter", name), "native", f"{why}: each has a grid of its own.")
        _refuse_shared(name, adapter, parts.adapter)
        _exclude("adapter", name, adapter, holds, parts.steps)
        holds = (holds - frozenset(adapter.destroys)) | frozenset(adapter.provides)
        parts.adapter[name] = adapter
        with _named(f"adapter {name!r}"):
            adapter.attach()
        record_step("adapter", name, adapter, tokens=parts.num_image_tokens, grid=None, width=text_dim)
    for name, pruner in parts.pruner.items():  # what a pruner needs inside the LLM is known only now
        missing = (frozenset(pruner.needs) & CHECKED_AFTER_LLM) - holds
        if missing:
            # VLoRA, say, feeds the image by weights: the LLM's sequence then has no image tokens to prune.
            taker = next((n for n, a in parts.adapter.items() if missing & frozenset(a.excludes)), "")
            source = f"adapter {taker!r}, which takes the image by another way," if taker else ""
            if missing == {"projected"}:
                source = "a projector that makes one token of one" if parts.projector is None else ""
                source = source or f"projector {slots['projector']['name']!r}, which makes new tokens,"
            raise _misfit("pruner", name, missing, holds, source or f"llm {slots['llm']['name']!r}")
        with _named(f"pruner {name!r}"):
            pruner.attach(parts.llm)

    if parts.vision is not None and parts.projector is None and not any(_uses_image(a) for a in parts.adapter.values()):
        raise MisfitError(
            ("projector", ""),
            "image unused",
            f"The image reaches nothing: vision {vision_name!r} has no projector, and no adapter takes image features. "
            f"Set projector={registry.names('projector')[0]} for example.",
        )
    if parts.vision is not None:
        parts.vision.prepare(parts.requested)
    return parts


def _device_of(kind: str, node: Mapping[str, Any], fill: Any) -> Any:
    """Return the device context to build a part in: the meta device if its weights are read afterwards."""
    if fill is None or kind not in fill.empty or not registry.get(kind, node["name"]).streams:
        return nullcontext()
    return torch.device("meta")


@dataclass
class Flow:
    """What reaches the next part: the shape of a row of tokens, the capabilities that hold, whose rows are ragged."""

    tokens: int
    grid: tuple[int, int] | None
    width: int
    holds: frozenset[str]
    ragged: str = ""  # the pruner that leaves rows of unequal counts
    most: tuple[int, int] | None = None  # (h, w) of the largest row, where each has a grid of its own


def _acts_behind(name: str) -> bool:
    return bool(getattr(registry.get("pruner", name).cls, "behind", False))


def _add_pruners(parts: Parts, slots: Mapping[str, Any], flow: Flow, record_step: Any, behind: bool) -> None:
    """Build the pruners in front of the projector, or those behind it; `flow` is what reaches the first of them."""
    pruners = slots.get("pruner") or {}
    for name, node in {**(front := in_front(pruners)), **pruners}.items():
        if _acts_behind(name) != behind:
            continue
        if parts.vision is None:
            raise MisfitError(
                ("pruner", name), "no vision", f"pruner {name!r} has no image tokens: the slot vision is empty."
            )
        given = {"vision_dim": flow.width, "vision_depth": parts.vision.depth}
        pruner = build_part("pruner", {**node, "name": name}, **given, grid=flow.grid, num_tokens=flow.tokens)
        vision = parts.name_of("vision")
        source = f"vision {vision!r}"
        if behind and frozenset(pruner.needs) - flow.holds <= parts.vision.provides:  # lost in the projector
            source = f"projector {parts.name_of('projector')!r}"
        _require("pruner", name, pruner, flow.holds, source, slots, parts.vision.lacks)
        _require_blocks("pruner", name, pruner, parts.vision, vision)
        if name in front:
            put_in_front(name, pruner, parts.vision, slots, vision)
            if not parts.vision.native:
                flow.tokens, flow.grid = parts.vision.num_tokens, (parts.vision.grid[0], parts.vision.grid[1])
            for step in parts.steps[1:]:  # others in front of the encoder: they get what it makes now
                step.tokens, step.grid = flow.tokens, flow.grid
        n = flow.tokens
        pooled = pruner.grid_of(flow.most) if flow.most else None
        flow.tokens = math.prod(pooled) if pooled else _count("pruner", name, pruner, n)
        flow.most = pooled or (flow.most if flow.tokens == n else None)
        if flow.ragged and (flow.tokens != n or behind or pruner.ragged):
            raise _unequal("pruner", name, flow.ragged)
        if behind and flow.tokens != n:
            raise ZooError(
                f"pruner {name!r} acts behind the projector, where tokens stay in place: its num_tokens({n}) has to be "
                f"{n}, not {flow.tokens}. How many it keeps is its tokens_of_image(n, cut)."
            )
        flow.ragged = name if pruner.ragged else flow.ragged
        flow.holds = (flow.holds - frozenset(pruner.destroys)) | frozenset(pruner.provides)
        now = pruner.grid or flow.grid
        flow.grid = (now[0], now[1]) if now and "grid" in flow.holds else None
        parts.pruner[name] = pruner
        record_step("pruner", name, pruner, tokens=flow.tokens, grid=flow.grid, width=flow.width)


def _unequal(kind: str, name: str, ragged: str) -> MisfitError:
    """Refuse a part that takes rows of one length behind a pruner whose rows have several."""
    return MisfitError(
        (kind, name),
        f"ragged: {ragged}",
        f"{kind} {name!r} takes equally many tokens of each image, and pruner {ragged!r} keeps a number that "
        "depends on the image.",
    )


def _add_layout(parts: Parts, slots: Mapping[str, Any], record_step: Any, **derived: Any) -> None:
    """Build the layout behind the projector, where the slots name one."""
    if node := slots.get("layout"):
        assert parts.vision is not None, "there is a projector behind it"
        whole = tuple(parts.vision.grid) if parts.vision.native else parts.vision.token_grid
        derived |= {"image_size": parts.vision.own_size, "encoder_grid": whole}
        parts.layout = layout = build_part("layout", node, **derived)
        tokens = _count("layout", node["name"], layout, derived["num_tokens"])
        record_step("layout", node["name"], layout, tokens=tokens, grid=None, width=derived["text_dim"])


def build_part(kind: str, node: Mapping[str, Any], **derived: Any) -> Any:
    """Build a part; its errors are raised with its name."""
    with _named(f"{kind} {node.get('name')!r}"):
        return registry.build(kind, node, **derived)


def _count(kind: str, name: str, part: Pruner | Projector | Layout, n: int) -> int:
    """Count the tokens that a part makes of `n`, by its `num_tokens`."""
    with _named(f"{kind} {name!r}", f"fails in num_tokens({n})"):
        count = part.num_tokens(n)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ZooError(f"its num_tokens({n}) gives {count!r}, and has to give a whole number of tokens.")
        return count


@contextmanager
def _named(name: str, fails: str = "cannot be built with these options") -> Iterator[None]:
    """Put the name of a part in front of its errors."""
    try:
        yield
    except ZooError as error:
        if str(error).startswith((name, "No ", "A ")):  # the message names the part already
            raise
        raise ZooError(f"{name}: {error}") from error
    except _UNFORESEEN as error:
        if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError that options do not explain
            raise
        reason = " ".join(str(error).split()) or "no message"
        raise ZooError(f"{name} {fails}: {type(error).__name__}: {reason}") from error


def _refuse_shared(name: str, adapter: Adapter, others: Mapping[str, Adapter]) -> None:
    """Refuse two adapters whose modules of the LLM (`exclusive`) are the same, or inside one another."""
    for other, part in others.items():
        pairs = product(adapter.exclusive, part.exclusive)
        if both := [a for a, b in pairs if a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")]:
            raise MisfitError(
                ("adapter", name),
                "same modules",
                f"adapter {name!r} and adapter {other!r} both take {len(set(both))} modules of the LLM, "
                f"{both[0]!r} for one. Give each its own, or leave one out.",
            )


def _uses_image(adapter: Adapter) -> bool:
    return not {base_of(word) for word in adapter.needs}.isdisjoint({"image", "grid", *ON_REQUEST})


def _require(
    kind: str,
    name: str,
    part: Part,
    holds: frozenset[str],
    source: str,
    slots: Mapping[str, Any],
    lacks: Mapping[str, str] | None = None,
) -> None:
    """Refuse a part that needs what does not hold; `lacks` has the encoder's reasons, by capability."""
    # A need of a block holds where its base does; `_require_blocks` asks whether the block runs.
    needs = frozenset(word for word in part.needs if block_of(word) is None or base_of(word) not in holds) - ALWAYS
    missing = needs - holds - (CHECKED_AFTER_LLM if kind == "pruner" else frozenset())
    if missing:
        destroyers = [
            n
            for n in (slots.get("pruner") or {})
            if n != name and {base_of(word) for word in missing} & registry.get("pruner", n).destroys
        ]
        why = "" if destroyers else next((why for word, why in (lacks or {}).items() if word in missing), "")
        raise _misfit(
            kind, name, missing, holds, f"pruner {destroyers[0]!r}" if destroyers else source, bool(destroyers), why
        )


def _require_blocks(kind: str, name: str, part: Part, vision: Encoder, source: str) -> None:
    """Refuse a need of a block that the encoder does not run, or whose attention it cannot compute."""
    most = vision.attention_blocks
    for word in sorted(frozenset(part.needs) - frozenset(vision.provides)):
        block = block_of(word)
        if block is not None and word in vision.lacks:
            why = vision.lacks[word]
            raise MisfitError((kind, name), f"missing: {word}", f"{kind} {name!r} needs {word}, but {why}")
        if block is None or 1 <= block <= most:
            continue
        base, given = base_of(word), f"vision {source!r}"
        if not most:
            reason = f"{given} gives the attention of one block alone, that which made the features."
        else:
            of_all = f" of its {vision.depth}" if vision.depth > most else ""
            reason = f"{given} runs {most} blocks{of_all}: {base}@1 to {base}@{most} are given."
        raise MisfitError((kind, name), f"missing: {word}", f"{kind} {name!r} needs {word}, but {reason}")


def _exclude(kind: str, name: str, part: Adapter, holds: frozenset[str], steps: list[Step]) -> None:
    """Refuse a part where a capability holds that it excludes."""
    if unwanted := frozenset(part.excludes) & holds:
        word = ", ".join(sorted(unwanted))
        giver = next((s for s in steps if unwanted & s.provides), None)
        source = f"{giver.kind} {giver.name!r} gives" if giver else "there are"
        raise MisfitError((kind, name), f"excluded: {word}", f"{kind} {name!r} excludes {word}, but {source} them.")


def _misfit(
    kind: str,
    name: str,
    missing: frozenset[str],
    holds: frozenset[str],
    source: str,
    destroyed: bool = False,
    why: str = "",
) -> MisfitError:
    what = ", ".join(sorted(missing))
    how = f"{source} destroys it" if destroyed else f"{source} does not give it"
    how += f": {why.removesuffix('.')}" if why else ""
    near = [n for word in sorted(missing) if base_of(word) not in KNOWN for n in registry.nearest(word, KNOWN | holds)]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return MisfitError(
        (kind, name),
        f"{'destroyed' if destroyed else 'missing'}: {what}",
        f"{kind} {name!r} needs {what}, but {how}.{hint} What holds there: {', '.join(sorted(holds)) or 'nothing'}.",
    )


def build_distiller(model: Any, node: Mapping[str, Any]) -> Distiller:
    """Build a stage's distiller for this model."""
    vision = model.vision
    made: Distiller = registry.build(
        "distiller",
        node,
        vision_dim=vision.hidden_size if vision is not None else None,
        text_dim=model.llm.hidden_size,
        vocab_size=model.llm.vocab_size,
        grid=vision.token_grid if vision is not None else None,
    )
    for word in sorted(made.needs):
        if word not in OF_DISTILLERS and not word.startswith("batch."):
            what = f"word that distiller {node['name']!r} may need, beside batch.<key>,"
            raise registry.unknown(what, word, OF_DISTILLERS)
    return made
