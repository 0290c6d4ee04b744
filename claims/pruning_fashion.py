"""The claim of FasterVLM on real photographs (arXiv:2412.01818): what [CLS] looks at answers, fewer random tokens less.

Fashion-MNIST at its own 28 x 28 pixels in patches of 2, so 196 image tokens. An encoder learns from [CLS] which of ten
classes it sees; then a language model learns "what is shown?" and "is this a ...?" from all tokens. Pruners come in
afterwards. Clothing fills half of its picture, so random tokens hit it too: less is to be won here than with objects of
four patches among sixty.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benches.real_data import fashion_mnist
from zoo.claims.curves import curves
from zoo.claims.experiment import Bound, Experiment, Run, gap, ratio
from zoo.claims.reader import Sizes, ask, each_ratio, encoder, learnt_reader

SIDE, PATCH, TOKENS, CLASSES = 14, 2, 196, 10
YES, NO = CLASSES, CLASSES + 1
KEPT = (98, 49, 20, 10)  # of 196 tokens
RANDOM = 3  # draws that random pruning is averaged over


def pixels(photos: Tensor) -> Tensor:
    """Give photos (n, 28, 28) three channels: (n, 3, 28, 28)."""
    return photos.unsqueeze(1).expand(-1, 3, -1, -1)


def questions(classes: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ask what is shown, and whether it is some class, which it is half of the time: questions and answers (n, 2)."""
    other = (classes + torch.randint(1, CLASSES, classes.shape, generator=g)) % CLASSES
    named = torch.where(torch.rand(classes.shape, generator=g) < 0.5, classes, other)
    said = torch.where(named == classes, YES, NO)
    return torch.stack([torch.full_like(classes, CLASSES), named], 1), torch.stack([classes, said], 1)


class Photos:
    """Photos of the training split, with questions."""

    def __init__(self) -> None:
        self.images, self.classes = fashion_mnist("train")

    def some(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pixels (n, 3, 28, 28) and classes (n,)."""
        chosen = torch.randint(len(self.images), (n,), generator=g)
        return pixels(self.images[chosen]), self.classes[chosen]

    def draw(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Draw pixels, and questions and answers (n, 2) about them."""
        images, classes = self.some(n, g)
        asked, answers = questions(classes, g)
        return {"pixels": images, "asked": asked, "answers": answers}


def measure(run: Run) -> None:
    """Train once, and answer the same questions behind every pruner."""
    photos, g = Photos(), run.generator(1)
    sizes = Sizes(seeing=300, reading=300, batch=32, test=300).of(run)

    def see(told: Callable[[Tensor], Tensor]) -> Tensor:
        images, classes = photos.some(sizes.batch, g)
        return F.cross_entropy(told(images), classes)

    vision = encoder(SIDE, PATCH, CLASSES, see, run.seed, sizes.seeing)
    model = learnt_reader(photos, vision, (CLASSES + 1, CLASSES + 2), run, sizes, g, layers=4)
    images, classes = (some[: sizes.test] for some in fashion_mnist("dev"))
    asked, answers = questions(classes, run.generator(10_000))
    arms = each_ratio(TOKENS, KEPT, RANDOM)
    for start, stop in ((2, 4), (1, 3)):
        node = {"name": "aim", "merge_ratio": 0.25, "start": start, "stop": stop}
        arms[f"aim merged to 49, none from layer {stop}"] = [[node]]
    ask(run, model, model.look(pixels(images)), {"asked": asked, "answers": answers}, arms)


EXPERIMENT = Experiment(
    data=("fashion_mnist",),
    setting=(
        "Fashion-MNIST, 28 x 28 in 196 patches; ViT of 3 blocks, width 48, 300 steps of 32; Llama of 4 layers, width "
        "64, 300 steps of 32",
        "accuracy on the class and on one yes-or-no question about each of 300 dev pictures (guessing: 0.30)",
        "MFLOPs: of the LLM for one picture and one question; random: mean of 3 draws",
    ),
    measure=measure,
    bounds=(
        Bound("fastervlm at 49, share of what all tokens reach", ratio("fastervlm 49", "all 196"), at_least=0.95),
        Bound("fastervlm at 20, share of what all tokens reach", ratio("fastervlm 20", "all 196"), at_least=0.85),
        Bound("fastervlm above random at 49", gap("fastervlm 49", "random 49"), at_least=0.02),
        Bound("fastervlm above random at 20", gap("fastervlm 20", "random 20"), at_least=0.02),
    ),
    draw=curves(TOKENS, KEPT, "Fashion-MNIST"),
)
