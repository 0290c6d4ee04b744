"""The card of `zoo bench prune`: what one run found out about each pruner, as tables, JSON and Markdown."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from zoo.benches.abilities import Ability, mean_of
from zoo.benches.measure import Value
from zoo.benches.report import Report, Row, short
from zoo.benches.tables import Table, giga, wrapped
from zoo.text.markup import in_cell

LARGEST_GAP = 1.0  # percent by which the closed form of FLOPs and torch's counter may differ
NONE = "null"


@dataclass
class Prefill:
    """Of one pruner, with one number of threads, encoder output to logits."""

    ms: Value
    speed_up: Value | None = None  # against no pruner
    share: Value | None = None  # of the ratio by FLOPs
    own: Value | None = None  # what the method takes by itself, in per cent of what it saves


@dataclass
class Point:
    """What a model answers with a share of its image tokens."""

    share: float | None  # asked for; None: the pruner has no such option, or there is none
    tokens: float  # image tokens of a layer of the LLM, the mean over layers
    flops: int  # of encoder, prefill and scoring
    abilities: dict[str, Ability]
    # what does not look at the images: `majority`, the commonest training answer, `blind`, zero pixels; without pruner
    baselines: dict[str, dict[str, Ability]] = field(default_factory=dict)


@dataclass
class Summary:
    """One pruner; what was not measured is None."""

    stages: dict[str, int]  # image tokens behind each part before the LLM, as declared
    layers: list[int]  # image tokens that entered each layer of the LLM
    flops: int  # of the prefill in closed form, without scoring
    scoring_flops: int
    cache_bytes: int  # counted; whether those held are as many is a row of the report
    inside: bool = False  # drops tokens inside the LLM
    options: dict[str, Any] = field(default_factory=dict)
    counted_flops: int | None = None  # of the prefill, scoring included, by torch's counter
    encoder_flops: int | None = None  # in closed form, without scores; None: no form for its convolutions
    encoder_plain: int | None = None  # the same, by torch's counter
    encoder_counted: int | None = None  # with scores that the pruner asks for
    cache_held: int | None = None
    prefill: dict[int, Prefill] = field(default_factory=dict)  # by number of threads
    ideal: float | None = None  # speed-up of the prefill by FLOPs
    encoder_share: Value | None = None  # scoring and choosing, in per cent of the encoder's time
    decode_ms: Value | None = None  # of one token
    decode_ratio: Value | None = None  # its time over that without a pruner
    peak_bytes: int | None = None  # of the prefill, beside the weights
    by_size: dict[int, Value] = field(default_factory=dict)  # image tokens -> speed-up of the prefill
    points: list[Point] = field(default_factory=list)
    alike: float | None = None  # per cent of the answers in a batch that are those of one by one

    @property
    def gap(self) -> float:
        """Between the closed form and the counter, in percent of the closed form; 0 where nothing was counted."""
        return max((gap for _, gap, _, _ in self.gaps()), default=0.0)

    def gaps(self) -> Iterator[tuple[str, float, int, int]]:
        """Yield what was counted, the gap in per cent of the closed form, the closed form and the count."""
        closed = self.flops + self.scoring_flops
        if self.counted_flops is not None:
            yield "prefill", 100 * abs(self.counted_flops / closed - 1), closed, self.counted_flops
        if self.encoder_flops and self.encoder_plain is not None:
            off = 100 * abs(self.encoder_plain / self.encoder_flops - 1)
            yield "encoder", off, self.encoder_flops, self.encoder_plain

    @property
    def total_flops(self) -> int:
        """Of encoder, prefill and scoring."""
        return (self.encoder_counted or self.encoder_flops or 0) + self.flops + self.scoring_flops

    @property
    def tokens(self) -> float:
        """Image tokens of a layer, the mean over layers."""
        return sum(self.layers) / len(self.layers)


@dataclass
class PruneReport(Report):
    """Rows of a bench, and a card for each pruner.

    Attributes:
        cards: by pruner; `null` is none.
        left_out: pruner -> why it does not go with the model.
        words: where a pruner pays and where it does not, who wins where.
        further: tables of what is not a pruner's.
        before: an earlier report, as `read_card` gives it.
        date: of the run.
    """

    cards: dict[str, Summary] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    further: list[Table] = field(default_factory=list)
    before: dict[str, Any] | None = None
    date: str = field(default_factory=lambda: date.today().isoformat())

    def print(self) -> None:
        """Print the card within the columns of a screen; all rows are in the files."""
        for table in self.tables():
            print("\n".join(["", *wrapped([table.title]), *table.lines()]))
        print("\n".join(["", *wrapped(self.judged())]))
        if self.left_out:
            print("\n".join(["", *wrapped(f"{name} is left out: {why}" for name, why in self.left_out.items())]))
        lines = [*self.words, *self.setting, *(f"{k}: {v}" for k, v in self.machine.items())]
        print("\n".join(["", *wrapped(lines)]))

    def write_json(self, path: Path) -> None:
        super().write_json(path)
        whole = json.loads(path.read_text())
        cards = {name: asdict(card) | {"tokens": card.tokens} for name, card in self.cards.items()}
        whole |= {"date": self.date, "cards": cards, "left_out": self.left_out, "words": self.words}
        path.write_text(json.dumps(whole, indent=1) + "\n")

    def markdown(self) -> str:
        parts = [super().markdown()]
        parts += ["\n".join([table.title, "", *table.markdown()]) + "\n" for table in self.tables()]
        left = [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        lines = [*self.judged(), *left, *self.words]
        return "\n".join([*parts, *(f"- {in_cell(line)}" for line in lines)]) + "\n"

    def write_png(self, path: Path) -> None:
        from zoo.benches.prune_picture import draw

        draw(self.cards, path)

    def judged(self) -> list[str]:
        """Say how many bounds are reached, and which are missed by how much."""
        bound = [row for row in self.rows if row.reached is not None]
        missed = [row for row in bound if not row.reached]
        found = [f"bounds: {len(bound) - len(missed)} reached, {len(missed)} MISSED"]
        return found + [f"MISSED  {row.what}: {_distance(row)}" for row in missed]

    # ---- tables --------------------------------------------------------------------------------------------------

    def tables(self) -> Iterator[Table]:
        """Yield the tables of the card: costs, times, answers, and what changed since an earlier card."""
        from zoo.benches.prune_compare import compared

        yield self._costs()
        if any(card.prefill for card in self.cards.values()):
            yield self._times()
        yield from self._abilities()
        yield from self.further
        if self.before is not None:
            yield from compared(self.cards, self.before)

    def _costs(self) -> Table:
        table = Table("tokens, FLOPs, memory", ["pruner", "of encoder", "layer 1", "mean", "last", "GFLOP", "counted"])
        table.head += ["encoder", "with scores", "cache MB", "peak MB"]
        for name, card in self.cards.items():
            peak = "" if card.peak_bytes is None else short(card.peak_bytes / 1e6)
            table.add(
                name,
                str(card.stages["encoder"]),
                *(f"{n:.0f}" for n in (card.layers[0], card.tokens, card.layers[-1])),
                *(giga(n) for n in (card.flops + card.scoring_flops, card.counted_flops)),
                *(giga(n) for n in (card.encoder_flops or card.encoder_plain, card.encoder_counted)),
                f"{(card.cache_bytes if card.cache_held is None else card.cache_held) / 1e6:.2f}",
                peak,
            )
        return table

    def _times(self) -> Table:
        counts = list(self.cards[NONE].prefill)
        table = Table("prefill, encoder output to logits; a decoded token", ["pruner", "by FLOPs"])
        for threads in counts:
            at = f"{threads}T"
            table.head += [f"ms {at}", f"x {at}", f"share {at}", *[f"own % {at}"] * (threads == counts[0])]
        table.head += ["decode ms", "ratio"]
        for name, card in self.cards.items():
            cells = ["" if card.ideal is None else f"{card.ideal:.2f}"]
            for threads in counts:
                p = card.prefill[threads]
                own = [_median(p.own)] if threads == counts[0] else []
                cells += [_median(p.ms), _median(p.speed_up), _median(p.share), *own]
            table.add(name, *cells, _median(card.decode_ms), _median(card.decode_ratio))
        return table

    def _abilities(self) -> Iterator[Table]:
        kinds = list(dict.fromkeys(k for card in self.cards.values() for p in card.points for k in p.abilities))
        shares = sorted({p.share for card in self.cards.values() for p in card.points if p.share}, reverse=True)
        every: list[float | None] = [*shares]
        for share in every or ([None] if kinds else []):
            what = "answers in per cent, with standard errors" + (f"; keep {share:g}" if share else "")
            table = Table(what, ["pruner", "tokens", "GFLOP", "mean", *kinds])
            for name, card in self.cards.items():
                for p in card.points:
                    if p.share in (share, None):
                        cells = [_score(p.abilities.get(kind)) for kind in kinds]
                        table.add(name, f"{p.tokens:.0f}", giga(p.flops), _score(mean_of(p.abilities)), *cells)
                        for of, own in p.baselines.items():
                            table.add(of, "", "", _score(mean_of(own)), *(_score(own.get(kind)) for kind in kinds))
            yield table


def _distance(row: Row) -> str:
    """How far a value is from its bound: in the value's own unit, and in per cent of the bound."""
    assert row.bound is not None, "it is judged"
    off = abs(row.value.median - row.bound)
    relative = f", {short(100 * off / row.bound)} % off" if row.bound else ""
    bound = f"bound {'<= ' if row.at_most else ''}{short(row.bound)}{row.unit}"
    return f"{short(row.value.median)}{row.unit}, {bound}{relative}"


def _median(value: Value | None) -> str:
    return "" if value is None else short(value.median)


def _score(ability: Ability | None) -> str:
    return "" if ability is None else f"{ability.mean:.1f} ± {ability.stderr:.1f}"
