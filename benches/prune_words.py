"""What a card of pruners says in words: where counts differ, where a pruner pays, who wins where."""

from collections.abc import Mapping, Sequence

from zoo.benches.abilities import Ability
from zoo.benches.prune_card import LARGEST_GAP, NONE, Point, Summary
from zoo.benches.report import short


def where_counts_differ(cards: Mapping[str, Summary]) -> list[str]:
    """Warn of pruners whose FLOPs in closed form are not those that torch counted.

    The counter takes an operation that it has no formula for (the kernel of a package, say) as free, and says nothing.
    """
    return [
        f"WARNING: {name}: FLOPs of the {what} in closed form ({closed:.4g}) and counted ({counted:.4g}) are "
        f"{short(gap)} % apart: the counter has no formula for an operation that ran, or the model computes what the "
        "closed form leaves out."
        for name, card in cards.items()
        for what, gap, closed, counted in card.gaps()
        if gap > LARGEST_GAP
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


def who_wins(cards: Mapping[str, Summary], controls: Sequence[str]) -> list[str]:
    """Say for each share of tokens which pruners answer best, ability by ability, and which lose to a control.

    Best are all within two standard errors of the highest score; to lose is to be two standard errors below.
    """
    shares = sorted({p.share for card in cards.values() for p in card.points if p.share}, reverse=True)
    found = []
    for share in shares:
        points = {n: p for n, card in cards.items() for p in card.points if n != NONE and p.share == share}
        kinds = dict.fromkeys(kind for p in points.values() for kind in p.abilities)
        alike = []
        for kind in kinds:
            scored = {name: p.abilities[kind] for name, p in points.items() if kind in p.abilities}
            top = max(scored, key=lambda name: scored[name].mean)
            best = [name for name in scored if not _below(scored[name], scored[top])]
            if len(best) == len(scored):
                alike.append(kind)
                continue
            shown = ", ".join(f"{name} {scored[name].mean:.1f}" for name in sorted(best, key=lambda n: -scored[n].mean))
            found.append(f"keep {share:g}, {kind}: best are {shown}.")
        if alike:
            found.append(f"keep {share:g}: no pruner is better than another in {', '.join(alike)}.")
        found += [line for name in points if (line := _loses(name, points, controls, share))]
    return found


def _loses(name: str, points: Mapping[str, Point], controls: Sequence[str], share: float) -> str:
    """Say in what a pruner answers worse than a control does."""
    lines = []
    for control in controls:
        if control == name or control not in points or name in controls:
            continue
        own, other = points[name].abilities, points[control].abilities
        worse = [k for k in own if k in other and _below(own[k], other[k])]
        if worse:
            lines.append(f"{control} in " + ", ".join(f"{k} ({own[k].mean:.1f}, {other[k].mean:.1f})" for k in worse))
    return f"keep {share:g}: {name} loses to {'; to '.join(lines)}." if lines else ""


def _below(a: Ability, b: Ability) -> bool:
    return a.mean < b.mean - 2 * (a.stderr**2 + b.stderr**2) ** 0.5
