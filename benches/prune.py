"""`zoo bench prune`: one card for all pruners, each measured beside what it should reach, from one run.

Models differ in the pruner alone. Of each: the tokens that enter every layer, FLOPs in closed form beside torch's
counter, what the method takes by itself, prefill with one thread and with two, decoding, cache, peak memory, and where
a trained model is given what it answers, ability by ability, over the share of tokens kept. Controls are on every card.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from zoo.benches.abilities import Draws, batches_answer_alike, scores
from zoo.benches.costs import cache_bytes, encoder_flops
from zoo.benches.flops import count_flops
from zoo.benches.measure import Clock, Plain, Turns, Value, interleave
from zoo.benches.peak import peak_bytes
from zoo.benches.place import torch_threads
from zoo.benches.products import product_rows
from zoo.benches.prune_card import LARGEST_GAP, Point, Prefill, PruneReport, Summary
from zoo.benches.prune_compare import read_card
from zoo.benches.prune_models import Arms, Variant, accepts, first_tokens
from zoo.benches.prune_options import CONTROLS, NONE, SECTIONS, Options, share_option, words
from zoo.benches.prune_scoring import JUDGED_TOKENS, scoring_rows
from zoo.benches.prune_words import where_counts_differ, where_it_pays, who_wins
from zoo.benches.report import Row, machine
from zoo.benches.tables import Table
from zoo.registry import ZooError

__all__ = ["Options", "run", "words"]

OWN_TIME = {
    "divprune": 5.0,
    "cdpruner": 5.0,
}  # bounds, in per cent of the prefill saved, that differ from the others' 3
SHARE, SHARE_INSIDE = 0.85, 0.8  # of the ratio by FLOPs that the prefill reaches
# What bounds of speed are meant for; small models and prompts have other costs, and are measured without a verdict.
LARGE = 90e6  # weights of the LLM: "100 M"
PATCHES, LEFT = 576, 0.12  # image tokens, and the share of them that a pruner before the LLM leaves: 64 of 576


def run(options: Options, show: Callable[[str], None] = print) -> PruneReport:
    """Measure what `options.only` asks for; `show` is told what is going on."""
    before = read_card(options.against) if options.against else None  # a wrong path is found before an hour of work
    with torch_threads(options.thread_counts[0]):
        report = _Bench(options, show).run()
    report.before = before
    return report


class _Bench:
    def __init__(self, options: Options, show: Callable[[str], None]) -> None:
        self.options, self.show = options, show
        cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.clock = Clock(self.device, options.thread_counts[0])
        show("building the models")
        self.arms = Arms(options.model.split(",")[0], options.data, options.positions)
        self.left_out: dict[str, str] = {}
        self.further: list[Table] = []
        self.variants = self._variants()
        self.base = self.variants[NONE]
        self.weights = sum(p.numel() for p in self.base.model.llm.parameters())
        self.cards = {name: self._counts(v) for name, v in self.variants.items()}
        whole = self.cards[NONE].layers
        for name in [n for n, card in self.cards.items() if n != NONE and card.layers == whole]:
            if max(self.options.shares) < 1:  # of video, say
                self.left_out[name] = "it keeps all tokens of one image with these options"
                del self.variants[name], self.cards[name]

    def run(self) -> PruneReport:
        o, sizes = self.options, self.base.sizes
        report = PruneReport("zoo bench prune", machine=machine(self.device, o.thread_counts[0]), cards=self.cards)
        report.left_out = self.left_out
        report.setting = [
            f"model {o.model}: LLM of {sizes.num_layers} layers x {sizes.width}, {self.weights / 1e6:.0f} M weights; "
            f"{o.batch} prompt(s) of {self.base.patches} image tokens and {o.text_tokens} text tokens; {o.dtype}",
            f"times: medians and quartiles of {o.rounds} turns that alternate, ratios within a turn; with one "
            "thread of the process, with more of the wall",
            "FLOPs count a multiplication with its addition as 2, and attention in full, without a causal discount",
            f"bounds of speed are for LLMs from 100 M weights and {PATCHES} image tokens on, and before the LLM for a "
            f"ninth of them left: {sum(map(self._judged, self.variants))} of these pruners are judged",
        ]
        for section in SECTIONS:
            if section in o.sections:
                self.show(f"measuring: {section}")
                report.add(*getattr(self, f"_{section}")())
        report.further = self.further
        report.words = [*where_counts_differ(self.cards), *where_it_pays(self.cards), *who_wins(self.cards, CONTROLS)]
        return report

    # ---- models ------------------------------------------------------------------------------------------------

    def _variants(self) -> dict[str, Variant]:
        o = self.options
        found: dict[str, Variant] = {}
        for name in o.pruners:
            try:
                found[name] = self._variant(name, o.node(name, found[NONE].grid if found else ()))
            except ZooError as error:
                if name == NONE:
                    raise
                self.left_out[name] = str(error).splitlines()[0]
        return found

    def _variant(self, name: str, node: Mapping[str, Any] | None, draw: int = 0) -> Variant:
        """Build a model with a pruner, and try it on a prompt."""
        o, dtype = self.options, getattr(torch, self.options.dtype)
        model = self.arms.model(name, node, draw)
        torch.nn.Module.to(model, device=self.device, dtype=dtype)
        if not model.num_image_tokens:
            raise ZooError(f"model {o.model!r} has no image tokens in the LLM: there is nothing to prune.")
        model.set_attention("sdpa" if self.device.type == "cpu" else "auto")
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(8, model.llm.vocab_size, (o.batch, o.text_tokens), generator=generator)
        text = torch.where(text == model.image_token_id, 7, text).to(self.device)
        variant = Variant.of(name, model, self.arms.pixels(model, o.batch).to(self.device, dtype), text)
        variant.after()
        return variant

    def _counts(self, variant: Variant) -> Summary:
        size, rows = torch.finfo(getattr(torch, self.options.dtype)).bits // 8, len(variant.text)
        shown = variant.shown()
        ids = variant.ids(shown)
        tokens = variant.tokens_of(variant.read(ids, shown).cache)
        flops, scoring = variant.read_flops(tokens)
        declared = [n + variant.text.shape[1] for n in variant.image_tokens(variant.patches)]
        assert variant.model.vision is not None, "it has image tokens"
        vision = variant.model.vision  # of several encoders products are counted by running them
        closed = None if vision.members else encoder_flops(vision.runner, variant.patches)
        return Summary(
            options={} if variant.name == NONE else dict(self.arms.nodes[variant.name]),
            inside=variant.inside,
            stages=variant.stages(variant.patches),
            layers=[n - variant.text.shape[1] for n in tokens],
            flops=flops,
            scoring_flops=scoring,
            counted_flops=count_flops(partial(variant.read, ids, shown)),
            encoder_flops=None if closed is None else rows * closed,
            encoder_plain=count_flops(partial(variant.encode, frozenset())),
            encoder_counted=count_flops(variant.encode),
            cache_bytes=rows * cache_bytes(variant.sizes, declared, size),
        )

    def _each(self) -> list[tuple[str, Variant]]:
        return [(name, v) for name, v in self.variants.items() if name != NONE]

    def _time(self, steps: Mapping[str, Callable[[], object]], each: int = 1, threads: int = 0) -> Turns:
        clock = Clock(self.device, threads) if threads else self.clock
        with torch_threads(threads or self.clock.threads):
            return interleave({k: Plain(s) for k, s in steps.items()}, clock, self.options.rounds, each)

    # ---- sections ----------------------------------------------------------------------------------------------

    def _prefill(self) -> Iterator[Row]:
        for name, card in self.cards.items():
            for what, gap, closed, counted in card.gaps():
                note = f"{closed / 1e9:.2f} and {counted / 1e9:.2f} GFLOP"
                yield Row(
                    f"{name}: closed form of the {what}'s FLOPs against torch's counter",
                    Value.one(gap),
                    " %",
                    LARGEST_GAP,
                    True,
                    note,
                )
        for threads in self.options.thread_counts:
            yield from self._prefill_with(threads)

    def _prefill_with(self, threads: int) -> Iterator[Row]:
        ahead = [(name, v) for name, v in self._each() if not v.inside or (v.pruner is not None and v.pruner.behind)]
        alone = {f"{name} alone": v.choose for name, v in ahead}
        asks = {f"encoder {sorted(v.model.requested)}": v.encode for _, v in self._each() if self._asks(v)}
        asks |= {"encoder": partial(self.base.encode, frozenset())} if asks else {}
        times = self._time({**{name: v.after for name, v in self.variants.items()}, **alone, **asks}, threads=threads)
        at = f"{threads} thread{'s' * (threads > 1)}"
        for name, v in self.variants.items():
            card = self.cards[name]
            card.prefill[threads] = found = Prefill(times.milliseconds(name))
            yield Row(f"{name}: prefill, encoder output to logits, {at}", found.ms, " ms")
            if name == NONE:
                continue
            found.speed_up = times.ratio(NONE, name)
            card.ideal = self.cards[NONE].flops / card.flops
            found.share = found.speed_up.over(card.ideal)
            left = f", {card.scoring_flops / 1e9:.2f} GFLOP of scoring not counted" if card.scoring_flops else ""
            note = f"{card.ideal:.2f}x by FLOPs{left}"
            yield Row(f"{name}: prefill against no pruner, {at}", found.speed_up, note=note)
            bound = (SHARE_INSIDE if v.inside else SHARE) if self._judged(name) else None
            yield Row(f"{name}: share of that ratio of FLOPs, {at}", found.share, "", bound=bound, note=note)
            scored = f"encoder {sorted(v.model.requested)}"
            for row in own_time(name, times, scored, at, self._judged(name)):
                found.own = row.value
                yield row

    def _asks(self, variant: Variant) -> bool:
        """Whether the encoder computes more for a pruner than it does anyway."""
        return bool(variant.model.requested) and variant.patches == self.base.patches

    def _judged(self, name: str) -> bool:
        """Whether bounds of speed are meant for this model and what a pruner leaves of its image tokens."""
        card, variant = self.cards[name], self.variants[name]
        large = self.weights >= LARGE and self.base.patches >= PATCHES
        return large and name != NONE and (variant.inside or card.tokens <= LEFT * self.base.patches)

    def _decode(self) -> Iterator[Row]:
        o, caches = self.options, {name: v.after().cache for name, v in self.variants.items()}
        for name in self.variants:
            held = sum(x.keys.nbytes + x.values.nbytes for x in caches[name].layers)
            off = abs(held - self.cards[name].cache_bytes)
            self.cards[name].cache_held = held
            note = f"{held / 1e6:.2f} MB"
            part = self.variants[name].pruner
            ragged = part is not None and (part.ragged or part.behind)  # it declares the most that it may keep
            yield Row(
                f"{name}: bytes of the cache beside those counted",
                Value.one(off),
                " B",
                None if ragged else 0.0,
                True,
                note,
            )
        steps = {name: lambda v=v, name=name: v.decode(caches[name], o.new_tokens) for name, v in self.variants.items()}
        times = self._time(steps)
        for name in self.variants:
            self.cards[name].decode_ms = value = times.milliseconds(name, o.new_tokens)
            yield Row(f"{name}: one token of decoding", value, " ms")
        for name, _ in self._each():
            self.cards[name].decode_ratio = value = times.ratio(name, NONE)
            bound = 1.0 if self.weights >= LARGE else None
            yield Row(f"{name}: time of a token over no pruner", value, bound=bound, at_most=True)

    def _memory(self) -> Iterator[Row]:
        for name, v in self.variants.items():
            self.cards[name].peak_bytes = most = peak_bytes(v.after, self.device)
            yield Row(f"{name}: peak memory of the prefill beside the weights", Value.one(most / 1e6), " MB")

    def _encoder(self) -> Iterator[Row]:
        """What a pruner before the LLM takes beside the encoder: scores from inside it, and choosing."""
        for name, v in self._each():
            if v.inside and not v.model.requested:
                continue
            plain = partial(v.encode, frozenset())
            times = self._time({"encoder": plain, "scored": v.encode, "choose": v.choose}, each=3)
            pairs = zip(*(times.seconds(key) for key in ("scored", "choose", "encoder")), strict=True)
            self.cards[name].encoder_share = value = Value.of([100 * ((a + b) / c - 1) for a, b, c in pairs])
            extra = peak_bytes(v.encode, self.device) - peak_bytes(plain, self.device)
            note = f"{extra / 1e6:.2f} MB more at the encoder's peak" if v.model.requested else ""
            bound = 3.0 if name == "fastervlm" and self._judged(name) else None
            yield Row(f"{name}: scoring and choosing, share of the encoder's time", value, " %", bound, True, note)

    def _scoring(self) -> list[Row]:
        """AIM's walk beside the fused kernel, against eager attention, which has the matrix at hand."""
        if "aim" not in self.variants:
            return []
        tokens, dtype = self.options.scored_tokens, getattr(torch, self.options.dtype)
        judged = self.weights >= LARGE and tokens >= JUDGED_TOKENS
        return scoring_rows(self._time, self.base.sizes, tokens, self.device, dtype, judged)

    def _sizes(self) -> Iterator[Row]:
        """From how many image tokens on a pruner pays."""
        side, grid = math.isqrt(self.base.patches), self.base.features.grid
        if grid is None or grid[0] != grid[1]:
            return
        for small in sorted({s for s in (2, 4, 8, 12, 16) if s < side} | {side}):
            steps: dict[str, Callable[[], object]] = {}
            for name, v in self.variants.items():
                if v.patches != self.base.patches:
                    continue  # its encoder takes other images
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
                    yield Row(f"{name}: prefill against no pruner, {small * small} image tokens", value)

    def _products(self) -> list[Row]:
        """What a second thread gains in one product with a weight of the LLM, by the number of tokens."""
        if self.device.type != "cpu":
            return []
        rows, table = product_rows(self._time, self.base.sizes, self.options.thread_counts)
        self.further.append(table)
        return rows

    def _abilities(self) -> Iterator[Row]:
        o = self.options
        if not self.arms.trained or not o.limit:
            return
        for name in self.variants:
            shares = [None] if name == NONE or not share_option(name) else o.shares
            for share in shares:
                self.show(f"measuring: abilities, {name}" + (f" at {share}" if share else ""))
                point = self._point(name, share)
                self.cards[name].points.append(point)
                for kind, ability in point.abilities.items():
                    value = Value(ability.mean, ability.mean - ability.stderr, ability.mean + ability.stderr)
                    yield Row(
                        f"{name}{f' at {share}' if share else ''}: {kind}", value, " %", note="within a standard error"
                    )

    def _point(self, name: str, share: float | None) -> Point:
        o, draws, variant = self.options, {"model": Draws()}, None
        models = o.model.split(",")
        for draw in range(o.seeds):
            if variant is None or len(models) > 1 or (name != NONE and accepts(name, "seed")):
                self.arms.name = models[draw % len(models)]
                variant = self._variant(name, o.node(name, self.base.grid, share), draw)
            asked = variant.model, self.arms.processor, self.arms.config, o.limit, draw
            for of, found in scores(*asked, baselines=name == NONE).items():
                draws.setdefault(of, Draws()).add(found)
        assert variant is not None, "there is a draw"
        card = self._counts(variant)
        own, *others = ((of, found.abilities()) for of, found in draws.items())
        return Point(share, sum(card.layers) / len(card.layers), card.total_flops, own[1], dict(others))

    def _batches(self) -> Iterator[Row]:
        """Whether answers in a batch are those that each prompt gets alone."""
        o = self.options
        if not self.arms.trained:
            return
        for name, v in self.variants.items():
            self.show(f"measuring: batches, {name}")
            same, asked = batches_answer_alike(v.model, v.model.processor, self.arms.config, o.questions, o.together)
            self.cards[name].alike = share = 100 * same / asked
            what = f"{name}: answers in batches of {o.together} that are those of one by one"
            yield Row(what, Value.one(share), " %", bound=100.0, note=f"{same} of {asked}, {o.dtype}")


def own_time(name: str, times: Turns, scored: str, at: str, judged: bool = True) -> list[Row]:
    """What a pruner before the LLM takes by itself, beside what it saves: choosing, and scores inside the encoder.

    Args:
        name: of the pruner; `NAME alone` in the times is its choice.
        times: of variants that took turns.
        scored: name there of the encoder with what the pruner asks of it, if it asks for anything.
        at: with how many threads.
        judged: hold it to its bound.
    """
    if f"{name} alone" not in times:
        return []
    saved = statistics.median(a - b for a, b in zip(times.seconds(NONE), times.seconds(name), strict=True))
    if saved <= 0:
        return []
    choosing = times.seconds(f"{name} alone")
    scoring = [0.0] * len(choosing)
    if scored in times:
        scoring = [a - b for a, b in zip(times.seconds(scored), times.seconds("encoder"), strict=True)]
    own = Value.of([100 * (a + b) / saved for a, b in zip(choosing, scoring, strict=True)])
    ms = [1e3 * statistics.median(some) for some in (choosing, scoring)]
    note = f"{ms[0]:.3g} ms to choose and {ms[1]:.3g} in the encoder, of {1e3 * saved:.3g} ms saved"
    what = f"{name}: its own time, share of the prefill that it saves, {at}"
    bound = OWN_TIME.get(name, 3.0) if judged else None
    return [Row(what, own, " %", bound=bound, at_most=True, note=note)]
