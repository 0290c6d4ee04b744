"""The comparison of `vlora` where words are known: SmolLM2-135M names clothes with no image token in its prompt.

The language model stays as it is; what learns is a generator of changes to its weights. Beside it a projector gives 16
image tokens to the same frozen model. Text without an image must come out the same to the bit.
"""

from typing import Any

import torch

from zoo.claims.experiment import Bound, Experiment, Run, gap, row
from zoo.claims.smollm import CONVOLUTIONS, LLM, loaded, scores, trained

DATA = ("data=[fashion_mnist]", "data.fashion_mnist.yes_no=0")
ENCODER = CONVOLUTIONS[:3]
STEPS, TEST = 150, 300
GENERATOR = ["adapter=[vlora]", "adapter.vlora.skip=3", "adapter.vlora.width=128", "adapter.vlora.depth=2",
             "adapter.vlora.num_heads=4", "adapter.vlora.rank=16", "adapter.vlora.image_std=0.036"]  # fmt: skip
TOKENS = "16 image tokens, projector alone"
# Arm -> options, what trains.
ARMS: dict[str, tuple[list[str], str]] = {
    TOKENS: ([*CONVOLUTIONS[3:]], "projector"),
    "qkvom, rank 16": ([*GENERATOR, "adapter.vlora.types=qkvom"], "adapter"),
    "kv, rank 16": ([*GENERATOR, "adapter.vlora.types=kv"], "adapter"),
}
SAME = "logits of text, same to the bit"


def measure(run: Run) -> None:
    """Train every arm on the frozen model, and compare what it makes of text with what the base makes of it."""
    for name, (words, part) in run.arms(ARMS):
        learn: dict[str, Any] = {"steps": STEPS, "train": [part], "lr": 1e-3}
        if part == "adapter":  # weights that change with the image are those of a whole row: one sample in each
            learn |= {"lr": 5e-4, "pack_length": None}
        stages = {"learn": learn}
        folder = trained(run, name, [LLM, *ENCODER, *words, *DATA], stages)
        model, processor = loaded(folder)
        found = scores(run, model, processor, DATA, TEST, baselines=part == "projector")
        run.add({name if what == "all" else f"{name}, {what}": one for what, one in found.items()})
        run.add({f"{name}, {SAME}": same_text(model, processor)})


@torch.no_grad()
def same_text(model: Any, processor: Any) -> float:
    """Whether the model gives the logits of its language model alone."""
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    whole = model(input_ids=ids, all_logits=True).logits
    for adapter in model.adapter.values():
        adapter.detach()
    return float(torch.equal(whole, model(input_ids=ids, all_logits=True).logits))


EXPERIMENT = Experiment(
    data=("fashion_mnist",),
    setting=(
        "frozen SmolLM2-135M, EfficientNet-Lite0; generators of width 128, 2 blocks, in 10 of 30 layers",
        f"{STEPS} steps of 16 photos of clothes; accuracy of the name on {TEST} dev photos (guessing: 0.1)",
    ),
    measure=measure,
    bounds=(
        Bound("qkvom, names right", row("qkvom, rank 16"), at_least=0.6),
        Bound("qkvom above 16 image tokens", gap("qkvom, rank 16", TOKENS), over="seeds"),
        Bound("qkvom above kv", gap("qkvom, rank 16", "kv, rank 16"), over="seeds"),
        Bound("text to the bit", row(f"qkvom, rank 16, {SAME}"), at_least=1.0, over="least"),
    ),
)
