"""Claim: a frozen language model describes images through changed weights alone, its text untouched (arXiv:2405.20339).

A small Llama learns captions "colour shape quadrant" and is frozen: it knows the grammar and nothing else. Images are
16 patches, one of which holds the prototypes of a colour and a shape; its quadrant is the third word. Then only a
generator of weights learns. Beside it a projector gives 16 image tokens to the same frozen model; that it fails says
only that a model which never read such tokens does not begin to, not that VLoRA is better than image tokens.
"""

import copy
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.claims.experiment import Bound, Experiment, Numbers, Run, row
from zoo.claims.steps import Parts, train
from zoo.registry import ImageFeatures, build

COLOURS, SHAPES, QUADRANTS = 6, 6, 4
VOCAB = COLOURS + SHAPES + QUADRANTS + 2
BOS, EOS = VOCAB - 2, VOCAB - 1
SIDE, DIM, WIDTH = 4, 20, 48
CLIP = 1024  # width of the features that the generator was made for
TEXT_STEPS, STEPS, BATCH, TEST = 400, 600, 48, 1000
SMALL = {"name": "vlora", "skip": 2, "width": 32, "depth": 2, "num_heads": 4}
ARMS: dict[str, dict[str, Any]] = {
    "qkvom, rank 4": {**SMALL, "types": "qkvom", "rank": 4},
    "qkvom, rank 1": {**SMALL, "types": "qkvom", "rank": 1},
    "kv, rank 4": {**SMALL, "types": "kv", "rank": 4},
    "16 image tokens": {"name": "mlp"},
}
SAME = "text and weights of the frozen model, same to the bit"


class Pictures:
    """Patches and captions from a generator."""

    dim, grid, vocab_size, steps = DIM, (SIDE, SIDE), VOCAB, STEPS

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.places = torch.randn(SIDE * SIDE, DIM, generator=g)
        self.colours = 3 * F.normalize(torch.randn(COLOURS, DIM, generator=g), dim=-1)
        self.shapes = 3 * F.normalize(torch.randn(SHAPES, DIM, generator=g), dim=-1)

    def draw(self, n: int, g: torch.Generator) -> tuple[ImageFeatures, Tensor]:
        """Draw `n` images (n, 16, D) and captions (n, 5)."""
        colour, shape = (torch.randint(k, (n,), generator=g) for k in (COLOURS, SHAPES))
        patch = torch.randint(SIDE * SIDE, (n,), generator=g)
        x = 0.3 * torch.randn(n, SIDE * SIDE, DIM, generator=g) + self.places
        x[torch.arange(n), patch] += self.colours[colour] + self.shapes[shape]
        quadrant = 2 * (patch // SIDE // 2) + patch % SIDE // 2
        ends = [torch.full_like(colour, word) for word in (BOS, EOS)]
        words = [ends[0], colour, COLOURS + shape, COLOURS + SHAPES + quadrant, ends[1]]
        return ImageFeatures(x, self.grid), torch.stack(words, dim=1)

    def unseen(self, n: int) -> tuple[ImageFeatures, Tensor]:
        """Images that no arm learns from."""
        return self.draw(n, torch.Generator().manual_seed(10_000))


def measure(source: Callable[[int], Any], only: Collection[str], run: Run) -> None:
    """Teach the language model, freeze it, and train every arm on a copy."""
    pictures = source(run.seed)
    text = _text_model(pictures, run)
    test: tuple[ImageFeatures, Tensor] = pictures.unseen(run.size(TEST, 50))
    probe = torch.randint(pictures.vocab_size, (8, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = text.lm(input_ids=probe).logits
    run.add({"text alone, nll": float(_loss(_Arm(text, None, pictures), *test, blind=True))})
    steps = run.steps(pictures.steps, least=4)
    for name, node in run.arms({name: ARMS[name] for name in only}):
        torch.manual_seed(run.seed)
        arm, g = _Arm(copy.deepcopy(text), node, pictures), run.generator(1)
        with torch.no_grad():
            fresh = _logits(arm, *test)
            same = node["name"] != "vlora" or torch.equal(fresh, _logits(arm, *test, blind=True))

        def loss(arm: "_Arm" = arm, g: torch.Generator = g) -> Tensor:
            return _loss(arm, *pictures.draw(BATCH, g))

        scores = Parts(steps, partial(_caption, arm, *test))
        train(arm.part.parameters(), steps, loss, decay=0.0, at=scores)
        run.add({f"{name}, all at {pictures.steps // part}": scores.found[part] for part in (4, 2, 1)})
        with torch.no_grad():
            run.add({f"{name}, nll at {pictures.steps}": float(_loss(arm, *test))})
            if node["name"] == "vlora":
                arm.part.condition(None, [0] * len(probe))
            same &= torch.equal(arm.llm.lm(input_ids=probe).logits, before)
        same &= all(torch.equal(p, q) for p, q in zip(arm.llm.parameters(), text.parameters(), strict=True))
        run.add({f"{name}, {SAME}": same})
    run.add({SAME: min(run.found[f"{name}, {SAME}"] for name in only)})


class _Arm:
    """The frozen model with an adapter, a projector, or nothing."""

    def __init__(self, llm: Any, node: dict[str, Any] | None, pictures: Any) -> None:
        self.llm = llm
        self.part: Any = None
        given = {"vision_dim": pictures.dim, "text_dim": WIDTH, "grid": pictures.grid}
        if node is not None and node["name"] == "vlora":
            self.part = build("adapter", node, llm=llm, **given)
            # The released 0.02 was made for CLIP's width; at this one the picture would drown in its positions.
            nn.init.normal_(self.part.memory.proj.weight, std=0.02 * (CLIP / pictures.dim) ** 0.5)
            self.part.attach()
        elif node is not None:
            self.part = build("projector", node, **given)
        self.tokens = node is not None and node["name"] != "vlora"


def _logits(arm: _Arm, image: ImageFeatures, words: Tensor, blind: bool = False) -> Tensor:
    """Logits behind each of `words`."""
    embeds = arm.llm.embed(words)
    if arm.tokens and not blind:
        embeds = torch.cat([arm.part(image), embeds], dim=1)
    elif arm.part is not None and not arm.tokens:
        arm.part.condition(None if blind else image, [int(not blind)] * len(words))
    hidden = arm.llm.hidden(inputs_embeds=embeds).last_hidden_state
    return arm.llm.head(hidden[:, -words.shape[1] :])


def _loss(arm: _Arm, image: ImageFeatures, words: Tensor, blind: bool = False) -> Tensor:
    logits = _logits(arm, image, words[:, :-1], blind)
    return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


@torch.no_grad()
def _caption(arm: _Arm, image: ImageFeatures, words: Tensor) -> float:
    """Share of greedy captions that are right in all words."""
    said = words[:, :1]
    for _ in range(words.shape[1] - 2):
        said = torch.cat([said, _logits(arm, image, said)[:, -1:].argmax(-1)], dim=1)
    return float((said == words[:, :-1]).all(1).float().mean())


def _text_model(pictures: Any, run: Run) -> Any:
    """Teach captions without images, half of the batches behind random vectors: a prefix is then nothing new."""
    torch.manual_seed(run.seed)
    sizes = {"hidden_size": WIDTH, "num_layers": 4, "num_heads": 4, "intermediate_size": 2 * WIDTH, "max_positions": 64}
    llm = build("llm", {"name": "hf", **sizes}, vocab_size=pictures.vocab_size)
    g = run.generator(2)

    def loss() -> Tensor:
        _, words = pictures.draw(64, g)
        embeds = llm.embed(words[:, :-1])
        if torch.rand(1, generator=g) < 0.5:
            count = pictures.grid[0] * pictures.grid[1]
            prefix = torch.randn(len(words), count, WIDTH, generator=g) * embeds.detach().std()
            embeds = torch.cat([prefix, embeds], dim=1)
        logits = llm.head(llm.hidden(inputs_embeds=embeds).last_hidden_state[:, 1 - words.shape[1] :])
        return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())

    train(llm.parameters(), run.steps(TEXT_STEPS, least=4), loss)
    return llm.eval().requires_grad_(False)


def _least_above_kv(found: Numbers) -> float:
    at = (STEPS // 4, STEPS // 2, STEPS)
    return min(found[f"qkvom, rank 4, all at {k}"] - found[f"kv, rank 4, all at {k}"] for k in at)


EXPERIMENT = Experiment(
    setting=(
        "a frozen Llama of 4 layers, width 48; generators of width 32, 2 blocks, in 2 layers; 600 steps of 48 at 2e-3",
        "the image projection starts at 0.02 sqrt(1024 / 20): as loud beside the positions as 0.02 is at CLIP's width",
        "all: colour, shape and quadrant right in greedy captions of 1000 new images; nll: per token",
    ),
    measure=partial(measure, Pictures, tuple(ARMS)),
    bounds=(
        Bound(f"qkvom, all three words right at {STEPS}", row(f"qkvom, rank 4, all at {STEPS}"), at_least=0.9),
        Bound("qkvom above kv, least of three points", _least_above_kv, at_least=0.0),
        Bound("text to the bit in every run", row(SAME), at_least=1.0),
    ),
)
