"""A picture of the claims about pruners: accuracy over tokens kept, and over what the LLM computes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from zoo.claims.reader import DENSE

PRUNERS = ("fastervlm", "random", "visionzip", "divprune", "fastv", "aim merged to")


def curves(tokens: int, kept: Sequence[int], title: str) -> Callable[[Mapping[str, list[float]], Path], None]:
    """Return what draws all pruners: lines are means of the seeds, bands their range, dotted lines dense positions.

    Args:
        tokens: of a picture, whole.
        kept: of them, in the arms.
        title: what was looked at.
    """
    return partial(_draw, tokens, kept, title)


def _draw(tokens: int, kept: Sequence[int], title: str, found: Mapping[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def ends(name: str) -> tuple[float, float, float]:
        numbers = found[name]
        return sum(numbers) / len(numbers), min(numbers), max(numbers)

    whole = f"all {tokens}"
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4), sharey=True, layout="constrained")
    for pruner in PRUNERS:
        names = [whole, *(f"{pruner} {k}" for k in kept)]
        mean, low, high = zip(*map(ends, names), strict=True)
        costs = [found[f"{n}, MFLOPs"][0] for n in names]
        for axis, x in ((left, [float(n) for n in (tokens, *kept)]), (right, costs)):
            (line,) = axis.plot(x, mean, marker="o", markersize=3, label=pruner.removesuffix(" to"))
            axis.fill_between(x, low, high, alpha=0.15)
            dense = [mean[0], *(ends(f"{n}, {DENSE}")[0] for n in names[1:])]
            axis.plot(x, dense, linestyle=":", linewidth=1, color=line.get_color())
    for name in (n for n in found if n.startswith("pool") and "MFLOPs" not in n and DENSE not in n):
        for axis, at in ((left, float(name.split()[1])), (right, found[f"{name}, MFLOPs"][0])):
            axis.plot([at], [ends(name)[0]], marker="s", color="grey", linestyle="", label="pool")
    inside = [n for n in found if n.startswith("aim") and "none from" in n and "MFLOPs" not in n and DENSE not in n]
    costs = [found[f"{n}, MFLOPs"][0] for n in inside]
    right.scatter(costs, [ends(n)[0] for n in inside], marker="x", color="black", label="aim, none in the last layers")
    entered = [float(n.split()[3].strip(",")) if "merged" in n else float(tokens) for n in inside]
    left.scatter(entered, [ends(n)[0] for n in inside], marker="x", color="black")
    left.set(xlabel=f"image tokens kept of {tokens} (aim: that enter the LLM)", ylabel="accuracy", xscale="log")
    left.set_xticks([tokens, *kept], [str(k) for k in (tokens, *kept)])
    right.set(xlabel="MFLOPs of the LLM", xscale="log")
    most, least = found[f"{whole}, MFLOPs"][0], min(costs)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if least / 3 <= t <= most * 1.2]
    right.set_xticks(ticks, [str(x) for x in ticks])
    left.minorticks_off()
    right.minorticks_off()
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, linewidth=0.5)
    figure.suptitle(f"{title}, {len(found[whole])} seeds; dotted: dense positions", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
