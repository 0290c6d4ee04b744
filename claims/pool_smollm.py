"""The comparison of `pool` where words are known: SmolLM2-135M boxes a shape in a drawn scene.

It looks through EfficientNet-Lite0 and gets 16 tokens of its 8 x 8 positions: pooled (each has a place), or read by 16
learned queries, or joined four to one. Projector and a low-rank update learn; a box is four numbers in text.
"""

from zoo.claims.experiment import Bound, Experiment, Run, gap
from zoo.claims.smollm import CONVOLUTIONS, LLM, LORA, loaded, scores, trained

DATA = (
    "data=[scenes]",
    "data.scenes.size=96",
    "data.scenes.grid=0",
    "data.scenes.questions={exist: 0, color: 0, shape: 0, size: 0, count: 0, relation: 0, box: 1}",
)
ENCODER = CONVOLUTIONS[:3]
STEPS, TEST = 180, 150
ARMS = {
    "pool": ["projector=pool", "projector.target=[4,4]", "projector.norm=true"],
    "16 queries": ["projector=resampler", "projector.num_queries=16"],
    "pixel shuffle": [*CONVOLUTIONS[3:]],
}


def measure(run: Run) -> None:
    """Train every arm from the same language model."""
    for name, words in run.arms(ARMS):
        stages = {"learn": {"steps": STEPS, "train": ["projector", "adapter"]}}
        folder = trained(run, name, [LLM, *ENCODER, *words, *LORA, *DATA], stages)
        found = scores(run, *loaded(folder), DATA, TEST, metric="iou")
        run.add({name if what == "all" else f"{name}, {what}": one for what, one in found.items()})


EXPERIMENT = Experiment(
    setting=(
        f"SmolLM2-135M with LoRA of rank 8, EfficientNet-Lite0 at 256 pixels, 16 tokens; {STEPS} steps of 16 at 1e-3",
        f"mean IoU of boxes in {TEST} scenes",
    ),
    measure=measure,
    bounds=(
        Bound("pool above 16 queries", gap("pool", "16 queries"), over="seeds"),
        Bound("pool above pixel shuffle", gap("pool", "pixel shuffle"), over="seeds"),
    ),
)
