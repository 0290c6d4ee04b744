"""The claim of AIM on video (arXiv:2412.03248): merged within frames and dropped inside the LLM, little is lost.

Films of 4 frames of 64 patches: in the first two stand two objects, in the other two stand two others, 3 x 3 patches
each, and every frame has noise of its own. The question is the colour of one of the four, so that every scene counts.
Encoder and language model learn as those of the claim `pruning` do, from all 256 tokens; pruners come in afterwards.
"""

import torch
from torch import Tensor

from zoo.claims.curves import curves
from zoo.claims.experiment import Bound, Experiment, Run, gap, ratio
from zoo.claims.pruning import KINDS, NOISE, RANDOM, Pictures, learnt_encoder
from zoo.claims.reader import Sizes, ask, each_ratio, learnt_reader

FRAMES, TOKENS = 4, 64  # tokens of a frame
KEPT = (32, 16, 8, 4)  # of 64 tokens of each frame
DEEP = "aim merged to 16, none from layer 3"  # 4 layers; AIM's 22 of 28


class Films:
    """Films from a generator; the patterns of shapes and colours are those of the seed."""

    def __init__(self, seed: int) -> None:
        self.pictures = Pictures(seed, size=3)

    def draw(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Draw pixels (n, 4, 3, S, S), the four shapes, which are asked for, and their colours (n, 4)."""
        shapes = torch.rand(n, KINDS, generator=g).argsort(1)[:, :4]  # unlike each other
        scenes = [self.pictures.draw(n, g, shapes[:, i : i + 2]) for i in (0, 2)]
        frames = torch.stack([scene["pixels"] for scene in scenes for _ in range(FRAMES // 2)], 1)
        frames = frames + NOISE * torch.randn(frames.shape, generator=g)
        return {"pixels": frames, "asked": shapes, "answers": torch.cat([s["answers"] for s in scenes], 1)}


def measure(run: Run) -> None:
    """Train once, and answer the same questions behind every pruner."""
    films, sizes = Films(run.seed), Sizes(seeing=250, reading=400, batch=16, test=256).of(run)
    vision = learnt_encoder(films.pictures, run, sizes.seeing, FRAMES * sizes.batch)
    model = learnt_reader(films, vision, (KINDS, KINDS), run, sizes, run.generator(2), layers=4)
    test = films.draw(sizes.test, run.generator(10_000))
    arms = each_ratio(TOKENS, KEPT, RANDOM)
    for merged in (1.0, 0.5, 0.25):
        for start, stop in ((2, 4), (2, 3), (1, 3)):
            node = {"name": "aim", "merge_ratio": merged, "start": start, "stop": stop}
            name = "aim" if merged == 1 else f"aim merged to {round(TOKENS * merged)}"
            arms[f"{name}, {'from layer 2 fewer, ' if start == 1 else ''}none from layer {stop}"] = [[node]]
    ask(run, model, model.look(test["pixels"]), test, arms)


EXPERIMENT = Experiment(
    setting=(
        "films of 4 frames of 64 patches, two objects of 9 in each half; ViT of 3 blocks, width 48, 250 steps; Llama "
        "of 4 layers, width 64, 400 steps of 16",
        "accuracy on four questions about each of 256 unseen films (guessing: 0.17); pruned without training",
        "counts are of each frame; MFLOPs: of the LLM for one film and one question; random: mean of 3 draws",
    ),
    measure=measure,
    bounds=(
        Bound("aim merged to a quarter, below all tokens", gap("all 64", "aim merged to 16"), at_most=0.05),
        Bound("aim merged to a quarter, none from layer 3, below all tokens", gap("all 64", DEEP), at_most=0.07),
        Bound("its share of the work", ratio(f"{DEEP}, MFLOPs", "all 64, MFLOPs"), at_most=0.20),
        Bound("merged above random at a quarter", gap("aim merged to 16", "random 16"), at_least=0.05),
    ),
    draw=curves(TOKENS, KEPT, "films of 4 frames"),
)
