"""Claims about pruners: [CLS] keeps what matters where random tokens lose it (arXiv:2412.01818); what AIM saves costs
little (arXiv:2412.03248); and how accuracy falls with the tokens kept, for every pruner.

Pictures of 8 x 8 patches: a smooth random ground, noise, and two objects of 2 x 2 patches, each a random pattern of its
shape plus one of its colour. An encoder with [CLS] learns to list the pairs of shape and colour from [CLS] alone; its
tokens and row are those of the block before the last. Then a projector and a language model learn "what colour is shape
s?" from all 64 tokens. Pruners come in afterwards: nothing is trained with one.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.benches.claim_steps import train
from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.model_types import LLMSequence
from zoo.registry import build

SIDE, PATCH, KINDS, WIDTH, TOKENS = 8, 4, 6, 64, 64
NOISE = 0.35
SEEING, READING, BATCH, TEST = 300, 500, 64, 512
RANDOM = 3  # draws that random pruning is averaged over
KEPT = (32, 16, 6, 3)  # of 64 tokens
SETTING = [
    "64 patches, two objects of 4; ViT of 3 blocks, width 48, 300 steps; Llama of 6 layers, width 64, 500 steps of 64",
    "accuracy on two questions about each of 512 unseen pictures (guessing: 0.17); pruned without training",
    "MFLOPs: of the LLM for one picture and one question; random: mean of 3 draws",
    "not claimed: that random tokens beat the choice of the LLM's own attention, which they do not do here either",
]
VIT = {"name": "timm", "image_size": SIDE * PATCH, "patch_size": PATCH, "width": 48, "depth": 3, "heads": 4}
LLAMA = {"name": "hf", "model_type": "llama", "hidden_size": WIDTH, "num_layers": 6, "num_heads": 4}
LLAMA |= {"intermediate_size": 160, "max_positions": 128}


class Pictures:
    """Pictures from a generator; the patterns of shapes and colours are those of the seed."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.shapes, self.colours = torch.randn(2, KINDS, 3 * PATCH * PATCH, generator=g)

    def draw(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Draw pixels (n, 3, S, S), the two shapes and colours (n, 2), and the 8 places of objects (n, 64) bool."""
        ground = torch.randn(n, 3 * PATCH * PATCH, 3, 3, generator=g)
        x = F.interpolate(ground, (SIDE, SIDE), mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)
        x = x + NOISE * torch.randn(x.shape, generator=g)  # (n, 64, 48)
        shapes = torch.rand(n, KINDS, generator=g).argsort(1)[:, :2]  # unlike each other
        colours = torch.randint(KINDS, (n, 2), generator=g)
        half = torch.randint(2, (n,), generator=g)  # objects share no patch: one left, one right
        columns = torch.randint(SIDE // 2 - 1, (n, 2), generator=g) + torch.stack([half, 1 - half], 1) * SIDE // 2
        rows = torch.randint(SIDE - 1, (n, 2), generator=g)
        corner = rows * SIDE + columns
        places = corner.unsqueeze(-1) + torch.tensor([0, 1, SIDE, SIDE + 1])  # (n, 2, 4)
        look = (self.shapes[shapes] + self.colours[colours]).unsqueeze(2).expand(-1, -1, 4, -1)  # (n, 2, 4, 48)
        look = look + NOISE * torch.randn(look.shape, generator=g)
        index = places.flatten(1)  # (n, 8)
        x = x.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), look.flatten(1, 2))
        pixels = x.unflatten(-1, (3, PATCH, PATCH)).unflatten(1, (SIDE, SIDE))  # (n, h, w, 3, p, p)
        pixels = pixels.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIDE * PATCH, SIDE * PATCH)
        shown = torch.zeros(n, SIDE * SIDE, dtype=torch.bool).scatter(1, index, True)
        return {"pixels": pixels, "shapes": shapes, "colours": colours, "shown": shown}


class Reader(nn.Module):
    """Encoder, projector and language model; the question is one token, and so is the answer."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.vision = vision
        self.projector = build("projector", {"name": "mlp"}, vision_dim=48, text_dim=WIDTH, grid=(SIDE, SIDE))
        self.llm = build("llm", LLAMA, vocab_size=2 * KINDS)

    def forward(self, pixels: Tensor, shape: Tensor, pruners: tuple[Any, ...] = ()) -> Tensor:
        """Give logits of the colour (n, 6)."""
        need = frozenset().union(*(p.needs for p in pruners)) & self.vision.provides - {"grid"}
        image = self.vision(pixels, need=need)
        for pruner in pruners:
            image = pruner(image)
        tokens = self.projector(image)  # (n, K, W)
        asked = self.llm.embed(shape.unsqueeze(1))  # (n, 1, W)
        n, k = tokens.shape[:2]
        slots = torch.cat([torch.ones(n, k), torch.zeros(n, 1)], dim=1).bool()
        sequence = LLMSequence(slots, torch.ones(n, k + 1, dtype=torch.long), None, None)
        for pruner in pruners:
            if hasattr(pruner, "begin"):
                pruner.begin(sequence)
        hidden = self.llm.hidden(inputs_embeds=torch.cat([tokens, asked], dim=1)).last_hidden_state
        return self.llm.head(hidden[:, -1])[:, KINDS:]


def encoder(pictures: Pictures, seed: int, steps: int) -> Any:
    """Train an encoder to tell from [CLS] which shapes there are, of which colour; give it without its last block."""
    torch.manual_seed(seed)
    tower = build("vision", {**VIT, "layer": -1})
    head = nn.Linear(48, KINDS * (KINDS + 1))
    g = torch.Generator().manual_seed(seed + 1)

    def loss() -> Tensor:
        batch = pictures.draw(BATCH, g)
        cls = tower(batch["pixels"], need=frozenset({"prefix_tokens"})).prefix[:, 0]
        told = torch.full((BATCH, KINDS), KINDS).scatter(1, batch["shapes"], batch["colours"])
        return F.cross_entropy(head(cls).view(-1, KINDS + 1), told.flatten())

    train([*tower.parameters(), *head.parameters()], steps, loss, warmup=min(50, steps // 4))
    cut = build("vision", {**VIT, "layer": -2})
    cut.load_state_dict(tower.state_dict(), strict=False)
    return cut.requires_grad_(False).eval()


def arms() -> Iterator[tuple[str, list[list[dict[str, Any]]]]]:
    """Name -> chains of pruners whose scores are averaged."""
    yield "all 64", [[]]
    for k in KEPT:
        share = k / TOKENS
        yield f"fastervlm {k}", [[{"name": "fastervlm", "num_keep": k}]]
        yield f"random {k}", [[{"name": "random", "keep_ratio": share, "seed": s}] for s in range(RANDOM)]
        yield f"visionzip {k}", [[{"name": "visionzip", "keep_ratio": share}]]
        yield f"divprune {k}", [[{"name": "divprune", "keep_ratio": share}]]
        yield f"fastv {k}", [[{"name": "fastv", "keep_ratio": share}]]
        yield f"aim merged to {k}", [[{"name": "aim", "merge_ratio": share, "prune": False}]]
    yield "pool 16", [[{"name": "pool", "stride": 2}]]
    for start, stop in ((3, 6), (2, 5), (1, 4)):
        inside = {"name": "aim", "start": start, "stop": stop}
        yield f"aim merged to 32, none from layer {stop}", [[{**inside, "merge_ratio": 0.5}]]
        yield f"aim, none from layer {stop}", [[{**inside, "merge_ratio": 1.0}]]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Train once, and answer the same questions behind every pruner."""
    pictures = Pictures(seed)
    vision = encoder(pictures, seed, max(4, round(SEEING * share)))
    show(f"  the encoder has learnt for {max(4, round(SEEING * share))} steps")
    torch.manual_seed(seed)
    model, g = Reader(vision), torch.Generator().manual_seed(seed + 2)
    steps = max(4, round(READING * share))

    def loss() -> Tensor:
        batch = pictures.draw(BATCH, g)
        which = torch.randint(2, (BATCH, 1), generator=g)
        logits = model(batch["pixels"], batch["shapes"].gather(1, which)[:, 0])
        return F.cross_entropy(logits, batch["colours"].gather(1, which)[:, 0])

    train(model.parameters(), steps, loss, warmup=min(50, steps // 4))
    model.eval()
    test = pictures.draw(TEST if share == 1 else 64, torch.Generator().manual_seed(10_000 + seed))
    found: dict[str, float] = {}
    for name, chains in arms():
        scores = [_answered(model, test, chain) for chain in chains]
        found[name] = sum(s for s, _ in scores) / len(scores)
        found[f"{name}, MFLOPs"] = scores[0][1]
        show(f"  {name}: {found[name]:.3f}, {scores[0][1]:.1f} MFLOPs")
    for name, score in (("cls", "cls"), ("column mean", "column_mean")):
        pruner = build("pruner", {"name": "fastervlm", "num_keep": 8, "score": score}, num_tokens=TOKENS)
        with torch.no_grad():
            keep = pruner(vision(test["pixels"], need=pruner.needs)).keep
        found[f"patches of objects among the first 8 by {name}"] = float(test["shown"].gather(1, keep).float().mean())
    return found


@torch.no_grad()
def _answered(model: Reader, test: dict[str, Tensor], chain: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy behind a chain of pruners, and what the LLM computes for one picture."""
    from torch.utils.flop_counter import FlopCounterMode

    pruners = tuple(
        build("pruner", node, vision_dim=48, grid=(SIDE, SIDE), num_tokens=TOKENS, llm=model.llm) for node in chain
    )
    for pruner in pruners:
        if hasattr(pruner, "attach"):
            pruner.attach(model.llm)
    try:
        with FlopCounterMode(display=False) as counter:
            handles = _counting(model.llm, counter)
            model(test["pixels"][:1], test["shapes"][:1, 0], pruners)
        flops = counter.inside  # type: ignore[attr-defined]
        for handle in handles:
            handle.remove()
        right = [
            model(test["pixels"], test["shapes"][:, i], pruners).argmax(-1) == test["colours"][:, i] for i in range(2)
        ]
    finally:
        for pruner in pruners:
            if hasattr(pruner, "detach"):
                pruner.detach()
    return float(torch.cat(right).float().mean()), flops / 1e6


def _counting(llm: Any, counter: Any) -> list[Any]:
    """Note what is computed between the first layer's start and the last one's end."""
    start = {"at": 0}

    def begin(*_: Any) -> None:
        start["at"] = counter.get_total_flops()

    def end(*_: Any) -> None:
        counter.inside = counter.get_total_flops() - start["at"]

    return [llm.layers[0].register_forward_pre_hook(begin), llm.layers[-1].register_forward_hook(end)]


def judge(found: dict[str, list[float]]) -> list[Row]:
    """FasterVLM against random at 75 and 90 % fewer, and AIM at a third of the work."""
    mean = {name: sum(numbers) / len(numbers) for name, numbers in found.items()}
    aim = "aim merged to 32, none from layer 4"

    def row(what: str, value: float, bound: float, at_most: bool = False) -> Row:
        return Row(f"pruning: {what}", Value(value, value, value), "", bound=bound, at_most=at_most)

    return [
        row("fastervlm at 16 below all 64", mean["all 64"] - mean["fastervlm 16"], 0.02, at_most=True),
        row("fastervlm above random at 16", mean["fastervlm 16"] - mean["random 16"], 0.15),
        row("fastervlm above random at 6", mean["fastervlm 6"] - mean["random 6"], 0.30),
        row("aim, merged to 32 and none from layer 4, below all 64", mean["all 64"] - mean[aim], 0.07, at_most=True),
        row("its share of the work", mean[f"{aim}, MFLOPs"] / mean["all 64, MFLOPs"], 0.32, at_most=True),
    ]


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Draw accuracy over tokens kept, and over what the LLM computes; bands are lowest and highest of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def ends(name: str) -> tuple[float, float, float]:
        numbers = found[name]
        return sum(numbers) / len(numbers), min(numbers), max(numbers)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for pruner in ("fastervlm", "random", "visionzip", "divprune", "fastv", "aim merged to"):
        names = ["all 64", *(f"{pruner} {k}" for k in KEPT)]
        mean, low, high = zip(*map(ends, names), strict=True)
        for axis, x in ((left, [TOKENS, *KEPT]), (right, [found[f"{n}, MFLOPs"][0] for n in names])):
            axis.plot(x, mean, marker="o", markersize=3, label=pruner.removesuffix(" to"))
            axis.fill_between(x, low, high, alpha=0.15)
    inside = [n for n in found if n.startswith("aim") and "none from" in n and "MFLOPs" not in n]
    costs = [found[f"{n}, MFLOPs"][0] for n in inside]
    for axis, x in ((left, [float(KEPT[0] if "merged" in n else TOKENS) for n in inside]), (right, costs)):
        axis.scatter(x, [ends(n)[0] for n in inside], marker="x", color="black", label="aim, none in the last layers")
    left.set(
        xlabel="image tokens kept of 64 (aim: that enter the LLM)",
        ylabel="accuracy",
        xscale="log",
        xticks=[TOKENS, *KEPT],
    )
    left.set_xticks([TOKENS, *KEPT], [str(k) for k in (TOKENS, *KEPT)])
    right.set(xlabel="MFLOPs of the LLM", xscale="log")
    right.set_xticks(ticks := [2, 5, 10, 20, 40], [str(x) for x in ticks])
    left.minorticks_off()
    right.minorticks_off()
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, linewidth=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
