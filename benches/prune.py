"""`zoo bench prune`: what pruners save, measured beside what they should, all from one run.

Models differ in the pruner alone. For each: image tokens behind every part and in every layer of the LLM, FLOPs in
closed form beside torch's counter, prefill and decode times with their spread, peak memory, bytes of the cache, and
the score of a task where the model has weights worth asking. In the end it says in words where a pruner does not pay.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from zoo.benches.costs import cache_bytes
from zoo.benches.flops import count_flops
from zoo.benches.measure import Clock, Plain, Turns, Value, interleave
from zoo.benches.peak import peak_bytes
from zoo.benches.place import at_least_one, chosen, torch_threads
from zoo.benches.prune_card import LARGEST_GAP, PruneReport, Summary, where_counts_differ, where_it_pays
from zoo.benches.prune_models import SIZES, Variant, accepts, first_tokens, named_model, random_models
from zoo.benches.report import Row, machine
from zoo.fusion.pruners.inside.attention_flow import attention_flow
from zoo.registry import ZooError, names, unknown

NONE = "null"
SECTIONS = ("prefill", "decode", "memory", "encoder", "scoring", "sizes", "task")
OWN_TIME = {"divprune": 5.0}  # bounds, in per cent of the prefill saved, that differ from the others' 3
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Options:
    model: str = (
        "random_100m"  # random_100m (a decoder of 100 M with random weights), tiny, or a model as `zoo eval` takes
    )
    pruner: str = "null,random,fastervlm,aim"  # with commas between; null: none; options of one: pruner.aim.start=4
    keep_ratio: float = 0.1  # of the pruners that have such an option
    text_tokens: int = 64  # of the prompt, half of them before the image
    batch: int = 1  # prompts at once
    new_tokens: int = 16  # of a decode turn
    rounds: int = 7  # turns of each variant
    threads: int = 1  # of torch on the CPU; with one, time is that of the process, whatever else runs
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "float32"  # float32 | bfloat16 | float16
    limit: int = 100  # samples of the task, for a model with trained weights; 0: no task
    scored_tokens: int = 2048  # of the section scoring
    only: str = ""  # sections: prefill, decode, memory, encoder, scoring, sizes, task; empty: all
    set: dict[str, Any] = field(default_factory=dict)  # pruner -> its options; written pruner.NAME.OPTION=value

    def __post_init__(self) -> None:
        at_least_one(self, "text_tokens", "batch", "new_tokens", "rounds", "threads", "scored_tokens")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        self.sections = chosen("section", self.only, SECTIONS)
        for name in [*self.pruners, *self.set]:
            if name != NONE and name not in names("pruner"):
                raise unknown("pruner", name, [NONE, *names("pruner")])

    @property
    def pruners(self) -> list[str]:
        """The pruners in order, none first: everything is measured against it."""
        return list(dict.fromkeys([NONE, *(p.strip("[] ") for p in self.pruner.split(",") if p.strip("[] "))]))

    def nodes(self) -> dict[str, dict[str, Any] | None]:
        """The options of each pruner."""
        found: dict[str, dict[str, Any] | None] = {}
        for name in self.pruners:
            shared = {"keep_ratio": self.keep_ratio} if name != NONE and accepts(name, "keep_ratio") else {}
            found[name] = None if name == NONE else {**shared, **dict(self.set.get(name, {}))}
        return found


def words(given: Sequence[str]) -> list[str]:
    """Write options of a pruner, `pruner.aim.start=4`, as the dataclass has them."""
    return [f"set.{w.removeprefix('pruner.')}" if w.startswith("pruner.") else w for w in given]


def run(options: Options, show: Callable[[str], None] = print) -> PruneReport:
    """Measure what `options.only` asks for; `show` is told what is going on."""
    with torch_threads(options.threads):
        return _Bench(options, show).run()


class _Bench:
    def __init__(self, options: Options, show: Callable[[str], None]) -> None:
        self.options, self.show = options, show
        cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.clock = Clock(self.device, options.threads)
        show("building the models")
        self.tasks: dict[str, Callable[[], str]] = {}
        self.variants = self._variants()
        self.base = self.variants[NONE]
        self.n = self.base.features.tokens.shape[1]
        self.cards = {name: self._counts(v) for name, v in self.variants.items()}

    def run(self) -> PruneReport:
        o, sizes = self.options, self.base.sizes
        report = PruneReport("zoo bench prune", machine=machine(self.device, o.threads), cards=self.cards)
        weights = sum(p.numel() for p in self.base.model.llm.parameters()) / 1e6
        report.setting = [
            f"model {o.model}: LLM of {sizes.num_layers} layers x {sizes.width}, {weights:.0f} M parameters; "
            f"{o.batch} prompt(s) of {self.n} image tokens and {o.text_tokens} text tokens; {o.dtype}",
            f"{self.clock.name} time, medians and quartiles of {o.rounds} turns that alternate; ratios within a turn",
            "FLOPs count a multiplication with its addition as 2, have no causal discount, and leave the encoder out",
        ]
        for section in SECTIONS:
            if section in o.sections:
                self.show(f"measuring: {section}")
                report.add(*getattr(self, f"_{section}")())
        report.words = [*where_counts_differ(self.cards), *where_it_pays(self.cards)]
        return report

    # ---- models ------------------------------------------------------------------------------------------------

    def _variants(self) -> dict[str, Variant]:
        o, nodes = self.options, self.options.nodes()
        generator = torch.Generator().manual_seed(0)
        found: dict[str, Variant] = {}
        if o.model in SIZES:
            models = random_models(SIZES[o.model], nodes)
        else:
            models = {}
            for name, node in nodes.items():
                models[name], processor, config = named_model(o.model, name, node)
                self.tasks[name] = _task(models[name], processor, config, o)
        for name, model in models.items():
            torch.nn.Module.to(model, device=self.device, dtype=getattr(torch, o.dtype))
            if not model.num_image_tokens:
                raise ZooError(f"model {o.model!r} has no image tokens in the LLM: there is nothing to prune.")
            model.set_attention("sdpa" if self.device.type == "cpu" else "auto")
            assert model.vision is not None, "it has image tokens"
            size = (o.batch, 3, *model.vision.transform.size)
            generator.manual_seed(0)
            pixels = torch.randn(size, generator=generator).to(self.device, getattr(torch, o.dtype))
            text = torch.randint(8, model.llm.vocab_size, (o.batch, o.text_tokens), generator=generator)
            text = torch.where(text == model.image_token_id, 7, text).to(self.device)
            with torch.no_grad():
                features = model.vision(pixels, need=model.requested)
            found[name] = Variant(name, model, pixels, text, features)
        return found

    def _counts(self, variant: Variant) -> Summary:
        tokens, size = variant.layer_tokens(self.n), torch.finfo(getattr(torch, self.options.dtype)).bits // 8
        flops, scoring = variant.read_flops(self.n)
        rows = variant.text.shape[0]
        return Summary(
            stages=variant.stages(self.n),
            layers=variant.image_tokens(self.n),
            flops=flops,
            scoring_flops=scoring,
            cache_bytes=rows * cache_bytes(variant.sizes, tokens, size),
        )

    def _each(self) -> list[tuple[str, Variant]]:
        return [(name, v) for name, v in self.variants.items() if name != NONE]

    def _time(self, steps: Mapping[str, Callable[[], object]], each: int = 1) -> Turns:
        return interleave({k: Plain(s) for k, s in steps.items()}, self.clock, self.options.rounds, each)

    # ---- sections ----------------------------------------------------------------------------------------------

    def _prefill(self) -> list[Row]:
        rows: list[Row] = []
        before = {f"{name} alone": partial(v.choose, v.features) for name, v in self._each() if not v.inside}
        times = self._time({**{name: v.after for name, v in self.variants.items()}, **before})
        for name, v in self.variants.items():
            card = self.cards[name]
            ids, embeds = v.prompt(v.features)
            card.counted_flops = count_flops(partial(v.read, ids, embeds))
            card.prefill_ms = times.milliseconds(name)
            rows.append(Row(f"{name}: prefill, encoder output to logits", card.prefill_ms, " ms"))
            what = f"{name}: closed form of the prefill's FLOPs against torch's counter"
            note = f"{(card.flops + card.scoring_flops) / 1e9:.2f} and {card.counted_flops / 1e9:.2f} GFLOP"
            rows.append(Row(what, Value.of([card.gap]), " %", bound=LARGEST_GAP, at_most=True, note=note))
        for name, v in self._each():
            card = self.cards[name]
            card.speed_up = times.ratio(NONE, name)
            card.ideal = self.cards[NONE].flops / card.flops
            share = card.speed_up.over(card.ideal)
            scored = f", {card.scoring_flops / 1e9:.2f} GFLOP of scoring not counted" if card.scoring_flops else ""
            note = f"{card.ideal:.2f}x by FLOPs{scored}"
            rows.append(Row(f"{name}: prefill against no pruner", card.speed_up, note=note))
            rows.append(
                Row(f"{name}: share of that ratio of FLOPs", share, "", bound=0.75 if v.inside else 0.85, note=note)
            )
            if f"{name} alone" in before:
                rows += own_time(name, times)
        return rows

    def _decode(self) -> list[Row]:
        o, caches = self.options, {name: v.read(*v.prompt(v.features))[1] for name, v in self.variants.items()}
        rows: list[Row] = []
        for name in self.variants:
            held = sum(x.keys.nbytes + x.values.nbytes for x in caches[name].layers)
            off = abs(held - self.cards[name].cache_bytes)
            note = f"{held / 1e6:.2f} MB"
            rows.append(Row(f"{name}: bytes of the cache beside those counted", Value.of([off]), " B", 0.0, True, note))
        steps = {name: lambda v=v, name=name: v.decode(caches[name], o.new_tokens) for name, v in self.variants.items()}
        times = self._time(steps)
        for name in self.variants:
            self.cards[name].decode_ms = value = times.milliseconds(name, o.new_tokens)
            rows.append(Row(f"{name}: one token of decoding", value, " ms"))
        for name, _ in self._each():
            self.cards[name].decode_ratio = value = times.ratio(name, NONE)
            rows.append(Row(f"{name}: time of a token over no pruner", value, bound=1.0, at_most=True))
        return rows

    def _memory(self) -> list[Row]:
        rows = []
        for name, v in self.variants.items():
            self.cards[name].peak_bytes = most = peak_bytes(v.after, self.device)
            rows.append(Row(f"{name}: peak memory of the prefill beside the weights", Value.of([most / 1e6]), " MB"))
        return rows

    def _encoder(self) -> list[Row]:
        """What a pruner before the LLM takes beside the encoder: scores from inside it, and choosing."""
        rows = []
        for name, v in self._each():
            if not v.model.requested and v.inside:
                continue
            plain = Variant(name, self.base.model, v.pixels, v.text, v.features)
            times = self._time(
                {"encoder": plain.encode, "scored": v.encode, "choose": partial(v.choose, v.features)}, each=3
            )
            pairs = zip(*(times.seconds(name) for name in ("scored", "choose", "encoder")), strict=True)
            value = Value.of([100 * ((a + b) / c - 1) for a, b, c in pairs])
            what = f"{name}: scoring and choosing, share of the encoder's time"
            bound = 3.0 if name == "fastervlm" else None
            extra = peak_bytes(v.encode, self.device) - peak_bytes(plain.encode, self.device)
            note = f"{extra / 1e6:.2f} MB more at the encoder's peak" if v.model.requested else ""
            rows.append(Row(what, value, " %", bound=bound, at_most=True, note=note))
        return rows

    def _scoring(self) -> list[Row]:
        """AIM's walk beside the fused kernel, against eager attention, which has the matrix at hand."""
        if "aim" not in self.variants:
            return []
        o, sizes = self.options, self.base.sizes
        shape, dtype = (1, sizes.heads, o.scored_tokens, sizes.head_dim), getattr(torch, o.dtype)
        query, key, value = (torch.randn(shape, device=self.device).to(dtype) for _ in range(3))
        start = torch.full((1, o.scored_tokens), 1 / o.scored_tokens, device=self.device)
        mask = torch.full((o.scored_tokens,) * 2, -torch.inf, device=self.device, dtype=dtype).triu(1)
        scale = sizes.head_dim**-0.5

        def eager() -> torch.Tensor:
            return (query @ key.mT * scale + mask).softmax(-1) @ value

        def eager_scored() -> torch.Tensor:
            scores = query @ key.mT * scale + mask
            walk = (scores.float() / 0.1).softmax(-1)
            u = start[:, None, None].expand(1, sizes.heads, 1, -1)
            for _ in range(5):
                u = u @ walk
            return scores.softmax(-1) @ value

        def fused() -> torch.Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

        def walk() -> torch.Tensor:
            return attention_flow(query, key, start, scaling=scale, steps=5, temperature=0.1)

        work = {"eager": eager, "eager scored": eager_scored, "fused": fused, "walk": walk}
        with torch.no_grad():
            times = self._time({**work, "both": lambda: (fused(), walk())})
            peaks = {name: peak_bytes(step, self.device) for name, step in work.items()}
        at = f"at {o.scored_tokens} tokens, {sizes.heads} heads"
        memory = Value.of([peaks["walk"] / peaks["eager"]])
        note = f"{peaks['walk'] / 1e6:.0f} and {peaks['eager'] / 1e6:.0f} MB"
        took = {k: f"{times.milliseconds(k).median:.0f} ms" for k in times}
        return [
            Row(
                f"aim: scoring over eager attention, time {at}",
                times.ratio("walk", "eager"),
                bound=0.8,
                at_most=True,
                note=f"{took['walk']} and {took['eager']}",
            ),
            Row(f"aim: scoring over eager attention, memory {at}", memory, "x", 0.15, True, note),
            Row(
                f"aim: fused attention and scoring over eager attention and dense scoring, time {at}",
                times.ratio("both", "eager scored"),
                note=f"{took['both']} and {took['eager scored']}; fused attention alone {took['fused']}",
            ),
        ]

    def _sizes(self) -> list[Row]:
        """From how many image tokens on a pruner pays."""
        side = math.isqrt(self.n)
        grid = self.base.features.grid
        if grid is None or grid[0] != grid[1]:
            return []
        rows = []
        for small in sorted({s for s in (2, 4, 8, 12, 16) if s < side} | {side}):
            steps: dict[str, Callable[[], object]] = {}
            for name, v in self.variants.items():
                try:
                    features = v.features if small == side else first_tokens(v.features, small)
                    v.stages(small * small)
                except ZooError:
                    continue  # made for one grid
                steps[name] = partial(v.after, features)
            times = self._time(steps, each=max(1, min(4, 256 // (small * small))))
            for name in steps:
                if name != NONE:
                    value = times.ratio(NONE, name)
                    self.cards[name].by_size[small * small] = value
                    rows.append(Row(f"{name}: prefill against no pruner, {small * small} image tokens", value))
        return rows

    def _task(self) -> list[Row]:
        if not self.tasks or not self.options.limit:
            for card in self.cards.values():
                card.task = "not measured: random weights" if not self.tasks else "not measured"
            return []
        for name, score in self.tasks.items():
            self.show(f"measuring: task, {name}")
            self.cards[name].task = score()
        return []


def own_time(name: str, times: Turns) -> list[Row]:
    """What a pruner before the LLM takes by itself, beside what it saves; scores of the encoder are not in it."""
    saved = statistics.median(a - b for a, b in zip(times.seconds(NONE), times.seconds(name), strict=True))
    if saved <= 0:
        return []
    alone, what = times.milliseconds(f"{name} alone"), f"{name}: its own time, share of the prefill that it saves"
    note = f"{alone.median:.3g} of {1e3 * saved:.3g} ms"
    return [Row(what, alone.over(10 * saved), " %", bound=OWN_TIME.get(name, 3.0), at_most=True, note=note)]


def _task(model: Any, processor: Any, config: Any, options: Options) -> Callable[[], str]:
    """Return what scores a model on the data it was trained for."""

    def score() -> str:
        from zoo.evaluation.evaluate import evaluate
        from zoo.registry import build
        from zoo.runs.data import RunData

        data = RunData(config.data)
        datasets = data.evaluation or data.all
        if not datasets:
            return "not measured: no data"
        tasks = {str(name): build("task", node) for name, node in config.task.items()}
        result = evaluate(model, processor, datasets, tasks, limit=options.limit, baselines=False)
        lines = [line for line in result.lines if not line.held_out]
        return ", ".join(f"{_figure(x, lines)} {100 * x.score.value:.1f} +- {100 * x.score.stderr:.1f}" for x in lines)

    return score


def _figure(line: Any, lines: Sequence[Any]) -> str:
    """Name a figure of an evaluation, by its metric too where its kind has several."""
    kind = line.kind or line.data
    return f"{kind} {line.metric}" if sum((x.kind or x.data) == kind for x in lines) > 1 else kind
