"""What a second thread gains in a product with a weight of a decoder, by the number of tokens that are multiplied.

A prefill is mostly such products: (tokens, width) by (width, feed-forward). A pruned prompt has fewer rows, and BLAS
divides a product among threads by tiles: few rows are few tiles, and the whole weight is read either way.
"""

from collections.abc import Callable, Sequence

import torch

from zoo.benches.costs import DecoderSizes
from zoo.benches.measure import Turns, Value
from zoo.benches.report import Row

TOKENS = (1, 16, 64, 128, 256, 640)
LEAST, MOST = 2e9, 300  # operations of a turn, so that it takes long enough to be timed; and its products


def product_rows(time: Callable[..., Turns], sizes: DecoderSizes, threads: Sequence[int]) -> list[Row]:
    """Time products of both shapes of the feed-forward layer, one behind the other, with each number of threads.

    Args:
        time: `time(steps, threads=n)` times steps in turns.
        sizes: of the decoder.
        threads: numbers of threads, the first to compare with.
    """
    wide = sizes.intermediate
    up, down = torch.randn(sizes.width, wide), torch.randn(wide, sizes.width)
    inputs = {n: torch.randn(n, sizes.width) for n in TOKENS}
    flops = {n: 4.0 * n * sizes.width * wide for n in TOKENS}
    repeat = {n: min(MOST, max(1, round(LEAST / flops[n]))) for n in TOKENS}

    def step(n: int) -> Callable[[], object]:
        def run() -> None:
            for _ in range(repeat[n]):
                torch.mm(torch.mm(inputs[n], up), down)

        return run

    rows, rates = [], {}
    for count in threads:
        times = time({str(n): step(n) for n in TOKENS}, threads=count)
        for n in TOKENS:
            rates[count, n] = Value.of([flops[n] * repeat[n] / 1e9 / t for t in times.seconds(str(n))])
    for n in TOKENS:
        for count in threads:
            gain = rates[count, n].median / rates[threads[0], n].median
            note = "" if count == threads[0] else f"{gain:.2f}x of {threads[0]}"
            what = f"product of {n} tokens by {sizes.width} x {wide} and back, {count} thread{'s' * (count > 1)}"
            rows.append(Row(what, rates[count, n], " GFLOP/s", note=note))
    return rows
