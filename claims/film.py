"""The claim of AIM on video (arXiv:2412.03248): merged within frames and dropped inside the LLM, little is lost.

Films of 4 frames of 64 patches: in the first two stand two objects, in the other two stand two others, 3 x 3 patches
each, and every frame has noise of its own. The question is the colour of one of the four, so that every scene counts.
Encoder and language model learn as those of the claim `pruning` do, from all 256 tokens; pruners come in afterwards.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from zoo.benches.report import Row
from zoo.claims.curves import bounded, draw_curves
from zoo.claims.pruning import KINDS, NOISE, Pictures, learnt_encoder, learnt_reader
from zoo.claims.reader import ask_all, each_ratio, sizes

FRAMES, TOKENS = 4, 64  # tokens of a frame
KEPT = (32, 16, 8, 4)  # of 64 tokens of each frame
SEEING, READING, BATCH, TEST, RANDOM = 250, 400, 16, 256, 3
DEEP = "aim merged to 16, none from layer 3"  # 4 layers; AIM's 22 of 28
SETTING = [
    "films of 4 frames of 64 patches, two objects of 9 in each half; ViT of 3 blocks, width 48, 250 steps; Llama of 4 "
    "layers, width 64, 400 steps of 16",
    "accuracy on four questions about each of 256 unseen films (guessing: 0.17); pruned without training",
    "counts are of each frame; MFLOPs: of the LLM for one film and one question; random: mean of 3 draws",
]


class Films:
    """Films from a generator; the patterns of shapes and colours are those of the seed."""

    def __init__(self, seed: int) -> None:
        self.pictures = Pictures(seed, size=3)

    def draw(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Draw pixels (n, 4, 3, S, S), and the four shapes and colours (n, 4)."""
        shapes = torch.rand(n, KINDS, generator=g).argsort(1)[:, :4]  # unlike each other
        scenes = [self.pictures.draw(n, g, shapes[:, i : i + 2]) for i in (0, 2)]
        frames = torch.stack([scene["pixels"] for scene in scenes for _ in range(FRAMES // 2)], 1)
        frames = frames + NOISE * torch.randn(frames.shape, generator=g)
        return {"pixels": frames, "shapes": shapes, "colours": torch.cat([s["colours"] for s in scenes], 1)}


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train once, and answer the same questions behind every pruner."""
    films = Films(seed)
    seeing, reading, batch, many = sizes(share, SEEING, READING, BATCH, TEST)
    vision = learnt_encoder(films.pictures, seed, seeing, 4 * batch)
    show(f"  the encoder has learnt for {seeing} steps")
    model = learnt_reader(films, vision, seed, reading, batch, layers=4)
    test = films.draw(many, torch.Generator().manual_seed(10_000 + seed))
    arms = each_ratio(TOKENS, KEPT, RANDOM)
    for merged in (1.0, 0.5, 0.25):
        for start, stop in ((2, 4), (2, 3), (1, 3)):
            node = {"name": "aim", "merge_ratio": merged, "start": start, "stop": stop}
            name = "aim" if merged == 1 else f"aim merged to {round(TOKENS * merged)}"
            arms[f"{name}, {'from layer 2 fewer, ' if start == 1 else ''}none from layer {stop}"] = [[node]]
    return ask_all(model, model.look(test["pixels"]), test["shapes"], test["colours"], arms, show)


def judge(found: dict[str, list[float]]) -> list[Row]:
    """AIM against all tokens, merged alone and as it is; the work it leaves; random tokens at the same count."""
    mean = {name: sum(numbers) / len(numbers) for name, numbers in found.items()}
    whole, merged = mean[f"all {TOKENS}"], mean["aim merged to 16"]
    return bounded(
        "pruning_film",
        ("aim merged to a quarter, below all tokens", whole - merged, "<=", 0.05),
        ("aim merged to a quarter, none from layer 3, below all tokens", whole - mean[DEEP], "<=", 0.07),
        ("its share of the work", mean[f"{DEEP}, MFLOPs"] / mean[f"all {TOKENS}, MFLOPs"], "<=", 0.20),
        ("merged above random at a quarter", merged - mean["random 16"], ">=", 0.05),
    )


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Draw accuracy over tokens kept of each frame, and over what the LLM computes."""
    draw_curves(found, path, TOKENS, KEPT, "films of 4 frames")
