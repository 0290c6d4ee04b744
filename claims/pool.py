"""Claim: at an equal and small budget, pooled tokens localise where a resampler's do not yet (arXiv:2311.06791).

Features of an 8 x 8 grid, drawn without an encoder: two rectangles of different classes, the second over the first,
noise, and a code of the position, all turned by one fixed rotation, so that a resampler can tell places too. Projectors
give 16 tokens to a small causal transformer; behind them stands a class whose rectangle is to be boxed, and before that
one whose presence is asked, which needs no place. Everything learns together.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.claims.steps import train
from zoo.registry import ImageFeatures, build

SIDE, DIM, CLASSES, WIDTH, TOKENS = 8, 24, 6, 48, 16
STEPS, BATCH, TEST = 1200, 64, 2000
# Without its norm of the tokens, which makes bare ground as loud as what stands on it: with it, it learns far later.
_QUERIES = {"name": "resampler", "num_queries": TOKENS, "hidden_size": WIDTH, "num_heads": 4, "input_norm": False}
ARMS: dict[str, dict[str, Any]] = {
    "pool": {"name": "pool", "stride": 2},
    "resampler, 1 block": {**_QUERIES, "depth": 1},
    "resampler, 2 blocks": {**_QUERIES, "depth": 2},
    "pool, tokens shuffled": {"name": "pool", "stride": 2},
}
SETTING = [
    "8 x 8 features of two rectangles to 16 tokens, GPT-2 of 2 layers, width 48; 1200 steps of 64, 2000 tests",
    "acc: boxes with IoU of at least 0.5 after so many steps; shuffled: tokens in another order for each image",
]


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


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Drawn scenes."""
    return experiment(Scenes(seed), STEPS, seed, share, show)


def experiment(scenes: Any, whole: int, seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train every arm from the same seed and test it at a quarter, a half and the whole of the steps."""
    found: dict[str, float] = {}
    steps = max(4, round(whole * share))
    test = scenes.unseen(TEST if share == 1 else 100)
    for arm in ARMS:
        torch.manual_seed(seed)
        model, g = Reader(arm, scenes), torch.Generator().manual_seed(seed + 1)
        scores: dict[int, tuple[float, float, float]] = {}

        def loss(model: Reader = model, g: torch.Generator = g) -> Tensor:
            batch = scenes.draw(BATCH, g)
            box, presence = model(batch, g)
            boxes = F.cross_entropy(box.flatten(0, 1), batch["box"].flatten())
            return boxes + 0.5 * F.cross_entropy(presence, batch["there"])

        def at(done: int, model: Reader = model, scores: dict[int, tuple[float, float, float]] = scores) -> None:
            if done in (steps // 4, steps // 2, steps):
                scores[done] = _score(model, test)

        train(model.parameters(), steps, loss, warmup=min(50, steps // 4), last=0.05, at=at)
        for part, done in ((4, steps // 4), (2, steps // 2), (1, steps)):
            found[f"{arm}, acc at {whole // part}"] = scores[done][0]
        found[f"{arm}, mean IoU at {whole}"], found[f"{arm}, presence at {whole}"] = scores[steps][1:]
        show("  " + arm + ": " + ", ".join(f"{scores[k][0]:.2f}" for k in sorted(scores)))
    return found


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


def judge(found: dict[str, list[float]]) -> list[Row]:
    """Compare at a quarter of the budget; presence must not tell the arms apart."""
    mean = {name: sum(numbers) / len(numbers) for name, numbers in found.items()}
    early = "{}, acc at {}".format
    best = max(mean[early(arm, STEPS // 4)] for arm in ARMS if arm.startswith("resampler"))
    gap = mean[early("pool", STEPS // 4)] - best
    shuffled = mean[early("pool", STEPS // 4)] - mean[early("pool, tokens shuffled", STEPS // 4)]
    there = [mean[f"{arm}, presence at {STEPS}"] for arm in ARMS]
    spread = max(there) - min(there)
    one = lambda x: Value(x, x, x)  # noqa: E731
    return [
        Row(f"pool: acc at {STEPS // 4} above the better resampler", one(gap), "", bound=0.3),
        Row(f"pool: acc at {STEPS // 4} above its own shuffled tokens", one(shuffled), "", bound=0.0),
        Row(f"pool: presence at {STEPS}, between arms", one(spread), "", bound=0.02, at_most=True),
    ]
