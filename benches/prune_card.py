"""The efficiency card: what one run found out about each pruner, as table, JSON, Markdown and picture, and in words."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zoo.benches.measure import Value
from zoo.benches.report import Report, short
from zoo.text.markup import in_cell, label

LARGEST_GAP = 1.0  # percent by which the closed form of FLOPs and torch's counter may differ


@dataclass
class Summary:
    """One pruner; what was not measured is None."""

    stages: dict[str, int]  # image tokens behind each part before the LLM
    layers: list[int]  # image tokens that each layer of the LLM sees
    flops: int  # of the prefill in closed form, without scoring
    scoring_flops: int
    cache_bytes: int  # counted; whether those held are as many is a row of the report
    counted_flops: int | None = None  # of the prefill, scoring included, by torch's counter
    prefill_ms: Value | None = None  # encoder output to logits
    decode_ms: Value | None = None  # of one token
    decode_ratio: Value | None = None  # its time over that without a pruner
    peak_bytes: int | None = None  # of the prefill, beside the weights
    speed_up: Value | None = None  # of the prefill against no pruner
    ideal: float | None = None  # the same by FLOPs
    by_size: dict[int, Value] = field(default_factory=dict)  # image tokens -> speed-up of the prefill
    task: str = ""

    @property
    def gap(self) -> float:
        """Between the closed form and the counter, in percent of the closed form; 0 where nothing was counted."""
        closed = self.flops + self.scoring_flops
        return 0.0 if self.counted_flops is None else 100 * abs(self.counted_flops / closed - 1)


@dataclass
class PruneReport(Report):
    """Rows of a bench, and a card for each pruner.

    Attributes:
        cards: by pruner; `null` is none.
        words: where a pruner pays and where it does not.
    """

    cards: dict[str, Summary] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    def print(self) -> None:
        super().print()
        for line in [*self._table(), "", *self.words]:
            print(line)

    def write_json(self, path: Path) -> None:
        super().write_json(path)
        whole = json.loads(path.read_text())
        whole |= {"cards": {name: asdict(card) for name, card in self.cards.items()}, "words": self.words}
        path.write_text(json.dumps(whole, indent=1) + "\n")

    def markdown(self) -> str:
        lines = [*self._table(), "", *(f"- {line}" for line in self.words)]
        return super().markdown() + "\n" + "\n".join(lines) + "\n"

    def write_png(self, path: Path) -> None:
        """Draw image tokens by layer, prefill and decode times, and the speed-up by number of image tokens."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(16, 4), layout="constrained")
        FigureCanvasAgg(figure)
        layers, prefill, decode, sizes = figure.subplots(1, 4)
        colour = {name: f"C{i}" for i, name in enumerate(self.cards)}
        for i, (name, card) in enumerate(self.cards.items()):
            style = ("-", "--", "-.", ":")[i % 4]  # pruners that keep as many lie on one another
            layers.step(range(len(card.layers)), card.layers, style, where="mid", label=label(name), color=colour[name])
            if card.by_size:
                at = sorted(card.by_size)
                sizes.plot(at, [card.by_size[n].median for n in at], f"o{style}", label=label(name), color=colour[name])
                low, high = ([getattr(card.by_size[n], side) for n in at] for side in ("low", "high"))
                sizes.fill_between(at, low, high, alpha=0.15, color=colour[name], linewidth=0)
        layers.set(xlabel="layer of the LLM", ylabel="image tokens it sees")
        layers.xaxis.get_major_locator().set_params(integer=True)
        layers.legend(framealpha=0.5)  # colours are the same in all four
        for axes, field_name, what in (
            (prefill, "prefill_ms", "prefill, encoder output to logits, ms"),
            (decode, "decode_ms", "one token of decoding, ms"),
        ):
            shown = {name: getattr(card, field_name) for name, card in self.cards.items() if getattr(card, field_name)}
            medians = [v.median for v in shown.values()]
            spread = [[v.median - v.low for v in shown.values()], [v.high - v.median for v in shown.values()]]
            axes.bar(
                [label(name) for name in shown], medians, yerr=spread, capsize=3, color=[colour[name] for name in shown]
            )
            axes.set(ylabel=what)
            axes.tick_params(axis="x", rotation=30)
        sizes.axhline(1, color="grey", linewidth=1)
        sizes.set(xlabel="image tokens of the encoder", ylabel="prefill speed-up against no pruner", xscale="log")
        if ticks := sorted({n for card in self.cards.values() for n in card.by_size}):
            sizes.set_xticks(ticks, [str(n) for n in ticks])
            sizes.minorticks_off()
        figure.savefig(path, dpi=120)

    def _table(self) -> list[str]:
        """One line for each pruner, in Markdown."""
        head = ["pruner", "image tokens", "into the LLM", "mean over layers", "GFLOP", "counted", "prefill ms"]
        head += ["decode ms", "peak MB", "cache MB", "task"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, card in self.cards.items():
            cells = [in_cell(name), str(card.stages["encoder"]), str(card.layers[0])]
            cells += [f"{sum(card.layers) / len(card.layers):.0f}", f"{(card.flops + card.scoring_flops) / 1e9:.2f}"]
            cells += ["" if card.counted_flops is None else f"{card.counted_flops / 1e9:.2f}"]
            cells += [_spread(card.prefill_ms), _spread(card.decode_ms)]
            cells += ["" if card.peak_bytes is None else short(card.peak_bytes / 1e6)]
            cells += [f"{card.cache_bytes / 1e6:.2f}", in_cell(card.task)]
            lines.append("| " + " | ".join(cells) + " |")
        return lines


def _spread(value: Value | None) -> str:
    return "" if value is None else f"{short(value.median)} ({short(value.low)} to {short(value.high)})"


def where_counts_differ(cards: Mapping[str, Summary]) -> list[str]:
    """Warn of pruners whose FLOPs in closed form are not those that torch counted.

    The counter takes an operation that it has no formula for (the kernel of a package, say) as free, and says nothing.
    """
    return [
        f"WARNING: {name}: FLOPs in closed form ({card.flops + card.scoring_flops:.4g}) and counted "
        f"({card.counted_flops:.4g}) are {short(card.gap)} % apart: the counter has no formula for an operation that "
        "ran, or the LLM computes what the closed form leaves out."
        for name, card in cards.items()
        if card.gap > LARGEST_GAP
    ]


def where_it_pays(cards: Mapping[str, Summary]) -> list[str]:
    """Say of each pruner from how many image tokens on the prefill is faster than without.

    Faster and slower mean that the quartiles lie on one side; what lies between is said to make no difference. Where a
    decoded token takes longer than without, that is said too.
    """
    found = []
    for name, card in cards.items():
        if not card.by_size:
            continue
        at = sorted(card.by_size)
        slower = [n for n in at if card.by_size[n].high < 1]
        faster = [n for n in at if card.by_size[n].low > 1]
        first = next((n for n in at if all(m in faster for m in at if m >= n)), None)
        largest = f"{short(card.by_size[at[-1]].median)}x at {at[-1]}"
        if len(at) == 1 and faster:
            text = f"{name} pays at the one number of image tokens measured ({largest})."
        elif first == at[0]:
            text = f"{name} pays at every number of image tokens measured, {at[0]} to {at[-1]} ({largest})."
        elif first is not None:
            text = f"{name} pays from {first} image tokens on ({largest})."
        else:
            text = f"{name} does not pay up to {at[-1]} image tokens ({largest})."
        if slower:
            text += f" It is slower than no pruner at {', '.join(map(str, slower))}."
        if even := [n for n in at if n not in slower and n not in faster]:
            text += f" It makes no difference at {', '.join(map(str, even))}."
        if card.decode_ratio is not None and card.decode_ratio.low > 1:
            text += f" A decoded token takes {short(card.decode_ratio.median)}x as long as without."
        found.append(text)
    return found
