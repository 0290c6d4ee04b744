"""Claim: a small model learns more from a large one's distributions than from the same answers once more (2410.16236).

The recipe `llava_kd_tiny` and parts of it, on drawn scenes, each from random weights: the stages one by one, the terms
one by one, and the control that the published table lacks, a second supervised pass of the same length. Equal compute
is a control with as many more steps as the teacher's forward pass costs, measured in the run itself.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.benches.measure import Value
from zoo.benches.report import Row

PLAIN_PT = ["stages.dpt.distiller=null", "stages.dpt.teacher=''"]
PLAIN_FT = ["stages.dft.distiller=null", "stages.dft.teacher=''"]
TEST = 200  # scenes
ARMS: dict[str, list[str]] = {
    "PT-SFT": [*PLAIN_PT, "~stages.dft"],
    "PT-SFT-SFT": [*PLAIN_PT, *PLAIN_FT],
    "PT-SFT-DFT": PLAIN_PT,
    "DPT-SFT-SFT": PLAIN_FT,
    "DPT-SFT-DFT": [],
    "PT-SFT-DFT, response": [
        *PLAIN_PT,
        "stages.dft.distiller.visual_weight=0",
        "stages.dft.distiller.relation_weight=0",
    ],
    "PT-SFT-DFT, response and visual": [*PLAIN_PT, "stages.dft.distiller.relation_weight=0"],
}
EQUAL_COMPUTE = "PT-SFT-SFT, equal compute"
SETTING = [
    "recipe llava_kd_tiny: a student of 0.28 M parameters, teacher scenes_tiny (1.6 M); 600 steps of the encoder "
    "alone, then 300 + 300 + 450 of 20 pictures",
    f"accuracy over the questions of {TEST} unseen scenes, boxes with an IoU of at least 0.5 counted as right",
]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train every arm with one seed; accuracy of each, and seconds of its stages."""
    found: dict[str, float] = {}
    for name, words in ARMS.items():
        accuracy, seconds = _arm(seed, share, words)
        found |= {name: accuracy, f"{name}, seconds": seconds}
        show(f"  {name}: {accuracy:.3f} in {seconds:.0f} s")
    longer = found["PT-SFT-DFT, seconds"] - found["PT-SFT-SFT, seconds"]
    last = found["PT-SFT-SFT, seconds"] - found["PT-SFT, seconds"]
    factor = 1 + max(0.0, longer) / max(last, 1e-9)
    accuracy, seconds = _arm(seed, share, [*PLAIN_PT, *PLAIN_FT], {"dft": factor})
    show(f"  {EQUAL_COMPUTE}: {accuracy:.3f} in {seconds:.0f} s, {factor:.2f} times the steps of the last stage")
    return found | {EQUAL_COMPUTE: accuracy, f"{EQUAL_COMPUTE}, seconds": seconds}


def judge(found: dict[str, list[float]]) -> list[Row]:
    """What distillation gains in every seed, over equal steps and over equal compute, and what each part adds."""

    def least(what: str, above: str, below: str, bound: float | None = 0.0) -> Row:
        gaps = [a - b for a, b in zip(found[above], found[below], strict=True)]
        value = Value(min(gaps), min(gaps), max(gaps))
        return Row(f"llava_kd: {what}, least of the seeds", value, "", bound=bound)

    full = "DPT-SFT-DFT"
    return [
        least("distilled fine-tuning over a second supervised pass", "PT-SFT-DFT", "PT-SFT-SFT"),
        least("the same at equal compute", "PT-SFT-DFT", EQUAL_COMPUTE),
        least("all three stages over a second supervised pass", full, "PT-SFT-SFT"),
        least("distilled pre-training over plain", full, "PT-SFT-DFT"),
        least("image tokens beside answers", "PT-SFT-DFT, response and visual", "PT-SFT-DFT, response"),
        least("relations beside both", "PT-SFT-DFT", "PT-SFT-DFT, response and visual"),
    ]


def _arm(seed: int, share: float, words: list[str], longer: dict[str, float] | None = None) -> tuple[float, float]:
    """Train one arm; returns its accuracy and the seconds of its stages."""
    from zoo.config import compose
    from zoo.evaluate import evaluate
    from zoo.progress import Display
    from zoo.train import Run

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        cfg: Any = compose(
            "train", ["recipe=llava_kd_tiny", f"seed={seed}", "device=cpu", f"run.folder={folder}", *words]
        )
        for name, stage in cfg.stages.items():
            stage.steps = max(1, round(stage.steps * share * (longer or {}).get(str(name), 1.0)))
        run = Run(cfg, Display(silent=True))
        began = time.monotonic()
        run.train()
        seconds = time.monotonic() - began
        result = evaluate(
            run.model,
            run.processor,
            {"scenes": run.data.evaluation["scenes"]},
            limit=max(2, round(TEST * share)),
            baselines=False,
        )
    right = [x.score for x in result.lines if x.metric in ("accuracy", "accuracy_50")]
    count = sum(s.n for s in right)
    return sum(s.value * s.n for s in right) / count, seconds
