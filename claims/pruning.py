"""Claims about pruners: [CLS] keeps what matters where random tokens lose it (arXiv:2412.01818); what AIM saves costs
little (arXiv:2412.03248); and how accuracy falls with the tokens kept, for every pruner.

Pictures of 8 x 8 patches: a smooth random ground, noise, and two objects of 2 x 2 patches, each a random pattern of its
shape plus one of its colour. An encoder with [CLS] learns to list the pairs of shape and colour from [CLS] alone; its
tokens and row are those of the block before the last. Then a projector and a language model learn "what colour is shape
s?" from all 64 tokens. Pruners come in afterwards: nothing is trained with one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.claims.curves import curves
from zoo.claims.experiment import Bound, Experiment, Run, gap, ratio
from zoo.claims.reader import Chains, Sizes, ask, each_ratio, encoder, learnt_reader
from zoo.registry import build

SIDE, PATCH, KINDS, TOKENS = 8, 4, 6, 64
NOISE = 0.35
RANDOM = 3  # draws that random pruning is averaged over
KEPT = (32, 16, 6, 3)  # of 64 tokens


class Pictures:
    """Pictures from a generator; the patterns of shapes and colours are those of the seed.

    Args:
        seed: of the patterns.
        size: patches a side of an object.
    """

    def __init__(self, seed: int, size: int = 2) -> None:
        g = torch.Generator().manual_seed(seed)
        self.size = size
        self.shapes, self.colours = torch.randn(2, KINDS, 3 * PATCH * PATCH, generator=g)

    def draw(self, n: int, g: torch.Generator, shapes: Tensor | None = None) -> dict[str, Tensor]:
        """Draw pixels (n, 3, S, S), two shapes to ask for, their colours (n, 2), and where objects are (n, 64) bool."""
        ground = torch.randn(n, 3 * PATCH * PATCH, 3, 3, generator=g)
        x = F.interpolate(ground, (SIDE, SIDE), mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)
        x = x + NOISE * torch.randn(x.shape, generator=g)  # (n, 64, 48)
        if shapes is None:
            shapes = torch.rand(n, KINDS, generator=g).argsort(1)[:, :2]  # unlike each other
        colours = torch.randint(KINDS, (n, 2), generator=g)
        half = torch.randint(2, (n,), generator=g)  # objects share no patch: one left, one right
        columns = torch.randint(SIDE // 2 - self.size + 1, (n, 2), generator=g)
        columns = columns + torch.stack([half, 1 - half], 1) * SIDE // 2
        rows = torch.randint(SIDE - self.size + 1, (n, 2), generator=g)
        corner = rows * SIDE + columns
        square = (torch.arange(self.size)[:, None] * SIDE + torch.arange(self.size)).flatten()
        places = corner.unsqueeze(-1) + square  # (n, 2, 4)
        look = (self.shapes[shapes] + self.colours[colours]).unsqueeze(2).expand(-1, -1, len(square), -1)
        look = look + NOISE * torch.randn(look.shape, generator=g)
        index = places.flatten(1)  # (n, 8)
        x = x.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), look.flatten(1, 2))
        pixels = x.unflatten(-1, (3, PATCH, PATCH)).unflatten(1, (SIDE, SIDE))  # (n, h, w, 3, p, p)
        pixels = pixels.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIDE * PATCH, SIDE * PATCH)
        shown = torch.zeros(n, SIDE * SIDE, dtype=torch.bool).scatter(1, index, True)
        return {"pixels": pixels, "asked": shapes, "answers": colours, "shown": shown}


def learnt_encoder(pictures: Pictures, run: Run, steps: int, batch: int) -> Any:
    """Train an encoder to tell from [CLS] which shapes there are, of which colour, from `batch` pictures a step."""
    g = run.generator(1)

    def loss(told: Callable[[Tensor], Tensor]) -> Tensor:
        drawn = pictures.draw(batch, g)
        logits = told(drawn["pixels"]).view(-1, KINDS + 1)
        wanted = torch.full((batch, KINDS), KINDS).scatter(1, drawn["asked"], drawn["answers"])
        return F.cross_entropy(logits, wanted.flatten())

    return encoder(SIDE, PATCH, KINDS * (KINDS + 1), loss, run.seed, steps)


def measure(run: Run) -> None:
    """Train once, and answer the same questions behind every pruner."""
    pictures, sizes = Pictures(run.seed), Sizes(seeing=300, reading=500, batch=64, test=512).of(run)
    vision = learnt_encoder(pictures, run, sizes.seeing, sizes.batch)
    model = learnt_reader(pictures, vision, (KINDS, KINDS), run, sizes, run.generator(2))
    test = pictures.draw(sizes.test, run.generator(10_000))
    image = model.look(test["pixels"])
    arms: dict[str, Chains] = each_ratio(TOKENS, KEPT, RANDOM)
    for start, stop in ((3, 6), (2, 5), (1, 4)):
        inside = {"name": "aim", "start": start, "stop": stop}
        arms[f"aim merged to 32, none from layer {stop}"] = [[{**inside, "merge_ratio": 0.5}]]
        arms[f"aim, none from layer {stop}"] = [[{**inside, "merge_ratio": 1.0}]]
    ask(run, model, image, test, arms)
    for name, score in (("cls", "cls"), ("column mean", "column_mean")):
        pruner = build("pruner", {"name": "fastervlm", "num_keep": 8, "score": score}, num_tokens=TOKENS)
        shown = test["shown"].gather(1, pruner(image).keep)
        run.add({f"patches of objects among the first 8 by {name}": float(shown.float().mean())})


AIM = "aim merged to 32, none from layer 4"  # a third of the work
EXPERIMENT = Experiment(
    setting=(
        "64 patches, two objects of 4; ViT of 3 blocks, width 48, 300 steps; Llama of 6 layers, width 64, 500 steps "
        "of 64",
        "accuracy on two questions about each of 512 unseen pictures (guessing: 0.17); pruned without training",
        "MFLOPs: of the LLM for one picture and one question; random: mean of 3 draws",
        "not claimed: that random tokens beat the choice of the LLM's own attention, which they do not do here either",
    ),
    measure=measure,
    bounds=(
        Bound("fastervlm at 16 below all 64", gap("all 64", "fastervlm 16"), at_most=0.02),
        Bound("fastervlm above random at 16", gap("fastervlm 16", "random 16"), at_least=0.15),
        Bound("fastervlm above random at 6", gap("fastervlm 6", "random 6"), at_least=0.30),
        Bound("aim, merged to 32 and none from layer 4, below all 64", gap("all 64", AIM), at_most=0.07),
        Bound("its share of the work", ratio(f"{AIM}, MFLOPs", "all 64, MFLOPs"), at_most=0.32),
    ),
    draw=curves(TOKENS, KEPT, "two objects of 4 patches"),
)
