"""What a second thread gains in products with weights of a decoder, by the number of tokens that are multiplied.

A prefill is mostly such products: (tokens, width) by (width, feed-forward) and back. A pruned prompt has fewer rows,
and each product has a part that does not shrink with them: the weight is read and packed into tiles.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo.benches.costs import DecoderSizes
from zoo.benches.measure import Turns, Value
from zoo.benches.report import Row, short
from zoo.benches.tables import Table

TOKENS = (1, 16, 64, 128, 256, 640)
HALVES = ("by rows", "by columns")
LEAST, MOST = 2e9, 300  # operations of a turn, so that it takes long enough to be timed; and its products


def product_rows(time: Callable[..., Turns], sizes: DecoderSizes, threads: Sequence[int]) -> tuple[list[Row], Table]:
    """Time products of both shapes of the feed-forward layer, one behind the other.

    With each number of threads; and with the first number both halves of a product, by its rows and by its columns,
    which is what each of two threads would do alone. Two threads that gain less than halves promise wait for each
    other or for memory, or for a core that another process has.

    Args:
        time: `time(steps, threads=n)` times steps in turns.
        sizes: of the decoder.
        threads: numbers of threads, the first to compare with.
    """
    wide, half = sizes.intermediate, sizes.intermediate // 2
    up, down = torch.randn(sizes.width, wide), torch.randn(wide, sizes.width)
    narrow = up[:, :half].contiguous(), down[:, : sizes.width // 2].contiguous()
    steps: dict[str, Callable[[], object]] = {}
    flops = {n: 4.0 * n * sizes.width * wide for n in TOKENS}
    repeat = {n: min(MOST, max(1, round(LEAST / flops[n]))) for n in TOKENS}
    for n in TOKENS:
        x, hidden = torch.randn(n, sizes.width), torch.randn(n, wide)
        steps[f"{n}"] = _repeated(repeat[n], (x, up), (hidden, down))
        steps[f"{n} by columns"] = _repeated(repeat[n], (x, narrow[0]), (hidden, narrow[1]))
        if n > 1:
            steps[f"{n} by rows"] = _repeated(repeat[n], (x[: n // 2], up), (hidden[: n // 2], down))
    whole = {name: step for name, step in steps.items() if " " not in name}
    every = {count: time(steps if count == threads[0] else whole, threads=count) for count in threads}
    table = Table("products with a weight of the LLM", ["tokens"])
    table.head += [f"GFLOP/s {count}T" for count in threads] + [f"gain {count}T" for count in threads[1:]]
    table.head += [f"halves {by}" for by in HALVES]
    rows: list[Row] = []
    first = every[threads[0]]
    for n in TOKENS:
        what = f"product of {n} tokens by {sizes.width} x {wide} and back"
        rates = [Value.of([flops[n] * repeat[n] / 1e9 / t for t in every[c].seconds(f"{n}")]) for c in threads]
        gains = [rate.median / rates[0].median for rate in rates[1:]]
        halves = [first.ratio(f"{n}", f"{n} {by}") if f"{n} {by}" in first else None for by in HALVES]
        for count, rate in zip(threads, rates, strict=True):
            rows.append(Row(f"{what}, {count} thread{'s' * (count > 1)}", rate, " GFLOP/s"))
        for by, ratio in zip(HALVES, halves, strict=True):
            if ratio is not None:
                rows.append(Row(f"{what}, over half of it {by}", ratio))
        cells = [short(value.median) for value in rates] + [f"{gain:.2f}" for gain in gains]
        table.add(str(n), *cells, *("" if ratio is None else f"{ratio.median:.2f}" for ratio in halves))
    return rows, table


def _repeated(count: int, *pairs: tuple[Tensor, Tensor]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(count):
            for a, b in pairs:
                torch.mm(a, b)

    return run
