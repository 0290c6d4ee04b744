"""The comparison of `mole` where words are known: SmolLM2-135M learns four domains of pictures at once.

A projector learns on all domains and is frozen with everything else. Then one low-rank update, or routed ones, learn to
name clothes, count blood cells, answer clinicians' questions and name emoji, each a quarter of a batch. Controls: an
update with as many weights at work for twice the steps, and one with as many weights in all.
"""

from typing import Any

from zoo.claims.experiment import Bound, Experiment, Run, gap
from zoo.claims.smollm import CONVOLUTIONS, LLM, loaded, scores, trained

DOMAINS = ("fashion_mnist", "bccd", "vqa_rad", "emoji")
DATA = (
    f"data=[{','.join(DOMAINS)}]",
    "data.fashion_mnist.yes_no=0",
    "data.bccd.per_image=1",
    "data.vqa_rad.group_by_image=false",
    "data.emoji.per_image=1",
)
PROJECTOR_STEPS, STEPS, TEST, RANK, EXPERTS = 60, 75, 90, 4, 3
FEED_FORWARD = "adapter.lora.targets=[gate_proj,up_proj,down_proj]"


def _lora(rank: int) -> list[str]:
    return ["adapter=[lora]", f"adapter.lora.rank={rank}", f"adapter.lora.alpha={2 * rank}", FEED_FORWARD]


MOLE = ["adapter=[mole]", f"adapter.mole.num_experts={EXPERTS}", f"adapter.mole.rank={RANK}",
        f"adapter.mole.alpha={2 * RANK}", "adapter.mole.dropout=0"]  # fmt: skip
# Arm -> options of its adapter, steps as a multiple.
ARMS: dict[str, tuple[list[str], int]] = {
    "one update": (_lora(RANK), 1),
    "one update, twice the steps": (_lora(RANK), 2),
    f"one update of rank {RANK * EXPERTS}": (_lora(RANK * EXPERTS), 1),
    "3 experts": (MOLE, 1),
    "3 experts, gate prob": ([*MOLE, "adapter.mole.gate=prob"], 1),
}


def measure(run: Run) -> None:
    """Teach the projector, and every arm behind it."""
    stage: dict[str, Any] = {"data": dict.fromkeys(DOMAINS, 1)}
    projector = {"see": {**stage, "steps": PROJECTOR_STEPS, "train": ["projector"]}}
    base = trained(run, "projector", [LLM, *CONVOLUTIONS, *DATA], projector)
    for name, (words, times) in run.arms(ARMS):
        stages = {"learn": {**stage, "steps": times * STEPS, "train": ["adapter"]}}
        folder = trained(run, name, [f"model=dir:{base}", *words, *DATA], stages)
        found = scores(run, *loaded(folder), DATA, TEST, baselines=name == "one update")
        run.add({name if what == "all" else f"{name}, {what}": one for what, one in found.items()})


EXPERIMENT = Experiment(
    data=DOMAINS,
    setting=(
        f"SmolLM2-135M, EfficientNet-Lite0, 16 image tokens; the projector learns for {PROJECTOR_STEPS} steps of 16",
        f"rank {RANK} on the feed-forward layers, {STEPS} steps of 16 at 1e-3; accuracy on {TEST} dev samples of each",
    ),
    measure=measure,
    bounds=[
        Bound(f"experts above {other}", gap("3 experts", other), over="seeds", note=why)
        for other, why in (
            ("one update", "equal weights at work"),
            ("one update, twice the steps", "twice its steps"),
            (f"one update of rank {RANK * EXPERTS}", "equal weights in all"),
        )
    ],
)
