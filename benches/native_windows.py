"""The encoders of Qwen-VL against transformers' own, which attends to one segment after the other."""

from collections.abc import Callable
from typing import Any

import torch

from zoo.benches.measure import Clock, Turns
from zoo.benches.report import Row
from zoo.registry import ZooError
from zoo.vision.encoders.qwen import MERGE, QwenVision, QwenVisionConfig

HEAD = 80  # numbers of a head
# Grids in tokens; a window has 4 x 4. The last three are not asked for by a bound of their own, and share it.
IMAGES = {
    "1 window": [(4, 4)],
    "4 windows": [(8, 8)],
    "16 windows": [(16, 16)],
    "16 images of a window": [(4, 4)] * 16,
    "windows cut at two sides": [(15, 17)],
    "four unlike images": [(9, 5), (5, 9), (16, 2), (6, 6)],
}
BOUND = 1.0
PATCHES = 2048  # that a turn encodes at least


def allowed(width: int) -> None:
    """Refuse widths that are not of whole heads.

    Raises:
        ZooError: it is one.
    """
    if width < HEAD or width % HEAD:
        raise ZooError(f"width must be a multiple of {HEAD}, got {width}.")


def run(options: Any, clock: Clock, show: Callable[[str], None]) -> tuple[str, list[Row]]:
    """Time encoders of the families on images of several numbers of windows, ours and theirs in turns."""
    rows = []
    for family in options.families.split(","):
        sizes: dict[str, Any] = {"width": options.width, "heads": options.width // HEAD, "depth": options.depth}
        torch.manual_seed(0)
        ours = QwenVision(QwenVisionConfig(model_type=family, mlp_ratio=3.0, max_pixels=10**6, **sizes)).eval()
        for name, grids in IMAGES.items():
            show(f"measuring: {family}, {name}")
            rows += _rows(f"{family}, {name}", ours, grids, clock, options.rounds)
    return f"encoders {options.depth} x {options.width}, sdpa", rows


def _rows(name: str, ours: QwenVision, grids: list[tuple[int, int]], clock: Clock, rounds: int) -> list[Row]:
    """Time the encoder, and the tower of transformers inside it with its own way of attention.

    It is one tower: where a copy of its weights lies in memory changes products by more than attention does.
    """
    unit, width = ours.patch_shape
    pixels = torch.randn(sum(h * w for h, w in grids) * unit, width, generator=torch.Generator().manual_seed(0))
    shapes = torch.tensor([(1, h * MERGE, w * MERGE) for h, w in grids])
    kernel = ours.tower.config._attn_implementation

    @torch.no_grad()
    def mine() -> Any:
        ours.tower.config._attn_implementation_internal = kernel
        return ours(pixels, grids=grids)

    @torch.no_grad()
    def theirs() -> Any:
        ours.tower.config._attn_implementation_internal = "sdpa"
        return ours.tower(pixels, grid_thw=shapes).pooler_output

    tokens = torch.cat(mine().in_order(lambda group: group.tokens))
    off = float((tokens - theirs()).abs().max())
    note = f"largest difference of tokens {off:.0e}" if off else "tokens are equal to the bit"
    times = _there_and_back({"ours": mine, "theirs": theirs}, clock, rounds, max(1, PATCHES // len(pixels)))
    return [
        Row(f"{name}: transformers' encoder", times.milliseconds("theirs"), unit=" ms"),
        Row(f"{name}: time over transformers'", times.ratio("ours", "theirs"), bound=BOUND, at_most=True, note=note),
    ]


def _there_and_back(variants: dict[str, Callable[[], Any]], clock: Clock, rounds: int, steps: int) -> Turns:
    """Time variants step by step, in both orders in turn: differences of a percent are less than what time brings."""
    times = Turns(clock, variants)
    for turn in range(rounds + 1):
        taken = dict.fromkeys(variants, (0.0, 0.0))
        for name in (*variants, *reversed(variants)) * steps:
            before = clock.read()
            variants[name]()
            after = clock.read()
            taken[name] = (taken[name][0] + after[0] - before[0], taken[name][1] + after[1] - before[1])
        for name, (cpu, wall) in taken.items() if turn else ():  # the first round is not counted
            times[name].cpu.append(cpu / steps / 2)
            times[name].wall.append(wall / steps / 2)
    return times
