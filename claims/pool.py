"""Claim: at an equal and small budget, pooled tokens localise where a resampler's do not yet (arXiv:2311.06791).

Features of an 8 x 8 grid, drawn without an encoder: two rectangles of different classes, the second over the first,
noise, and a code of the position, all turned by one fixed rotation, so that a resampler can tell places too. Projectors
give 16 tokens to a small causal transformer; behind them comes a class whose rectangle is to be boxed, and before that
one whose presence is asked, which needs no place. Everything learns together.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.claims.experiment import Bound, Experiment, Numbers, Run, gap
from zoo.claims.steps import Parts, train
from zoo.registry import ImageFeatures, build

SIDE, DIM, CLASSES, WIDTH, TOKENS = 8, 24, 6, 48, 16
STEPS, BATCH, TEST = 1200, 64, 2000
# Without its norm of the tokens, which gives ground and objects the same length: with it, it learns far later.
_QUERIES = {"name": "resampler", "num_queries": TOKENS, "hidden_size": WIDTH, "num_heads": 4, "input_norm": False}
ARMS: dict[str, dict[str, Any]] = {
    "pool": {"name": "pool", "stride": 2},
    "resampler, 1 block": {**_QUERIES, "depth": 1},
    "resampler, 2 blocks": {**_QUERIES, "depth": 2},
    "pool, tokens shuffled": {"name": "pool", "stride": 2},
}


class Scenes:
    """Features, boxes and classes from a generator."""

    dim, bins = DIM, SIDE  # of features; of a coordinate of a box

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.prototypes = 4 * F.normalize(torch.randn(CLASSES, DIM, generator=g), dim=-1)
        self.rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=g))[0]
        rates = 10.0 ** (-torch.arange(DIM // 4) / (DIM // 4))
        angles = torch.arange(SIDE)[:, None] * rates * math.pi / 2  # (8, D / 4)
        code = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (8, D / 2)
        rows, columns = code[:, None].expand(-1, SIDE, -1), code[None].expand(SIDE, -1, -1)
        self.code = 0.5 * torch.cat([rows, columns], dim=-1)  # (8, 8, D)

    def encoder(self) -> nn.Module:
        """What learns along, ahead of the projector: nothing."""
        return nn.Identity()

    def unseen(self, n: int) -> dict[str, Tensor]:
        """Scenes that no arm learns from."""
        return self.draw(n, torch.Generator().manual_seed(10_000))

    def draw(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Draw features (n, 64, D), class and box of the upper rectangle, and a class with whether it is there."""
        first = torch.randint(CLASSES, (n,), generator=g)
        second = (first + 1 + torch.randint(CLASSES - 1, (n,), generator=g)) % CLASSES
        sides = torch.randint(2, 5, (n, 2, 2), generator=g)
        starts = (torch.rand(n, 2, 2, generator=g) * (SIDE - sides + 1)).long()
        ends = starts + sides - 1  # last row and column
        place = torch.arange(SIDE)
        inside = (place >= starts[..., None]) & (place <= ends[..., None])  # (n, rectangle, axis, 8)
        masks = inside[:, :, 0, :, None] & inside[:, :, 1, None, :]  # (n, rectangle, 8, 8)
        x = self.code + 0.3 * torch.randn(n, SIDE, SIDE, DIM, generator=g)
        shown = torch.where(masks[:, 1, ..., None], self.prototypes[second][:, None, None], 0.0)
        below = (masks[:, 0] & ~masks[:, 1])[..., None]
        shown = shown + torch.where(below, self.prototypes[first][:, None, None], 0.0)
        seen = masks[:, 0] & ~masks[:, 1]
        asked = torch.where(torch.rand(n, generator=g) < 0.5, torch.randint(CLASSES, (n,), generator=g), first)
        there = (asked == second) | ((asked == first) & seen.flatten(1).any(1))
        return {
            "x": ((x + shown) @ self.rotation).flatten(1, 2),
            "box": torch.stack([starts[:, 1, 1], starts[:, 1, 0], ends[:, 1, 1], ends[:, 1, 0]], dim=1),
            "class": second,
            "asked": asked,
            "there": there.long(),
        }


class Reader(nn.Module):
    """Projector, transformer, heads."""

    def __init__(self, arm: str, scenes: Any) -> None:
        super().__init__()
        self.encoder, self.bins = scenes.encoder(), scenes.bins
        self.projector = build("projector", ARMS[arm], vision_dim=scenes.dim, text_dim=WIDTH, grid=(SIDE, SIDE))
        plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "max_positions": 32}
        self.llm = build("llm", {"name": "hf", "model_type": "gpt2", **sizes, "extra": plain}, vocab_size=2 * CLASSES)
        self.box, self.presence = nn.Linear(WIDTH, 4 * self.bins), nn.Linear(WIDTH, 2)
        self.shuffled = "shuffled" in arm

    def forward(self, batch: dict[str, Tensor], g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Give logits of the four coordinates (n, 4, bins) and of presence (n, 2)."""
        tokens = self.projector(ImageFeatures(self.encoder(batch["x"]), (SIDE, SIDE)))  # (n, 16, W)
        if self.shuffled:
            order = torch.rand(tokens.shape[:2], generator=g).argsort(1)
            tokens = tokens.gather(1, order[..., None].expand_as(tokens))
        asked = self.llm.embed(torch.stack([CLASSES + batch["asked"], batch["class"]], dim=1))  # (n, 2, W)
        hidden = self.llm.hidden(inputs_embeds=torch.cat([tokens, asked], dim=1)).last_hidden_state
        return self.box(hidden[:, -1]).unflatten(-1, (4, self.bins)), self.presence(hidden[:, -2])


def measure(source: Callable[[int], Any], whole: int, run: Run) -> None:
    """Train every arm from the same seed, and test it at a quarter, a half and the whole of `whole` steps."""
    scenes, steps = source(run.seed), run.steps(whole, least=4)
    test = scenes.unseen(run.size(TEST, 100))
    for name, _ in run.arms(ARMS):
        torch.manual_seed(run.seed)
        model, g = Reader(name, scenes), run.generator(1)

        def loss(model: Reader = model, g: torch.Generator = g) -> Tensor:
            batch = scenes.draw(BATCH, g)
            box, presence = model(batch, g)
            boxes = F.cross_entropy(box.flatten(0, 1), batch["box"].flatten())
            return boxes + 0.5 * F.cross_entropy(presence, batch["there"])

        scores = Parts(steps, partial(_score, model, test))
        train(model.parameters(), steps, loss, warmup=min(50, steps // 4), last=0.05, at=scores)
        for part in (4, 2, 1):
            run.add({f"{name}, acc at {whole // part}": scores.found[part][0]})
        _, iou, presence = scores.found[1]
        run.add({f"{name}, mean IoU at {whole}": iou, f"{name}, presence at {whole}": presence})


@torch.no_grad()
def _score(model: Reader, test: dict[str, Tensor]) -> tuple[float, float, float]:
    box, presence = model(test, torch.Generator().manual_seed(0))
    a, b = box.argmax(-1), test["box"]  # (n, 4): x1 y1 x2 y2, the last ones inside
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    both = (high - low + 1).clamp(min=0).prod(1)
    areas = [(x[:, 2:] - x[:, :2] + 1).clamp(min=0).prod(1) for x in (a, b)]
    iou = both / (areas[0] + areas[1] - both)
    right = (presence.argmax(-1) == test["there"]).float().mean()
    return float((iou >= 0.5).float().mean()), float(iou.mean()), float(right)


def above_resamplers(part: int, whole: int = STEPS) -> Callable[[Numbers], float]:
    """How far pool is above the better resampler, after one of `part` parts of the steps."""
    at = f", acc at {whole // part}"
    return lambda found: found["pool" + at] - max(found[arm + at] for arm in ARMS if arm.startswith("resampler"))


def above_shuffled(part: int, whole: int = STEPS) -> Callable[[Numbers], float]:
    """How far it is above its own tokens in another order."""
    at = f", acc at {whole // part}"
    return gap("pool" + at, "pool, tokens shuffled" + at)


def _spread(found: Numbers) -> float:
    there = [found[f"{arm}, presence at {STEPS}"] for arm in ARMS]
    return max(there) - min(there)


EXPERIMENT = Experiment(
    setting=(
        "8 x 8 features of two rectangles to 16 tokens, GPT-2 of 2 layers, width 48; 1200 steps of 64, 2000 tests",
        "acc: boxes with IoU of at least 0.5 after so many steps; shuffled: tokens in another order for each image",
    ),
    measure=partial(measure, Scenes, STEPS),
    bounds=(
        Bound(f"acc at {STEPS // 4} above the better resampler", above_resamplers(4), at_least=0.3),
        Bound(f"acc at {STEPS // 4} above its own shuffled tokens", above_shuffled(4), at_least=0.0),
        Bound(f"presence at {STEPS}, between arms", _spread, at_most=0.02),  # a control: it needs no place
    ),
)
