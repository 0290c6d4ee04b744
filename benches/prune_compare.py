"""Two cards of pruners, of different days: what changed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.benches.abilities import Ability
from zoo.benches.measure import Value
from zoo.benches.prune_card import Summary
from zoo.benches.report import short
from zoo.benches.tables import Table, giga
from zoo.registry import ZooError


def read_card(path: str) -> dict[str, Any]:
    """Read a card that was saved with `json=`.

    Raises:
        ZooError: the file is no such card.
    """
    try:
        whole = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ZooError(f"against={path}: {error}") from error
    cards = whole.get("cards") if isinstance(whole, dict) else None
    if not isinstance(cards, dict) or not all(isinstance(c, dict) and "scoring_flops" in c for c in cards.values()):
        raise ZooError(f"against={path}: this is not a card of `zoo bench prune json=...`.")
    return dict(whole)


def compared(cards: Mapping[str, Summary], before: Mapping[str, Any]) -> Iterator[Table]:
    """Yield tables of what changed since an earlier card: ratios, which other machines leave alone, and answers."""
    old = before["cards"]
    title = f"against the card of {before.get('date', 'another day')}: {before['command'] or before['bench']}"
    costs = Table(title, ["pruner", "GFLOP", "share", "own %", "decode", "changed"])
    for name, card in cards.items():
        if name in old:
            cells = _costs(card, old[name])
            costs.add(name, *(text for text, _ in cells), "yes" if any(changed for _, changed in cells) else "")
        else:
            costs.add(name, "", "", "", "", "new")
    for name in old:
        if name not in cards:
            costs.add(name, "", "", "", "", "not measured")
    yield costs
    pairs = []
    for name, card in cards.items():
        earlier = {p["share"]: p["abilities"] for p in (old.get(name) or {}).get("points", ())}
        pairs += [(name, p, earlier[p.share]) for p in card.points if p.share in earlier]
    kinds = list(dict.fromkeys(kind for _, point, was in pairs for kind in point.abilities if kind in was))
    answers = Table("answers against before, in points; a star is more than two standard errors", ["pruner", "keep"])
    answers.head += kinds
    for name, point, was in pairs:
        changes = [_difference(point.abilities.get(kind), was.get(kind)) for kind in kinds]
        answers.add(name, "" if point.share is None else f"{point.share:g}", *changes)
    if pairs:
        yield answers


def _costs(card: Summary, was: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """FLOPs, share of the ratio, own time and decoding: what to show, and whether it changed."""
    now, then = card.flops + card.scoring_flops, was["flops"] + was["scoring_flops"]
    found = [(giga(now) if now == then else f"{giga(then)} > {giga(now)}", now != then)]
    threads = next(iter(card.prefill), None)
    prefill = card.prefill[threads] if threads is not None else None
    earlier = (was.get("prefill") or {}).get(str(threads)) or {}
    found.append(_moved(earlier.get("share"), prefill.share if prefill else None))
    found.append(_moved(earlier.get("own"), prefill.own if prefill else None))
    return [*found, _moved(was.get("decode_ratio"), card.decode_ratio)]


def _moved(old: Mapping[str, float] | None, new: Value | None) -> tuple[str, bool]:
    """Two measurements; they differ where their quartiles are apart."""
    if old is None or new is None:
        return "" if new is None else short(new.median), False
    return f"{short(old['median'])} > {short(new.median)}", new.low > old["high"] or new.high < old["low"]


def _difference(new: Ability | None, old: Mapping[str, Any] | None) -> str:
    if new is None or old is None:
        return ""
    change, error = new.mean - old["mean"], (new.stderr**2 + old["stderr"] ** 2) ** 0.5
    return f"{change:+.1f}{'*' if abs(change) > 2 * error else ''}"
