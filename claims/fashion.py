"""The claim of FasterVLM on real photographs (arXiv:2412.01818): what [CLS] looks at answers, fewer random tokens less.

Fashion-MNIST at its own 28 x 28 pixels in patches of 2, so 196 image tokens. An encoder learns from [CLS] which of ten
classes it sees; then a language model learns "what is shown?" and "is this a ...?" from all tokens. Pruners come in
afterwards. Clothing fills half of its picture, so random tokens hit it too: less is to be won here than with objects of
four patches among sixty.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benches.real_data import fashion_mnist
from zoo.benches.report import Row
from zoo.claims.curves import bounded, draw_curves
from zoo.claims.reader import Reader, ask_all, each_ratio, encoder, sizes
from zoo.claims.steps import train

SIDE, PATCH, TOKENS, CLASSES = 14, 2, 196, 10
YES, NO = CLASSES, CLASSES + 1
KEPT = (98, 49, 20, 10)  # of 196 tokens
SEEING, READING, BATCH, TEST, RANDOM = 300, 300, 32, 300, 3
DATA = ("fashion_mnist",)
SETTING = [
    "Fashion-MNIST, 28 x 28 in 196 patches; ViT of 3 blocks, width 48, 300 steps of 32; Llama of 4 layers, width 64, "
    "300 steps of 32",
    "accuracy on the class and on one yes-or-no question about each of 300 dev pictures (guessing: 0.30)",
    "MFLOPs: of the LLM for one picture and one question; random: mean of 3 draws",
]


def pixels(photos: Tensor) -> Tensor:
    """Give photos (n, 28, 28) three channels: (n, 3, 28, 28)."""
    return photos.unsqueeze(1).expand(-1, 3, -1, -1)


def questions(classes: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ask what is shown, and whether it is some class, which it is half of the time: questions and answers (n, 2)."""
    other = (classes + torch.randint(1, CLASSES, classes.shape, generator=g)) % CLASSES
    named = torch.where(torch.rand(classes.shape, generator=g) < 0.5, classes, other)
    said = torch.where(named == classes, YES, NO)
    return torch.stack([torch.full_like(classes, CLASSES), named], 1), torch.stack([classes, said], 1)


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train once, and answer the same questions behind every pruner."""
    images, classes = fashion_mnist("train")
    g = torch.Generator().manual_seed(seed + 1)
    seeing, reading, batch, many = sizes(share, SEEING, READING, BATCH, TEST)

    def see(told: Callable[[Tensor], Tensor]) -> Tensor:
        some = torch.randint(len(images), (batch,), generator=g)
        return F.cross_entropy(told(pixels(images[some])), classes[some])

    vision = encoder(SIDE, PATCH, CLASSES, see, seed, seeing)
    show(f"  the encoder has learnt for {seeing} steps")
    torch.manual_seed(seed)
    model = Reader(vision, CLASSES + 1, CLASSES + 2, layers=4)

    def answer() -> Tensor:
        some = torch.randint(len(images), (batch,), generator=g)
        asked, said = questions(classes[some], g)
        which = torch.randint(2, (batch, 1), generator=g)
        logits = model(model.look(pixels(images[some])), asked.gather(1, which)[:, 0])
        return F.cross_entropy(logits, said.gather(1, which)[:, 0])

    train(model.parameters(), reading, answer, warmup=min(50, reading // 4))
    model.eval()
    images, classes = (some[:many] for some in fashion_mnist("dev"))
    asked, said = questions(classes, torch.Generator().manual_seed(10_000 + seed))
    arms = each_ratio(TOKENS, KEPT, RANDOM)
    for start, stop in ((2, 4), (1, 3)):
        node = {"name": "aim", "merge_ratio": 0.25, "start": start, "stop": stop}
        arms[f"aim merged to 49, none from layer {stop}"] = [[node]]
    return ask_all(model, model.look(pixels(images)), asked, said, arms, show)


def judge(found: dict[str, list[float]]) -> list[Row]:
    """FasterVLM against all tokens and against random ones, at 75 and 90 % fewer."""
    mean = {name: sum(numbers) / len(numbers) for name, numbers in found.items()}
    whole = mean[f"all {TOKENS}"]
    return bounded(
        "pruning_fashion",
        ("fastervlm at 49, share of what all tokens reach", mean["fastervlm 49"] / whole, ">=", 0.95),
        ("fastervlm at 20, share of what all tokens reach", mean["fastervlm 20"] / whole, ">=", 0.85),
        ("fastervlm above random at 49", mean["fastervlm 49"] - mean["random 49"], ">=", 0.02),
        ("fastervlm above random at 20", mean["fastervlm 20"] - mean["random 20"], ">=", 0.02),
    )


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Draw accuracy over tokens kept, and over what the LLM computes."""
    draw_curves(found, path, TOKENS, KEPT, "Fashion-MNIST")
