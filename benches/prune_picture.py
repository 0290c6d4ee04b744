"""The picture of a card of pruners: what each costs, and what models answer over tokens kept and over FLOPs."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from zoo.benches.abilities import Ability, mean_of
from zoo.benches.measure import Value
from zoo.benches.prune_card import NONE, Point, Summary
from zoo.text.markup import label

CONTROLS = {"random": "--", "pool": ":", "downsample": "-."}  # black lines, which a method has to beat
ACROSS = 4  # panels of a row
GREY = "0.55"


def draw(cards: Mapping[str, Summary], path: Path) -> None:
    """Draw what was measured: a row of costs, a row of retention curves, and a panel for each ability."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(k for card in cards.values() for p in card.points for k in p.abilities))
    costs = any(card.prefill or card.by_size or card.decode_ratio for card in cards.values())
    rows = -(-len(kinds) // ACROSS)
    tall = max(3.6, 1.4 + 0.27 * len(cards))
    heights = [tall] * costs + [4.8, 2.5 * rows] * bool(kinds) or [tall]
    figure = Figure(figsize=(16, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    looks = styles(cards)
    if costs or not kinds:
        _costs(parts.pop(0), cards, looks)
    if kinds:
        _retention(parts.pop(0), cards, looks)
        _abilities(parts.pop(0), cards, looks, kinds, rows)
    figure.savefig(path, dpi=110)


def styles(names: Any) -> dict[str, dict[str, Any]]:
    """Choose how the line of each pruner looks: controls are black, the others have a colour and a mark each."""
    from matplotlib import colormaps

    colours = [c for i, c in enumerate(colormaps["tab10"].colors) if i != 7]  # type: ignore[attr-defined]  # no grey
    marks = "osD^v<>pP"
    found: dict[str, dict[str, Any]] = {NONE: {"color": GREY, "linestyle": "-", "marker": "o"}}
    for name in names:
        if name in CONTROLS:
            found[name] = {"color": "black", "linestyle": CONTROLS[name], "marker": "x"}
        elif name != NONE:
            i = sum(style["color"] not in ("black", GREY) for style in found.values())
            found[name] = {"color": colours[i % 9], "linestyle": ("-", "--")[i // 9 % 2], "marker": marks[i % 9]}
    return found


# ---- costs -----------------------------------------------------------------------------------------------------------


def _costs(figure: Any, cards: Mapping[str, Summary], looks: Mapping[str, dict[str, Any]]) -> None:
    sizes = any(card.by_size for card in cards.values())
    axes = list(figure.subplots(1, 4 + sizes))
    _layers(axes[0], cards, looks)
    counts = list(cards[NONE].prefill)
    _bars(
        axes[1],
        cards,
        [(f"{n} thread{'s' * (n > 1)}", partial(_speed_up, n)) for n in counts],
        "prefill, times as fast as without",
    )
    for at, name in enumerate(_shown(cards)):
        if (ideal := cards[name].ideal) is not None:
            axes[1].plot([ideal, ideal], [at - 0.42, at + 0.42], color="black", linewidth=1.5)
    axes[1].plot([], [], color="black", linewidth=1.5, label="by FLOPs")
    axes[1].legend(fontsize=7, framealpha=0.6)
    first = counts[0] if counts else 1
    _bars(
        axes[2],
        cards,
        [("", lambda c: c.prefill[first].own if first in c.prefill else None)],
        "own time, % of the prefill saved (line: 3)",
        mark=3.0,
    )
    _bars(axes[3], cards, [("", lambda c: c.decode_ratio)], "time of a decoded token, over no pruner", mark=1.0)
    if sizes:
        _by_size(axes[4], cards, looks)


def _speed_up(threads: int, card: Summary) -> Value | None:
    return card.prefill[threads].speed_up if threads in card.prefill else None


def _shown(cards: Mapping[str, Summary]) -> list[str]:
    return [name for name in cards if name != NONE]


def _bars(
    axes: Any,
    cards: Mapping[str, Summary],
    series: list[tuple[str, Callable[[Summary], Value | None]]],
    what: str,
    mark: float | None = None,
) -> None:
    """Horizontal bars, a pruner a row, with quartiles."""
    names, thick = _shown(cards), 0.8 / max(1, len(series))
    for k, (called, of) in enumerate(series):
        found = {at: v for at, name in enumerate(names) if (v := of(cards[name])) is not None}
        places = [at + (k - (len(series) - 1) / 2) * thick for at in found]
        spread = [[v.median - v.low for v in found.values()], [v.high - v.median for v in found.values()]]
        medians = [v.median for v in found.values()]
        axes.barh(
            places, medians, thick * 0.9, xerr=spread, color=f"C{k}", error_kw={"linewidth": 0.8}, label=called or None
        )
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(names)), [label(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(what, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _layers(axes: Any, cards: Mapping[str, Summary], looks: Mapping[str, dict[str, Any]]) -> None:
    same: dict[tuple[float, ...], list[str]] = {}
    for name, card in cards.items():
        same.setdefault(tuple(card.layers), []).append(name)
    for layers, names in same.items():  # one line for all that keep as many
        look = {k: v for k, v in looks[names[0]].items() if k != "marker"}
        more = f" and {len(names) - 1} more" if len(names) > 2 else f", {label(names[1])}" if len(names) > 1 else ""
        called = "no pruner" if names == [NONE] else f"{label(names[0])}{more}"
        axes.step(range(1, len(layers) + 1), layers, where="mid", label=called, **look)
    axes.set_xlabel("layer of the LLM", fontsize=9)
    axes.set_ylabel("image tokens that enter it", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7, framealpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _by_size(axes: Any, cards: Mapping[str, Summary], looks: Mapping[str, dict[str, Any]]) -> None:
    for name, card in cards.items():
        at = sorted(card.by_size)
        if at:
            axes.plot(
                at, [card.by_size[n].median for n in at], label=label(name), markersize=3, linewidth=1, **looks[name]
            )
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("image tokens of the encoder", fontsize=9)
    axes.set_ylabel("prefill, times as fast as without", fontsize=9)
    if ticks := sorted({n for card in cards.values() for n in card.by_size}):
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
        axes.minorticks_off()
    axes.legend(fontsize=6, framealpha=0.6, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


# ---- answers ---------------------------------------------------------------------------------------------------------


def curve(
    axes: Any, at: list[float], scored: list[Ability], style: Mapping[str, Any], called: str | None = None
) -> None:
    """Draw a line with standard errors; of one point, the point."""
    order = sorted(range(len(at)), key=lambda i: at[i])
    x, y = [at[i] for i in order], [scored[i].mean for i in order]
    axes.plot(x, y, label=called, markersize=4, linewidth=1.2, **style)
    errors = [scored[i].stderr for i in order]
    axes.errorbar(x, y, yerr=errors, color=style["color"], linestyle="", capsize=2, linewidth=0.8, alpha=0.5)


def _curves(
    axes: Any,
    cards: Mapping[str, Summary],
    looks: Mapping[str, dict[str, Any]],
    x: Callable[[Point], float],
    y: Callable[[Point], Ability | None],
) -> None:
    whole = cards[NONE].points[0]
    every = [x(p) for card in cards.values() for p in card.points]
    wide, gap = max(every) > 2.5 * min(every), 0.005 * (max(every) - min(every))
    for i, (name, card) in enumerate(cards.items()):
        # Without a pruner is where all curves begin, but those with a schedule, which have one point.
        start = [whole] if name != NONE and any(p.share for p in card.points) else []
        found = [(p, score) for p in [*start, *card.points] if (score := y(p)) is not None]
        step = i - len(cards) / 2  # a little aside, so that errors at one place do not cover each other
        if found:
            aside = (lambda n, step=step: n * 1.012**step) if wide else (lambda n, step=step: n + step * gap)
            at = [x(p) if p is whole else aside(x(p)) for p, _ in found]
            curve(axes, at, [score for _, score in found], looks[name], "no pruner" if name == NONE else label(name))
    if (score := y(whole)) is not None:
        axes.axhline(score.mean, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xscale("log" if wide else "linear")
    low, high = axes.get_ylim()
    if high - low < 4:  # all alike
        axes.set_ylim(low - 4, high + 4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.5)


def _ticks(axes: Any, values: list[float], shown: Callable[[float], str]) -> None:
    """Label a logarithmic axis at the values themselves, where they are apart."""
    if axes.get_xscale() != "log":
        return
    kept: list[float] = []
    for value in sorted(values, reverse=True):
        if not kept or kept[-1] / max(value, 1e-9) > 1.25:
            kept.append(value)
    axes.set_xticks(kept, [shown(value) for value in kept])
    axes.minorticks_off()


def _retention(figure: Any, cards: Mapping[str, Summary], looks: Mapping[str, dict[str, Any]]) -> None:
    figure.suptitle("the mean over abilities, which are below", fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    _curves(left, cards, looks, lambda p: max(p.tokens, 0.5), lambda p: mean_of(p.abilities))
    _curves(right, cards, looks, lambda p: p.flops / 1e9, lambda p: mean_of(p.abilities))
    _ticks(left, [max(p.tokens, 0.5) for card in cards.values() for p in card.points], lambda n: f"{n:.0f}")
    _ticks(right, [p.flops / 1e9 for card in cards.values() for p in card.points], lambda n: f"{n:.3g}")
    left.set_xlabel("image tokens of a layer of the LLM, the mean over layers")
    right.set_xlabel("GFLOP of encoder, prefill and scoring")
    left.set_ylabel("answers, per cent")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)


def _ability(kind: str, point: Point) -> Ability | None:
    return point.abilities.get(kind)


def _abilities(
    figure: Any, cards: Mapping[str, Summary], looks: Mapping[str, dict[str, Any]], kinds: list[str], rows: int
) -> None:
    panels = figure.subplots(rows, ACROSS, squeeze=False, sharex=True).flatten()
    for axes, kind in zip(panels, kinds, strict=False):
        _curves(axes, cards, looks, lambda p: max(p.tokens, 0.5), partial(_ability, kind))
        _ticks(axes, [max(p.tokens, 0.5) for card in cards.values() for p in card.points], lambda n: f"{n:.0f}")
        axes.set_title(label(kind), fontsize=9)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    figure.supxlabel("image tokens of a layer of the LLM", fontsize=9)
